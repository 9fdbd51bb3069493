"""Attribution: shares add up, agree with ablations where the model is linear, and integrated gradients are complete."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sae_research.analysis.attribute import (
    attribute,
    check_by_ablation,
    log_probability,
    logit_difference,
    long_table,
    prompt_metric,
)
from sae_research.analysis.context import AnalysisContext
from sae_research.config.params import Params
from sae_research.lm import LanguageModel
from sae_research.runtime.errors import UserError
from tests.helpers.analysis import EARLY, LATE, biased

PROMPT = "the time that people use water before your long little day"


@pytest.mark.parametrize("metric", [logit_difference(5, 9), log_probability(7), lambda logits: logits.square().mean((1, 2))])
def test_shares_add_up_to_the_whole(two: AnalysisContext, metric: object) -> None:
    found = attribute(two, PROMPT, metric, hooks=["blocks.0.hook_mlp_out", LATE])
    tokens = two.tokens(PROMPT)
    for name, hook in (("early", EARLY), ("late", LATE)):
        x = two.lm.activations(tokens, hook).requires_grad_()
        with torch.enable_grad():
            g = torch.autograd.grad(metric(two.lm.resume(hook, x, tokens)).sum(), x)[0]
        shares = found.saes[name]
        whole = float((x.detach() * g).sum())
        assert shares.total == pytest.approx(whole, rel=1e-3, abs=1e-4)
        assert float((shares.reconstruction + shares.error + shares.bias).sum()) == pytest.approx(whole, rel=1e-3, abs=1e-4)
        assert shares.error.abs().sum() > 0 and shares.latents.abs().sum() > 0
        per_token = (x * g).sum(-1)[0].detach()
        torch.testing.assert_close(shares.reconstruction + shares.error + shares.bias, per_token, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found.hooks[LATE], per_token, atol=1e-3, rtol=1e-3)
    assert set(found.hooks) == {"blocks.0.hook_mlp_out", LATE}
    assert found.metric == pytest.approx(float(metric(two.lm.logits(tokens))[0]), rel=1e-4)


def test_the_error_share_is_not_a_constant(two: AnalysisContext) -> None:
    """The ratio of gradient norms that circulates is 1/2 for every SAE; signed shares differ between a poor SAE and one
    that explains more."""
    shares = attribute(two, PROMPT, logit_difference(5, 9)).saes
    fractions = [float(s.error.sum()) / s.total for s in shares.values()]
    assert abs(fractions[0] - fractions[1]) > 0.01 and all(abs(f - 0.5) > 1e-3 for f in fractions)


def test_integrated_gradients_are_complete(analysis: AnalysisContext) -> None:
    metric, tokens = logit_difference(5, 9), analysis.tokens(PROMPT)
    x = analysis.lm.activations(tokens, LATE)
    start = torch.where(analysis.mask(tokens, x)[..., None], analysis.saes["late"].b_dec, x)
    ends = [float(metric(analysis.lm.resume(LATE, end, tokens))) for end in (start, x)]
    gaps = []
    for steps in (2, 32):
        shares = attribute(analysis, PROMPT, metric, steps=steps).saes["late"]
        assert shares.total == pytest.approx(ends[1] - ends[0], abs=1e-4) and float(shares.bias.sum()) == 0
        gaps.append(abs(float((shares.reconstruction + shares.error).sum()) - shares.total))
    assert gaps[1] < 0.05 * abs(shares.total), gaps
    assert gaps[1] <= gaps[0] + 1e-4


def test_the_check_measures_real_ablations(lm: LanguageModel, params: Params, analysis: AnalysisContext) -> None:
    metric = logit_difference(5, 9)
    found = attribute(analysis, PROMPT, metric)
    check = check_by_ablation(analysis, "late", PROMPT, found, metric, n_latents=12)
    tokens, sae = analysis.tokens(PROMPT), analysis.saes["late"]
    x = lm.activations(tokens, LATE)
    z = sae.encode(x, analysis.mask(tokens, x))
    for latent, effect in list(zip(check.latents.tolist(), check.measured.tolist(), strict=True))[:4]:
        without = x - z[..., latent, None] * sae.W_dec[latent]
        by_hand = float(metric(lm.logits(tokens)) - metric(lm.resume(LATE, without, tokens)))
        assert effect == pytest.approx(by_hand, rel=1e-3, abs=1e-3)
    # latents too weak to bend the model: the linear estimate is right
    small = biased("standard")
    small.W_enc.mul_(1e-3)
    small.b_enc.copy_(torch.linspace(-1e-3, 1e-3, len(small.b_enc)))
    weak = AnalysisContext.of({"late": small}, lm, params)
    check = check_by_ablation(weak, "late", PROMPT, attribute(weak, PROMPT, metric), metric, n_latents=12)
    assert check.correlation > 0.99 and check.sign_agreement > 0.9
    np.testing.assert_allclose(check.attributed, check.measured, atol=0.2 * np.abs(check.measured).max())


def test_long_table_holds_every_share(analysis: AnalysisContext) -> None:
    found = attribute(analysis, PROMPT)
    rows = long_table(found)
    assert sum(row["share"] for row in rows) == pytest.approx(found.saes["late"].total, rel=1e-3, abs=1e-4)
    assert abs(rows[0]["share"]) >= abs(rows[-1]["share"])


def test_refusals(analysis: AnalysisContext) -> None:
    with pytest.raises(UserError, match="one number per sequence"):
        attribute(analysis, PROMPT, lambda logits: logits.sum())
    with pytest.raises(UserError, match="NaN or infinite"):
        attribute(analysis, PROMPT, lambda logits: logits[:, -1, 0] / 0)
    with pytest.raises(UserError, match="--against needs --answer"):
        prompt_metric(analysis, None, "the", analysis.tokens(PROMPT))
    with pytest.raises(UserError, match="the model has layers 0 to"):
        attribute(analysis, PROMPT, hooks=["blocks.9.hook_resid_post"])
