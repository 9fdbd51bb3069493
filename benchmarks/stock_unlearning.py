"""SAE Bench 0.6.0's unlearning on our SAEs, text and questions: for parity fixtures and for timings.

SAE Bench runs its own unmodified code on a `HookedTransformer`. What is replaced is data: its corpora and question sets,
which live on a hub, and two constants that tie it to Gemma, the model's name and the chat format around a prompt.
"""

from __future__ import annotations

import contextlib
import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import stock  # isort: skip  (sets what SAE Bench reads from the environment when it is imported)

import numpy as np
import torch
from sae_bench.evals.unlearning import main as unlearning_main
from sae_bench.evals.unlearning.eval_config import UnlearningEvalConfig
from sae_bench.evals.unlearning.utils import eval as single
from sae_bench.evals.unlearning.utils import feature_activation, metrics
from torch import Tensor
from transformer_lens import HookedTransformer

from sae_research.config.evaluation_params import Unlearning
from sae_research.saes import SparseAutoencoder

FORGET_SET = "wmdp-bio"
"""The one question set that SAE Bench tries to make the model forget."""
_GEMMA = "gemma-2-2b-it"


def unlearning(
    sae: SparseAutoencoder,
    model: HookedTransformer,
    corpora: Mapping[str, Tensor],
    questions: Mapping[str, Sequence[dict[str, Any]]],
    prompt_format: str,
    config: Unlearning,
    batch_size: int,
    artifacts: Path,
    known: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Any]:
    """SAE Bench's `run_eval_single_sae` and the score of its results.

    corpora: forget and retain -> contexts [n, seq]. questions: set -> rows of question, choices and answer; the set to
    forget is FORGET_SET. prompt_format: the text around `{prompt}`, with one BOS. known: set -> numbers of the questions
    to ask; SAE Bench finds them itself where None.

    Returns {"score", "known", "density": {forget, retain}, "configurations": [{retain_threshold, n_features, multiplier,
    latents, sets: {set: {correct, probabilities}}}]}; a set of fewer latents than asked for appears once.
    """
    bench = UnlearningEvalConfig(
        dataset_names=list(questions),
        retain_thresholds=list(config.retain_thresholds),
        n_features_list=list(config.n_features_list),
        multipliers=list(config.multipliers),
        model_name=_GEMMA,
        llm_batch_size=batch_size,
        llm_dtype="float32",
    )
    if known is not None:
        write_known(artifacts, known)
    with (
        _our_data(model, corpora, questions, prompt_format),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        single.run_eval_single_sae(model, stock.StockSAE(sae, _GEMMA), bench, str(artifacts), "sae", False)
    results = artifacts / "sae" / "results"
    frame = unlearning_main.get_metrics_df(str(results / "metrics"))
    densities = {side: np.loadtxt(results / "sparsities" / f"feature_sparsity_{side}.txt") for side in ("forget", "retain")}
    return {
        "score": float(unlearning_main.get_unlearning_scores(frame)),
        "known": _read_known(artifacts, questions),
        "density": {side: values.tolist() for side, values in densities.items()},
        "configurations": [_configuration(path) for path in sorted((results / "metrics").glob("*.pkl"))],
    }


def write_known(artifacts: Path, known: Mapping[str, Sequence[int]]) -> None:
    """The files from which SAE Bench would take which questions are known."""
    for name, numbers in known.items():
        for split in ("train", "test", "all"):
            for kind in ("correct", "correct-iff-question", "correct-no-tricks"):
                path = artifacts / "data/question_ids" / split / f"{_full_name(name)}_{kind}.csv"
                path.parent.mkdir(parents=True, exist_ok=True)
                np.savetxt(path, np.array(numbers, dtype=int), fmt="%d")


def _read_known(artifacts: Path, questions: Mapping[str, Any]) -> dict[str, list[int]]:
    files = {name: artifacts / "data/question_ids/all" / f"{_full_name(name)}_correct.csv" for name in questions}
    return {name: np.genfromtxt(path, ndmin=1, dtype=int).tolist() for name, path in files.items()}


def _full_name(name: str) -> str:
    return name if name == FORGET_SET else f"mmlu-{name.replace('_', '-')}"


def _configuration(path: Path) -> dict[str, Any]:
    with path.open("rb") as handle:
        saved = pickle.load(handle)  # noqa: S301  (written by SAE Bench a moment ago)
    parameters = saved.pop("ablate_params")
    multiplier, n_features, _, threshold = unlearning_main.get_params(path.name)
    return {
        "retain_threshold": float(threshold),
        "n_features": int(n_features),
        "multiplier": int(multiplier),
        "latents": [int(latent) for latent in parameters["features_to_ablate"]],
        "sets": {
            name: {
                "correct": [int(value) for value in found["is_correct"]],
                "probabilities": found["output_probs"].astype(float).tolist(),
            }
            for name, found in saved.items()
        },
    }


@contextlib.contextmanager
def _our_data(
    model: HookedTransformer,
    corpora: Mapping[str, Tensor],
    questions: Mapping[str, Sequence[dict[str, Any]]],
    prompt_format: str,
) -> Iterator[None]:
    def load(_: str, name: str, split: str) -> Sequence[dict[str, Any]]:
        return questions[name]

    replaced = [
        (feature_activation, "get_shuffled_forget_retain_tokens", lambda *_, **__: (corpora["forget"], corpora["retain"])),
        (metrics, "load_dataset", load),
        (metrics, "GEMMA_INST_FORMAT", prompt_format),
        (model.cfg, "model_name", _GEMMA),
    ]
    originals = [(where, name, getattr(where, name)) for where, name, _ in replaced]
    grad = torch.is_grad_enabled()  # SAE Bench switches it off for good
    for where, name, value in replaced:
        setattr(where, name, value)
    try:
        yield
    finally:
        torch.set_grad_enabled(grad)
        for where, name, value in originals:
            setattr(where, name, value)
