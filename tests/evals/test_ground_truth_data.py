"""Synthetic activations: the generator gives what was asked, as SAELens' own functions see it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom, multivariate_normal, norm

from sae_research.config.ground_truth import GroundTruth
from sae_research.evals.ground_truth import data
from sae_research.evals.ground_truth.data import World
from tests.helpers.ground_truth import true_codes, truth, world


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))


def test_independent_features_fire_as_often_as_asked() -> None:
    made, n = world(hierarchy_roots=0, correlation_rank=0), 20_000
    fired = (made.sample(n, "test").codes != 0).toarray()
    low, high = binom.ppf((1e-6, 1 - 1e-6), n, made.asked[:, None]).T
    count = fired.sum(0)
    assert ((count >= low - 1 - 2e-4 * n) & (count <= high + 1)).all()  # a magnitude may be drawn below zero
    phi = np.corrcoef(fired.T)
    assert np.abs(phi[np.triu_indices(48, 1)]).max() < 6 / n**0.5


def test_correlated_features_fire_together_as_their_copula_says() -> None:
    made, n = world(hierarchy_roots=0, correlation_rank=4, correlation_scale=0.6), 20_000
    fired = (made.sample(n, "test").codes != 0).toarray()
    low_rank = made.model.correlation_matrix
    assert low_rank is not None
    latent = (low_rank.correlation_factor @ low_rank.correlation_factor.T).numpy()
    pairs = [(0, 1), (2, 9), (5, 7), (3, 20)]
    for i, j in pairs:
        limits = norm.ppf(made.asked[[i, j]])
        together = multivariate_normal.cdf(limits, cov=[[1, latent[i, j]], [latent[i, j], 1]])
        assert fired[:, [i, j]].all(1).mean() == pytest.approx(together, abs=5 * (together / n) ** 0.5 + 1e-4)
    strong = data.statistics(made, made.sample(2048, "test"))
    assert strong["firing_correlation_rms"] > 2 * strong["firing_correlation_rms_independent"]


def test_children_fire_below_their_parents_alone_and_siblings_one_at_a_time() -> None:
    known = truth()
    said = data.statistics(known.world, known.samples)
    assert said["children"] == 42 and said["parents"] == 6 + 18 - (24 * 3 - 42) // 3 and said["children_without_parent"] == 0
    codes = known.samples.codes.toarray() > 0
    for parent in np.unique(known.world.edges[:, 0]):
        children = known.world.edges[known.world.edges[:, 0] == parent, 1]
        assert codes[:, children].sum(1).max() <= 1
        assert not codes[~codes[:, parent]][:, children].any()
    assert said["l0"] == pytest.approx(codes.sum(1).mean())


def test_activations_are_the_sums_that_they_are_said_to_be() -> None:
    known = truth()
    assert torch.allclose(true_codes(known) @ known.world.features + known.world.bias, known.samples.x, atol=1e-4)
    noisy = truth(noise=0.5)
    rest = noisy.samples.x - true_codes(noisy) @ noisy.world.features - noisy.world.bias
    assert float(rest.std()) == pytest.approx(0.5, rel=0.02)
    again = known.world.sample(2048, "test")
    assert torch.equal(again.x, known.samples.x) and not torch.equal(known.world.sample(2048, "other").x, again.x)


@pytest.mark.slow
def test_the_published_setting_by_name() -> None:
    settings = GroundTruth.model_validate({"data": {"setting": "synth_sae_bench_16k"}})
    asked = data.config(settings.data.whole(), 42)
    assert (asked.num_features, asked.hidden_dim, settings.width) == (16384, 768, 4096)
    assert asked.hierarchy is not None and asked.hierarchy.total_root_nodes == 128 and asked.hierarchy.max_depth == 3
    assert asked.orthogonalization is not None and asked.orthogonalization.num_steps == 100 and asked.bias == 0.5
    # "about 34 active features a sample", which orthogonalisation has no part in
    values = settings.data.whole() | {"orthogonal_steps": 0}
    made = World(values, 42)
    assert made.sample(256, "test").codes.getnnz() / 256 == pytest.approx(34, abs=2.5)
