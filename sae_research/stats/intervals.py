"""How sure a value is: clustered bootstrap intervals, paired differences, correction for many comparisons.

Every value here is a ratio of sums over clusters, `sum(numerator) / sum(denominator)`: a mean per token (numerator
its sum in a cluster, denominator the tokens), a fraction of variance, an accuracy (correct and asked). What varies
together forms one cluster (all tokens of one document or source, all questions about one text), and clusters are what
is drawn with replacement. Two SAEs measured on the same clusters meet the same draws, so that what they share cancels.

Few clusters of unequal size, of skewed values, are what a text of a few sources gives. An ordinary Student's t then finds
differences far more often than it says: with the 15 sources of the default text at a level of 0.0005, where a correction
for a hundred comparisons decides, five times as often with Gaussian noise and forty times with exponential noise. So the
standard error is the jackknife's, and Student's t has `1.25 sqrt(n)` degrees of freedom, n the *effective* number of
clusters: the most that kept the rate of false findings within 1.3 times its level in a simulation with noise of skewness
0, 2 and 3 (`benchmarks/noise.py`, docs/noise.md).

numpy only: evaluations write these sums, reporting reads them, and reporting starts without torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np

LEVEL = 0.95
RESAMPLES = 5000
MIN_CLUSTERS = 5
"""With fewer clusters there is no interval: their spread is not known."""
FREEDOM_PER_ROOT = 1.25
"""Degrees of freedom for each square root of an effective cluster."""
SIGNIFICANT_DIGITS = 7
"""Of stored sums: differences between SAEs are far larger than their rounding."""

_NORMAL = NormalDist()


@dataclass(frozen=True)
class Retrained:
    """The value with each of several draws of training texts; its mean is the value that is reported."""

    figures: np.ndarray
    """One number per draw [draws]. Two SAEs meet the same draws."""
    share: float
    """Texts of a draw over texts of the pool that it was drawn from."""
    replaced: bool
    """Whether a draw may hold a text twice: a bootstrap, where the pool is small."""

    def variance(self, figures: np.ndarray) -> float:
        """Variance of the mean over draws of `figures` [draws], the pool being a draw too.

        Draws without replacement share texts and so vary less than fresh ones: by 1 - share for a value to which each
        text adds its part. The mean over draws keeps the pool's own part, share times a fresh draw's variance (Nadeau and
        Bengio 2003 correct resampled tests in this way).
        """
        spread = float(np.var(figures, ddof=1))
        return spread * (1 / len(figures) + (self.share if self.replaced else self.share / (1 - self.share)))


@dataclass(frozen=True)
class Ratio:
    """A value and the clusters it comes from. Arrays of one number per cluster [clusters].

    `strata` numbers the groups inside which clusters are drawn, so that every draw holds as many of each as the data;
    None for one group. `retrained` says how the value varies with the texts that something was fitted on.
    """

    numerator: np.ndarray
    denominator: np.ndarray
    strata: np.ndarray | None = None
    retrained: Retrained | None = None

    @property
    def value(self) -> float:
        """The value; NaN where nothing was counted."""
        below = float(self.denominator.sum())
        return float(self.numerator.sum()) / below if below else math.nan

    def drawn(self, seed: int) -> np.ndarray:
        """The value in every resample [RESAMPLES]; the same draws for equal seed, number of clusters and strata."""
        strata = None if self.strata is None else tuple(int(s) for s in self.strata)
        weights_RC = draws(len(self.numerator), strata, seed)
        return _divide(weights_RC @ self.numerator, weights_RC @ self.denominator)

    @property
    def enough(self) -> bool:
        """Whether there are clusters enough to tell how they vary."""
        return len(self.numerator) - len(np.unique(self._groups)) >= MIN_CLUSTERS - 1

    @property
    def effective(self) -> float:
        """How many clusters of equal size would vary as these do: 1 / sum(share of the denominator squared)."""
        total, squares = float(self.denominator.sum()), float(np.square(self.denominator).sum())
        return total**2 / squares if squares else 0.0

    @property
    def freedom(self) -> float:
        """Degrees of freedom of Student's t."""
        return FREEDOM_PER_ROOT * math.sqrt(self.effective)

    @property
    def left_out(self) -> np.ndarray:
        """By how much the value changes, to first order, when a cluster is left out and the others of its stratum take
        its place [clusters]. Their sum of squares is the jackknife's variance (CR3 of Bell and McCaffrey 2002)."""
        total = float(self.denominator.sum())
        if not total:
            return np.full(len(self.numerator), math.nan)
        groups = self._groups
        own = (self.numerator - self.value * self.denominator) / total
        size = np.abs(self.denominator)  # counts may have signs, and those of a stratum add up to nothing
        of_group = np.bincount(groups, size)[groups]
        share = np.divide(size, of_group, out=np.zeros_like(size), where=of_group > 0)
        centred = own - share * np.bincount(groups, own)[groups]
        return -np.divide(centred, 1 - share, out=np.zeros_like(centred), where=share < 1)

    @property
    def _groups(self) -> np.ndarray:
        if self.strata is None:
            return np.zeros(len(self.numerator), np.int64)
        return np.unique(self.strata, return_inverse=True)[1]


