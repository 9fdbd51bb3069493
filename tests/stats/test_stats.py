"""Streaming statistics against plain ones, and the cases whose answer is known beforehand."""

from __future__ import annotations

import math

import pytest
import torch

from sae_research.stats.predictions import CleanPredictions, loss_ratios, losses, prediction_sums
from sae_research.stats.reconstruction import ReconstructionStats
from sae_research.stats.weights import max_cosine


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(4, 10, 6) * torch.tensor([1, 2, 3, 4, 5, 60.0]) + 7
    return x, x + torch.randn_like(x), torch.relu(torch.randn(4, 10, 9) - 1), torch.rand(4, 10) > 0.3


def test_streaming_equals_plain(batch: tuple[torch.Tensor, ...]) -> None:
    x, hat, z, mask = batch
    stats = ReconstructionStats(6, 9)
    for i in range(4):
        stats.update(x[i : i + 1], hat[i : i + 1], z[i : i + 1], mask[i : i + 1])
    got, X, H, Z = stats.metrics(), x[mask].double(), hat[mask].double(), z[mask].double()
    residual, total = (X - H).square(), (X - X.mean(0)).square()
    want = {
        "tokens": len(X),
        "l0": (Z != 0).sum(1).double().mean(),
        "l1": Z.abs().sum(1).mean(),
        "mse": residual.mean(),
        "variance_explained": 1 - residual.sum() / total.sum(),
        "variance_explained_per_dim": (1 - residual.sum(0) / total.sum(0)).mean(),
        "cosine_similarity": torch.nn.functional.cosine_similarity(X, H).mean(),
        "l2_ratio": (H.norm(dim=1) / X.norm(dim=1)).mean(),
        "fraction_alive": (Z != 0).any(0).double().mean(),
        "relative_reconstruction_bias": H.square().sum(1).mean() / (X * H).sum(1).mean(),
    }
    assert got == pytest.approx({key: float(value) for key, value in want.items()}, rel=1e-6)
    torch.testing.assert_close(stats.density, (Z != 0).double().mean(0).float())


def test_known_answers(batch: tuple[torch.Tensor, ...]) -> None:
    x, _, z, mask = batch
    perfect, mean = ReconstructionStats(6, 9), ReconstructionStats(6, 9)
    perfect.update(x, x, z, mask)
    mean.update(x, x[mask].mean(0).expand_as(x), z, mask)
    assert perfect.metrics()["variance_explained"] == 1
    assert mean.metrics()["variance_explained"] == pytest.approx(0, abs=1e-6)
    assert mean.metrics()["variance_explained_per_dim"] == pytest.approx(0, abs=1e-6)
    assert ReconstructionStats(6, 9).metrics() == {}


def test_signs_and_masked_tokens_do_not_count(batch: tuple[torch.Tensor, ...]) -> None:
    x, hat, z, mask = batch
    plain, flipped = ReconstructionStats(6, 9), ReconstructionStats(6, 9)
    plain.update(x, hat, z, mask)
    x2, z2 = x.clone(), -z
    x2[~mask], z2[~mask] = 1e6, 1e6
    flipped.update(x2, hat, z2, mask)
    assert plain.metrics() == flipped.metrics()


