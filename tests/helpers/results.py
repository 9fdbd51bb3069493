"""Synthetic result folders in SAE Bench 0.6.0's shape, with this project's block beside."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from sae_research.config.reporting import Visualization
from sae_research.reporting.metrics import EVALS
from sae_research.reporting.results import merge
from sae_research.reporting.rows import Run, read_run
from sae_research.stats.intervals import accuracy, interval, packed, ratio, stored

# name: (form, architecture, role, base, L0, variance explained, loss recovered, KL, top-1, top-5)
SAES: dict[str, tuple[str, str, str, str | None, float, float, float, float, float, float]] = {
    "standard": ("standard", "standard", "baseline", None, 61.3, 0.712, 0.931, 0.21, 0.742, 0.829),
    "standard_ihtp_k1": ("ihtp", "ihtp", "variant", "standard", 88.0, 0.741, 0.945, 0.19, 0.701, 0.802),
    "standard_ihtp_k2": ("ihtp", "ihtp", "variant", "standard", 160.0, 0.832, 0.971, 0.11, 0.712, 0.811),
    "standard_ihtp_k5": ("ihtp", "ihtp", "variant", "standard", 331.0, 0.954, 0.991, 0.031, 0.731, 0.823),
    "standard_ihtp_k10": ("ihtp", "ihtp", "variant", "standard", 576.0, 0.9999, 0.9998, 0.0004, 0.722, 0.817),
    "standard_mpsae_s10": (
        "matching_pursuit",
        "mpsae",
        "variant",
        "standard",
        10.0,
        0.571,
        0.842,
        0.44,
        0.728,
        0.808,
    ),
    "standard_mpsae_s50": (
        "matching_pursuit",
        "mpsae",
        "variant",
        "standard",
        50.0,
        0.843,
        0.962,
        0.13,
        0.733,
        0.821,
    ),
    "standard_mpsae_s100": (
        "matching_pursuit",
        "mpsae",
        "variant",
        "standard",
        100.0,
        0.912,
        0.984,
        0.061,
        0.729,
        0.82,
    ),
    "topk": ("topk", "topk", "comparison", None, 32.0, 0.808, 0.952, 0.15, 0.761, 0.846),
    "control_random": ("matching_pursuit", "control", "control", None, 32.0, 0.342, 0.412, 1.9, 0.581, 0.664),
    "control_data_rows": (
        "matching_pursuit",
        "control",
        "control",
        None,
        32.0,
        0.841,
        0.958,
        0.14,
        0.708,
        0.79,
    ),
    "control_pca": ("linear", "control", "control", None, 64.0, 0.731, 0.902, 0.31, 0.622, 0.735),
}
INTERPOLATING = {"standard_ihtp_k10"}
TASKS = ("news_topic", "disease_area", "code_language", "film_sentiment")
D_SAE = 2304


def config(name: str) -> dict[str, Any]:
    form, architecture, role, base, l0, *_ = SAES[name]
    return {
        "form": form,
        "architecture": architecture,
        "role": role,
        "base": base,
        "d_in": 576,
        "d_sae": D_SAE,
        "k": int(name.rsplit("k", 1)[1]) if "ihtp" in name else None,
        "s": int(l0) if form == "matching_pursuit" else None,
        "hook_name": "blocks.8.hook_resid_post",
        "model_name": "smollm2-135m-instruct",
        "dtype": "float32",
        "causal": form != "ihtp",
        "per_token": form != "ihtp",
        "signed": form in ("ihtp", "matching_pursuit", "linear"),
        "provenance": {"source": "trained"},
    }


def _envelope(name: str, eval_type: str, eval_config: dict[str, Any]) -> dict[str, Any]:
    return {
        "eval_type_id": eval_type,
        "eval_config": eval_config,
        "eval_id": "0",
        "datetime_epoch_millis": 0,
        "sae_bench_commit_hash": "0.6.0",
        "sae_lens_id": name,
        "sae_lens_release_id": "local",
        "sae_lens_version": "6.54.12",
        "sae_cfg_dict": config(name),
    }


def core_evidence(name: str, figures: dict[str, float], noise: float = 0.01) -> dict[str, Any]:
    """Intervals and sums over 24 documents, as core evaluation stores them: the text's ups and downs are common to all
    SAEs, `noise` is an SAE's own."""
    text, own = np.random.default_rng(1), np.random.default_rng(sum(name.encode()))
    tokens, ups = text.integers(200, 500, 24), text.normal(0, 0.2, 24)
    ratios = {}
    for key, part in (
        ("l0", "sparsity"),
        ("variance_explained", "sparsity"),
        ("loss_recovered", "predictions"),
        ("ce_delta", "predictions"),
        ("kl", "predictions"),
    ):
        moved = 1 + 0.1 * ups + own.normal(0, noise, 24)
        ratios[key] = part, ratio(figures[key] * tokens * moved * tokens.sum() / (tokens * moved).sum(), tokens)
    about = {"level": "document", "clusters": 24, "documents": 24, "sources": 3}
    return {
        "intervals": {key: list(interval(figure, 42)) for key, (_, figure) in ratios.items()},
        "clusters": {part: {**about, "key": part} for part in ("sparsity", "predictions")},
        "cluster_sums": {key: stored(figure, part) for key, (part, figure) in ratios.items()},
    }


