"""Every streamed statistic against a plain computation over all tokens at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError

from sae_research.config.transfer import Sampling
from sae_research.saes import encode_each
from sae_research.stats.reconstruction import together
from sae_research.transfer.loading import MODELS, Pair, masks
from sae_research.transfer.losses import logit_similarity, patched_losses
from sae_research.transfer.stage import flattened_r2
from sae_research.transfer.sweep import sweep
from sae_research.transfer.table import latent_table, members, sample, wilson
from sae_research.transfer.text import batches
from tests.helpers.tiny_saes import HOOK

N_TOKENS = 1500
RULE = {"outliers": {"rule": "median", "median_multiple": 1.12, "listed": 5}}
"""Removes some tokens of the tiny model."""


def everything(pair: Pair, limits: dict[str, float]) -> dict[str, Any]:
    """All activations of the text in memory, and the masks: the first of the two passes."""
    found: dict[str, Any] = {"acts": {m: [] for m in MODELS}, "kept": [], "counted": [], "tokens": []}
    for batch in batches(pair.base, pair.finetuned, pair.source, N_TOKENS, 5):
        acts = {m: lm.activations(batch.base.tokens, HOOK) for m, lm in pair.models.items()}
        mask = masks(pair, batch, acts, limits[HOOK])
        found["kept"].append(mask.kept["base"])
        found["counted"].append(mask.counted["base"])
        found["tokens"].append(batch.base.tokens)
        for m in MODELS:
            found["acts"][m].append(acts[m])
    return {
        key: torch.cat(value) if isinstance(value, list) else {m: torch.cat(v) for m, v in value.items()}
        for key, value in found.items()
    }


@pytest.fixture(scope="module")
def swept(make_pair: Any) -> tuple[Pair, Any, dict[str, Any]]:
    pair = make_pair("near", **RULE)
    statistics = sweep(pair, N_TOKENS)
    return pair, statistics, everything(pair, {hook: stats.limit for hook, stats in statistics.hooks.items()})


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """From the kernel definition HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))."""
    centre = np.eye(len(x)) - 1 / len(x)
    k, ell = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    return float((k * ell).sum() / np.sqrt((k * k).sum() * (ell * ell).sum()))


def test_similarity(swept: Any) -> None:
    _, statistics, found = swept
    stats = statistics.hooks[HOOK]
    assert 0 < stats.removed.n < stats.kept.n
    for similarity, mask in ((stats.kept, found["kept"]), (together(stats.kept, stats.removed), found["counted"])):
        x, y = (found["acts"][m][mask].double().numpy() for m in MODELS)
        norms = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
        means = similarity.means()
        assert similarity.n == len(x)
        assert means["cosine"] == pytest.approx(((x * y).sum(1) / norms[0] / norms[1]).mean(), abs=1e-6)
        assert means["euclidean"] == pytest.approx(np.linalg.norm(x - y, axis=1).mean(), rel=1e-6)
        assert means["relative_error"] == pytest.approx((np.linalg.norm(x - y, axis=1) / norms[0]).mean(), rel=1e-6)
        assert means["cka"] == pytest.approx(linear_cka(x, y), abs=1e-6)
        assert abs(means["cosine_shuffled"]) < means["cosine"] - 0.5
    rows, places = found["kept"].nonzero(as_tuple=True)
    cosine = torch.nn.functional.cosine_similarity(*(found["acts"][m].double() for m in MODELS), dim=-1)
    for place in (1, 9, 23):
        want = cosine[:, place][found["kept"][:, place]].mean()
        assert stats.kept.profile()["by_position"]["cosine"][place] == pytest.approx(float(want), abs=1e-6)
    assert stats.kept.profile()["by_position"]["cosine"][0] is None
    assert sum(stats.kept.profile()["cosine_histogram"]["counts"]) == len(rows)
    assert stats.heat_map[0][9] == pytest.approx(float(cosine[0, 9]), abs=1e-4) and stats.heat_map[0][0] is None


def test_latents_and_quality(swept: Any) -> None:
    pair, statistics, found = swept
    sae, stats = pair.saes["base"], statistics.saes["base"]
    z = {m: dict(encode_each({"sae": sae}, found["acts"][m], found["counted"]))["sae"] for m in MODELS}
    frame = latent_table(
        stats, logit_similarity(pair.base, pair.finetuned, sae).correlation, pair.params.transfer.sampling, 0
    )
    assert len(frame) == sae.cfg.d_sae
    a, b = (z[m][found["kept"]].double().numpy() for m in MODELS)
    both = [z[m][found["counted"]].double().numpy() for m in MODELS]
    W_U = pair.base.model.lm_head.weight.double() * pair.base.model.model.norm.weight.double()
    other_U = pair.finetuned.model.lm_head.weight.double() * pair.finetuned.model.model.norm.weight.double()
    logits = [(sae.W_dec.double() @ weight.T).numpy() for weight in (W_U, other_U)]
    for latent in range(sae.cfg.d_sae):
        row = frame.iloc[latent]
        assert row.pearson == pytest.approx(np.corrcoef(a[:, latent], b[:, latent])[0, 1], abs=1e-6)
        assert row.pearson_with_outliers == pytest.approx(np.corrcoef(*(part[:, latent] for part in both))[0, 1], abs=1e-6)
        fires = a[:, latent] != 0, b[:, latent] != 0
        assert row.jaccard == pytest.approx((fires[0] & fires[1]).sum() / (fires[0] | fires[1]).sum(), abs=1e-9)
        assert row.base_density == pytest.approx(fires[0].mean(), abs=1e-9)
        gap = np.abs(np.log10(a[:, latent] + 1e-10) - np.log10(b[:, latent] + 1e-10)).mean()
        assert row.log_error == pytest.approx(gap, abs=1e-6)
        assert row.logit_correlation == pytest.approx(np.corrcoef(logits[0][latent], logits[1][latent])[0, 1], abs=1e-6)
        assert row.base_density_low < row.base_density < row.base_density_high
    assert frame.pearson_shuffled.abs().mean() < 0.1 < frame.pearson.mean()
    assert frame.pearson_halves.abs().mean() < 0.15
    x, hat = found["acts"]["finetuned"], sae.decode(z["finetuned"])
    kept_x, residual = x[found["kept"]].double(), (x - hat)[found["kept"]].double()
    metrics = stats.kept["finetuned"].metrics()
    want = 1 - float(residual.square().sum() / (kept_x - kept_x.mean(0)).square().sum())
    assert metrics["variance_explained"] == pytest.approx(want, abs=1e-6)
    want = 1 - float(residual.square().sum() / (kept_x - kept_x.mean()).square().sum())
    assert flattened_r2(stats.kept["finetuned"]) == pytest.approx(want, abs=1e-6)
    total = together(stats.kept["base"], stats.removed["base"])
    assert total.metrics()["l0"] == pytest.approx((both[0] != 0).sum(1).mean(), abs=1e-9)
    assert stats.kept["base"].tokens == len(a), "the sum left its parts alone"


def test_patched_losses_equal_whole_runs(swept: Any) -> None:
    pair, statistics, found = swept
    losses = patched_losses(pair, statistics.first, N_TOKENS)
    size = pair.params.transfer.patched_batch_size
    scale = torch.tensor([row % size % 4 == 0 for row in range(len(found["tokens"]))])
    """Contexts that ablations run on."""
    sae, tokens = pair.saes["base"], found["tokens"]
    for model, lm in pair.models.items():
        z = sae.encode(found["acts"][model], found["counted"])
        mean = found["acts"][model][found["kept"]].double().mean(0).float()
        put = {
            "ce_zero": torch.zeros_like(found["acts"][model]),
            "ce_mean": mean.expand_as(found["acts"][model]),
            "ce_patched": sae.decode(z),
        }
        for kind, mask in (("kept", found["kept"]), ("all", found["counted"])):
            got = losses["models"][model][kind]
            clean = lm.logits(tokens).double().log_softmax(-1)
            chosen, by_name = mask[:, :-1], {}
            for name, value in put.items():
                edited = torch.where(mask[..., None], value, found["acts"][model])
                log_q = lm.patched_logits(tokens, HOOK, lambda _, edited=edited: edited).double().log_softmax(-1)
                rows = scale[:, None] if name != "ce_patched" else torch.ones_like(scale)[:, None]
                ce = -log_q[:, :-1].gather(2, tokens[:, 1:, None])[..., 0][chosen & rows].mean()
                where = got["saes"]["base"] if name == "ce_patched" else got
                assert where[name]["value"] == pytest.approx(float(ce), rel=1e-5)
                by_name[name] = -log_q[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
            by_name["ce_clean"] = -clean[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
            zero, patched, own = (
                float(by_name[key][chosen & scale[:, None]].sum()) for key in ("ce_zero", "ce_patched", "ce_clean")
            )
            recovered = got["saes"]["base"].get("loss_recovered", {}).get("value")
            assert recovered == (pytest.approx((zero - patched) / (zero - own), rel=1e-4) if zero > own else None)
            kl = (clean.exp() * (clean - log_q)).sum(-1)[mask].mean()
            assert got["saes"]["base"]["kl"]["value"] == pytest.approx(float(kl), rel=1e-4)
    assert losses["clean_kl"]["value"] > 0


def test_nothing_grows_with_tokens(make_pair: Any) -> None:
    def size(value: Any) -> int:
        if isinstance(value, torch.Tensor):
            return value.numel()
        if isinstance(value, dict):
            return sum(size(v) for v in value.values())
        if isinstance(value, list):
            return sum(size(v) if isinstance(v, list) else 1 for v in value)
        ours = type(value).__module__.startswith("sae_research.transfer")
        return sum(size(v) for v in vars(value).values()) if ours else 1

    pair = make_pair("near", **RULE)
    sizes = []
    for n in (1200, 3600):
        statistics = sweep(pair, n)
        sizes.append(size(statistics.hooks) + size(statistics.saes) + size(statistics.outliers))
    assert sizes[0] == sizes[1]


def test_wilson_against_statsmodels_values() -> None:
    low, high = wilson([0, 5, 100], 100)
    # proportion_confint(count, 100, method="wilson") of statsmodels 0.14
    assert low == pytest.approx([0.0, 0.0215436, 0.9630065], abs=1e-6)
    assert high == pytest.approx([0.0369935, 0.1117505, 1.0], abs=1e-6)


def test_a_sample_for_each_interval_of_density() -> None:
    """Beside a loop over latents; one interval, given or not, draws what is drawn without the setting."""
    rng = np.random.default_rng(0)
    base = np.concatenate([10 ** rng.uniform(-6, 0, 300), [0.0, 0.0, 1e-3, 1e-3]])
    frame = pd.DataFrame({"base_density": base, "finetuned_density": base * 10 ** rng.uniform(-0.3, 0.3, len(base))})
    frame.loc[300, "finetuned_density"] = 0.01
    two = Sampling(dense=20, dead=5, intervals=[[1e-5, 1e-3], [1e-3, 0.1]])
    inside = members(frame, two)
    assert list(inside) == ["dead_base", "dead_finetuned", "dense_1e-05_to_0.001", "dense_0.001_to_0.1"]
    for (low, high), found in zip(two.intervals, list(inside.values())[2:], strict=True):
        wanted = [
            all(low <= row[f"{model}_density"] + 1e-10 < high for model in MODELS) for row in frame.to_dict(orient="records")
        ]
        assert found.tolist() == wanted and sum(wanted) > 20
    drawn = sample(frame, two, 7)
    assert [int((drawn == name).sum()) for name in inside] == [1, 0, 20, 20]
    assert all(inside[name][drawn == name].all() for name in inside)
    one = [sample(frame, Sampling(dense=20, intervals=given), 7) for given in (None, [[1e-5, 0.1]])]
    assert (one[0] == one[1]).all()
    among = ((frame[[f"{model}_density" for model in MODELS]] + 1e-10).apply(np.log10) >= -5.0).all(axis=1) & (
        (frame[[f"{model}_density" for model in MODELS]] + 1e-10).apply(np.log10) <= -1.0
    ).all(axis=1)
    expected = np.random.default_rng([7, 2]).permutation(np.flatnonzero(among))[:20]
    assert sorted(np.flatnonzero(one[0] == "dense")) == sorted(expected), "the published interval, as it was drawn before"
    for wrong in ([[0.1, 1e-3]], [[1e-5, 1e-2], [1e-3, 0.1]], [[0.0, 0.1]], [[0.5, 1.5]], []):
        with pytest.raises(ValidationError):
            Sampling(intervals=wrong)
