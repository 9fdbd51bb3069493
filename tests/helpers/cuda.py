"""On which devices a test of CUDA runs, and what of the registries has nothing to run there.

Tests take the parameter `DEVICES`: the simulated device, everywhere; a real one where it is (`-m gpu`, `make gpu`).
"""

from __future__ import annotations

import argparse
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from sae_research.cli import analyze
from sae_research.config.evaluations import EVALUATIONS
from sae_research.saes import registry
from sae_research.training import RECIPES
from tests.helpers.simulated_cuda import simulated_cuda

DEVICES = [pytest.param("simulated", id="simulated"), pytest.param("cuda", id="cuda", marks=pytest.mark.gpu)]


@contextmanager
def cuda(device: str) -> Generator[None]:
    """ "cuda" is there for the length of the block, simulated or real. A machine with a GPU runs the real one only."""
    if device == "cuda":
        yield
        return
    if torch.cuda.is_available():
        pytest.skip("a real CUDA device is here")
    with simulated_cuda():
        yield


def verbs() -> list[str]:
    """Every verb of `analyze`."""
    parser = argparse.ArgumentParser()
    analyze.fill(parser)
    return [name for action in parser._subparsers._group_actions for name in action.choices]  # type: ignore[union-attr]


REGISTRIES: dict[str, Iterable[str]] = {
    "encoder": registry,
    "recipe": RECIPES,
    "evaluation": EVALUATIONS,
    "analysis verb": verbs(),
}
"""What is covered: every entry has a test on the device, or stands in `NOT_APPLICABLE`."""
NOT_APPLICABLE: dict[str, dict[str, str]] = {
    "encoder": {},
    "recipe": {},
    "evaluation": {},
    "analysis verb": {"saes": "lists files and releases; no tensor is made"},
}
"""By registry: entry -> why nothing of it runs on a device."""


def covered(kind: str, quick: Iterable[str] | None = None) -> list[Any]:
    """The entries of a registry as parameters of a test; where `quick` is given, all others are marked slow."""
    left = [name for name in REGISTRIES[kind] if name not in NOT_APPLICABLE[kind]]
    return [pytest.param(name, marks=[] if quick is None or name in quick else [pytest.mark.slow]) for name in left]
