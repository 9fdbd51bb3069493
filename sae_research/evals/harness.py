"""What every evaluation shares: the SAEs that setup prepared, cache keys, labelled tasks, and results in SAE Bench's own
output types, so that its readers and leaderboards accept our files.
"""

from __future__ import annotations

import importlib
import sys
import uuid
from collections.abc import Sequence, Sized
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sae_research.config.params import Params
from sae_research.lm import LanguageModel
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import fingerprint
from sae_research.runtime.stages import StageFolder, read_manifest
from sae_research.saes import SparseAutoencoder, load_sae
from sae_research.saes.registry import code_fingerprint
from sae_research.text.local import listed
from sae_research.text.tasks import Task, TaskUnavailable, load_task

SAE_FOLDER = Path("downloaded_saes")


def load_saes(folder: Path, lm: LanguageModel) -> dict[str, SparseAutoencoder]:
    """Every SAE of the manifest, in its order, on the model's device.

    Raises `UserError` when setup has not run, a file is damaged, or an SAE does not fit the model.
    """
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise UserError(f"{manifest}: no such file; run the setup stage first (dvc repro setup)")
    saes = {name: load_sae(folder / name, str(lm.device)) for name in read_manifest(manifest)["order"]}
    if not saes:
        raise UserError(f"{manifest} lists no SAE; give params.yaml a baseline_sae")
    for name, sae in saes.items():
        width = lm.d_in(sae.cfg.hook_name)
        if sae.cfg.d_in != width:
            raise UserError(f"SAE {name} reads {sae.cfg.d_in} dimensions, {lm.name} has {width} at {sae.cfg.hook_name}")
    return saes


def by_hook(saes: dict[str, SparseAutoencoder]) -> dict[str, dict[str, SparseAutoencoder]]:
    """SAEs grouped by hook: one model pass serves a group."""
    groups: dict[str, dict[str, SparseAutoencoder]] = {}
    for name, sae in saes.items():
        groups.setdefault(sae.cfg.hook_name, {})[name] = sae
    return groups


def result_key(sae: SparseAutoencoder, lm: LanguageModel, inputs: Any, *modules: str) -> str:
    """Key of one SAE's result: weights, configuration, inputs, model, precision, device kind, and the code and libraries
    that `modules` (names, `__name__` of whoever computes it) and the SAE's class reach."""
    return fingerprint(
        {
            "sae": sae.weights_fingerprint(),
            "inputs": inputs,
            "model": lm.fingerprint,
            "dtype": str(lm.dtype),
            "device": lm.device.type,
            "code": code_fingerprint(*modules, classes=[type(sae)]),
        }
    )[:40]


def model_key(lm: LanguageModel, inputs: Any, *modules: str) -> str:
    """Key of what the model alone gives, for every SAE: inputs, model, precision, device kind, code and libraries."""
    return fingerprint(
        {
            "inputs": inputs,
            "model": lm.fingerprint,
            "dtype": str(lm.dtype),
            "device": lm.device.type,
            "code": code_fingerprint(*modules),
        }
    )[:40]


def announce(params: Params, lm: LanguageModel, saes: dict[str, SparseAutoencoder]) -> None:
    """One line that says what is about to be evaluated."""
    print(
        f"{len(saes)} SAEs on {lm.name} ({params.model.torch_dtype}, {lm.device}) at {', '.join(by_hook(saes))}",
        flush=True,
        file=sys.stderr,
    )


def load_tasks(names: Sequence[str], train_size: int, test_size: int, seed: int, stage: StageFolder) -> list[Task]:
    """Every task of `names` that has texts enough (sizes as for `text.tasks.load_task`); `stage` notes why others, and rare
    classes of a task, are skipped. Raises `UserError` for an unknown name, unreadable files or a hub out of reach."""
    tasks = []
    for name in names:
        try:
            task = load_task(name, train_size, test_size, seed)
        except TaskUnavailable as error:
            stage.skip(name, str(error))
            continue
        if rare := task.notes.get("classes_left_out"):
            stage.skip(
                f"{name}: {len(rare)} of {len(rare) + len(task.train)} classes",
                f"fewer than {train_size // 2} train and {test_size // 2} test texts in {listed(rare)}",
            )
        tasks.append(task)
    return tasks


