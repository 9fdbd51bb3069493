"""Unlearning by clamping latents (Farrell et al., arXiv 2410.19278), in SAE Bench 0.6.0's definition and in ours.

Latents that fire often on a forget corpus and hardly ever on a retain corpus are clamped to a negative value while the
model answers questions it is known to answer. Questions are asked once per model, densities are measured once per SAE,
and an intervention starts from the cached activations at the hook.

The packaged question sets and corpora are a **stand-in** for WMDP and MMLU: biomedical against other science questions,
one-word answers against three other answers. They show how an SAE behaves, not a figure to compare with published ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from tqdm import tqdm

from sae_research.errors import NotApplicable, UserError
from sae_research.evals.inputs import by_hook, model_key, result_key
from sae_research.evals.pool import HookActivations
from sae_research.evals.unlearning.densities import DEFINITIONS, Firing, choose_latents, firing
from sae_research.evals.unlearning.intervention import Configuration, Plans, correct_answers
from sae_research.evals.unlearning.prompts import PACKAGED_QUESTIONS, Known, Prompt, find_known, wordings
from sae_research.evals.unlearning.results import Record, result
from sae_research.lm import LanguageModel
from sae_research.params import Params
from sae_research.saes import SparseAutoencoder
from sae_research.saes.guard import Family, Guard
from sae_research.store import fingerprint
from sae_research.store_cache import ResultCache
from sae_research.store_stages import StageFolder
from sae_research.text.stream import pack_documents
from sae_research.text.topic_corpora import PACKAGED_TOPICS, topic_documents

CHARACTERS_PER_TOKEN = 5
"""About what English needs: a document is cut to one context's worth of text."""
STAND_IN = ("stand-in for WMDP and MMLU: packaged biomedical against general text, one-word science questions with three "
            "other answers as distractors; not comparable with published unlearning scores")
NOTHING_TO_CLAMP = ("no latent fires on the forget corpus and stays below a retain threshold: nothing was clamped, which "
                    "scores 0")


class Material(NamedTuple):
    """What is asked and read, the same for every SAE."""

    corpora: dict[str, Tensor]
    """forget and retain -> contexts [n, seq_len]"""
    forget: list[Known]
    retain: list[Known]

    def prompts(self) -> list[Prompt]:
        """All known questions, those to forget first."""
        return [prompt for known in (*self.forget, *self.retain) for prompt in known.prompts]

    def asked(self) -> dict[str, dict[str, dict[str, int]]]:
        """Side -> set -> how many questions were asked and how many are known."""
        return {side: {known.name: {"asked": known.asked, "known": len(known.known)} for known in sets}
                for side, sets in (("forget", self.forget), ("retain", self.retain))}

    @property
    def n_forget(self) -> int:
        return sum(len(known.prompts) for known in self.forget)


