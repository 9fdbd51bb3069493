"""What an SAE found of known features, and which metric that can be had on real models follows it.

N true features, F latents, n test samples; c the true codes [n, N], z the SAE's activations [n, F]. A feature counts where
it fires on at least `data.MIN_FIRINGS` test samples. A latent *stands for* the feature that the matching gives it.

A metric follows the truth as far as it ranks methods alike: Spearman's correlation of the two at equal L0. A *method* is a
recipe with its own encoder, or a pursuit encoder over one dictionary; its sparsities make a curve. Within a seed every curve
is read at one L0, linear in log L0 and never beyond its ends; the correlation is taken over methods and averaged over seeds.
Its interval draws methods and seeds anew (bootstrap, percentiles).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.stats import rankdata
from torch import Tensor

from sae_research.evals.ground_truth.data import MIN_FIRINGS, Samples, World
from sae_research.saes import SparseAutoencoder
from sae_research.stats.reconstruction import ReconstructionStats

DUPLICATE = 0.9
"""Latents of a larger absolute cosine than this are duplicates."""
MIN_EDGE = 10
"""A parent and child count for absorption where both situations occur on so many test samples."""
PROBED = 128
"""Most features that a probe is made for, evenly spread over those that count."""
MIN_POSITIVES = 10
"""Firings that a probed feature needs in each half of the samples."""

Metrics = dict[str, float]


class Matching(NamedTuple):
    """Features and latents paired one to one, of the largest total similarity."""

    features: np.ndarray
    latents: np.ndarray
    """[min(N, F)] each"""
    mean: float
    """Mean similarity of the pairs."""


def match(similarity_NF: np.ndarray) -> Matching:
    """The optimal assignment (scipy) by absolute similarity."""
    absolute = np.abs(similarity_NF)
    features, latents = linear_sum_assignment(absolute, maximize=True)
    return Matching(features, latents, float(absolute[features, latents].mean()))


@dataclass
class Truth:
    """A world's test samples, with what every SAE's metrics need of them."""

    world: World
    samples: Samples
    sequence_length: int
    _dictionaries: dict[str, Dictionary] = field(default_factory=dict)

    @property
    def n(self) -> int:
        return len(self.samples.x)

    @cached_property
    def fired(self) -> sparse.csc_matrix:
        """Which features fire [n, N], as numbers"""
        return (self.samples.codes != 0).astype(np.float32).tocsc()

    @cached_property
    def count(self) -> np.ndarray:
        """Samples that each feature fires on [N]"""
        return np.asarray(self.fired.sum(0)).ravel()

    @cached_property
    def counted(self) -> np.ndarray:
        """Features that count, ascending"""
        return np.flatnonzero(self.count >= MIN_FIRINGS)

    @cached_property
    def parent_alone(self) -> sparse.csc_matrix:
        """Where the parent of an edge fires and none of its children [n, edges]"""
        parents = self.world.edges[:, 0]
        children = sparse.csr_matrix(
            (np.ones(len(parents), np.float32), self.world.edges.T[::-1]), shape=(self.fired.shape[1],) * 2
        )  # [child, parent]
        any_child = ((self.fired @ children) != 0).astype(np.float32).tocsc()
        on = self.fired[:, parents]
        return (on - on.multiply(any_child[:, parents])).tocsc()

    def dictionary(self, sae: SparseAutoencoder) -> Dictionary:
        """What depends on the decoder alone, computed once for all encoders over it."""
        key = f"{sae.W_dec.shape}{float(sae.W_dec.double().sum())}{float(sae.W_dec.double().square()[:, 0].sum())}"
        if key not in self._dictionaries:
            self._dictionaries[key] = Dictionary.of(sae.W_dec, self.world.features)
        return self._dictionaries[key]


@dataclass
class Dictionary:
    """A decoder beside the true features."""

    matching: Matching
    best: np.ndarray
    """The true feature of largest absolute cosine, of each latent [F]"""
    nearest: np.ndarray
    """Largest absolute cosine with an earlier latent [F]"""

    @classmethod
    def of(cls, W_dec: Tensor, features: Tensor) -> Dictionary:
        rows_FD = torch.nn.functional.normalize(W_dec.float(), dim=1)
        cosine_NF = (features.float() @ rows_FD.T).abs()
        own_FF = (rows_FD @ rows_FD.T).abs().tril(-1)
        return cls(match(cosine_NF.cpu().numpy()), cosine_NF.argmax(0).cpu().numpy(), own_FF.max(1).values.cpu().numpy())


@torch.no_grad()
def measure(sae: SparseAutoencoder, z: Tensor, truth: Truth) -> Metrics:
    """Every metric of one SAE, as `reporting.stage_metrics.GROUND_TRUTH` defines them; what is not defined has no key.

    z: its activations on the test samples [n / sequence, sequence, F].
    """
    known = truth.dictionary(sae)
    x = truth.samples.x.view(*z.shape[:-1], -1)
    stats = ReconstructionStats(sae.cfg.d_in, sae.cfg.d_sae, z.device)
    stats.update(sae.target(x), sae.decode(z), z, torch.ones(z.shape[:-1], dtype=torch.bool, device=z.device))
    kept = {
        key: value
        for key, value in stats.metrics().items()
        if key in ("variance_explained", "cosine_similarity", "l0", "fraction_alive")
    }
    codes = sparse.csc_matrix(z.reshape(truth.n, -1).cpu().numpy())
    fires = (codes != 0).astype(np.float32)
    return {
        "mcc": known.matching.mean,
        "mcc_activations": match(correlations(truth.samples.codes, codes)).mean,  # ty: ignore[invalid-argument-type]
        **_support(truth, known, fires),
        **_latent_support(truth, known, fires),
        "uniqueness": len(np.unique(known.best)) / len(known.best),
        "fraction_dead": 1 - kept["fraction_alive"],
        "fraction_duplicate": float((known.nearest > DUPLICATE).mean()),
        **_hierarchy(truth, known, fires),
        **_probing(truth, codes),
        **kept,
    }


def correlations(codes: sparse.csr_matrix, z: sparse.csr_matrix) -> np.ndarray:
    """Pearson correlation of every true code with every latent [N, F]; 0 where one of them is constant."""
    n = codes.shape[0]
    mean_N, mean_F = np.asarray(codes.mean(0)).ravel(), np.asarray(z.mean(0)).ravel()
    spread_N = np.sqrt(np.maximum(np.asarray(codes.multiply(codes).mean(0)).ravel() - mean_N**2, 0))
    spread_F = np.sqrt(np.maximum(np.asarray(z.multiply(z).mean(0)).ravel() - mean_F**2, 0))
    covariance = (codes.T.tocsr() @ z.tocsr()).toarray() / n - np.outer(mean_N, mean_F)
    below = np.outer(spread_N, spread_F)
    return np.divide(covariance, below, out=np.zeros_like(below), where=below > 1e-12)


def _scores(both: np.ndarray, fires: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, ...]:
    """(precision, recall, F1) from counts; 0 for 0/0."""
    precision, recall = (np.divide(both, below, out=np.zeros_like(both), where=below > 0) for below in (fires, true))
    total = precision + recall
    return precision, recall, np.divide(2 * precision * recall, total, out=np.zeros_like(both), where=total > 0)


def _together(one: sparse.csr_matrix, other: sparse.csr_matrix) -> np.ndarray:
    """Samples on which the columns of both fire [columns]"""
    return np.asarray(one.multiply(other).sum(0), np.float64).ravel()


def _support(truth: Truth, known: Dictionary, fires: sparse.csr_matrix) -> Metrics:
    features, latents = known.matching.features, known.matching.latents
    both = np.zeros(len(truth.count))
    fired = np.zeros(len(truth.count))
    both[features] = _together(truth.fired[:, features], fires[:, latents])
    fired[features] = np.asarray(fires.sum(0)).ravel()[latents]
    at = truth.counted
    found = _scores(both[at], fired[at], truth.count[at].astype(np.float64))
    return dict(zip(("precision", "recall", "f1"), (float(values.mean()) for values in found), strict=True))


def _latent_support(truth: Truth, known: Dictionary, fires: sparse.csr_matrix) -> Metrics:
    both = _together(truth.fired[:, known.best], fires)
    found = _scores(both, np.asarray(fires.sum(0), np.float64).ravel(), truth.count[known.best].astype(np.float64))
    names = ("latent_precision", "latent_recall", "latent_f1")
    return dict(zip(names, (float(values.mean()) for values in found), strict=True))


def _hierarchy(truth: Truth, known: Dictionary, fires: sparse.csr_matrix) -> Metrics:
    edges = truth.world.edges
    if not len(edges):
        return {}
    latent_of = np.full(len(truth.count), -1)
    latent_of[known.matching.features] = known.matching.latents
    kept = (latent_of[edges] >= 0).all(1)
    parents, children = edges[kept].T
    on_parent, on_child = fires[:, latent_of[parents]], fires[:, latent_of[children]]
    child = truth.fired[:, children].multiply(on_child).tocsc()
    alone = truth.parent_alone[:, np.flatnonzero(kept)]
    n_child, n_alone = (np.asarray(part.sum(0), np.float64).ravel() for part in (child, alone))
    enough = (n_child >= MIN_EDGE) & (n_alone >= MIN_EDGE)
    alive = np.asarray(fires.sum(0)).ravel() > 0
    split = np.bincount(known.best[alive], minlength=len(truth.count))[np.unique(edges[:, 0])]
    found = {"split_latents": float(split[split > 0].mean())} if split.any() else {}
    if enough.any():
        silent = 1 - _together(child, on_parent)[enough] / n_child[enough]
        usual = 1 - _together(alone, on_parent)[enough] / n_alone[enough]
        found["absorption"] = float((silent - usual).mean())
    return found


def _probing(truth: Truth, z: sparse.csc_matrix) -> Metrics:
    """One latent and a threshold for each probed feature, chosen on every other sample."""
    train, test = np.arange(0, truth.n, 2), np.arange(1, truth.n, 2)
    labels = truth.fired.tocsr()
    enough = np.minimum(*(np.asarray(labels[part].sum(0)).ravel() for part in (train, test))) >= MIN_POSITIVES
    able = np.flatnonzero(enough & (truth.count < truth.n / 2 + 1))
    if not len(able):
        return {}
    probed = able[np.unique(np.linspace(0, len(able) - 1, min(PROBED, len(able))).round().astype(int))]
    labels, rows = labels[:, probed], z.tocsr()
    positives = labels[train].T.tocsr()
    n_positive = np.asarray(positives.sum(1)).ravel()[:, None]
    sums, total = (positives @ rows[train]).toarray(), np.asarray(rows[train].sum(0))
    difference = sums / n_positive - (total - sums) / (len(train) - n_positive)
    squares = np.asarray(rows[train].multiply(rows[train]).sum(0)) / len(train) - (total / len(train)) ** 2
    spread = np.sqrt(np.maximum(squares, 0))
    # by correlation with the label: the bare difference of means prefers a parent's latent to the feature's own
    related = np.divide(difference, spread, out=np.zeros_like(difference), where=spread > 1e-12)
    latent = np.abs(related).argmax(1)
    sign = np.where(np.take_along_axis(difference, latent[:, None], 1)[:, 0] < 0, -1.0, 1.0).astype(np.float32)
    values = z[:, latent].toarray() * sign
    truth_nP = labels.toarray() > 0
    limit = _thresholds(values[train], truth_nP[train])
    told = values[test] > limit
    right = truth_nP[test]
    hit = (told & right).sum(0) / right.sum(0)
    spared = (~told & ~right).sum(0) / (~right).sum(0)
    return {"top_1_probing": float((hit + spared).mean() / 2), "probed_features": float(len(probed))}


def _thresholds(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The limit above which balanced accuracy is best, of each column: the next value below. [n, P] -> [P]"""
    order = np.argsort(-values, axis=0, kind="stable")
    ranked, right = np.take_along_axis(values, order, 0), np.take_along_axis(labels, order, 0)
    gain = np.cumsum(right, 0) / right.sum(0) - np.cumsum(~right, 0) / (~right).sum(0)
    last = np.vstack([ranked[:-1] > ranked[1:], np.zeros((1, values.shape[1]), bool)])  # no limit inside a tie
    place = np.where(last, gain, -1.0).argmax(0)
    below = np.minimum(place + 1, len(values) - 1)
    return np.take_along_axis(ranked, below[None], 0)[0]


