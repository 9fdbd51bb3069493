"""SAE Bench 0.6.0's absorption evaluation on our words and prompts: for parity fixtures and for timings.

SAE Bench's own unmodified functions run, in its order: k-sparse probing, then the absorption calculator. Replaced are
its unseeded draws of words, split and prompts, and the folders it writes to (its own lie inside site-packages). For
parity its probes also start where ours start and meet their words in the same order; for timings they do not.
"""

from __future__ import annotations

import contextlib
import io
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.stock import StockSAE  # first: it sets what SAE Bench reads when imported

import torch  # isort: skip
from sae_bench.evals.absorption import (  # isort: skip
    common,
    feature_absorption,
    feature_absorption_calculator,
    k_sparse_probing,
    main,
    probing,
    prompting,
)
from transformer_lens import HookedTransformer

from sae_research.config.evaluation_params import Absorption
from sae_research.evals.absorption.letters import epoch_order, random_start
from sae_research.evals.absorption.words import LETTERS, Words, whole_prompts
from sae_research.saes import SparseAutoencoder

GROUND_TRUTH_BATCH = 64
"""SAE Bench trains its probe on the model in batches of 64, its probes on latents in batches of 4,096."""


def absorption(
    sae: SparseAutoencoder,
    name: str,
    model: HookedTransformer,
    words: Words,
    config: Absorption,
    artifacts: Path,
    seed: int | None = None,
    batch_size: int = 64,
) -> dict[str, Any]:
    """What SAE Bench says of one SAE, with its best settings (latents computed once for the k-sparse probes).

    `artifacts` keeps the model's probe and activations for the next SAE. With `seed`, probes start and shuffle as ours
    do. Returns {"letters": {letter: figures}, "f1_probe": {letter: F1}}.
    """
    stock = StockSAE(sae, model.cfg.model_name)
    common_arguments: dict[str, Any] = {
        "model": model,
        "sae": stock,
        "layer": sae.cfg.hook_layer,
        "sae_name": name,
        "force": True,
        "max_k_value": config.max_k_value,
        "prompt_template": config.prompt_template,
        "prompt_token_pos": int(words.positions[0]) - len(words.tails[0]),
        "device": "cpu",
        "probes_dir": artifacts / "probes",
    }
    with contextlib.ExitStack() as stack:
        for change in _our_words(words, whole_prompts(words, config)):
            stack.enter_context(change)
        if seed is not None:
            stack.enter_context(_our_draws(seed))
        for stream in (contextlib.redirect_stdout, contextlib.redirect_stderr):
            stack.enter_context(stream(io.StringIO()))
        torch.set_grad_enabled(True)
        probing_df = k_sparse_probing.run_k_sparse_probing_experiment(
            **common_arguments,
            experiment_dir=artifacts / "k_sparse",
            f1_jump_threshold=config.f1_jump_threshold,
            k_sparse_probe_l1_decay=config.k_sparse_probe_l1_decay,
            precalc_k_sparse_probe_sae_acts=True,
            eval_batch_size=256,
            verbose=False,
        )
        raw = feature_absorption.run_feature_absortion_experiment(
            **common_arguments,
            experiment_dir=artifacts / "absorption",
            sparse_probing_experiment_dir=artifacts / "k_sparse",
            feature_split_f1_jump_threshold=config.f1_jump_threshold,
            batch_size=batch_size,
        )
    return _figures(probing_df, main._aggregate_results_df(raw), config)


def _figures(probing_df: Any, absorbed_df: Any, config: Absorption) -> dict[str, Any]:
    by_letter = {row["letter"]: row for _, row in probing_df.iterrows()}
    return {
        "f1_probe": {letter: float(row["f1_probe"]) for letter, row in by_letter.items()},
        "letters": {
            row["letter"]: {
                "mean_absorption_fraction": float(row["mean_absorption_fraction"]),
                "full_absorption_rate": float(row["full_absorption_rate"]),
                "num_full_absorption": int(row["num_full_absorption"]),
                "num_probe_true_positives": int(row["num_probe_true_positives"]),
                "split_feats": [int(i) for i in row["split_feats"]],
                "f1_by_k": [float(by_letter[row["letter"]][f"f1_sparse_sae_{k}"]) for k in range(1, config.max_k_value + 1)],
            }
            for _, row in absorbed_df.iterrows()
        },
    }


def _our_words(words: Words, prompts: list[str]) -> Iterator[Any]:
    prompt_of = {
        word: prompting.SpellingPrompt(base=prompt, answer=f" {LETTERS[letter].upper()}", word=word)
        for word, prompt, letter in zip(words.texts, prompts, words.letters, strict=True)
    }
    rows = list(zip(words.texts, words.letters, words.test, strict=True))
    parts = [[(prompt_of[word], int(letter)) for word, letter, test in rows if test == held] for held in (False, True)]
    yield patch.object(common, "get_alpha_tokens", lambda _: list(words.texts))
    yield patch.object(feature_absorption, "get_alpha_tokens", lambda _: list(words.texts))
    yield patch.object(common, "create_dataset_probe_training", lambda **_: tuple(parts))
    yield patch.object(feature_absorption_calculator, "create_icl_prompt", lambda word, **_: prompt_of[word])


@contextlib.contextmanager
def _our_draws(seed: int) -> Iterator[None]:
    """Starts and orders of SAE Bench's probes as `letter_probes` draws them."""
    stage: list[tuple[int, int]] = [(0, 0)]

    class Loader:
        def __init__(self, dataset: Any, batch_size: int, shuffle: bool) -> None:
            stage[0] = (2, 6) if batch_size == GROUND_TRUTH_BATCH else (3, 4)
            self.dataset, self.batch_size, self.epoch, self.salt = dataset, batch_size, 0, stage[0][1]

        def __len__(self) -> int:
            return math.ceil(len(self.dataset) / self.batch_size)

        def __iter__(self) -> Iterator[Any]:
            order = torch.from_numpy(epoch_order(len(self.dataset), (seed, self.salt, self.epoch)))
            self.epoch += 1
            yield from (self.dataset[rows] for rows in order.split(self.batch_size))

    original = probing.LinearProbe.__init__

    def start(self: Any, input_dim: int, num_outputs: int = 1) -> None:
        original(self, input_dim, num_outputs)
        ours = random_start(input_dim, (seed, stage[0][0]))
        self.fc.weight.data = torch.from_numpy(ours.weights.T.copy())
        self.fc.bias.data = torch.from_numpy(ours.biases.copy())

    with patch.object(probing, "DataLoader", Loader), patch.object(probing.LinearProbe, "__init__", start):
        yield
