"""SAELens' own objects in a lab, as they come from `SAE.from_pretrained`."""

from __future__ import annotations

import pytest
import torch

from sae_research.analysis.patching import run_with_saes
from sae_research.analysis.sources import Lab
from sae_research.lm import LanguageModel

from .conftest import LATE

PROMPT = "the time that people use water"


@pytest.mark.slow
@pytest.mark.parametrize("normalisation", ["none", "layer_norm"])
def test_a_sae_lens_object_computes_what_it_computes_there(lm: LanguageModel, normalisation: str, in_project: object) -> None:
    """With layer_norm it cannot be folded into weights of ours and runs as it is; its decoder then is not affine over
    several inputs, which is refused."""
    from sae_lens import StandardSAE, StandardSAEConfig
    from sae_lens.saes.sae import SAEMetadata

    sae = StandardSAE(StandardSAEConfig(d_in=32, d_sae=64, normalize_activations=normalisation, metadata=SAEMetadata(
        hook_name=LATE, model_name="tiny", context_size=32, prepend_bos=True)))
    torch.nn.init.normal_(sae.W_enc)
    lab = Lab.of({"theirs": sae}, lm)
    tokens = lab.tokens(PROMPT)
    seen = run_with_saes(lab, tokens).saes["theirs"]
    mask = seen.mask[..., None]
    with torch.no_grad():
        torch.testing.assert_close(seen.reconstruction * mask, sae(seen.input) * mask, atol=1e-4, rtol=1e-4)
