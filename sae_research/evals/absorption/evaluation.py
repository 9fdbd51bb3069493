"""The absorption evaluation: letters that the model itself knows, then every SAE on those letters.

Results are SAE Bench's output type, with both definitions by letter; ours adds means over letters with intervals, each
letter being one cluster. Source: SAE Bench 0.6.0, sae_bench/evals/absorption/main.py, and arXiv 2409.14507.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from threadpoolctl import threadpool_limits

from sae_research.config.params import Params
from sae_research.evals import harness
from sae_research.evals.absorption import letters as letter_probes
from sae_research.evals.absorption.letters import (
    Absorbed,
    MainLatents,
    Probes,
    WordLatents,
    f1,
    lab_absorbed,
    lab_main_latents,
    one_vs_rest,
    random_start,
    sae_bench_absorbed,
    sae_bench_main_latents,
    usual_activation,
)
from sae_research.evals.absorption.words import LETTERS, WordActivations, Words, load_words
from sae_research.evals.harness import Group, Scores, by_hook, made_once, model_key
from sae_research.lm import LanguageModel
from sae_research.runtime.errors import NotApplicable
from sae_research.runtime.files import fingerprint
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SparseAutoencoder
from sae_research.saes.base import Family, Guard, SAEInfo
from sae_research.stats.intervals import interval, ratio, stored


def result(name: str, info: SAEInfo, acts: WordActivations, letters: Letters, scores: dict[str, Any]) -> dict[str, Any]:
    """A validated `AbsorptionEvalOutput` as plain data."""
    details = [
        {
            "first_letter": letter,
            "mean_absorption_fraction": found["sae_bench"]["absorption_fraction"],
            "full_absorption_rate": found["sae_bench"]["full_absorption"],
            "num_full_absorption": found["sae_bench"]["full_absorption_words"],
            "num_probe_true_positives": found["words"],
            "num_split_features": len(found["sae_bench"]["main_latents"]),
        }
        for letter, found in scores.items()
    ]
    return harness.output(
        "absorption",
        name,
        info,
        config=_config(acts),
        metrics={"mean": _means(details)},
        details=details,
        unstructured={harness.LAB: lab_block(acts, letters, scores)},
        sae_bench="absorption:AbsorptionEvalOutput",
    )


def _config(acts: WordActivations) -> dict[str, Any]:
    config = acts.params.absorption
    tails, positions = acts.words.tails, acts.words.positions
    return {
        "model_name": acts.lm.name,
        "random_seed": acts.params.random_seed,
        "f1_jump_threshold": config.f1_jump_threshold,
        "max_k_value": config.max_k_value,
        "prompt_template": config.prompt_template,
        "prompt_token_pos": int(positions[0]) - len(tails[0]),
        "llm_batch_size": acts.params.model.llm_batch_size,
        "llm_dtype": acts.params.model.torch_dtype,
        "k_sparse_probe_l1_decay": config.k_sparse_probe_l1_decay,
        "min_GT_probe_f1": config.min_ground_truth_probe_f1,
        "min_feats_for_eval": config.min_feats_for_eval,
        "precalc_k_sparse_probe_sae_acts": True,
    }


def _means(details: list[dict[str, Any]]) -> dict[str, float]:
    """SAE Bench's means and standard deviations over letters; of a single letter the deviation counts as 0."""
    names = {
        "absorption_fraction_score": "mean_absorption_fraction",
        "full_absorption_score": "full_absorption_rate",
        "num_split_features": "num_split_features",
    }
    values = {name: [float(record[key]) for record in details] for name, key in names.items()}
    return {
        **{f"mean_{name}": statistics.mean(column) for name, column in values.items()},
        **{f"std_dev_{name}": statistics.stdev(column) if len(column) > 1 else 0.0 for name, column in values.items()},
    }


