"""Synthetic result folders in SAE Bench 0.6.0's shape, with our block beside: a small but complete lab."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.results import Lab, complete
from tests.helpers.sites import ground_truth, written_site


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """Core and sparse probing finished for all SAEs, the optional ones disabled, two SAEs trained here."""
    return complete(tmp_path)


@pytest.fixture(scope="module")
def site_lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The same with ground truth and its results site, written once: only to be read."""
    built = complete(tmp_path_factory.mktemp("site"))
    ground_truth(built)
    written_site(built)
    return built