def need_one(section: str, tasks: Sized, stage: StageFolder) -> None:
    """Raises `UserError` that says why no task of the section's `dataset_names` is left, when none is."""
    if not len(tasks):
        raise UserError(
            f"{section}.dataset_names: no task is usable: " + ("; ".join(stage.skipped.values()) or "the list is empty")
        )


LAB = "lab_v1"
"""Name of our own definitions' block inside `eval_result_unstructured`."""


def sae_description(sae: SparseAutoencoder) -> dict[str, Any]:
    """What tables and plots need to know of an SAE: the result's `sae_cfg_dict`."""
    cfg = sae.cfg
    return {
        "form": cfg.form,
        "architecture": cfg.architecture,
        "role": cfg.role,
        "base": cfg.base,
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        **sae.options(),
        "hook_name": cfg.hook_name,
        "hook_layer": cfg.hook_layer,
        "model_name": cfg.model_name,
        "dtype": cfg.dtype,
        "context_size": cfg.context_size,
        "prepend_bos": cfg.prepend_bos,
        "normalize_activations": "none",
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
        "per_token": sae.per_token,
        "causal": sae.causal,
        "signed": sae.signed,
        "provenance": cfg.provenance,
    }


def envelope(name: str, sae: SparseAutoencoder, eval_type: str) -> dict[str, Any]:
    """The fields every SAE Bench result has. The identifier follows from the content, and the time is the epoch:
    two equal runs write equal bytes."""
    identity = fingerprint([eval_type, name, sae.weights_fingerprint()])
    return {
        "eval_id": str(uuid.UUID(identity[:32])),
        "datetime_epoch_millis": 0,
        "sae_bench_commit_hash": f"sae-bench {version('sae-bench')} definitions",
        "sae_lens_id": name,
        "sae_lens_release_id": sae.cfg.provenance.get("release", "sae_research"),
        "sae_lens_version": version("sae-lens"),
        "sae_cfg_dict": sae_description(sae),
    }


@cache
def _types(eval_type: str) -> Any:
    """SAE Bench's module of output types, imported only when a result is written."""

    return importlib.import_module(f"sae_bench.evals.{eval_type}.eval_output")


def core_output(
    config: dict[str, Any],
    metrics: dict[str, dict[str, float]],
    details: list[dict[str, float]],
    unstructured: dict[str, Any],
    common: dict[str, Any],
) -> dict[str, Any]:
    """A validated `CoreEvalOutput` as plain data."""
    from sae_bench.evals.core.eval_config import CoreEvalConfig

    types = _types("core")
    categories = types.CoreMetricCategories(
        model_behavior_preservation=types.ModelBehaviorPreservationMetrics(**metrics["model_behavior_preservation"]),
        model_performance_preservation=types.ModelPerformancePreservationMetrics(
            **metrics["model_performance_preservation"]
        ),
        reconstruction_quality=types.ReconstructionQualityMetrics(**metrics["reconstruction_quality"]),
        shrinkage=types.ShrinkageMetrics(**metrics["shrinkage"]),
        sparsity=types.SparsityMetrics(**metrics["sparsity"]),
        token_stats=types.TokenStatsMetrics(**metrics["token_stats"]),
        misc_metrics=types.MiscMetrics(**metrics["misc_metrics"]),
    )
    return asdict(
        types.CoreEvalOutput(
            eval_config=CoreEvalConfig(**config),
            eval_result_metrics=categories,
            eval_result_details=[types.CoreFeatureMetric(**record) for record in details],
            eval_result_unstructured=unstructured,
            **common,
        )
    )


def sparse_probing_output(
    config: dict[str, Any],
    llm: dict[str, float],
    sae: dict[str, float],
    details: list[dict[str, Any]],
    unstructured: dict[str, Any],
    common: dict[str, Any],
) -> dict[str, Any]:
    """A validated `SparseProbingEvalOutput` as plain data.

    SAE Bench has fields for k in 1, 2, 5, 10, 20, 50, 100 only and drops others without a word; ours keeps every k
    in the unstructured block.
    """
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig

    types = _types("sparse_probing")
    return asdict(
        types.SparseProbingEvalOutput(
            eval_config=SparseProbingEvalConfig(**config),
            eval_result_metrics=types.SparseProbingMetricCategories(
                llm=types.SparseProbingLlmMetrics(**llm), sae=types.SparseProbingSaeMetrics(**sae)
            ),
            eval_result_details=[types.SparseProbingResultDetail(**record) for record in details],
            eval_result_unstructured=unstructured,
            **common,
        )
    )
