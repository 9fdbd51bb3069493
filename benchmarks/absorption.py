"""Seconds for first-letter absorption of several SAEs: ours against SAE Bench 0.6.0.

Run `python -m benchmarks absorption`.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import numpy as np

from benchmarks import stock_absorption
from sae_research.config.params import Params
from sae_research.evals.absorption import evaluate, evaluation
from sae_research.evals.absorption.words import LETTERS, alphabetic_words, in_prompts
from sae_research.lm import LanguageModel
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SparseAutoencoder


def compare(
    saes: dict[str, SparseAutoencoder], lm: LanguageModel, model: object, params: Params, words_per_letter: int = 20
) -> dict[str, tuple[float, float]]:
    """(our seconds, SAE Bench's) for all `saes` together, from words to results, nothing cached beforehand.

    Both sides get the same reduced vocabulary (SAE Bench's probes need every letter) and the same prompts; SAE Bench runs
    with its latents computed once and batches of 64. Ours scores every letter that its probe finds at all, however few its
    words, in both definitions. Sequence-level SAEs are left out: SAE Bench cannot encode them. Loading the model counts
    on neither side.
    """
    chosen = {name: sae for name, sae in saes.items() if sae.per_token and sae.cfg.hook_name.endswith("hook_resid_post")}
    params = params.model_copy(
        update={
            "activation_caching": params.activation_caching.model_copy(update={"enabled": False}),
            "absorption": params.absorption.model_copy(update={"min_ground_truth_probe_f1": 0.0}),
        }
    )
    os.environ["SAE_RESEARCH_NO_CACHE"] = "1"
    vocabulary, generator = alphabetic_words(lm.tokenizer), np.random.default_rng(params.random_seed)
    reduced = []
    for letter in LETTERS:
        of_letter = [word for word in vocabulary if word.strip().lower().startswith(letter)]
        reduced += [of_letter[i] for i in generator.permutation(len(of_letter))[:words_per_letter]]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        words = in_prompts(lm, sorted(reduced), params.absorption, params.random_seed)
        with patch.multiple(evaluation, MIN_TRAIN_WORDS=1, MIN_TEST_WORDS=1):
            results = dict(evaluate(chosen, lm, params, StageFolder(Path(folder) / "out"), prompts=words))
        ours, start = time.perf_counter() - start, time.perf_counter()
        for name, sae in chosen.items():
            stock_absorption.absorption(sae, name, model, words, params.absorption, Path(folder) / "stock")
        theirs = time.perf_counter() - start
    letters = len(next(iter(results.values()))["eval_result_details"])
    return {f"absorption, {len(chosen)} SAEs, {len(words.texts)} words, {letters} letters": (ours, theirs)}
