"""Every evaluation, one record each: what it is called, which section it reads, where it is computed, what to know of it.

Stages, parameters, extraction, tables and the report follow from these records; `docs/extending.md` adds one. Nothing here
imports torch or an evaluation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field, create_model

from sae_research.config.evaluation_params import (
    SCR,
    TPP,
    Absorption,
    Autointerp,
    CoreEval,
    MetaSAE,
    Ravel,
    SparseProbing,
    SparseProbingSaeProbes,
    Unlearning,
)
from sae_research.config.ground_truth import GroundTruth
from sae_research.config.section import Section
from sae_research.config.transfer import Transfer

_UNRELIABLE = (
    "What the literature holds of it: at its canonical settings this metric fails and should not be relied on, "
    "while k-sparse probing on the tasks of sae-probes was the most reliable (arXiv 2605.18229)."
)
_STAND_IN = (
    "With the packaged corpora and questions (the default) this is a stand-in for WMDP and MMLU: biomedical "
    "against other science questions, one-word answers against three other answers. Its scores compare SAEs with "
    "one another, not with published ones."
)
_PROBED = "it ablates latents in the activations that its probes and they are read from"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation."""

    name: str
    """In `eval_types`, `eval_results/` and `metrics/`."""
    title: str
    """In tables and headings."""
    section: type[Section]
    """What `params.yaml` says of it, under `section_name`."""
    measures: str
    """In a few words, with what it needs beyond the packaged data."""
    asks: str
    """Its question, a sentence of the documentation."""
    chance: str
    """What is reached without an SAE that is of use, a sentence of the documentation."""
    trust: str
    """How far its answer carries, a sentence or two of the documentation."""
    evaluate: str | None = None
    """`module:function` below `sae_research.evals`, called with (saes, lm, params, stage); it yields (name, result) of every
    SAE it can score. None where a stage script of its own computes other than one result per SAE of the comparison."""
    on: bool = False
    """Whether it runs as delivered."""
    headline: bool = False
    """Whether its metrics stand in the report's first table; the others have a section each."""
    section_name: str = ""
    """The name where empty."""
    result_type: str = ""
    """SAE Bench's `eval_type_id`; the name where empty."""
    caution: str | None = None
    """Stands above its metrics. Differences between SAEs are then not tested."""

    one_hook: str = ""
    """Why it means nothing for a transcoder, which writes another hook than it reads; empty where it means something."""

    crosscoders: bool = False
    """Whether it takes crosscoders and cross-layer transcoders, which read and write several hooks."""

    parts: str = ""
    """Why it means nothing for one layer of a cross-layer transcoder; empty where it looks at latents alone."""

    def __post_init__(self) -> None:
        for field in ("section_name", "result_type"):
            object.__setattr__(self, field, getattr(self, field) or self.name)


