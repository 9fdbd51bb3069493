"""Results in SAE Bench's own output types, so that its readers and leaderboards accept our files."""

from __future__ import annotations

import uuid
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from typing import Any

from sae_research.saes import SparseAutoencoder
from sae_research.store import fingerprint

LAB = "lab_v1"
"""Name of our own definitions' block inside `eval_result_unstructured`."""


def sae_description(sae: SparseAutoencoder) -> dict[str, Any]:
    """What tables and plots need to know of an SAE: the result's `sae_cfg_dict`."""
    cfg = sae.cfg
    return {
        "form": cfg.form, "architecture": cfg.architecture, "role": cfg.role, "base": cfg.base,
        "d_in": cfg.d_in, "d_sae": cfg.d_sae, **sae.options(), "hook_name": cfg.hook_name,
        "hook_layer": cfg.hook_layer, "model_name": cfg.model_name, "dtype": cfg.dtype,
        "context_size": cfg.context_size, "prepend_bos": cfg.prepend_bos, "normalize_activations": "none",
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input, "per_token": sae.per_token, "causal": sae.causal,
        "signed": sae.signed, "provenance": cfg.provenance,
    }


def envelope(name: str, sae: SparseAutoencoder, eval_type: str) -> dict[str, Any]:
    """The fields every SAE Bench result has. The identifier follows from the content, and the time is the epoch:
    two equal runs write equal bytes."""
    identity = fingerprint([eval_type, name, sae.weights_fingerprint()])
    return {
        "eval_id": str(uuid.UUID(identity[:32])), "datetime_epoch_millis": 0,
        "sae_bench_commit_hash": f"sae-bench {version('sae-bench')} definitions",
        "sae_lens_id": name, "sae_lens_release_id": sae.cfg.provenance.get("release", "sae_research"),
        "sae_lens_version": version("sae-lens"), "sae_cfg_dict": sae_description(sae),
    }


@cache
def _types(eval_type: str) -> Any:
    """SAE Bench's module of output types, imported only when a result is written."""
    import importlib

    return importlib.import_module(f"sae_bench.evals.{eval_type}.eval_output")


def core_output(config: dict[str, Any], metrics: dict[str, dict[str, float]], details: list[dict[str, float]],
                unstructured: dict[str, Any], common: dict[str, Any]) -> dict[str, Any]:
    """A validated `CoreEvalOutput` as plain data."""
    from sae_bench.evals.core.eval_config import CoreEvalConfig

    types = _types("core")
    categories = types.CoreMetricCategories(
        model_behavior_preservation=types.ModelBehaviorPreservationMetrics(**metrics["model_behavior_preservation"]),
        model_performance_preservation=types.ModelPerformancePreservationMetrics(
            **metrics["model_performance_preservation"]),
        reconstruction_quality=types.ReconstructionQualityMetrics(**metrics["reconstruction_quality"]),
        shrinkage=types.ShrinkageMetrics(**metrics["shrinkage"]),
        sparsity=types.SparsityMetrics(**metrics["sparsity"]),
        token_stats=types.TokenStatsMetrics(**metrics["token_stats"]),
        misc_metrics=types.MiscMetrics(**metrics["misc_metrics"]))
    return asdict(types.CoreEvalOutput(
        eval_config=CoreEvalConfig(**config), eval_result_metrics=categories,
        eval_result_details=[types.CoreFeatureMetric(**record) for record in details],
        eval_result_unstructured=unstructured, **common))


def sparse_probing_output(config: dict[str, Any], llm: dict[str, float], sae: dict[str, float],
                          details: list[dict[str, Any]], unstructured: dict[str, Any],
                          common: dict[str, Any]) -> dict[str, Any]:
    """A validated `SparseProbingEvalOutput` as plain data.

    SAE Bench has fields for k in 1, 2, 5, 10, 20, 50, 100 only and drops others without a word; ours keeps every k
    in the unstructured block.
    """
    from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig

    types = _types("sparse_probing")
    return asdict(types.SparseProbingEvalOutput(
        eval_config=SparseProbingEvalConfig(**config),
        eval_result_metrics=types.SparseProbingMetricCategories(
            llm=types.SparseProbingLlmMetrics(**llm), sae=types.SparseProbingSaeMetrics(**sae)),
        eval_result_details=[types.SparseProbingResultDetail(**record) for record in details],
        eval_result_unstructured=unstructured, **common))