def averaged(figures: Sequence[Ratio]) -> Ratio:
    """The mean of values on the same clusters."""
    found = figures[0]
    for number, figure in enumerate(figures[1:], start=2):
        found = mixed(found, figure, 1 / number) or found
    return found


def mixed(one: Ratio, other: Ratio, weight: float) -> Ratio | None:
    """`one` and `other` in the shares 1 - weight and weight: a value between two measured ones, on the same clusters. None
    where they do not count the same."""
    if one.denominator.shape != other.denominator.shape or not np.allclose(one.denominator, other.denominator, rtol=1e-5):
        return None
    retrained = None
    if one.retrained is not None and other.retrained is not None:
        retrained = replace(one.retrained, figures=(1 - weight) * one.retrained.figures + weight * other.retrained.figures)
    return Ratio((1 - weight) * one.numerator + weight * other.numerator, one.denominator, one.strata, retrained)


def ratio(
    numerator: Sequence[float] | np.ndarray,
    denominator: Sequence[float] | np.ndarray | float = 1.0,
    strata: Sequence[int] | np.ndarray | None = None,
) -> Ratio:
    """A `Ratio` from any sequences; a denominator of 1 makes the value a mean over clusters. Clusters in which nothing
    was counted are left out."""
    top = np.asarray(numerator, np.float64)
    below = np.broadcast_to(np.asarray(denominator, np.float64), top.shape)
    kept = below != 0
    return Ratio(top[kept], below[kept], None if strata is None else np.asarray(strata)[kept])


def interval(figure: Ratio, seed: int, level: float = LEVEL) -> tuple[float, float] | None:
    """Interval of a ratio (low, high); None with fewer than `MIN_CLUSTERS` clusters or an undefined value.

    Percentiles of the resamples, widened for few clusters in the manner of Hesterberg (2015), to the jackknife's error and
    Student's t with `Ratio.freedom`. Bias-corrected and accelerated intervals were tried: with 6 to 40 clusters they cover
    no better. Where training texts were drawn several times their part of the error is in it.
    """
    if not figure.enough:
        return None
    retrained = _retrained([figure])
    error, freedom = _error([float(np.square(figure.left_out).sum()), *retrained[:1]], [figure.freedom, *retrained[1:]])
    return _percentiles(figure.value, _moved(figure.drawn(seed), retrained, seed), error, freedom, level)


def _retrained(ones: Sequence[Ratio], others: Sequence[Ratio] = ()) -> tuple[float, ...]:
    """(variance, degrees of freedom) that the choice of training texts adds to a value or a difference; empty where they
    were drawn once."""
    draws = [[ratio.retrained for ratio in side if ratio.retrained is not None] for side in (ones, others)]
    if len(draws[0]) < len(ones) or len(draws[1]) < len(others):
        return ()
    one, other = (np.mean([each.figures for each in side], axis=0) if side else 0.0 for side in draws)
    return draws[0][0].variance(np.asarray(one - other)), len(draws[0][0].figures) - 1


def _moved(drawn: np.ndarray, retrained: tuple[float, ...], seed: int) -> np.ndarray:
    """Resamples [RESAMPLES] that vary with training texts as well, as a normal value would."""
    if not retrained:
        return drawn
    return drawn + np.random.default_rng([seed, len(drawn)]).normal(0, math.sqrt(retrained[0]), len(drawn))


def _error(variances: list[float], freedoms: list[float]) -> tuple[float, float]:
    """Standard error of all parts together, and its degrees of freedom (Welch and Satterthwaite)."""
    total = sum(variances)
    below = sum(part**2 / degrees for part, degrees in zip(variances, freedoms, strict=True))
    return math.sqrt(total), total**2 / below if below else freedoms[0]


def _percentiles(
    value: float, drawn: np.ndarray, error: float, freedom: float, level: float = LEVEL
) -> tuple[float, float] | None:
    """Percentiles of resamples that lie as far out as `error` and Student's t say, on the normal scale."""
    finite = drawn[np.isfinite(drawn)]
    if not math.isfinite(value) or len(finite) < RESAMPLES / 2:
        return None
    spread = float(finite.std())
    if spread <= 1e-12 * abs(value):
        return value, value
    tail = _NORMAL.cdf(-student_quantile((1 + level) / 2, freedom) * max(1.0, error / spread))
    low, high = np.quantile(finite, (tail, 1 - tail))
    return float(low), float(high)


@lru_cache(maxsize=8)
def draws(n_clusters: int, strata: tuple[int, ...] | None, seed: int) -> np.ndarray:
    """How often each cluster is drawn in each resample [RESAMPLES, clusters]."""
    generator = np.random.default_rng([seed, n_clusters])
    groups = np.zeros(n_clusters, np.int64) if strata is None else np.asarray(strata)
    weights_RC = np.zeros((RESAMPLES, n_clusters))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        weights_RC[:, members] = generator.multinomial(len(members), np.full(len(members), 1 / len(members)), RESAMPLES)
    return weights_RC