def probing_evidence(figures: dict[str, float]) -> dict[str, Any]:
    """Intervals and outcomes of 160 test texts, 40 a task, two classes each; the same texts are hard for every SAE."""
    asked, correct, texts = {}, {}, np.random.default_rng(2)
    for index, task in enumerate(TASKS):
        rows = [" ".join(str(40 * index + 20 * half + i) for i in range(20)) for half in (0, 1)]
        asked[task] = {"a": rows, "b": rows[::-1]}
        hard = texts.random(40)
        for key, value in figures.items():
            bits = hard < value
            correct.setdefault(key, {})[task] = {"a": packed(bits), "b": packed(np.roll(bits, 20))}
    return {
        "intervals": {key: list(interval(accuracy(asked, cells), 42)) for key, cells in correct.items()},
        "outcomes": {"key": "texts", "asked": asked, "correct": correct},
    }


def core_result(name: str) -> dict[str, Any]:
    _, _, _, _, l0, explained, recovered, kl, *_ = SAES[name]
    generator = random.Random(name)
    centre = math.log10(l0 / D_SAE)
    edges = [round(-6 + 0.25 * index, 2) for index in range(25)]
    counts = [
        int(260 * math.exp(-((edge + 0.125 - centre) ** 2) / 0.5) * generator.uniform(0.7, 1.3)) for edge in edges[:-1]
    ]
    dead = max(0, D_SAE - sum(counts))
    figures = {"l0": l0, "variance_explained": explained, "loss_recovered": recovered, "ce_delta": 1.02 * kl, "kl": kl}
    return {
        **_envelope(
            name,
            "core",
            {
                "model_name": "smollm2-135m-instruct",
                "context_size": 128,
                "dataset": "packaged",
                "batch_size_prompts": 8,
                "n_eval_reconstruction_batches": 2,
                "n_eval_sparsity_variance_batches": 8,
            },
        ),
        "eval_result_metrics": {
            "model_behavior_preservation": {
                "kl_div_score": 1 - kl / 9,
                "kl_div_with_ablation": 9.0,
                "kl_div_with_sae": None,
            },
            "model_performance_preservation": {
                "ce_loss_score": recovered - 0.0011,
                "ce_loss_with_ablation": 12.1,
                "ce_loss_with_sae": 3.3,
                "ce_loss_without_sae": 3.1,
            },
            "reconstruction_quality": {
                "explained_variance": 0.9 + explained / 12,
                "explained_variance_legacy": explained - 0.0213,
                "mse": 0.0123456,
                "cossim": 0.91,
            },
            "shrinkage": {
                "l2_norm_in": 140.0,
                "l2_norm_out": 131.0,
                "l2_ratio": 0.93,
                "relative_reconstruction_bias": 0.97,
            },
            "sparsity": {"l0": l0 * 0.992, "l1": 311.127},
            "token_stats": {
                "total_tokens_eval_reconstruction": 2048,
                "total_tokens_eval_sparsity_variance": 8192,
            },
            "misc_metrics": {
                "freq_over_1_percent": 0.2,
                "freq_over_10_percent": 0.03,
                "normalized_freq_over_1_percent": 0.7,
                "normalized_freq_over_10_percent": 0.3,
                "average_max_encoder_cosine_sim": 0.3,
                "average_max_decoder_cosine_sim": 0.3,
                "frac_alive": 0.61,
            },
        },
        "eval_result_details": [{"index": index, "feature_density": 0.01} for index in range(50)],
        "eval_result_unstructured": {
            "lab_v1": {
                "metrics": {
                    "l0": l0,
                    "l1": 402.5,
                    "variance_explained": explained,
                    "variance_explained_per_dim": explained - 0.04,
                    "mse": 21.7,
                    "cosine_similarity": 0.912,
                    "l2_ratio": 0.94,
                    "relative_reconstruction_bias": 0.98,
                    "fraction_alive": 1 - dead / D_SAE,
                    "kl": kl,
                    "ce_clean": 3.1234,
                    "ce_patched": 3.1234 + 1.02 * kl,
                    "ce_delta": 1.02 * kl,
                    "ce_zero_ablated": 12.2,
                    "ce_mean_ablated": 7.4,
                    "loss_recovered": recovered,
                    "loss_recovered_mean_ablation": 2 * recovered - 1,
                    "support": 4.1 * l0,
                    "fraction_tokens_kept": 0.9766,
                    "tokens": 8128,
                },
                "interpolating": name in INTERPOLATING,
                "interpolating_fraction": float(name in INTERPOLATING),
                "density_histogram": {"log10_edges": edges, "counts": counts, "dead": dead},
                **core_evidence(name, figures),
            }
        },
    }