def lab_block(acts: WordActivations, letters: Letters, scores: dict[str, Any]) -> dict[str, Any]:
    """Our metrics: means over letters, each letter one cluster for the intervals."""
    by_letter = {letter: {"words": found["words"], **found["lab"]} for letter, found in scores.items()}
    columns = {
        key: [found[key] for found in by_letter.values()]
        for key in ("absorption_fraction", "full_absorption", "main_latents_f1")
    }
    columns["split_latents"] = [len(found["main_latents"]) for found in by_letter.values()]
    columns["probe_f1"] = letters.f1
    figures = {key: ratio(values) for key, values in columns.items()}
    intervals = {key: interval(figure, acts.params.random_seed) for key, figure in figures.items()}
    count, wanted = len(scores), acts.params.absorption.min_feats_for_eval
    return {
        "metrics": {
            **{key: figure.value for key, figure in figures.items()},
            "letters": count,
            "words": sum(found["words"] for found in by_letter.values()),
        },
        "intervals": {key: list(bounds) for key, bounds in intervals.items() if bounds is not None},
        "clusters": {
            "letters": {
                "level": "letter",
                "clusters": count,
                "key": fingerprint([acts.hook, acts.words.fingerprint(), list(scores)])[:16],
            }
        },
        "cluster_sums": {key: stored(figure, "letters") for key, figure in figures.items()},
        "letters": by_letter,
        "skipped_letters": letters.why_not,
        "probe_f1": {LETTERS[number]: value for number, value in zip(letters.numbers, letters.f1, strict=True)},
        "sae_bench_f1_by_k": {letter: found["sae_bench"]["f1_by_k"] for letter, found in scores.items()},
        "sae_bench_would_report": count >= wanted,
    }


MIN_TRAIN_WORDS = 10
MIN_TEST_WORDS = 5
"""Letters with fewer words are skipped: their probe would say nothing."""
_BLOCK = 8_000_000
"""Largest [words, d_sae] block of dense latents looked at together."""


class Letters(NamedTuple):
    """What the model's own activations at a hook say of the letters."""

    numbers: np.ndarray
    """The letters that have enough words [letters]."""
    f1: list[float]
    """Of their probes on the test words."""
    probes: Probes
    why_not: dict[str, str]
    """Letters that do not qualify, and why."""

    def qualifying(self) -> Letters:
        keep = [i for i, number in enumerate(self.numbers) if LETTERS[number] not in self.why_not]
        return Letters(
            self.numbers[keep],
            [self.f1[i] for i in keep],
            Probes(self.probes.weights[:, keep], self.probes.biases[keep]),
            self.why_not,
        )


