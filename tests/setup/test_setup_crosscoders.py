"""A comparison that holds a crosscoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_research.lm import load_language_model
from sae_research.runtime.errors import UserError
from sae_research.saes import load_sae, save_sae
from sae_research.setup import run_setup
from tests.helpers.crosscoders import HOOKS, D, random_crosscoder, writing

NAMES = " + ".join(HOOKS)


def test_it_is_compared_and_tried_on_text(project: Path, make_params: Any, capsys: pytest.CaptureFixture[str]) -> None:
    made = random_crosscoder(model_name="somewhere/tiny")
    exact = writing(1, torch.zeros(3 * D))
    exact.cfg = exact.cfg.replace(model_name="somewhere/tiny")
    for name, sae in (("cross", made), ("exact", exact)):
        save_sae(sae, project / "trained_saes" / name)
    params = make_params()
    manifest = run_setup(params)
    assert NAMES in capsys.readouterr().out
    assert manifest["saes"]["cross"]["hook_name"] == NAMES and manifest["saes"]["cross"]["role"] == "comparison"
    report = json.loads((project / "downloaded_saes" / "preflight.json").read_text())
    assert report["saes"]["exact"]["variance_explained"] == pytest.approx(1, abs=1e-5)
    assert report["saes"]["cross"]["variance_explained"] < 1
    read = load_sae(project / "downloaded_saes" / "cross")
    lm = load_language_model(params.model.name, "cpu")
    tokens = torch.randint(10, 300, (2, 16), generator=torch.Generator().manual_seed(0))
    x = torch.cat([lm.activations(tokens, hook) for hook in HOOKS], dim=-1)
    assert torch.equal(read.reconstruct(x), made.reconstruct(x)) and read.cfg.hook_scales == made.cfg.hook_scales


def test_it_is_no_baseline(project: Path, make_params: Any) -> None:
    save_sae(random_crosscoder(model_name="somewhere/tiny"), project / "one")
    baseline = {"source": "folder", "path": "one", "hook_layer": 0, "name": "one"}
    with pytest.raises(UserError, match="baseline_sae: one is a crosscoder .* of a baseline of one hook"):
        run_setup(make_params(baseline_sae=baseline))
