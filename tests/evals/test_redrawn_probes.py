"""Probes with training texts drawn again: the optimum of every draw, and draws that are what they say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from sae_research.evals.probing import draw, top_dimensions
from sae_research.evals.sparse_probing.redrawn import pool_size, redrawn_correct, train_draws
from sae_research.stats.intervals import Retrained, accuracy, difference, interval, packed
from sae_research.stats.logistic import newton

SIZE, POOL, TEST = 20, 60, 16


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    """Latents [rows, d] of three classes' pools, then of their test texts; a few latents tell the first class apart."""
    generator = torch.Generator().manual_seed(0)
    z = torch.relu(torch.randn(3 * (POOL + TEST), 96, generator=generator) - 0.5) * 4
    for rows in (slice(0, POOL), slice(3 * POOL, 3 * POOL + TEST)):
        z[rows, :6] += torch.relu(torch.randn(POOL if rows.start == 0 else TEST, 6, generator=generator)) * 3
    return z


POOLS = {label: torch.arange(i * POOL, (i + 1) * POOL) for i, label in enumerate("abc")}
TESTS = {label: torch.arange(3 * POOL + i * TEST, 3 * POOL + (i + 1) * TEST) for i, label in enumerate("abc")}


def test_every_draw_is_fitted_to_its_optimum(features: torch.Tensor) -> None:
    drawn = train_draws(POOLS, SIZE, 4, 3, 7)
    tests = {label: draw(TESTS, label, 7, "test") for label in TESTS}
    found = redrawn_correct(features, drawn, tests, [1, 2, 5])
    for label, trains in drawn.of_class.items():
        test = tests[label]
        for number, train in enumerate(trains):
            for k in (1, 2, 5, None):
                x = features[train.rows]
                chosen = torch.arange(96) if k is None else top_dimensions(x, train.labels, k)
                probe = LogisticRegression(C=1.0, tol=1e-10, max_iter=20_000).fit(
                    x[:, chosen].double().numpy(), train.labels.numpy()
                )
                right = probe.predict(features[test.rows][:, chosen].double().numpy()) == test.labels.numpy()
                assert np.array_equal(found[k][label][number], right), (label, number, k)
    assert found[None]["a"].mean() > 0.6 > found[None]["b"].mean()


def test_draws_are_disjoint_in_no_text_twice_and_stay_the_same() -> None:
    drawn = train_draws(POOLS, SIZE, 30, 3, 7)
    assert not drawn.replaced and drawn.share == pytest.approx(1 / 3)
    positives = [set(one.rows[one.labels == 1].tolist()) for one in drawn.of_class["b"]]
    assert all(len(rows) == SIZE and rows <= set(POOLS["b"].tolist()) for rows in positives)
    assert len({tuple(sorted(rows)) for rows in positives}) == 30 and len(set.union(*positives)) == POOL
    again = train_draws(POOLS, SIZE, 30, 3, 7)
    assert all(torch.equal(x.rows, y.rows) for x, y in zip(drawn.of_class["b"], again.of_class["b"], strict=True))
    few = train_draws({label: rows[:30] for label, rows in POOLS.items()}, SIZE, 5, 3, 7)
    assert few.replaced and few.share == pytest.approx(2 / 3)
    assert pool_size({"a": {"train": 100}, "b": {"train": 45}}, SIZE, 3) == 45
    assert pool_size({"a": {"train": 100}, "b": {"train": 99}}, SIZE, 3) == 60


def test_a_solver_started_far_from_the_optimum_arrives() -> None:
    x = np.random.default_rng(0).normal(size=(3, 40, 4)) * np.array([1e3, 1, 1e-3, 0])
    y = (x[..., 0] + x[..., 1] > 0).astype(float)
    theta = newton(x, y)
    x1 = np.concatenate([x, np.ones((3, 40, 1))], 2)
    p = 1 / (1 + np.exp(-np.einsum("rnd,rd->rn", x1, theta).clip(-700, 700)))
    gradient = np.einsum("rnd,rn->rd", x1, p - y) + theta * np.array([1, 1, 1, 1, 0])
    assert np.abs(gradient).max() < 1e-3


# --- what the draws add to errors --------------------------------------------------------------


def outcomes(rng: np.random.Generator, draws: int, spread: float, shift: float = 0.0) -> dict[str, dict[str, list[str]]]:
    """Of one task and class: accuracy 0.7 + shift, moved by `spread` from draw to draw."""
    level = (0.7 + shift + rng.normal(0, spread, draws)).clip(0.2, 1)
    return {"t": {"a": [packed(rng.random(80) < p) for p in level]}}


ASKED = {"t": {"a": [" ".join(map(str, range(40))), " ".join(map(str, range(40, 80)))]}}


def test_training_texts_widen_intervals_and_differences() -> None:
    rng = np.random.default_rng(0)
    steady, moving = (accuracy(ASKED, outcomes(rng, 20, spread), 1 / 3) for spread in (0.0, 0.25))
    assert len(moving.retrained.figures) == 20 and moving.value == pytest.approx(moving.retrained.figures.mean())
    narrow, wide = interval(steady, 0), interval(moving, 0)
    assert wide[1] - wide[0] > 1.2 * (narrow[1] - narrow[0])
    alone = accuracy(ASKED, {"t": {"a": outcomes(rng, 20, 0.0)["t"]["a"][0]}})
    assert alone.retrained is None
    found = difference([moving], [steady], 0)
    assert found.error > difference([steady], [steady], 0).error
    assert found.error**2 >= moving.retrained.variance(moving.retrained.figures - steady.retrained.figures)


@pytest.mark.parametrize("replaced", [False, True])
def test_the_variance_of_a_mean_over_draws_holds_the_pool(replaced: bool) -> None:
    """For a figure to which each training text adds its part, draws out of one pool say how a mean over draws would vary
    over fresh pools."""
    rng = np.random.default_rng(0)
    size, pool, draws, means, said = 20, 60, 25, [], []
    for _ in range(400):
        values = rng.exponential(size=pool)
        chosen = [rng.choice(pool, size, replace=replaced) for _ in range(draws)]
        figures = np.array([values[rows].mean() for rows in chosen])
        means.append(figures.mean())
        said.append(Retrained(figures, size / pool, replaced).variance(figures))
    assert np.mean(said) == pytest.approx(np.var(means), rel=0.2)
