"""Evaluations of SAEs in memory: any torch module, without the pipeline."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sae_research.config.params import Params
from sae_research.evaluate import evaluate
from sae_research.lm import LanguageModel, load_language_model
from sae_research.runtime.errors import UserError
from sae_research.saes import SAEConfig, form_class, save_sae

HOOK, D, F = "blocks.1.hook_resid_post", 32, 64


class Mine(torch.nn.Module):
    """A user's module that knows nothing of this project."""

    def __init__(self, W_enc: torch.Tensor, W_dec: torch.Tensor) -> None:
        super().__init__()
        self.W_enc, self.W_dec = torch.nn.Parameter(W_enc), torch.nn.Parameter(W_dec)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.W_enc).relu()

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        return z @ self.W_dec


@pytest.fixture(scope="module")
def lm(tiny_inputs: Path) -> LanguageModel:
    return load_language_model(str(tiny_inputs / "tiny"), device="cpu")


@pytest.fixture
def params(tiny_inputs: Path) -> Params:
    return Params.model_validate(
        {
            "model": {"name": str(tiny_inputs / "tiny"), "device": "cpu"},
            "text": {"dataset": str(tiny_inputs / "texts"), "context_size": 24},
            "core_eval": {
                "batch_size_prompts": 3,
                "n_eval_reconstruction_batches": 1,
                "n_eval_sparsity_variance_batches": 2,
            },
            "meta_sae": {"train_steps": 5, "train_batch_size": 32},
        }
    )


def test_a_module_scores_as_the_same_sae_of_ours(in_project: Path, lm: LanguageModel, params: Params) -> None:
    torch.manual_seed(0)
    W_enc, W_dec = torch.randn(D, F) / 8, torch.nn.functional.normalize(torch.randn(F, D), dim=1)
    cfg = SAEConfig(form="standard", d_in=D, d_sae=F, model_name=lm.name, hook_name=HOOK)
    save_sae(
        form_class("standard")(cfg, W_enc=W_enc, W_dec=W_dec, b_enc=torch.zeros(F), b_dec=torch.zeros(D)),
        in_project / "ours",
    )
    found = evaluate(
        {"mine": Mine(W_enc, W_dec), "ours": in_project / "ours"},
        lm,
        params,
        hook=HOOK,
        evaluations=("core", "meta_sae"),
        folder=in_project / "out",
    )
    assert found["mine"]["core"]["l0"] == found["ours"]["core"]["l0"] > 1
    assert found["mine"]["core"]["kl"] == pytest.approx(found["ours"]["core"]["kl"], rel=1e-3)
    assert found["mine"]["meta_sae"] and found["ours"]["meta_sae"]
    assert json.loads((in_project / "out/core/mine_eval_results.json").read_text())["eval_type_id"] == "core"
    with pytest.raises(UserError, match=r"unknown evaluation 'cor', did you mean core\?"):
        evaluate({"mine": Mine(W_enc, W_dec)}, lm, params, hook=HOOK, evaluations=["cor"])
    with pytest.raises(UserError, match="'My SAE' may hold only"):
        evaluate({"My SAE": Mine(W_enc, W_dec)}, lm, params, hook=HOOK)


def test_a_class_of_a_notebook_has_no_source_and_no_cached_result() -> None:
    code = (
        "from sae_research.saes.registry import code_fingerprint as f; Mine = type('Mine', (), {}); "
        "print(f(classes=[Mine]) != f(classes=[Mine]))"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "True"