def flags(sae: SparseAutoencoder, figures: Metrics, truth: Truth) -> list[str]:
    """What keeps a row from being read as the others are."""
    found = []
    if sae.cfg.d_sae < len(truth.counted):
        found.append(f"narrow: {sae.cfg.d_sae} latents for {len(truth.counted)} features that fire")
    if (
        sae.per_token
        and figures["l0"] >= sae.cfg.d_in
        or not sae.per_token
        and figures["l0"] >= min(sae.cfg.d_in, truth.sequence_length)
    ):
        found.append("interpolating: as many free coefficients as equations")
    if figures["fraction_alive"] == 0:
        found.append("no latent fires")
    return found


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
                {key: np.array([values[key] for values in figures]) for key in sorted(keys)},
            )
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
    return [
        method
        for method, seeds in found.items()
        if every == set(seeds) and all(curve.covers(l0) for curve in seeds.values())
    ]


def follow(rows: Sequence[Mapping[str, Any]], near: float, seed: int) -> dict[str, Any]:
    """{l0, methods, seeds, correlations: metric -> truth -> {spearman, interval}, note}.

    near: the true L0. `correlations` is empty, and `note` says why, with fewer than `MIN_METHODS` methods at one L0. A
    single seed has no interval.
    """
    found = curves(rows)
    l0 = common_l0(found, near)
    methods = [] if l0 is None else _covering(found, l0)
    seeds = sorted({number for method in methods for number in found[method]})
    answer: dict[str, Any] = {
        "l0": l0,
        "methods": methods,
        "seeds": len(seeds),
        "correlations": {},
        "note": "",
        "left_out": sorted(set(found) - set(methods)),
    }
    if l0 is None or len(methods) < MIN_METHODS:
        return {
            **answer,
            "note": f"{len(methods)} methods reach one L0 in every seed, {MIN_METHODS} are needed to rank "
            "them: give recipes more sparsities (a list), or add recipes",
        }
    if len(seeds) < 2:
        answer["note"] = "one seed: no interval"
    random = np.random.default_rng(seed)
    for metric in ALLOWED:
        if not all(metric in curve.figures for method in methods for curve in found[method].values()):
            continue
        values = _values(found, methods, seeds, metric, l0)
        answer["correlations"][metric] = {
            truth: _correlation(values, _values(found, methods, seeds, truth, l0), random) for truth in TRUTHS
        }
    return answer


def _values(
    found: Mapping[str, Mapping[int, Curve]], methods: list[str], seeds: list[int], key: str, l0: float
) -> np.ndarray:
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
