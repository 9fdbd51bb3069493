"""The tiny model with SAEs in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae_research.analysis.context import AnalysisContext
from sae_research.config.params import Params
from sae_research.lm import LanguageModel, load_language_model
from tests.helpers.analysis import EARLY, SIZE, biased


@pytest.fixture(scope="module")
def lm(tiny_inputs: Path) -> LanguageModel:
    return load_language_model(str(tiny_inputs / "tiny"), "cpu")


@pytest.fixture
def params(tiny_inputs: Path) -> Params:
    return Params(
        text={"dataset": str(tiny_inputs / "texts"), "context_size": SIZE},
        model={"llm_batch_size": 8, "name": str(tiny_inputs / "tiny"), "device": "cpu"},
        analysis={"tokens": 4_000, "split": "sae_train", "top_contexts": 4},
    )


@pytest.fixture
def analysis(lm: LanguageModel, params: Params, in_project: Path) -> AnalysisContext:
    """One SAE."""
    return AnalysisContext.of({"late": biased("standard")}, lm, params)


@pytest.fixture
def two(lm: LanguageModel, params: Params, in_project: Path) -> AnalysisContext:
    """Two SAEs at two hooks."""
    return AnalysisContext.of({"early": biased("topk", hook=EARLY, seed=1), "late": biased("standard")}, lm, params)
