"""Subspaces of latents and label-free explanations, on stores whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from sae_research.analysis.context import AnalysisContext
from sae_research.analysis.explain import Explainer, as_json, explain_latents, logit_tail, ranking_scores
from sae_research.analysis.subspace import by_word, firing_together, subspace
from sae_research.config.params import Params
from sae_research.lm import LanguageModel
from sae_research.runtime.errors import UserError
from sae_research.saes import SparseAutoencoder
from tests.helpers.analysis import LATE, biased

ON_TOKEN, AFTER_TOKEN, LATE_HALF, ANYWHERE = 0, 1, 2, 3


class ByRule(SparseAutoencoder):
    """Latent 0 fires on one token, latent 1 after it, latent 2 in the second half of a context, latent 3 by chance."""

    form = "by_rule"
    tensor_names = ("W_dec", "b_dec")
    per_token = False

    def encode(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        z = torch.zeros(*x.shape[:2], self.cfg.d_sae)
        on = self.tokens[self.batch : self.batch + len(x)] == self.wanted
        z[..., ON_TOKEN] = on * 2.0
        z[:, 1:, AFTER_TOKEN] = on[:, :-1] * 3.0
        z[:, x.shape[1] // 2 :, LATE_HALF] = 1.0
        z[..., ANYWHERE] = (torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(self.batch)) < 0.05).float()
        self.batch += len(x)
        return self.keep(z, mask)


@pytest.fixture
def known(lm: LanguageModel, params: Params, in_project: object) -> AnalysisContext:
    """An SAE whose latents follow rules, and the word it fires on."""
    from sae_research.text.tokens import token_contexts

    base = biased("standard")
    sae = ByRule(base.cfg.replace(form="by_rule", options={}), W_dec=base.W_dec, b_dec=base.b_dec)
    sae.tokens = token_contexts(lm.tokenizer, lm.separator_id, params.text, "sae_train", 4_000).tokens
    ids, counts = sae.tokens.unique(return_counts=True)
    sae.wanted, sae.batch = int(ids[counts.argsort(descending=True)[3]]), 0
    return AnalysisContext.of({"known": sae}, lm, params)


def test_rules_are_found_and_score_as_they_should(known: AnalysisContext) -> None:
    explainer = Explainer(known.stats("known"))
    word = known.lm.tokenizer.decode([known.saes["known"].wanted])
    on, after, late, chance = (explainer.explain(latent) for latent in range(4))
    assert on.best == "token" and on.rules["token"].auc == 1 and on.rules["token"].average_precision == 1
    assert on.purity == 1 and on.token_entropy == pytest.approx(0) and on.by_pmi[0].token == word
    assert on.by_mean[0].mean == pytest.approx(2.0) and on.by_mean[0].firings == on.by_mean[0].occurrences
    assert on.by_pmi[0].pmi == pytest.approx(-np.log2(on.density), abs=0.3)
    assert repr(word) in on.words
    assert after.best == "previous token" and after.rules["previous token"].auc > 0.99 > 0.8 > after.rules["token"].auc
    assert late.best == "position" and late.rules["position"].auc > 0.95 and late.position > 0.6
    assert max(rule.auc for rule in chance.rules.values()) < 0.65
    assert explainer.explain(10) is None, "a latent that never fires has no explanation"


def test_explain_latents_and_their_logits(analysis: AnalysisContext) -> None:
    found = explain_latents(analysis, "late")
    store = analysis.stats("late")
    assert {e.latent for e in found} <= set(np.flatnonzero(store.count).tolist()) and len(found) > 10
    for e in found[:3]:
        assert e.promoted and as_json(e)["rules"].keys() == e.rules.keys()
        held = store.activations(e.latent)[0]
        test = np.asarray(store.document).reshape(-1)[held] % 4 == 0
        assert len(held) - test.sum() >= 10
    tail = logit_tail(np.array([0, 0, 0, 10.0]), ["a", "b", "c", "d"], 1)
    assert tail.promoted == ["d"] and tail.skew == pytest.approx(1.1547, abs=1e-3)


def test_ranking_scores_are_sklearns() -> None:
    rng = np.random.default_rng(0)
    truth = rng.random(400) < 0.2
    scores = np.round(rng.random(400) + 0.3 * truth, 1)  # many ties
    assert ranking_scores(scores, truth) == pytest.approx(
        (roc_auc_score(truth, scores), average_precision_score(truth, scores))
    )


def test_subspace_is_the_pca_of_reconstructions(analysis: AnalysisContext) -> None:
    stats, sae = analysis.stats("late"), analysis.saes["late"]
    latents = np.argsort(-stats.count)[:5].tolist()
    found = subspace(stats, sae, latents, by_word(["the", "time"]))
    numbers, z = firing_together(stats, latents)
    assert len(found.group) == len(numbers) and (z != 0).any(1).all()
    recon = z @ sae.W_dec[latents].numpy()
    centred = recon - recon.mean(0)
    values = np.linalg.svd(centred, compute_uv=False) ** 2
    np.testing.assert_allclose(found.variance_ratio, (values / values.sum())[:3], rtol=1e-3)
    np.testing.assert_allclose(found.coordinates @ found.components, centred, atol=np.sqrt(values[3:].sum()) + 1e-3)
    for i in range(0, len(numbers), 50):
        context, position = found.place[i]
        assert found.token[i] == analysis.lm.tokenizer.decode([int(stats.token_ids[context, position])])
        assert found.group[i] == {"the": "the", "time": "time"}.get(found.token[i].strip(), "other")
        assert found.token[i] in found.context[i]
    assert {"the", "other"} <= set(found.group)
    with pytest.raises(UserError, match="too few for 3 components"):
        subspace(stats, sae, latents[:2])
    with pytest.raises(UserError, match="latent 99"):
        subspace(stats, sae, [99, 1, 2])
    with pytest.raises(UserError, match="of another SAE"):
        subspace(stats, biased("topk"), latents)
    assert by_word({"weekend": ["Saturday", "Sunday"]})(" sunday") == "weekend"


def test_the_store_says_what_it_is_of(analysis: AnalysisContext) -> None:
    assert analysis.stats("late").about["hook"] == LATE and analysis.stats("late") is analysis.stats("late")