EVALUATIONS: dict[str, Evaluation] = {
    evaluation.name: evaluation
    for evaluation in (
        Evaluation(
            "core",
            "Core",
            CoreEval,
            "reconstruction, sparsity, loss recovered, KL",
            "How much of the activations is kept, with how few latents, and does the model still predict as before?",
            "The mean explains 0 of the variance; zeros in place recover 0 of the loss, the clean model 1.",
            "High for what it measures; of meaning it says nothing. Untrained rows under a good encoder come close.",
            "core:evaluate",
            on=True,
            headline=True,
            section_name="core_eval",
            crosscoders=True,
            parts="what it reconstructs is its share of sums over the layers of the whole, and alone stands for nothing",
        ),
        Evaluation(
            "sparse_probing",
            "Sparse probing",
            SparseProbing,
            "classes separated by one, two or five latents",
            "Can a linear probe on one, two or five latents tell one class of texts from the others?",
            "0.5: both classes of a task have as many texts.",
            "Fair: intervals hold test texts and the draw of training texts. Small differences need more texts.",
            "sparse_probing:evaluate",
            on=True,
            headline=True,
        ),
        Evaluation(
            "scr",
            "Spurious correlation removal",
            SCR,
            "a spurious concept removed by ablating latents",
            "Does ablating the latents of a spurious concept make a biased classifier use the intended one?",
            "0: ablating nothing changes nothing.",
            "Low: in the literature it does not follow the quality of an SAE at its usual settings (arXiv 2605.18229).",
            "scr_tpp:evaluate_scr",
            caution=_UNRELIABLE,
            one_hook=_PROBED,
        ),
        Evaluation(
            "tpp",
            "Targeted probe perturbation",
            TPP,
            "one class removed by ablating latents, the others kept",
            "Does ablating the latents of one class spoil the probe of that class and of no other?",
            "0: ablating nothing changes nothing.",
            "Low: in the literature it does not follow the quality of an SAE at its usual settings (arXiv 2605.18229).",
            "scr_tpp:evaluate_tpp",
            caution=_UNRELIABLE,
            one_hook=_PROBED,
        ),
        Evaluation(
            "absorption",
            "Feature absorption",
            Absorption,
            "first letters that other latents have absorbed",
            "Do more specific latents take over a first letter from the latents that should stand for it?",
            "0: no letter is absorbed. Controls show what latents of no meaning have.",
            "Fair where the model knows the letters: those whose probe is poor are skipped, and the number left is said.",
            "absorption:evaluate",
            result_type="absorption_first_letter",
            one_hook="it compares what latents write with probes of what they are read from",
        ),
        Evaluation(
            "unlearning",
            "Unlearning",
            Unlearning,
            "one field forgotten by clamping latents, the rest kept",
            "Does clamping the latents of one field make the model fail its questions and answer the others as before?",
            "0: clamping nothing forgets nothing.",
            "Low at the default sizes: of a few dozen questions a single answer decides.",
            "unlearning:evaluate",
            caution=_STAND_IN,
            one_hook="it clamps latents in the activations that they are read from",
        ),
        Evaluation(
            "sparse_probing_sae_probes",
            "k-sparse probing on the tasks of sae-probes",
            SparseProbingSaeProbes,
            "binary tasks of sae-probes solved from the last token",
            "Can a probe on one, two or five latents of a text's last token solve binary tasks?",
            "0.5: both classes of a task have as many texts.",
            "Good: of the probing metrics the literature finds it the most reliable (arXiv 2605.18229).",
            "sae_probes:evaluate",
        ),
        Evaluation(
            "meta_sae",
            "Meta-SAE",
            MetaSAE,
            "decoder rows explained by a smaller SAE",
            "How far are decoder rows combinations of fewer common directions?",
            "None; the controls' rows are what to compare with.",
            "A description, not a score: neither a high nor a low value is a virtue. Compare with the controls.",
            "meta_sae:evaluate",
            result_type="meta_structure_decoder_variance",
            parts="it compares decoder rows, of which each of its latents has one for every later layer",
        ),
        Evaluation(
            "autointerp",
            "Automatic interpretation",
            Autointerp,
            "explanations written and scored by a language model; needs an OpenAI-compatible endpoint",
            "Can a language model explain a latent, and tell from the explanation where it fires?",
            "0.5 of the balanced score: guessing.",
            "As good as the judge. Read the balanced score: the plain one rewards saying that nothing fires.",
            "autointerp:evaluate",
        ),
        Evaluation(
            "ravel",
            "RAVEL",
            Ravel,
            "one attribute of an entity changed, the others kept",
            "Do latents hold one attribute of an entity apart from its other attributes?",
            "0.5: a mask that changes nothing keeps all attributes and changes none.",
            "Low with the packaged model, where no SAE lies above a mask that changes nothing.",
            "ravel:evaluate",
            one_hook="it exchanges latents in the activations that they are read from",
        ),
        Evaluation(
            "transfer",
            "Transfer to a finetuned model",
            Transfer,
            "whether the SAE serves a finetune of its model",
            "Does an SAE of a base model still serve a finetune of it, and which latents change?",
            "Two pairs of known difference: the model with itself, and with noise on its weights.",
            "Good: two controls of known difference stand beside every pair.",
        ),
        Evaluation(
            "ground_truth",
            "Ground truth",
            GroundTruth,
            "SAEs on synthetic activations whose true features are known; needs no language model",
            "Does a recipe find features that are known, and which other metric follows that?",
            "What untrained rows reach, in every table.",
            "Exact for synthetic activations, whose features are linear and sparse; those of text need not be.",
            on=True,
        ),
    )
}
"""By name, in the order of every table."""

AT_HOOK = "@"
"""`kl@blocks.3.hook_resid_post`: a crosscoder's metric at one of its hooks."""

OF_SAES = {name: one for name, one in EVALUATIONS.items() if one.evaluate is not None}
"""Those that give one result per SAE of the comparison."""

if TYPE_CHECKING:

    class _Toggles(Section):
        def __getattr__(self, name: str) -> Any: ...
else:
    _Toggles = create_model(
        "_Toggles",
        __base__=Section,
        **{name: (bool, Field(one.on, description=f"{one.measures}.")) for name, one in EVALUATIONS.items()},
    )


class EvalTypes(_Toggles):
    """Which evaluations run."""

    dashboards: bool = False
    """A site to look at latents with, in dashboards/."""
