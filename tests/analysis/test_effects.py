"""Latents chosen by measured effect, against plain runs of the model with the edit written out."""

from __future__ import annotations

import numpy as np
import pytest

from sae_research.analysis.attribute import ablate
from sae_research.analysis.context import AnalysisContext
from sae_research.analysis.effects import carriers, search_by_effect
from sae_research.lm import LanguageModel
from sae_research.runtime.errors import UserError
from sae_research.saes.pursuit.encoders import IHTPSAE
from tests.helpers.analysis import LATE
from tests.helpers.tiny_saes import D_SAE, tiny_sae

PROMPT = "the time that people use water"


@pytest.fixture
def targets(analysis: AnalysisContext) -> list[str]:
    """Two texts that are one token each."""
    texts = dict.fromkeys(analysis.lm.tokenizer.decode([i]) for i in analysis.tokens(PROMPT)[0, 1:].tolist())
    return list(texts)[:2]


def test_effects_are_those_of_plain_runs(analysis: AnalysisContext, lm: LanguageModel, targets: list[str]) -> None:
    found = search_by_effect(analysis, PROMPT, targets, k=D_SAE, strength=2.0, candidates=D_SAE)
    sae, stats = analysis.saes["late"], analysis.stats("late")
    tokens, wanted = analysis.tokens(PROMPT), [analysis.token(text) for text in targets]
    x = lm.activations(tokens, LATE)
    mask = analysis.mask(tokens, x)[..., None]
    plain = lm.logits(tokens)[0, -1].log_softmax(-1)
    assert {row.latent for row in found} == set(np.flatnonzero(stats.count).tolist())
    assert [row.effect for row in found] == sorted((row.effect for row in found), reverse=True)
    for row in found[::7]:
        edit = 2.0 * float(stats.max[row.latent]) * sae.W_dec[row.latent]
        after = lm.patched_logits(tokens, LATE, lambda x, edit=edit: x + mask * edit)[0, -1].log_softmax(-1)
        assert row.before == pytest.approx(float(plain[wanted].exp().sum()), rel=1e-4)
        assert row.after == pytest.approx(float(after[wanted].exp().sum()), rel=1e-4)
        assert row.effect == pytest.approx(float(np.log(row.after / row.before)), abs=1e-4)
        assert row.kl == pytest.approx(float((plain.exp() * (plain - after)).sum()), rel=1e-2, abs=1e-6)
        assert row.top == lm.tokenizer.decode([int(after.argmax())])
        # the estimate is the slope: the same edit, a thousandth as strong
        small = lm.patched_logits(tokens, LATE, lambda x, edit=edit: x + 1e-3 * mask * edit)[0, -1].log_softmax(-1)
        slope = float(small[wanted].logsumexp(-1) - plain[wanted].logsumexp(-1)) * 1e3
        assert row.estimate == pytest.approx(slope, rel=0.05, abs=2e-2)
    best = search_by_effect(analysis, PROMPT, targets, k=3, strength=2.0)
    assert [row.latent for row in best] == [row.latent for row in found[:3]]


def test_carriers_are_what_ablation_measures(analysis: AnalysisContext, targets: list[str]) -> None:
    found = carriers(analysis, PROMPT, targets[0], k=4, tried=D_SAE)
    rows = {
        row.latents[0]: -row.answer_log_probability_change
        for row in ablate(analysis, PROMPT, range(D_SAE), targets[0])
        if row.error_term and len(row.latents) == 1
    }
    best = sorted((latent for latent in rows if rows[latent] > 1e-6), key=lambda latent: -rows[latent])[:4]
    assert [row.latent for row in found] == best
    for row in found:
        assert row.measured == pytest.approx(rows[row.latent], abs=1e-4)


def test_log_probabilities_stand_beside_logits(analysis: AnalysisContext, lm: LanguageModel, targets: list[str]) -> None:
    plain, *rows = ablate(analysis, PROMPT, [60, 61], targets[0])
    logits = lm.logits(analysis.tokens(PROMPT))[0, -1]
    assert plain.answer_log_probability == pytest.approx(float(logits.log_softmax(-1)[analysis.token(targets[0])]), abs=1e-5)
    assert plain.answer_log_probability_change == 0
    for row in (plain, *rows):
        assert row.answer_log_probability == pytest.approx(np.log(row.answer_probability), abs=1e-4)
    whole = next(row for row in rows if row.error_term is False and not row.latents)
    without = next(row for row in rows if row.error_term is False and row.latents == [60])
    assert without.answer_log_probability_change == pytest.approx(
        without.answer_log_probability - whole.answer_log_probability, abs=1e-5
    )


def test_refusals(analysis: AnalysisContext, lm: LanguageModel) -> None:
    with pytest.raises(UserError, match="name at least one token"):
        search_by_effect(analysis, PROMPT, [])
    base = tiny_sae("standard")
    iht = IHTPSAE(base.W_dec, base.b_dec, 3, base.cfg.replace(form="ihtp", base="standard", options={"k": 3}))
    with pytest.raises(UserError, match="cannot steer"):
        search_by_effect(AnalysisContext.of({"standard_ihtp_k3": iht}, lm, analysis.params), PROMPT, ["the"])
