"""A repository with this code, small enough to run the whole DAG through the real `dvc` in a test."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
ENV = os.environ | {
    "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    "DVC_NO_ANALYTICS": "1",
    "GIT_AUTHOR_NAME": "t",
    "GIT_AUTHOR_EMAIL": "t@example.com",
    "GIT_COMMITTER_NAME": "t",
    "GIT_COMMITTER_EMAIL": "t@example.com",
    "OMP_NUM_THREADS": "1",  # a second thread costs more than these sizes gain
}
ENV.pop("DVC_ROOT", None)

TINY: dict[str, Any] = {
    "text": {"context_size": 24},
    "model": {"device": "cpu", "llm_batch_size": 8},
    "train": {
        "hook_name": "blocks.1.hook_resid_post",
        "tokens": 3000,
        "held_out_tokens": 240,
        "batch_size": 256,
        "buffer_tokens": 1024,
        "llm_dtype": "float32",
        "saes": {
            "standard": {"recipe": "standard", "d_sae": 64, "l1_coefficient": 0.1},
            "topk": {"recipe": "top_k", "d_sae": 64, "k": 4},
        },
    },
    "baseline_sae": {"hook_layer": 1},
    "sae_variants": {"ihtp": {"k_values": [1]}, "mpsae": {"s_values": [3]}, "omp": {"s_values": [2]}},
    "comparison_saes": {"python": ["custom_saes.example:AbsTopK"]},
    "controls": {"s": 4, "pca_components": 8},
    "preflight": {"tokens": 240},
    "core_eval": {"batch_size_prompts": 3, "n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 2},
    "sparse_probing": {
        "dataset_names": ["product_sentiment"],
        "probe_train_set_size": 24,
        "probe_test_set_size": 16,
        "context_length": 32,
        "k_values": [1, 5],
    },
    "ground_truth": {
        "data": {"num_features": 48, "hidden_dim": 24, "hierarchy_roots": 6, "min_probability": 0.02},
        "samples": 1024,
        "test_samples": 1024,
        "n_seeds": 2,
        "pursuit": {"encoders": ["ihtp", "mpsae"], "sizes": [3]},
    },
}
SAES = [
    "standard",
    "standard_ihtp_k1",
    "standard_mpsae_s3",
    "standard_omp_s2",
    "topk",
    "abs_topk",
    "control_random",
    "control_data_rows",
    "control_pca",
]


def run(project: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=project, env=ENV, capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        pytest.fail(f"{' '.join(command)} exited with {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def merge(target: dict[str, Any], values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict) and isinstance(target.get(key), dict) and key != "saes":
            merge(target[key], value)
        else:
            target[key] = value


def set_params(project: Path, values: dict[str, Any]) -> None:
    yaml, path = YAML(), project / "params.yaml"
    params = yaml.load(path.read_text())
    merge(params, values)
    with path.open("w") as handle:
        yaml.dump(params, handle)


def read(project: Path, path: str) -> Any:
    return json.loads((project / path).read_text())


def copy_files(folder: Path) -> None:
    """This project's files without results, as Git would track them."""
    files = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file() and not name.startswith(("metrics/", "images/", "report/", "METRICS.md", "dvc.lock")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def make_project(folder: Path, tiny_inputs: Path) -> Path:
    """A repository with this code and no results, whose parameters name the tiny model and its text."""
    copy_files(folder)
    set_params(
        folder,
        TINY
        | {
            "model": TINY["model"] | {"name": str(tiny_inputs / "tiny")},
            "text": TINY["text"] | {"dataset": str(tiny_inputs / "texts")},
        },
    )
    run(folder, "git", "init", "-q")
    run(folder, "git", "config", "user.name", "t")  # DVC reads the identity from the repository, not the environment
    run(folder, "git", "config", "user.email", "t@example.com")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "tiny")
    return folder
