"""What the experiment tests share besides fixtures: a small params.yaml, and SAE-Interpretability's published examples."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

ROOT = Path(__file__).parents[2]
TRAIN = {
    "hook_name": "blocks.1.hook_resid_post",
    "tokens": 3000,
    "held_out_tokens": 240,
    "evaluate_tokens": 240,
    "batch_size": 256,
    "buffer_tokens": 1024,
    "llm_dtype": "float32",
    "saes": {
        "standard": {"recipe": "standard", "d_sae": 64, "l1_coefficient": 0.1},
        "topk": {"recipe": "top_k", "d_sae": 64, "k": 4},
    },
}
ENV = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "DVC_NO_ANALYTICS": "1"}
ENV.pop("DVC_ROOT", None)


def tiny_params(inputs: Path) -> dict[str, Any]:
    """The repository's own params.yaml, made small."""
    values = YAML(typ="safe").load((ROOT / "params.yaml").read_text())
    values["model"] |= {"name": str(inputs / "tiny"), "device": "cpu", "llm_batch_size": 8}
    values["text"] |= {"dataset": str(inputs / "texts"), "context_size": 24}
    values["train"] |= TRAIN
    values["baseline_sae"] |= {"hook_layer": 1}
    values["controls"] |= {"names": ["random"], "s": 4, "pca_components": 8}
    values["preflight"] |= {"tokens": 240}
    values["core_eval"] |= {
        "batch_size_prompts": 3,
        "n_eval_reconstruction_batches": 1,
        "n_eval_sparsity_variance_batches": 2,
    }
    return values


def run(project: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=project, env=ENV, capture_output=True, text=True, check=False)


def verb(project: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(project, sys.executable, "-m", "sae_research", *arguments)


README_CONFIG = """
wandb_project: "my-project"
wandb_run_name: null
wandb_tags: ["relu"]
seed: 42
tlens_model_name: "roneneldan/TinyStories-1M"
tlens_model_path: null
lr: 1e-3
lr_schedule: "cosine"
gradient_accumulation_steps: 20
warmup_samples: 20_000
max_grad_norm: 1.0
data:
  dataset_name: "org/tokens"
  tokenizer_name: "roneneldan/TinyStories"
  context_length: 1024
  n_train_samples: 100_000
  train_batch_size: 20
saes:
  sae_type: "relu"
  dict_size_to_input_ratio: 32.0
  sparsity_coeff: 0.1
  sae_positions: ["blocks.2.hook_resid_pre", "blocks.4.hook_resid_pre"]
"""
README_SWEEP = """
learning_rates: [1e-4, 3e-4, 1e-3]
gradient_accumulation_steps: [20, 40]
n_train_samples: [50_000, 100_000]
train_batch_size: [20, 40]
sparsity_coeffs: [0.01, 0.03, 0.1]
dict_size_ratios: [16.0, 32.0, 64.0]
sae_specific:
  aux_coeffs: [0.03125, 0.0625]
  initial_betas: [0.5, 1.0]
  input_dependent_gates: [true, false]
max_experiments: 20
"""