def probing_result(name: str) -> dict[str, Any]:
    top_1, top_5 = SAES[name][-2:]
    ours = {
        "sae_top_1_accuracy": top_1,
        "sae_top_2_accuracy": (top_1 + top_5) / 2,
        "sae_top_5_accuracy": top_5,
        "sae_full_accuracy": 0.951,
        "llm_top_1_accuracy": 0.684,
        "llm_top_2_accuracy": 0.713,
        "llm_top_5_accuracy": 0.777,
        "llm_full_accuracy": 0.962,
    }
    shift = dict(zip(TASKS, (0.05, -0.07, 0.09, -0.07), strict=True))
    stock = {key.replace("_full", "").replace("_accuracy", "_test_accuracy"): value - 0.003 for key, value in ours.items()}
    return {
        **_envelope(
            name,
            "sparse_probing",
            {
                "random_seed": 42,
                "dataset_names": list(TASKS),
                "context_length": 128,
                "probe_train_set_size": 240,
                "probe_test_set_size": 120,
                "k_values": [1, 2, 5],
            },
        ),
        "eval_result_metrics": {
            "llm": {
                **{key: value for key, value in stock.items() if key.startswith("llm")},
                "llm_top_10_test_accuracy": None,
            },
            "sae": {key: value for key, value in stock.items() if key.startswith("sae")},
        },
        "eval_result_details": [{"dataset_name": f"{task}_results", **stock} for task in TASKS],
        "eval_result_unstructured": {
            "lab_v1": {
                "metrics": ours,
                "tasks": {task: {key: value + shift[task] for key, value in ours.items()} for task in TASKS},
                **probing_evidence(ours),
            }
        },
    }


def scr_result(name: str) -> dict[str, Any]:
    return {
        **_envelope(name, "scr", {"n_values": [2, 5]}),
        "eval_result_metrics": {
            "scr_metrics": {
                "scr_metric_threshold_2": 0.101,
                "scr_metric_threshold_5": None,
                "scr_dir1_threshold_2": 0.09,
                "scr_dir2_threshold_2": 0.12,
            }
        },
        "eval_result_details": [{"dataset_name": "news", "scr_metric_threshold_2": 0.1}],
        "eval_result_unstructured": None,
    }


RESULTS = {"core": core_result, "sparse_probing": probing_result, "scr": scr_result}


class Lab:
    """A project folder with results, to be changed by a test before the reporting stages run on it."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, value: Any) -> Path:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(value if isinstance(value, str) else json.dumps(value))
        return target

    def read(self, path: str) -> Any:
        return json.loads((self.root / path).read_text())

    def status(
        self,
        name: str,
        status: str,
        message: str = "",
        skipped: dict[str, str] | None = None,
        notes: dict[str, Any] | None = None,
    ) -> None:
        self.write(
            f"eval_results/{name}/_status.json",
            {"status": status, "message": message, "skipped": skipped or {}, "notes": notes or {}},
        )

    def result(self, name: str, sae: str, value: dict[str, Any]) -> None:
        """Under the name of this evaluation, whichever one's figures they are."""
        kind = {"absorption": "absorption_first_letter"}.get(name, name)
        self.write(f"eval_results/{name}/{sae}_eval_results.json", {**value, "eval_type_id": kind})

    def disable(self, name: str) -> None:
        for path in (self.root / "eval_results" / name).glob("*"):
            path.unlink()
        self.status(name, "disabled", "switched off in params.yaml (eval_types)")

    def evaluate(self, name: str, saes: list[str] | None = None) -> None:
        self.status(name, "ok", notes={"text": "packaged"} if name == "core" else {})
        for sae in saes or list(SAES):
            self.result(name, sae, RESULTS[name](sae))

    def train(self, tokens: int = 300_000) -> None:
        for sae, scale in (("standard", 1.0), ("topk", 0.7)):
            rows = ["step\ttokens\tloss\tl0\tvariance_explained"]
            for step in range(1, 41):
                part = step / 40
                rows.append(
                    f"{step * 8}\t{int(tokens * part)}\t{scale * (900 * math.exp(-6 * part) + 60)}\t"
                    f"{scale * 60 * (1 + 9 * math.exp(-9 * part))}\t{0.8 - 0.6 * math.exp(-5 * part)}"
                )
            self.write(f"trained_saes/{sae}/training_curve.tsv", "\n".join(rows) + "\n")
        self.write(
            "trained_saes/training_report.json",
            {
                "tokens": tokens,
                "saes": {sae: {"held_out": {"l0": 40.0, "variance_explained": 0.7}} for sae in ("standard", "topk")},
            },
        )


def complete(root: Path) -> Lab:
    """Core and sparse probing finished for all SAEs, the optional ones disabled, two SAEs trained here."""
    built = Lab(root)
    built.write("params.yaml", "visualization: {dpi: 80, width_inches: 7.0, height_inches: 4.6, architectures: {}}\n")
    for name in EVALS:
        built.evaluate(name) if name in ("core", "sparse_probing") else built.disable(name)
    built.train()
    return built


STYLE = Visualization(dpi=60)


def build(lab: Lab) -> Run:
    """The run as the report reads it."""
    merge(lab.root)
    return read_run(lab.root)


def section(text: str, title: str) -> str:
    """What METRICS.md says under a heading."""
    return text.split(f"## {title}\n")[1].split("\n## ")[0]
