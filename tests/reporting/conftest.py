"""Synthetic result folders in SAE Bench 0.6.0's shape, with our block beside: a small but complete lab."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae_research.reporting.metrics import EVALS
from tests.helpers.results import (
    Lab,
)


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """Core and sparse probing finished for all SAEs, the optional ones disabled, two SAEs trained here."""
    built = Lab(tmp_path)
    built.write("params.yaml", "visualization: {dpi: 80, width_inches: 7.0, height_inches: 4.6, architectures: {}}\n")
    for name in EVALS:
        built.evaluate(name) if name in ("core", "sparse_probing") else built.disable(name)
    built.train()
    return built
