"""Fixtures of the training tests: a tiny model, its text, and parameters of runs that take a second."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_research.config.params import Params
from tests.helpers.tiny_model import make_tiny_model, make_tiny_text
from tests.helpers.training import HOOK, STANDARD, TOP_K


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(model folder, text folder)"""
    root = tmp_path_factory.mktemp("tiny")
    return make_tiny_model(root / "model"), make_tiny_text(root / "text")


@pytest.fixture
def make_params(tiny: tuple[Path, Path]) -> Callable[..., Params]:
    """Parameters of a tiny run, with keys of `train` overridden."""
    model, text = tiny

    def make(**train: Any) -> Params:
        return Params.model_validate(
            {
                "model": {"name": str(model), "device": "cpu"},
                "text": {"dataset": str(text), "context_size": 32},
                "train": {
                    "hook_name": HOOK,
                    "tokens": 8192,
                    "batch_size": 64,
                    "buffer_tokens": 1024,
                    "llm_dtype": "float32",
                    "precision": "float32",
                    "held_out_tokens": 512,
                    "saes": {"standard": STANDARD, "topk": TOP_K},
                    **train,
                },
            }
        )

    return make


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Caches land in the test's own folder; one thread, which is faster for tensors this small."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def planted_rows() -> torch.Tensor:
    """Normalised rows [2048, 16]: sparse sums of 24 directions about a mean."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(24, 16, generator=generator), dim=1)
    codes = torch.rand(2048, 24, generator=generator) * (torch.rand(2048, 24, generator=generator) < 0.12)
    rows = codes @ directions + 0.3
    return rows / rows.square().sum(1).mean().sqrt()
