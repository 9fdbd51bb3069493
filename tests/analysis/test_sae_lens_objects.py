"""SAELens' own objects in an analysis, loaded by `SAE.from_pretrained`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_research.analysis.context import AnalysisContext
from sae_research.analysis.prompt import run_with_saes
from sae_research.lm import LanguageModel
from sae_research.runtime.errors import UserError
from sae_research.saes.foreign import ForeignSAE
from tests.helpers.analysis import LATE

PROMPT = "the time that people use water"


def made(architecture: str, **options: Any) -> Any:
    import sae_lens
    from sae_lens.saes.sae import SAEMetadata

    config = getattr(sae_lens, f"{architecture}Config")(
        d_in=32,
        d_sae=64,
        metadata=SAEMetadata(hook_name=LATE, model_name="tiny", context_size=32, prepend_bos=True),
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sae = getattr(sae_lens, architecture)(config)
        torch.nn.init.normal_(sae.W_enc)
        sae.W_dec.data = torch.nn.functional.normalize(sae.W_enc.data.T, dim=1)
    return sae


@pytest.mark.slow
@pytest.mark.parametrize("architecture, options, ours", [("StandardSAE", {}, True), ("AbsTopKSAE", {"k": 4}, False)])
def test_it_computes_what_it_computes_there(
    lm: LanguageModel, in_project: object, architecture: str, options: dict[str, Any], ours: bool
) -> None:
    """Converted where this project has the form, run as it is where not."""
    sae = made(architecture, **options)
    analysis = AnalysisContext.of({"theirs": sae}, lm)
    assert isinstance(analysis.saes["theirs"], ForeignSAE) != ours
    seen = run_with_saes(analysis, analysis.tokens(PROMPT)).saes["theirs"]
    mask = seen.mask[..., None]
    with torch.no_grad():
        torch.testing.assert_close(seen.reconstruction * mask, sae(seen.input) * mask, atol=1e-4, rtol=1e-4)
    assert analysis.saes["theirs"].signed == (architecture == "AbsTopKSAE") and analysis.saes["theirs"].per_token


@pytest.mark.slow
def test_a_scaled_input_is_refused(lm: LanguageModel, in_project: object) -> None:
    with pytest.raises(UserError, match="every token is scaled by its own norm"):
        AnalysisContext.of({"theirs": made("StandardSAE", normalize_activations="layer_norm")}, lm)
