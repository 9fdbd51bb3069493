"""What every test may use: a tiny model and its text, made once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.tiny_model import make_tiny_model, make_tiny_text


def pytest_runtest_setup(item: pytest.Item) -> None:
    """`make test-slow` takes everything in: what needs a GPU runs where one is, and says why not elsewhere."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The pipeline first: begun last, it would run alone while the other workers have nothing left to do."""
    items.sort(key=lambda item: item.path.name != "test_pipeline.py")


@pytest.fixture(scope="session")
def tiny_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `tiny/` (a random Llama) and `texts/`."""
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_model(folder / "tiny")
    make_tiny_text(folder / "texts", n_documents=1500)
    return folder


@pytest.fixture
def in_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder as the project and working directory, with caches of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    return tmp_path
