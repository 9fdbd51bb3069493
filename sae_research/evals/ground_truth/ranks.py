"""Which metric follows the truth: at equal L0, the rank correlation of what real models allow with what is known here.

A *method* is a recipe with its own encoder, or a pursuit encoder over one dictionary; its sparsities make a curve. Within
a seed every curve is read at one L0, linear in log L0 and never beyond its ends; Spearman's correlation is taken over
methods and averaged over seeds. The interval draws methods and seeds anew (bootstrap, percentiles).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import rankdata

TRUTHS = ("mcc", "latent_f1")
ALLOWED = ("variance_explained", "cosine_similarity", "top_1_probing", "fraction_alive")
"""What can be had without true features; the labels of a probe are what a labelled data set gives."""
MIN_METHODS = 4
TOLERANCE = 1.05
"""A curve may be read this factor beyond its ends."""
DRAWS = 2000


class Curve(NamedTuple):
    """One method in one seed, by ascending L0."""

    l0: np.ndarray
    figures: dict[str, np.ndarray]

    def covers(self, l0: float) -> bool:
        return bool(self.l0[0] / TOLERANCE <= l0 <= self.l0[-1] * TOLERANCE)

    def at(self, key: str, l0: float) -> float:
        """Linear in log L0; the nearest end's value just beyond it."""
        return float(np.interp(np.log(l0), np.log(self.l0), self.figures[key]))


def curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[int, Curve]]:
    """method -> seed -> curve, of rows with `method`, `seed` and `metrics`; what never fires is left out."""
    found: dict[str, dict[int, list[Mapping[str, float]]]] = {}
    for row in rows:
        if row["metrics"]["l0"] > 0 and all(key in row["metrics"] for key in (*TRUTHS, "variance_explained")):
            found.setdefault(row["method"], {}).setdefault(row["seed"], []).append(row["metrics"])
    result: dict[str, dict[int, Curve]] = {}
    for method, seeds in found.items():
        for seed, figures in seeds.items():
            figures = sorted(figures, key=lambda values: values["l0"])
            keys = set.intersection(*(set(values) for values in figures))
            result.setdefault(method, {})[seed] = Curve(
                np.array([values["l0"] for values in figures]),
                {key: np.array([values[key] for values in figures]) for key in sorted(keys)})
    return result


def common_l0(found: Mapping[str, Mapping[int, Curve]], near: float) -> float | None:
    """The L0 that most methods' curves cover in every seed, nearest to `near` by ratio among equals; None without any."""
    read = [curve for seeds in found.values() for curve in seeds.values()]
    ends = sorted({float(end) for curve in read for end in (curve.l0[0], curve.l0[-1])})
    places = ends + [float(np.sqrt(low * high)) for low, high in zip(ends, ends[1:], strict=False)]
    if not places:
        return None
    return max(places, key=lambda l0: (len(_covering(found, l0)), -abs(np.log(l0 / near))))


def _covering(found: Mapping[str, Mapping[int, Curve]], l0: float) -> list[str]:
    every = {number for seeds in found.values() for number in seeds}
    return [method for method, seeds in found.items()
            if every == set(seeds) and all(curve.covers(l0) for curve in seeds.values())]


def follow(rows: Sequence[Mapping[str, Any]], near: float, seed: int) -> dict[str, Any]:
    """{l0, methods, seeds, correlations: metric -> truth -> {spearman, interval}, note}.

    near: the true L0. `correlations` is empty, and `note` says why, with fewer than `MIN_METHODS` methods at one L0. A
    single seed has no interval.
    """
    found = curves(rows)
    l0 = common_l0(found, near)
    methods = [] if l0 is None else _covering(found, l0)
    seeds = sorted({number for method in methods for number in found[method]})
    answer: dict[str, Any] = {"l0": l0, "methods": methods, "seeds": len(seeds), "correlations": {}, "note": "",
                              "left_out": sorted(set(found) - set(methods))}
    if len(methods) < MIN_METHODS:
        return {**answer, "note": f"{len(methods)} methods reach one L0 in every seed, {MIN_METHODS} are needed to rank "
                "them: give recipes more sparsities (a list), or add recipes"}
    if len(seeds) < 2:
        answer["note"] = "one seed: no interval"
    random = np.random.default_rng(seed)
    for metric in ALLOWED:
        if not all(metric in curve.figures for method in methods for curve in found[method].values()):
            continue
        values = _values(found, methods, seeds, metric, l0)
        answer["correlations"][metric] = {
            truth: _correlation(values, _values(found, methods, seeds, truth, l0), random) for truth in TRUTHS}
    return answer


def _values(found: Mapping[str, Mapping[int, Curve]], methods: list[str], seeds: list[int], key: str,
            l0: float) -> np.ndarray:
    """[seeds, methods]"""
    return np.array([[found[method][number].at(key, l0) for method in methods] for number in seeds])


def _correlation(metric_SM: np.ndarray, truth_SM: np.ndarray, random: np.random.Generator) -> dict[str, Any]:
    value = _mean_spearman(metric_SM, truth_SM)
    if value is None:
        return {"note": "constant over methods"}
    answer: dict[str, Any] = {"spearman": value}
    n_seeds, n_methods = metric_SM.shape
    if n_seeds < 2:
        return answer
    columns = random.integers(n_methods, size=(DRAWS, n_methods))
    rows = random.integers(n_seeds, size=(DRAWS, n_seeds))
    by_seed = np.stack([_spearman(metric_SM[s][columns], truth_SM[s][columns]) for s in range(n_seeds)], axis=1)
    drawn = np.take_along_axis(by_seed, rows, 1)
    sound = np.isfinite(drawn)
    mean = np.divide(np.where(sound, drawn, 0).sum(1), sound.sum(1), out=np.full(DRAWS, np.nan), where=sound.any(1))
    return {**answer, "interval": [float(value) for value in np.nanquantile(mean, (0.025, 0.975))]}


def _mean_spearman(metric_SM: np.ndarray, truth_SM: np.ndarray) -> float | None:
    """Mean over seeds of the correlation of ranks over methods; None where nothing varies."""
    found = _spearman(metric_SM, truth_SM)
    return float(np.nanmean(found)) if np.isfinite(found).any() else None


def _spearman(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Correlation of the ranks along the last dimension, equal values at their mean rank; NaN where a side is constant."""
    a, b = (rankdata(np.round(values, 12), axis=-1) for values in (one, other))
    a, b = a - a.mean(-1, keepdims=True), b - b.mean(-1, keepdims=True)
    below = np.sqrt((a**2).sum(-1) * (b**2).sum(-1))
    return np.divide((a * b).sum(-1), below, out=np.full(a.shape[:-1], np.nan), where=below > 0)
