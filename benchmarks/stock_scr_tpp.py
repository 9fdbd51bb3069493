"""SAE Bench 0.6.0's SCR and TPP on our SAEs and tasks, for parity fixtures and for side-by-side timings.

SAE Bench runs its own unmodified code; only its data loading is replaced, because its data sets live on a hub.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import stock  # first: it switches jaxtyping off

import torch  # isort: skip
from sae_bench.evals.scr_and_tpp import dataset_creation
from sae_bench.evals.scr_and_tpp import main as scr_tpp_main
from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig
from sae_bench.evals.sparse_probing import probe_training
from torch import Tensor
from transformer_lens import HookedTransformer

from sae_research.evals.scr_tpp.evaluation import Settings
from sae_research.saes import SparseAutoencoder
from sae_research.text.crossed_tasks import Cell, CrossedTask
from sae_research.text.tasks import Task

FIRST, SECOND, BIASED = "professor / nurse", "male / female", "male_professor / female_nurse"
"""SAE Bench's fixed names of the first attribute, the second, and the two together, whatever the data."""


def groups(cells: dict[Cell, list[str]]) -> dict[str, list[str]]:
    """A two-attribute task's texts as SAE Bench's six data sets."""
    m = len(cells[0, 1])
    both, neither = cells[0, 0], cells[1, 1]
    return {
        SECOND: both[:m] + cells[1, 0],
        "female_data_only": cells[0, 1] + neither[:m],
        FIRST: both[:m] + cells[0, 1],
        "nurse_data_only": cells[1, 0] + neither[:m],
        BIASED: both,
        "female_nurse_data_only": neither,
    }


def scr(
    sae: SparseAutoencoder,
    model: HookedTransformer,
    tasks: Sequence[CrossedTask],
    settings: Settings,
    seed: int,
    batch_size: int,
    artifacts: Path,
) -> dict[str, Any]:
    """SAE Bench's SCR. `artifacts` keeps activations and probes for the next SAE.

    Returns {"metrics", "draws", "trainings"}: averages and every task's figures, and what it drew at random, as
    `stock.sparse_probing` and `_trainings` record it.
    """
    by_name = {task.name: task for task in tasks}
    data = {name: (groups(task.train), groups(task.test)) for name, task in by_name.items()}
    original = dataset_creation.get_train_test_data
    dataset_creation.get_train_test_data = lambda name, *_: data[name]
    scr_tpp_main.COLUMN2_VALS_LOOKUP.update({task.name: task.second for task in tasks})
    try:
        return _run(
            sae,
            model,
            list(by_name),
            settings,
            seed,
            batch_size,
            artifacts,
            pairs={task.name: [task.first] for task in tasks},
        )
    finally:
        dataset_creation.get_train_test_data = original
        for name in by_name:
            del scr_tpp_main.COLUMN2_VALS_LOOKUP[name]


def tpp(
    sae: SparseAutoencoder,
    model: HookedTransformer,
    tasks: Sequence[Task],
    settings: Settings,
    seed: int,
    batch_size: int,
    artifacts: Path,
) -> dict[str, Any]:
    """SAE Bench's TPP, as `scr`; figures of every class stand under "classes"."""
    scr_tpp_main.COLUMN2_VALS_LOOKUP.update({task.name: None for task in tasks})
    try:
        with stock._our_tasks(list(tasks)):
            return _run(sae, model, [task.name for task in tasks], settings, seed, batch_size, artifacts, pairs=None)
    finally:
        for task in tasks:
            del scr_tpp_main.COLUMN2_VALS_LOOKUP[task.name]


def _run(
    sae: SparseAutoencoder,
    model: HookedTransformer,
    names: list[str],
    settings: Settings,
    seed: int,
    batch_size: int,
    artifacts: Path,
    pairs: dict[str, Any] | None,
) -> dict[str, Any]:
    config = ScrAndTppEvalConfig(
        random_seed=seed,
        dataset_names=names,
        perform_scr=pairs is not None,
        train_set_size=settings.train_set_size,
        test_set_size=settings.test_set_size,
        context_length=settings.context_length,
        probe_epochs=settings.probe_epochs,
        llm_batch_size=batch_size,
        llm_dtype="float32",
        model_name=model.cfg.model_name,
        n_values=list(settings.n_values),
        column1_vals_lookup=pairs or {},
    )
    draws: list[dict[str, Any]] = []
    trainings: list[dict[str, Any]] = []
    with (
        stock._recorded(draws),
        _trainings(trainings),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        metrics, classes = scr_tpp_main.run_eval_single_sae(
            config, stock.StockSAE(sae, model.cfg.model_name), model, "cpu", str(artifacts)
        )
    return {"metrics": metrics, "classes": classes, "draws": draws, "trainings": trainings}


@contextlib.contextmanager
def _trainings(found: list[dict[str, Any]]) -> Iterator[None]:
    """Learn what each probe started from and how its epochs were shuffled, by drawing the same a second time from the
    same generator state; and what it became."""
    original = probe_training.train_probe_gpu

    def train(train_inputs: Tensor, *args: Any, **kwargs: Any) -> Any:
        state = torch.get_rng_state()
        start = probe_training.Probe(kwargs["dim"], train_inputs.dtype)
        orders = [torch.randperm(len(train_inputs)).tolist() for _ in range(kwargs["epochs"])]
        torch.set_rng_state(state)
        probe, accuracy = original(train_inputs, *args, **kwargs)
        found.append({"start": _flat(start), "orders": orders, "end": _flat(probe), "accuracy": accuracy})
        return probe, accuracy

    probe_training.train_probe_gpu = train
    try:
        yield
    finally:
        probe_training.train_probe_gpu = original


def _flat(probe: Any) -> list[float]:
    """Weights, then bias."""
    return [*probe.net.weight[0].tolist(), probe.net.bias.item()]
