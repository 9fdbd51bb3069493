"""How sure a figure is: clustered bootstrap intervals, paired differences, correction for many comparisons.

Every figure here is a ratio of sums over clusters, `sum(numerator) / sum(denominator)`: a mean per token (numerator
its sum in a cluster, denominator the tokens), a fraction of variance, an accuracy (correct and asked). What varies
together forms one cluster (all tokens of one document or source, all questions about one text), and clusters are what
is drawn with replacement. Two SAEs measured on the same clusters meet the same draws, so that what they share cancels.

numpy only: evaluations write these sums, reporting reads them, and reporting starts without torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist
from typing import Any

import numpy as np

LEVEL = 0.95
RESAMPLES = 2000
MIN_CLUSTERS = 5
"""With fewer clusters there is no interval: their spread is not known."""
SIGNIFICANT_DIGITS = 7
"""Of stored sums: differences between SAEs are far larger than their rounding."""

_NORMAL = NormalDist()


@dataclass(frozen=True)
class Ratio:
    """A figure and the clusters it comes from. Arrays of one number per cluster [clusters].

    `strata` numbers the groups inside which clusters are drawn, so that every draw holds as many of each as the data;
    None for one group.
    """

    numerator: np.ndarray
    denominator: np.ndarray
    strata: np.ndarray | None = None

    @property
    def value(self) -> float:
        """The figure; NaN where nothing was counted."""
        below = float(self.denominator.sum())
        return float(self.numerator.sum()) / below if below else math.nan

    def drawn(self, seed: int) -> np.ndarray:
        """The figure in every resample [RESAMPLES]; the same draws for equal seed, number of clusters and strata."""
        strata = None if self.strata is None else tuple(int(s) for s in self.strata)
        weights_RC = draws(len(self.numerator), strata, seed)
        return _divide(weights_RC @ self.numerator, weights_RC @ self.denominator)

    @property
    def freedom(self) -> int:
        """Degrees of freedom: clusters less strata."""
        return len(self.numerator) - (1 if self.strata is None else len(np.unique(self.strata)))

    @property
    def inflation(self) -> float:
        """How much more n fresh clusters would vary than n drawn from these: n / (n - 1), with equal strata as well."""
        return len(self.numerator) / self.freedom


def ratio(numerator: Sequence[float], denominator: Sequence[float] | float = 1.0,
          strata: Sequence[int] | None = None) -> Ratio:
    """A `Ratio` from any sequences; a denominator of 1 makes the figure a mean over clusters. Clusters in which nothing
    was counted are left out."""
    top = np.asarray(numerator, np.float64)
    below = np.broadcast_to(np.asarray(denominator, np.float64), top.shape)
    kept = below != 0
    return Ratio(top[kept], below[kept], None if strata is None else np.asarray(strata)[kept])


def interval(figure: Ratio, seed: int, level: float = LEVEL) -> tuple[float, float] | None:
    """Bootstrap interval of a ratio (low, high); None with fewer than `MIN_CLUSTERS` clusters or an undefined figure.

    Percentiles of the resamples, widened as Hesterberg (2015) does for few clusters: resamples of n clusters vary
    (n - 1) / n as much as n fresh ones, and their spread is itself estimated, hence Student's t. Bias-corrected and
    accelerated intervals were tried: with 6 to 40 clusters they cover no better.
    """
    if figure.freedom < MIN_CLUSTERS - 1:
        return None
    return _percentiles(figure, figure.value, figure.drawn(seed), level)


def _percentiles(of: Ratio, value: float, drawn: np.ndarray, level: float = LEVEL) -> tuple[float, float] | None:
    """Widened percentiles of resamples. of: any figure over the same clusters."""
    finite = drawn[np.isfinite(drawn)]
    if not math.isfinite(value) or len(finite) < RESAMPLES / 2:
        return None
    if np.ptp(finite) <= 1e-12 * abs(value):
        return value, value
    tail = _NORMAL.cdf(-student_quantile((1 + level) / 2, of.freedom) * math.sqrt(of.inflation))
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
    """One figure less another on the same clusters."""

    value: float
    low: float
    high: float
    error: float
    """Standard error over resamples."""
    freedom: float
    p: float
    """Two-sided, before any correction: Student's t of value / error."""


def difference(ones: Sequence[Ratio], others: Sequence[Ratio], seed: int) -> Difference | None:
    """Mean figure of `ones` less that of `others`, all measured on the same clusters (paired).

    Either side may hold several training runs of one recipe: the spread between them then joins the error (Welch), as
    another run would differ again. None where there are too few clusters.
    """
    freedom: float = ones[0].freedom
    if freedom < MIN_CLUSTERS - 1:
        return None
    drawn = np.mean([r.drawn(seed) for r in ones], axis=0) - np.mean([r.drawn(seed) for r in others], axis=0)
    values = [[r.value for r in side] for side in (ones, others)]
    value = float(np.mean(values[0]) - np.mean(values[1]))
    bounds = _percentiles(ones[0], value, drawn)
    if bounds is None:
        return None
    parts = [(float(np.var(drawn[np.isfinite(drawn)])) * ones[0].inflation, float(freedom))]
    parts += [(float(np.var(side, ddof=1)) / len(side), len(side) - 1) for side in values if len(side) > 1]
    variance = sum(part for part, _ in parts)
    error = math.sqrt(variance)
    if len(parts) > 1 and variance:
        freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
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


def accuracy(asked: dict[str, dict[str, list[str]]], correct: dict[str, dict[str, str]]) -> Ratio:
    """Mean over tasks of the mean over classes of accuracy, clustered by text: one text serves several classes.

    asked: task -> class -> numbers of the test texts in that class and in others, separated by spaces. correct: task ->
    class -> `packed` outcomes in that order. Texts are drawn within their own task and class, whose sizes are given.
    """
    own_class, texts, shares, right = {}, [], [], []
    for task, classes in asked.items():
        for label, parts in classes.items():
            inside, outside = ([int(number) for number in part.split()] for part in parts)
            own_class |= {number: own_class.get(number, (task, label)) for number in inside}
            rows = inside + outside
            texts += rows
            shares += [1 / (len(rows) * len(classes) * len(asked))] * len(rows)
            right.append(unpacked(correct[task][label], len(rows)))
    names, cluster = np.unique(texts, return_inverse=True)
    strata = {name: index for index, name in enumerate(dict.fromkeys(own_class.values()))}
    weights = np.asarray(shares)
    return Ratio(np.bincount(cluster, weights * np.concatenate(right)), np.bincount(cluster, weights),
                 np.array([strata[own_class[name]] if name in own_class else len(strata) for name in names.tolist()]))


def stored(figure: Ratio, clusters: str) -> dict[str, Any]:
    """A ratio as JSON: `lab_v1["cluster_sums"][metric]`. clusters: the name in `lab_v1["clusters"]` of what was drawn."""
    return {"clusters": clusters, "numerator": _rounded(figure.numerator), "denominator": _rounded(figure.denominator)}


def _rounded(values: np.ndarray) -> list[float]:
    return [float(f"{value:.{SIGNIFICANT_DIGITS}g}") for value in values]


def _divide(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(np.shape(above), math.nan), where=below != 0)