# --- differences -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """One value less another on the same clusters."""

    value: float
    low: float
    high: float
    error: float
    """Standard error over resamples."""
    freedom: float
    p: float
    """Two-sided, before any correction: Student's t of value / error."""


def difference(ones: Sequence[Ratio], others: Sequence[Ratio], seed: int) -> Difference | None:
    """Mean value of `ones` less that of `others`, all measured on the same clusters (paired).

    Either side may hold several training runs of one recipe: the spread between them then joins the error (Welch), as
    another run would differ again. None where there are too few clusters.
    """
    if not ones[0].enough:
        return None
    drawn = np.mean([r.drawn(seed) for r in ones], axis=0) - np.mean([r.drawn(seed) for r in others], axis=0)
    left_out = np.mean([r.left_out for r in ones], axis=0) - np.mean([r.left_out for r in others], axis=0)
    values = [[r.value for r in side] for side in (ones, others)]
    value = float(np.mean(values[0]) - np.mean(values[1]))
    several = [side for side in values if len(side) > 1]
    retrained = _retrained(ones, others)
    spreads = [float(np.var(side, ddof=1)) / len(side) for side in several]
    error, freedom = _error(
        [float(np.square(left_out).sum()), *retrained[:1], *spreads],
        [ones[0].freedom, *retrained[1:], *(len(side) - 1.0 for side in several)],
    )
    bounds = _percentiles(value, _moved(drawn, retrained, seed), error, freedom)
    if bounds is None:
        return None
    if several and error:
        reach = student_quantile((1 + LEVEL) / 2, freedom) * error
        bounds = value - reach, value + reach
    rounding = 1e-12 * max(abs(v) for side in values for v in side)
    p = student_p(value / error, freedom) if error > rounding else float(abs(value) <= rounding)
    return Difference(value, *bounds, error, freedom, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order given: the chance of even one false finding among all stays below
    the level, whatever the tests' dependence."""
    p = np.asarray(p_values, np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(p[order] * (len(p) - np.arange(len(p)))) if len(p) else p
    result = np.empty_like(p)
    result[order] = np.minimum(adjusted, 1.0)
    return result.tolist()


def student_p(t: float, freedom: float) -> float:
    """Two-sided p of Student's t."""
    from scipy.special import stdtr  # a tenth of a second that a reader without tests need not wait

    return float(2 * stdtr(freedom, -abs(t)))


def student_quantile(share: float, freedom: float) -> float:
    """Where Student's t has `share` of its mass below."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, share))


# --- what is stored --------------------------------------------------------------------------


def packed(bits: np.ndarray) -> str:
    """A row of yes and no as hex digits: four outcomes a digit, the last padded with no."""
    return np.packbits(np.asarray(bits, bool)).tobytes().hex()


def unpacked(text: str, count: int) -> np.ndarray:
    """The first `count` outcomes of `packed`. bool [count]"""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=count).astype(bool)


def accuracy(
    asked: Mapping[str, Mapping[str, list[str]]],
    correct: Mapping[str, Mapping[str, str | list[str]]],
    share: float = 0.0,
    replaced: bool = False,
) -> Ratio:
    """Mean over tasks of the mean over classes of accuracy, clustered by text: one text serves several classes.

    asked: task -> class -> numbers of the test texts in that class and in others, separated by spaces. correct: task ->
    class -> `packed` outcomes in that order, or a list of them, one for each draw of training texts, which are a `share` of
    their pool. Texts are drawn within their own task and class, whose sizes are given.
    """
    own_class, texts, shares, right = {}, [], [], []
    for task, classes in asked.items():
        for label, parts in classes.items():
            inside, outside = ([int(number) for number in part.split()] for part in parts)
            own_class |= {number: own_class.get(number, (task, label)) for number in inside}
            rows = inside + outside
            texts += rows
            shares += [1 / (len(rows) * len(classes) * len(asked))] * len(rows)
            bits = correct[task][label]
            right.append(np.array([unpacked(draw, len(rows)) for draw in ([bits] if isinstance(bits, str) else bits)]))
    names, cluster = np.unique(texts, return_inverse=True)
    strata = {name: index for index, name in enumerate(dict.fromkeys(own_class.values()))}
    weights, right_RT = np.asarray(shares), np.concatenate(right, axis=1)
    retrained = Retrained(right_RT @ weights / weights.sum(), share, replaced) if len(right_RT) > 1 else None
    return Ratio(
        np.bincount(cluster, weights * right_RT.mean(0)),
        np.bincount(cluster, weights),
        np.array([strata[own_class[name]] if name in own_class else len(strata) for name in names.tolist()]),
        retrained,
    )


def stored(figure: Ratio, clusters: str) -> dict[str, Any]:
    """A ratio as JSON: `lab_v1["cluster_sums"][metric]`. clusters: the name in `lab_v1["clusters"]` of what was drawn."""
    return {"clusters": clusters, "numerator": _rounded(figure.numerator), "denominator": _rounded(figure.denominator)}


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.{SIGNIFICANT_DIGITS}g}") for value in values]


def _divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(np.shape(above), math.nan), where=below != 0)