def evaluate(
    saes: Mapping[str, SparseAutoencoder],
    lm: LanguageModel,
    params: Params,
    stage: StageFolder,
    *,
    prompts: Words | None = None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, result) of every SAE, the result as SAE Bench's `AbsorptionEvalOutput` in plain data.

    prompts: the words in their prompts, by default a sample of the tokenizer's alphabetic tokens. A letter counts where
    a probe on the model's activations finds it on unseen words; the others, and SAEs that fail, are skipped with their
    reason. Raises `UserError` when no word can be used, `NotApplicable` when no letter qualifies at any hook.
    """
    prompts = load_words(lm, params.absorption, params.random_seed) if prompts is None else prompts
    stage.notes["absorption"] = dict(prompts.notes)
    scored, hooks, guard = False, by_hook(saes), Guard(stage.skip)
    for members in hooks:
        hook = members.hook
        acts = WordActivations(lm, hook, prompts, params)
        letters = _letters(acts).qualifying()
        _report(letters, f" at {hook}" if len(hooks) > 1 else "", params, stage)
        if not len(letters.numbers):
            for name in members.infos:
                stage.skip(name, f"no first letter qualifies at {hook}")
            continue
        scored = True
        for name, scores in _scores(members, acts, letters, guard).items():
            with guard.on(name):
                yield name, result(name, members.infos[name], acts, letters, scores)
    if not scored:
        at = ", ".join(members.hook for members in hooks)
        raise NotApplicable(
            f"absorption: {lm.name} shows no first letter at {at} with a probe F1 above "
            f"{params.absorption.min_ground_truth_probe_f1}; a larger model is needed (SAE Bench advises "
            "2B parameters), or a lower absorption.min_ground_truth_probe_f1"
        )


def _report(letters: Letters, where: str, params: Params, stage: StageFolder) -> None:
    """One line per letter, not per SAE. where: empty with a single hook."""
    for letter, why in letters.why_not.items():
        stage.skip(f"letter {letter}{where}", why)
    notes, count, wanted = stage.notes["absorption"], len(letters.numbers), params.absorption.min_feats_for_eval
    notes[f"letters{where}"] = {LETTERS[i]: round(value, 4) for i, value in zip(letters.numbers, letters.f1, strict=True)}
    if count < wanted:
        notes[f"few_letters{where}"] = f"{count} of 26 letters qualify; SAE Bench asks for {wanted} and would report nothing"


# --- letters ---------------------------------------------------------------------------------


def _inputs(acts: WordActivations) -> list[Any]:
    params = acts.params
    return [
        params.absorption.model_dump(),
        params.token_mask.model_dump(),
        params.random_seed,
        acts.words.fingerprint(),
        acts.hook,
    ]


def _letters(acts: WordActivations) -> Letters:
    """Probes on the model's activations, and which letters they find. Kept in the result cache."""
    lm, params, labels, test = acts.lm, acts.params, acts.words.letters, acts.words.test
    counts = {part: np.bincount(labels[test == held], minlength=26) for part, held in (("training", False), ("test", True))}
    enough = (counts["training"] >= MIN_TRAIN_WORDS) & (counts["test"] >= MIN_TEST_WORDS)
    numbers = np.flatnonzero(enough)
    why_not = {
        LETTERS[i]: f"{counts['training'][i]} training and {counts['test'][i]} test words, "
        f"fewer than {MIN_TRAIN_WORDS} and {MIN_TEST_WORDS}"
        for i in np.flatnonzero(~enough)
    }
    if not len(numbers):
        return Letters(numbers, [], Probes(np.zeros((0, 0), np.float32), np.zeros(0, np.float32)), why_not)  # ty: ignore[invalid-argument-type]
    key = model_key(lm, ["letters", _inputs(acts)], __name__)
    kept = made_once(
        "absorption", key, lambda: _ground_truth(acts.vectors.numpy(), labels, test, numbers, params.random_seed)
    )
    probes = Probes(np.array(kept["weights"], np.float32), np.array(kept["biases"], np.float32))
    threshold = params.absorption.min_ground_truth_probe_f1
    why_not |= {
        LETTERS[number]: f"the probe on the model's activations has F1 {value:.3f} on {counts['test'][number]} "
        f"test words, not above {threshold}"
        for number, value in zip(numbers, kept["f1"], strict=True)
        if value <= threshold
    }
    return Letters(numbers, kept["f1"], probes, dict(sorted(why_not.items())))


def _ground_truth(x: np.ndarray, labels: np.ndarray, test: np.ndarray, numbers: np.ndarray, seed: int) -> dict[str, Any]:
    start = random_start(x.shape[1], (seed, 2))
    start = Probes(start.weights[:, numbers], start.biases[numbers])
    with threadpool_limits(1):  # thousands of small steps: threads would only wait for one another
        probes = letter_probes.train(
            x[~test], one_vs_rest(labels[~test], numbers), start, letter_probes.GROUND_TRUTH, (seed, 6)
        )
    scores = f1(probes.scores(x[test]), one_vs_rest(labels[test], numbers))
    return {"weights": probes.weights.tolist(), "biases": probes.biases.tolist(), "f1": scores.tolist()}


# --- SAEs ------------------------------------------------------------------------------------