def evaluate(saes: dict[str, SparseAutoencoder], lm: LanguageModel, params: Params,
             stage: StageFolder) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, result) of every SAE, the result as SAE Bench's `UnlearningEvalOutput` in plain data.

    An SAE that fails is skipped with its reason. Raises `NotApplicable` where the model knows too few questions,
    `UserError` for text that cannot be read.
    """
    material, guard = load_material(lm, params, stage), Guard(stage.skip)
    for hook, members in by_hook(saes).items():
        cache = ResultCache("unlearning")
        keys = {name: _key(sae, lm, params, material) for name, sae in members.items()}
        found = {name: cache.get(keys[name]) for name in members}
        missing = {name: sae for name, sae in members.items() if found[name] is None}
        for name, record in measure(missing, lm, hook, params, material, guard):
            with guard.on(name):
                cache.put(keys[name], record)
                found[name] = record
        for name, sae in guard.left(members).items():
            if not any(entry["latents"] for entry in found[name]["lab"]):
                stage.notes.setdefault("nothing_to_clamp", {})[name] = NOTHING_TO_CLAMP
            with guard.on(name):
                yield name, result(name, sae, lm.name, params, material.asked(), found[name],
                                   STAND_IN if stands_in(params) else None)


def _key(sae: SparseAutoencoder, lm: LanguageModel, params: Params, material: Material) -> str:
    config = params.unlearning
    values = [config.retain_thresholds, config.n_features_list, config.multipliers, params.token_mask.model_dump(),
              {name: fingerprint(tokens.tolist()) for name, tokens in material.corpora.items()},
              _identity(material.prompts()), material.n_forget]
    return result_key(sae, lm, values, __name__)


def _identity(asked: Sequence[Prompt]) -> str:
    return fingerprint([[p.tokens.tolist(), p.options, p.answer] for p in asked])


# --- what is asked and read ------------------------------------------------------------------

def load_material(lm: LanguageModel, params: Params, stage: StageFolder) -> Material:
    """Corpora as contexts, and the questions that the model knows. Raises as `evaluate` does."""
    config = params.unlearning
    if stands_in(params):
        stage.notes["stand_in"] = STAND_IN
    material = Material({}, [_known(lm, params, name) for name in config.forget_questions],
                        [_known(lm, params, name) for name in config.retain_questions])
    stage.notes["questions"] = material.asked()
    for side, sets in material.asked().items():
        known, total = (sum(counts[key] for counts in sets.values()) for key in ("known", "asked"))
        if known < config.min_known_questions:
            raise NotApplicable(
                f"{lm.name} knows {known} of {total} {side} questions ({', '.join(sets)}), fewer than "
                f"unlearning.min_known_questions = {config.min_known_questions}: what it does not know it cannot forget")
    corpora = {side: _contexts(lm, params, name)
               for side, name in (("forget", config.forget_corpus), ("retain", config.retain_corpus))}
    stage.notes["corpora"] = {side: {"contexts": len(tokens), "tokens": tokens.numel()} for side, tokens in corpora.items()}
    return material._replace(corpora=corpora)


def stands_in(params: Params) -> bool:
    """Whether any part of the packaged stand-in is used."""
    config = params.unlearning
    names = {config.forget_corpus, config.retain_corpus, *config.forget_questions, *config.retain_questions}
    return bool(names & {*PACKAGED_TOPICS, *PACKAGED_QUESTIONS})


def _known(lm: LanguageModel, params: Params, name: str) -> Known:
    """The known questions of one set, asked once per model."""
    config = params.unlearning
    asked = wordings(lm, name, config.prompt_format)
    first = [next(words()) for words in asked]
    cache = ResultCache("unlearning_known")
    key = model_key(lm, ["known", config.max_known_questions, _identity(first)], __name__)
    kept = cache.get(key)
    if kept is None:
        known = find_known(lm, name, asked, config.max_known_questions, params.model.llm_batch_size)
        cache.put(key, {"asked": known.asked, "known": known.known})
        return known
    return Known(name, [first[number] for number in kept["known"]], kept["asked"], kept["known"])


def _contexts(lm: LanguageModel, params: Params, name: str) -> Tensor:
    """Contexts [at most dataset_size, seq_len] of a corpus: fewer where it is shorter."""
    config = params.unlearning
    documents = topic_documents(name, config.corpus_column, CHARACTERS_PER_TOKEN * config.seq_len, params.random_seed)
    tokens = pack_documents(lm.tokenizer, lm.separator_id, iter(documents), config.seq_len, config.dataset_size).tokens
    if not len(tokens):
        raise UserError(f"unlearning: corpus {name} is shorter than one context of {config.seq_len} tokens; "
                        "give more text or a smaller unlearning.seq_len")
    return tokens


# --- measuring -------------------------------------------------------------------------------

def measure(saes: dict[str, SparseAutoencoder], lm: LanguageModel, hook: str, params: Params,
             material: Material, guard: Guard | None = None) -> Iterator[tuple[str, Record]]:
    """(name, which questions every configuration leaves right) of SAEs at one hook, families together. Without a `guard`
    an SAE that fails raises its error."""
    if not saes:
        return
    corpora = {side: HookActivations(lm, hook, tokens, params) for side, tokens in material.corpora.items()}
    asked = material.prompts()
    questions = HookActivations(lm, hook, [prompt.tokens for prompt in asked], params)

    def score(family: Family) -> Iterator[tuple[str, Record]]:
        found = {side: firing(corpus, family) for side, corpus in corpora.items()}
        plans = {name: {d: configurations(found["forget"][name][d], found["retain"][name][d], params)
                        for d in DEFINITIONS} for name in family}
        for name, right in correct_answers(questions, asked, family, plans).items():
            yield name, _record(plans[name], right, material.n_forget)

    with tqdm(total=len(saes), desc="clamp and ask", unit="SAE", dynamic_ncols=True) as bar:
        for name, record in (guard or Guard(None)).each(saes, score):
            yield name, record
            bar.update()


def configurations(forget: Firing, retain: Firing, params: Params) -> list[Configuration]:
    """Every combination of retain threshold, number of latents and multiplier, with the latents it clamps."""
    config = params.unlearning
    return [Configuration(threshold, n, multiplier, tuple(choose_latents(forget, retain, threshold, n)))
            for threshold in config.retain_thresholds for n in config.n_features_list
            for multiplier in config.multipliers]


def _record(plans: Plans, right: dict[str, np.ndarray], n_forget: int) -> Record:
    return {definition: [{**configuration._asdict(), "latents": list(configuration.latents),
                          "forget": _digits(row[:n_forget]), "retain": _digits(row[n_forget:])}
                         for configuration, row in zip(plans[definition], right[definition], strict=True)]
            for definition in DEFINITIONS}


def _digits(values: np.ndarray) -> str:
    return "".join("1" if value else "0" for value in values)
