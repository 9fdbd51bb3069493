"""The same on CUDA as on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sae_research.analysis.attribute import attribute, check_by_ablation, logit_difference
from sae_research.analysis.context import AnalysisContext
from sae_research.analysis.steer import steer
from sae_research.config.params import Params
from sae_research.lm import load_language_model
from tests.helpers.analysis import biased

PROMPT = "the time that people use water"


@pytest.mark.gpu
def test_cuda_agrees_with_the_cpu(tiny_inputs: Path, params: Params, in_project: Path) -> None:
    analyses = [
        AnalysisContext.of({"late": biased("standard")}, load_language_model(str(tiny_inputs / "tiny"), device), params)
        for device in ("cpu", "cuda")
    ]
    counts = [analysis.stats("late").count for analysis in analyses]
    assert np.abs(counts[0] - counts[1]).max() <= 2
    shares = [attribute(analysis, PROMPT, logit_difference(5, 9)) for analysis in analyses]
    torch.testing.assert_close(shares[0].saes["late"].latents, shares[1].saes["late"].latents, atol=1e-3, rtol=1e-2)
    assert check_by_ablation(analyses[1], "late", PROMPT, shares[1], logit_difference(5, 9), 8).correlation is not None
    found = [
        steer(analysis, PROMPT, 60, [3.0], seeds=[0], n_tokens=6, neutral_tokens=64, temperature=0) for analysis in analyses
    ]
    assert found[1].strengths[1].kl == pytest.approx(found[0].strengths[1].kl, rel=0.02)