def _scores(members: Group, acts: WordActivations, letters: Letters, guard: Guard) -> dict[str, Any]:
    """The scores by letter of every SAE that can be scored."""

    def score_family(family: Family) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, latents in acts.latents(family).items():
            with guard.on(name):
                yield name, score(family[name], latents, acts, letters)

    scores = Scores("absorption", members, members.keys(acts.lm, _inputs(acts), __name__), guard)
    with scores.progress("encode and score") as bar:
        scores.fill(score_family, bar)
    return scores.left()


def score(sae: SparseAutoencoder, latents: sparse.csr_matrix, acts: WordActivations, letters: Letters) -> dict[str, Any]:
    """One SAE's scores by letter, in both definitions."""
    test, labels, config, seed = acts.words.test, acts.words.letters, acts.params.absorption, acts.params.random_seed
    data = WordLatents(latents[~test], latents[test], labels[~test], labels[test], letters.numbers)
    main = {"sae_bench": sae_bench_main_latents(data, config, seed), "lab": lab_main_latents(data, config, seed)}
    view = _view(sae, acts, letters)
    scores = {}
    for i, number in enumerate(letters.numbers):
        hits = np.flatnonzero((data.test_labels == number) & view.found[:, i])
        usual = usual_activation(data.train[data.train_labels == number][:, main["lab"][i].latents].toarray())
        parts: dict[str, list[Absorbed]] = {"sae_bench": [], "lab": []}
        for words_ in np.array_split(hits, math.ceil(len(hits) * sae.cfg.d_sae / _BLOCK) or 1):
            z = data.test[words_].toarray().astype(np.float64)
            parts["sae_bench"].append(
                sae_bench_absorbed(z, view.whole[words_, i], view.cosines[:, i], main["sae_bench"][i].latents)
            )
            parts["lab"].append(
                lab_absorbed(
                    z, view.less_bias[words_, i], view.along[:, i], view.cosines[:, i], main["lab"][i].latents, usual
                )
            )
        scores[LETTERS[number]] = {
            "words": len(hits),
            **{
                definition: _summary(main[definition][i], Absorbed(*map(np.concatenate, zip(*found, strict=True))))
                for definition, found in parts.items()
            },
        }
    return scores


class _View(NamedTuple):
    """What lies along the letters' directions, unit vectors. float64, the last axis the letters."""

    found: np.ndarray
    """Whether the probe finds its letter, bool [test words, letters]."""
    whole: np.ndarray
    """Of the test words' activations [test words, letters]."""
    less_bias: np.ndarray
    """Of the same less the decoder's bias [test words, letters]."""
    along: np.ndarray
    """Of the decoder's rows [d_sae, letters]."""
    cosines: np.ndarray
    """Between decoder rows and directions [d_sae, letters]."""


def _view(sae: SparseAutoencoder, acts: WordActivations, letters: Letters) -> _View:
    x = acts.vectors[torch.from_numpy(acts.words.test)].to(sae.W_dec.device)
    directions = torch.from_numpy(letters.probes.weights).to(x)
    directions = directions / directions.norm(dim=0)
    rows = sae.W_dec.float()
    along = rows @ directions
    found = [
        along,
        along / rows.norm(dim=1, keepdim=True).clamp_min(1e-8),
        x @ directions,
        (sae.target(x) - sae.b_dec).float() @ directions,
    ]
    along_, cosines, whole, less_bias = (values.double().cpu().numpy() for values in found)
    return _View(letters.probes.scores(x.cpu().numpy()) > 0, whole, less_bias, along_, cosines)


def _summary(main: MainLatents, words_absorbed: Absorbed) -> dict[str, Any]:
    return {
        "absorption_fraction": float(words_absorbed.fraction.mean()),
        "full_absorption": float(words_absorbed.full.mean()),
        "full_absorption_words": int(words_absorbed.full.sum()),
        "main_latents": main.latents,
        "main_latents_f1": main.split_f1,
        "f1_by_k": main.f1,
    }
