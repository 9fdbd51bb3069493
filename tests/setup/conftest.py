"""A project folder with a tiny model, tiny texts and two trained SAEs, in which the stage runs in a
second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sae_research.config.params import Params
from sae_research.saes import save_sae
from tests.helpers.tiny_saes import tiny_sae


@pytest.fixture
def tiny(tiny_inputs: Path) -> Path:
    """A folder that holds `tiny` (model) and `texts`."""
    return tiny_inputs


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
        return Params.model_validate(
            {
                "model": {"name": str(tiny / "tiny"), "device": "cpu"},
                "text": {"dataset": str(tiny / "texts"), "context_size": 32},
                "sae_variants": {"ihtp": {"k_values": [1, 2]}, "mpsae": {"s_values": [3, 5]}, "omp": {"enabled": False}},
                "comparison_saes": {"trained": ["all"]},
                "controls": {"s": 4, "pca_components": 8},
                "preflight": {"tokens": 256},
                **sections,
            }
        )

    return make
