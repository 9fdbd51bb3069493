"""A project folder with a tiny model, tiny texts and two trained SAEs, in which the stage runs in a
second."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # tests/hub_server.py, tests/tiny_model.py

from tiny_model import make_tiny_model, make_tiny_text

from sae_research.params import Params
from sae_research.saes import SAEConfig, SparseAutoencoder, form_class, save_sae

D_IN, D_SAE, HOOK = 32, 64, "blocks.1.hook_resid_post"


def tiny_sae(form: str = "standard", seed: int = 0, **config: Any) -> SparseAutoencoder:
    """A random SAE for the tiny model's residual stream after layer 1."""
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_IN, generator=g), dim=1)
    options = {"k": 4} if form == "topk" else {}
    cls = form_class(form)
    cfg = SAEConfig(form=form, d_in=D_IN, d_sae=D_SAE, options=options,
                    **{"model_name": "somewhere/tiny", "hook_name": HOOK, **config})
    return cls(
        cfg,
        W_enc=W_dec.T.contiguous(),
        W_dec=W_dec,
        b_enc=torch.zeros(D_SAE),
        b_dec=torch.zeros(D_IN),
        **options,
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds `tiny` (model) and `texts`."""
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_model(folder / "tiny")
    make_tiny_text(folder / "texts", n_documents=1500)
    return folder


@pytest.fixture
def project(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project to work in, with trained_saes/standard and trained_saes/topk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    save_sae(tiny_sae(), tmp_path / "trained_saes" / "standard")
    save_sae(tiny_sae("topk", seed=1), tmp_path / "trained_saes" / "topk")
    return tmp_path


@pytest.fixture
def make_params(tiny: Path) -> Any:
    """Parameters of the tiny project; keyword arguments replace whole sections."""

    def make(**sections: Any) -> Params:
        return Params.model_validate({
            "model": {"name": str(tiny / "tiny"), "device": "cpu"},
            "text": {"dataset": str(tiny / "texts"), "context_size": 32},
            "sae_variants": {"ihtp": {"k_values": [1, 2]}, "mpsae": {"s_values": [3, 5]}},
            "comparison_saes": {"trained": ["all"]},
            "controls": {"s": 4, "pca_components": 8}, "preflight": {"tokens": 256}, **sections})

    return make
