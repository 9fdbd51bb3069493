"""Unlearning by clamping latents (Farrell et al., arXiv 2410.19278), in SAE Bench 0.6.0's definition and in ours.

Latents that fire often on a forget corpus and hardly ever on a retain corpus are clamped to a negative value while the
model answers questions it is known to answer. Questions are asked once per model, densities are measured once per SAE,
and an intervention starts from the cached activations at the hook. Results are SAE Bench's output type, with every
configuration's accuracies and our score with its interval.

The packaged question sets and corpora are a **stand-in** for WMDP and MMLU: biomedical against other science questions,
one-word answers against three other answers. Their scores compare SAEs with one another, not with published ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from sae_research.config.params import Params
from sae_research.evals import harness
from sae_research.evals.harness import Scores, by_hook, made_once, model_key
from sae_research.evals.unlearning import intervention
from sae_research.evals.unlearning.intervention import (
    DEFINITIONS,
    Configuration,
    Firing,
    Plans,
    choose_latents,
    correct_answers,
    firing,
)
from sae_research.evals.unlearning.prompts import PACKAGED_QUESTIONS, Known, Prompt, find_known, wordings
from sae_research.lm import LanguageModel
from sae_research.lm.activations import HookActivations
from sae_research.runtime.errors import NotApplicable, UserError
from sae_research.runtime.files import fingerprint
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SparseAutoencoder
from sae_research.saes.base import Family, Guard, SAEInfo
from sae_research.text.questions import PACKAGED_TOPICS, topic_documents
from sae_research.text.tokens import pack_documents

# definition -> configurations, each {retain_threshold, n_features, multiplier, latents, forget, retain}; the last two
# as "0110...", one digit per known question
Record = dict[str, list[dict[str, Any]]]


def result(
    name: str,
    info: SAEInfo,
    model: str,
    params: Params,
    asked: dict[str, Any],
    record: Record,
    stand_in: str | None,
) -> dict[str, Any]:
    """SAE Bench's `UnlearningEvalOutput` as plain data.

    asked: side -> question set -> {asked, known}. stand_in: what the packaged data stand for, None where none are used.
    """
    bar = params.unlearning.min_retain_accuracy
    (forget, retain), own = (_matrices(record[definition]) for definition in DEFINITIONS)
    label = {} if stand_in is None else {"stand_in": stand_in}
    return harness.output(
        "unlearning",
        name,
        info,
        config=_config(params, model),
        metrics={"unlearning": {"unlearning_score": intervention.unlearning_score(forget, retain, bar)}},
        unstructured={
            **label,
            "configurations": _figures(record["sae_bench"], forget, retain),
            harness.LAB: {**label, "questions": asked, **_lab_block(record["lab"], *own, params)},
        },
        sae_bench="unlearning:UnlearningEvalOutput",
    )


def _config(params: Params, model: str) -> dict[str, Any]:
    config = params.unlearning
    return {
        "random_seed": params.random_seed,
        "dataset_names": [*config.forget_questions, *config.retain_questions],
        "retain_thresholds": list(config.retain_thresholds),
        "n_features_list": list(config.n_features_list),
        "multipliers": list(config.multipliers),
        "dataset_size": config.dataset_size,
        "seq_len": config.seq_len,
        "model_name": model,
        "llm_batch_size": params.model.llm_batch_size,
        "llm_dtype": params.model.torch_dtype,
    }


def _lab_block(record: list[dict[str, Any]], forget: np.ndarray, retain: np.ndarray, params: Params) -> dict[str, Any]:
    bar, seed = params.unlearning.min_retain_accuracy, params.random_seed
    held_out, kept = intervention.held_out(forget, retain, bar, seed)
    return {
        "metrics": {
            "unlearning_score": intervention.unlearning_score(forget, retain, bar),
            "unlearning_score_held_out": held_out,
            "retain_accuracy_held_out": kept,
            "forget_questions": forget.shape[1],
            "retain_questions": retain.shape[1],
        },
        "intervals": {"unlearning_score": intervention.interval(forget, retain, bar, seed)},
        "best_configuration": intervention.best_configuration(forget, retain, bar),
        "configurations": [
            {**figures, "forget_right": entry["forget"], "retain_right": entry["retain"]}
            for figures, entry in zip(_figures(record, forget, retain), record, strict=True)
        ],
    }


def _matrices(record: list[dict[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Which forget and which retain questions are answered rightly, bool [configurations, questions] each."""
    forget, retain = (
        np.array([[digit == "1" for digit in entry[side]] for entry in record]) for side in ("forget", "retain")
    )
    return forget, retain


