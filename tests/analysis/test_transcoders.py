"""What analysis shows of a transcoder, and what it refuses because it would edit the hook that is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_research.analysis.attribute import ablate, attribute
from sae_research.analysis.context import AnalysisContext
from sae_research.analysis.prompt import direct_logits, search_by_prompt
from sae_research.analysis.steer import steer
from sae_research.config.params import Params
from sae_research.lm import LanguageModel
from sae_research.runtime.errors import UserError
from tests.helpers.transcoders import READ, WRITTEN, random_transcoder

PROMPT = "the people made two long days"


@pytest.fixture
def analysis(lm: LanguageModel, params: Params, in_project: Path) -> AnalysisContext:
    return AnalysisContext.of({"one": random_transcoder(skip=True)}, lm, params)


def test_latents_are_shown(analysis: AnalysisContext) -> None:
    _, sae = analysis.only
    tokens = analysis.tokens(PROMPT)
    acts = analysis.lm.activations(tokens, READ).float()
    z = sae.encode(acts, analysis.mask(tokens, acts))[0]
    found = search_by_prompt(analysis, PROMPT, 3)
    assert found and all((z[:, latent.latent] > 0).any() for latent in found)
    head: Any = analysis.lm.model.get_output_embeddings()
    gain = analysis.lm.model.model.norm.weight
    torch.testing.assert_close(
        direct_logits(analysis, sae, [3]), (sae.W_dec[3] * gain @ head.weight.T)[None], atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("what", "act"),
    [
        ("steering", lambda analysis: steer(analysis, PROMPT, 3)),
        ("attribution", lambda analysis: attribute(analysis, PROMPT)),
        ("a run with the reconstruction in place", lambda analysis: ablate(analysis, PROMPT, [3])),
    ],
)
def test_what_edits_the_hook_it_reads_is_refused(
    what: str, act: Callable[[AnalysisContext], Any], analysis: AnalysisContext
) -> None:
    with pytest.raises(UserError, match=f"{what} edits .* a transcoder .{READ} -> {WRITTEN}. writes others"):
        act(analysis)