def test_losses_against_torch() -> None:
    torch.manual_seed(0)
    tokens, clean, edited = torch.randint(0, 50, (3, 8)), torch.randn(3, 8, 50) * 4, torch.randn(3, 8, 50) * 4
    predictions = CleanPredictions(clean.clone(), tokens)
    ce, kl = predictions.compare(edited)
    want_ce = torch.nn.functional.cross_entropy(edited[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    want_kl = torch.nn.functional.kl_div(
        edited.log_softmax(-1), clean.log_softmax(-1), log_target=True, reduction="none"
    ).sum(-1)
    torch.testing.assert_close(ce, want_ce)
    torch.testing.assert_close(kl, want_kl)
    same_ce, same_kl = predictions.compare(clean)
    torch.testing.assert_close(same_ce, predictions.ce)
    assert same_kl.abs().max() < 1e-6


def test_losses_stay_finite_where_a_softmax_underflows() -> None:
    logits = torch.zeros(1, 2, 4)
    logits[..., 0] = 400
    _, kl = CleanPredictions(logits.clone(), torch.zeros(1, 2, dtype=torch.long)).compare(-logits)
    assert torch.isfinite(kl).all()
    assert kl.min() > 100


def test_shared_logits_stand_for_every_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_research.stats import predictions as losses

    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 150)  # three tokens a chunk: chunks cross sequences
    torch.manual_seed(0)
    tokens, clean, one = torch.randint(0, 50, (3, 8)), torch.randn(3, 8, 50), torch.randn(1, 8, 50)
    predictions = CleanPredictions(clean, tokens)
    for shared, repeated in zip(predictions.compare(one), predictions.compare(one.repeat(3, 1, 1)), strict=True):
        torch.testing.assert_close(shared, repeated)


def test_max_cosine_ignores_the_row_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_research.stats import weights

    monkeypatch.setattr(weights, "CHUNK_ROWS", 7)
    rows = torch.randn(20, 5)
    unit = torch.nn.functional.normalize(rows, dim=1)
    cosines = unit @ unit.T
    cosines.fill_diagonal_(-2)
    torch.testing.assert_close(max_cosine(rows), cosines.amax(1))


def test_the_work_of_max_cosine_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_research.stats import weights
    from sae_research.stats.sae_bench import misc_metrics
    from sae_research.stats.weights import LatentWeights

    rows = torch.randn(320, 5, generator=torch.Generator().manual_seed(0))
    exact = max_cosine(rows)
    monkeypatch.setattr(weights, "EXACT_WIDTH", 80)
    monkeypatch.setattr(weights, "CHUNK_ROWS", 7)
    looked_at = weights.measured_rows(320)
    assert len(looked_at) * 320 == 80**2 and looked_at.unique().numel() == 20 and int(looked_at.max()) < 320
    got = max_cosine(rows)
    torch.testing.assert_close(got[looked_at], exact[looked_at])
    assert int(got.isnan().sum()) == 300
    means = misc_metrics(torch.ones(320), LatentWeights(*[got] * 5))
    assert means["average_max_decoder_cosine_sim"] == pytest.approx(float(exact[looked_at].mean()))
    assert len(weights.measured_rows(80)) == 80 and len(weights.measured_rows(10**9)) == 1


def test_neighbours_in_one_dictionary_are_looked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_research.saes import SAEConfig
    from sae_research.saes.forms import LinearSAE
    from sae_research.stats import weights
    from sae_research.stats.weights import latent_weights

    def sae() -> LinearSAE:
        rows = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
        return LinearSAE(
            SAEConfig(form="linear", d_in=5, d_sae=12, hook_name="blocks.0.hook_resid_post", options={}),
            W_enc=rows.T.contiguous(),
            b_enc=torch.zeros(12),
            W_dec=rows * 2,
            b_dec=torch.zeros(5),
        )

    calls: list[int] = []
    monkeypatch.setattr(weights, "_looked_for", {})
    monkeypatch.setattr(weights, "max_cosine", lambda rows: calls.append(len(rows)) or max_cosine(rows))
    first, second = latent_weights(sae()), latent_weights(sae())
    assert len(calls) == 2 and torch.equal(first.max_decoder_cosine, second.max_decoder_cosine)
    torch.testing.assert_close(first.max_decoder_cosine, max_cosine(sae().W_dec))


def test_loss_recovered_is_a_share_of_what_ablation_costs() -> None:
    """By plain loops over counted positions; the last of a sequence predicts nothing."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(3, 5, generator=generator) > 0.4
    runs = {
        name: (torch.rand(3, 4, generator=generator) + level, torch.rand(3, 5, generator=generator))
        for name, level in {"clean": 1.0, "patched": 2.0, "zero": 6.0, "mean": 4.0}.items()
    }
    sums = prediction_sums(mask, {**runs, "clean": (runs["clean"][0], None)})
    places = [(b, s) for b in range(3) for s in range(5) if mask[b, s]]
    ce = {
        name: sum(float(values[b, s]) for b, s in places if s < 4) / sum(s < 4 for _, s in places)
        for name, (values, _) in runs.items()
    }
    want = {
        "kl": sum(float(runs["patched"][1][b, s]) for b, s in places) / len(places),
        "ce_clean": ce["clean"],
        "ce_patched": ce["patched"],
        "ce_delta": ce["patched"] - ce["clean"],
        "ce_zero_ablated": ce["zero"],
        "ce_mean_ablated": ce["mean"],
        "loss_recovered": (ce["zero"] - ce["patched"]) / (ce["zero"] - ce["clean"]),
        "loss_recovered_mean_ablation": (ce["mean"] - ce["patched"]) / (ce["mean"] - ce["clean"]),
    }
    assert losses(sums) == pytest.approx(want, rel=1e-12)
    by_row = prediction_sums(mask, runs, lambda values, where: torch.where(where, values, 0.0).double().sum(1))
    for key, (above, below) in loss_ratios(by_row).items():
        assert float(above.sum() / below.sum()) == pytest.approx(want[key], rel=1e-6)
    assert math.isnan(losses({**sums, "ce_zero": sums["ce_clean"]})["loss_recovered"])
    assert all(map(math.isnan, losses(prediction_sums(torch.zeros_like(mask), runs)).values()))