def _figures(record: list[dict[str, Any]], forget: np.ndarray, retain: np.ndarray) -> list[dict[str, Any]]:
    return [
        {
            "retain_threshold": entry["retain_threshold"],
            "n_features": entry["n_features"],
            "multiplier": entry["multiplier"],
            "latents": entry["latents"],
            "forget_accuracy": float(forget[row].mean()),
            "retain_accuracy": float(retain[row].mean()),
        }
        for row, entry in enumerate(record)
    ]


CHARACTERS_PER_TOKEN = 5
"""About what English needs: a document is cut to one context's worth of text."""
STAND_IN = (
    "stand-in for WMDP and MMLU: packaged biomedical against general text, one-word science questions with three "
    "other answers as distractors; not comparable with published unlearning scores"
)
NOTHING_TO_CLAMP = (
    "no latent fires on the forget corpus and stays below a retain threshold: nothing was clamped, which scores 0"
)


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
        return {
            side: {known.name: {"asked": known.asked, "known": len(known.known)} for known in sets}
            for side, sets in (("forget", self.forget), ("retain", self.retain))
        }

    @property
    def n_forget(self) -> int:
        return sum(len(known.prompts) for known in self.forget)


def evaluate(
    saes: Mapping[str, SparseAutoencoder], lm: LanguageModel, params: Params, stage: StageFolder
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, result) of every SAE, the result as SAE Bench's `UnlearningEvalOutput` in plain data.

    An SAE that fails is skipped with its reason. Raises `NotApplicable` where the model knows too few questions,
    `UserError` for text that cannot be read.
    """
    material, guard = load_material(lm, params, stage), Guard(stage.skip)
    for members in by_hook(saes):
        scores = Scores("unlearning", members, members.keys(lm, _inputs(params, material), __name__), guard)
        clamping = Clamping(lm, members.hook, params, material)
        with scores.progress("clamp and ask") as bar:
            scores.fill(clamping.score, bar)
        for name, record in scores.left().items():
            if not any(entry["latents"] for entry in record["lab"]):
                stage.notes.setdefault("nothing_to_clamp", {})[name] = NOTHING_TO_CLAMP
            with guard.on(name):
                stand_in = STAND_IN if stands_in(params) else None
                yield name, result(name, members.infos[name], lm.name, params, material.asked(), record, stand_in)


def _inputs(params: Params, material: Material) -> list[Any]:
    config = params.unlearning
    return [
        config.retain_thresholds,
        config.n_features_list,
        config.multipliers,
        params.token_mask.model_dump(),
        {name: fingerprint(tokens.tolist()) for name, tokens in material.corpora.items()},
        _identity(material.prompts()),
        material.n_forget,
    ]


def _identity(asked: Sequence[Prompt]) -> str:
    return fingerprint([[p.tokens.tolist(), p.options, p.answer] for p in asked])


# --- what is asked and read ------------------------------------------------------------------


def load_material(lm: LanguageModel, params: Params, stage: StageFolder) -> Material:
    """Corpora as contexts, and the questions that the model knows. Raises as `evaluate` does."""
    config = params.unlearning
    if stands_in(params):
        stage.notes["stand_in"] = STAND_IN
    material = Material(
        {},
        [_known(lm, params, name) for name in config.forget_questions],
        [_known(lm, params, name) for name in config.retain_questions],
    )
    stage.notes["questions"] = material.asked()
    for side, sets in material.asked().items():
        known, total = (sum(counts[key] for counts in sets.values()) for key in ("known", "asked"))
        if known < config.min_known_questions:
            raise NotApplicable(
                f"{lm.name} knows {known} of {total} {side} questions ({', '.join(sets)}), fewer than "
                f"unlearning.min_known_questions = {config.min_known_questions}: what it does not know it cannot forget"
            )
    corpora = {
        side: _contexts(lm, params, name)
        for side, name in (("forget", config.forget_corpus), ("retain", config.retain_corpus))
    }
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
    key = model_key(lm, ["known", config.max_known_questions, _identity(first)], __name__)

    def ask() -> dict[str, Any]:
        known = find_known(lm, name, asked, config.max_known_questions, params.model.llm_batch_size)
        return {"asked": known.asked, "known": known.known}

    kept = made_once("unlearning_known", key, ask)
    return Known(name, [first[number] for number in kept["known"]], kept["asked"], kept["known"])


def _contexts(lm: LanguageModel, params: Params, name: str) -> Tensor:
    """Contexts [at most dataset_size, seq_len] of a corpus: fewer where it is shorter."""
    config = params.unlearning
    documents = topic_documents(name, config.corpus_column, CHARACTERS_PER_TOKEN * config.seq_len, params.random_seed)
    tokens = pack_documents(lm.tokenizer, lm.separator_id, iter(documents), config.seq_len, config.dataset_size).tokens
    if not len(tokens):
        raise UserError(
            f"unlearning: corpus {name} is shorter than one context of {config.seq_len} tokens; "
            "give more text or a smaller unlearning.seq_len"
        )
    return tokens


# --- measuring -------------------------------------------------------------------------------


class Clamping:
    """What is read and asked at one hook, each run through the model when the first SAE needs it."""

    def __init__(self, lm: LanguageModel, hook: str, params: Params, material: Material) -> None:
        self.lm, self.hook, self.params, self.material = lm, hook, params, material

    @cached_property
    def corpora(self) -> dict[str, HookActivations]:
        return {
            side: HookActivations(self.lm, self.hook, tokens, self.params) for side, tokens in self.material.corpora.items()
        }

    @cached_property
    def questions(self) -> HookActivations:
        return HookActivations(self.lm, self.hook, [prompt.tokens for prompt in self.material.prompts()], self.params)

    def score(self, family: Family) -> Iterator[tuple[str, Record]]:
        """(name, which questions every configuration leaves right) of SAEs of one family."""
        found = {side: firing(corpus, family) for side, corpus in self.corpora.items()}
        plans = {
            name: {d: configurations(found["forget"][name][d], found["retain"][name][d], self.params) for d in DEFINITIONS}
            for name in family
        }
        for name, right in correct_answers(self.questions, self.material.prompts(), family, plans).items():
            yield name, _record(plans[name], right, self.material.n_forget)


def configurations(forget: Firing, retain: Firing, params: Params) -> list[Configuration]:
    """Every combination of retain threshold, number of latents and multiplier, with the latents it clamps."""
    config = params.unlearning
    return [
        Configuration(threshold, n, multiplier, tuple(choose_latents(forget, retain, threshold, n)))
        for threshold in config.retain_thresholds
        for n in config.n_features_list
        for multiplier in config.multipliers
    ]


def _record(plans: Plans, right: dict[str, np.ndarray], n_forget: int) -> Record:
    return {
        definition: [
            {
                **configuration._asdict(),
                "latents": list(configuration.latents),
                "forget": _digits(row[:n_forget]),
                "retain": _digits(row[n_forget:]),
            }
            for configuration, row in zip(plans[definition], right[definition], strict=True)
        ]
        for definition in DEFINITIONS
    }


def _digits(values: np.ndarray) -> str:
    return "".join("1" if value else "0" for value in values)
