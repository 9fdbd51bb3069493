"""Synthetic activations with known features: settings to SAELens' `SyntheticModel`, samples by seed, their statistics.

SAELens makes the features, their firing and their hierarchy; here are the seeds (its samples come from torch's global
generator), the Gaussian noise that it has not, codes kept sparse, and what was asked beside what came out.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from sae_lens.synthetic import (
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    HierarchyNode,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    OrthogonalizationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
)
from scipy import sparse
from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.runtime.files import fingerprint

BLOCK = 1024
"""Samples drawn at a time: what a CPU's cache holds."""
MIN_FIRINGS = 5
"""A feature that fires on fewer test samples is left out of every mean over features."""


def config(values: dict[str, Any], seed: int) -> SyntheticModelConfig:
    """SAELens' configuration of `SyntheticData.whole()`."""
    hierarchy = (
        None
        if values["hierarchy_roots"] == 0
        else HierarchyConfig(
            total_root_nodes=values["hierarchy_roots"],
            branching_factor=values["hierarchy_branching"],
            max_depth=values["hierarchy_depth"],
            mutually_exclusive_portion=values["mutually_exclusive"],
            compensate_probabilities=True,
            scale_children_by_parent=values["scale_by_parent"],
        )
    )
    correlation = (
        None
        if values["correlation_rank"] == 0
        else LowRankCorrelationConfig(rank=values["correlation_rank"], correlation_scale=values["correlation_scale"])
    )
    steps = values["orthogonal_steps"]
    return SyntheticModelConfig(
        num_features=values["num_features"],
        hidden_dim=values["hidden_dim"],
        firing_probability=ZipfianFiringProbabilityConfig(
            exponent=values["zipf_exponent"], max_prob=values["max_probability"], min_prob=values["min_probability"]
        ),
        hierarchy=hierarchy,
        correlation=correlation,
        orthogonalization=OrthogonalizationConfig(num_steps=steps, lr=3e-4) if steps else None,
        mean_firing_magnitudes=LinearMagnitudeConfig(start=values["first_magnitude"], end=values["last_magnitude"]),
        std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=values["magnitude_std"], std=values["magnitude_std_spread"]),
        bias=values["bias_norm"],
        seed=seed,
    )


@dataclass
class Samples:
    """Activations and the codes they are sums of."""

    x: Tensor
    """[n, hidden_dim]"""
    codes: sparse.csr_matrix
    """Magnitudes of the true features [n, num_features]"""


class World:
    """One set of true features with its laws of firing."""

    def __init__(self, values: dict[str, Any], seed: int, device: torch.device | str = "cpu", stream: int = 0) -> None:
        """values: `SyntheticData.whole()`. stream: other samples of the same features."""
        self.seed, self.stream, self.noise, self.device = seed, stream, float(values["noise"]), torch.device(device)
        self.fingerprint = fingerprint([values, seed, stream, self.device.type])
        """Of what it is; two worlds of equal settings are one."""
        cfg = config(values, seed)
        logger = logging.getLogger("sae_lens.synthetic.synthetic_model")
        level = logger.level
        logger.setLevel(logging.ERROR)  # clamped probabilities stand in `statistics`
        self.model = SyntheticModel(cfg, device=str(self.device))
        logger.setLevel(level)
        self.asked = cfg.firing_probability.generate(cfg.num_features).numpy().astype(np.float64)
        """Firing probability asked for each feature [num_features]"""
        self.edges = _edges(self.model.hierarchy.roots if self.model.hierarchy else [])
        """(parent, child) pairs [edges, 2]"""

    @property
    def features(self) -> Tensor:
        """Unit directions [num_features, hidden_dim]"""
        return self.model.feature_dict.feature_vectors.detach()

    @property
    def bias(self) -> Tensor:
        return self.model.feature_dict.bias.detach()

    @torch.no_grad()
    def sample(self, n: int, *purpose: Any) -> Samples:
        """n samples, the same for the same world and `purpose`."""
        seed = int(fingerprint([self.seed, self.stream, "samples", *purpose])[:12], 16)
        rows, codes = [], []
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(seed)
            for start in range(0, n, BLOCK):
                x_BD, c_BN = self.model.sample_with_features(min(BLOCK, n - start))
                if self.noise:
                    x_BD = x_BD + self.noise * torch.randn_like(x_BD)
                rows.append(x_BD)
                codes.append(sparse.csr_matrix(c_BN.cpu().numpy()))
        return Samples(torch.cat(rows), sparse.vstack(codes, format="csr"))

    @torch.no_grad()
    def activations(self, n: int, *purpose: Any) -> Tensor:
        """As `sample`, the activations alone [n, hidden_dim]."""
        return self.sample(n, *purpose).x


def statistics(world: World, samples: Samples) -> dict[str, Any]:
    """What was asked of the generator beside what these samples show.

    `rate_ratio`: quartiles over features of the firing rate measured over the one asked: with a hierarchy SAELens corrects
    probabilities only approximately. `never_fired`, `rarely_fired`: features without a sample, and with fewer than
    `MIN_FIRINGS`. `firing_correlation_rms`: root mean square of the correlation of two features' firing, over pairs that
    are not parent, child or siblings, with what independence gives for as many samples beside it.
    """
    fired = (samples.codes != 0).astype(np.float64)
    n, count = fired.shape[0], np.asarray(fired.sum(0)).ravel()
    enough = world.asked * n >= MIN_FIRINGS
    ratio = (count / n / world.asked)[enough] if enough.any() else np.zeros(1)
    orphan, alone = _orphans(world, fired), np.setdiff1d(np.arange(fired.shape[1]), world.edges.ravel())
    return {
        "features": int(fired.shape[1]),
        "dimensions": int(samples.x.shape[1]),
        "l0": float(count.sum() / n),
        "l0_asked": float(world.asked.sum()),
        "rate_ratio_quartiles": np.quantile(ratio, (0.25, 0.5, 0.75)).tolist(),
        "never_fired": int((count == 0).sum()),
        "rarely_fired": int((count < MIN_FIRINGS).sum()),
        "parents": len(np.unique(world.edges[:, 0])),
        "children": len(world.edges),
        "children_without_parent": orphan,
        **_correlation(fired, alone),
        "largest_cosine": _largest_cosine(world.features),
    }


def _orphans(world: World, fired: sparse.csr_matrix) -> int:
    """Firings of a child on a sample where its parent is silent."""
    if not len(world.edges):
        return 0
    parent, child = fired.tocsc()[:, world.edges[:, 0]], fired.tocsc()[:, world.edges[:, 1]]
    return int(child.sum() - child.multiply(parent).sum())


def _correlation(fired: sparse.csr_matrix, alone: np.ndarray) -> dict[str, float]:
    if len(alone) < 2:
        return {}
    part = fired.tocsc()[:, alone]
    n, rate = part.shape[0], np.asarray(part.mean(0)).ravel()
    kept = (rate > 0) & (rate < 1)
    part, rate = part[:, np.flatnonzero(kept)], rate[kept]
    if len(rate) < 2:
        return {}
    deviation = np.sqrt(rate * (1 - rate))
    phi = ((part.T @ part).toarray() / n - np.outer(rate, rate)) / np.outer(deviation, deviation)
    off = phi[~np.eye(len(rate), dtype=bool)]
    return {"firing_correlation_rms": float(np.sqrt((off**2).mean())), "firing_correlation_rms_independent": n**-0.5}


def _largest_cosine(features: Tensor) -> float:
    """Mean over features of the largest absolute cosine with another: the superposition."""
    largest = []
    for start in range(0, len(features), BLOCK):
        cosine = (features[start : start + BLOCK] @ features.T).abs()
        rows = torch.arange(len(cosine), device=cosine.device)
        cosine[rows, rows + start] = 0
        largest.append(cosine.max(1).values)
    return float(torch.cat(largest).mean())


def need_firing(world: World, samples: Samples) -> None:
    """Raises `UserError` where fewer than half of the features fire often enough to be measured."""
    count = np.asarray((samples.codes != 0).sum(0)).ravel()
    able = int((count >= MIN_FIRINGS).sum())
    if able < max(2, len(count) / 2):
        raise UserError(
            f"ground_truth: only {able} of {len(count)} features fire on {MIN_FIRINGS} of the {samples.codes.shape[0]} test "
            "samples; raise data.min_probability or test_samples, or lower data.num_features"
        )


def _edges(roots: list[HierarchyNode]) -> np.ndarray:
    found: list[tuple[int, int]] = []

    def visit(node: HierarchyNode) -> None:
        for child in node.children:
            if node.feature_index is not None and child.feature_index is not None:
                found.append((node.feature_index, child.feature_index))
            visit(child)

    for root in roots:
        visit(root)
    return np.array(found, dtype=np.int64).reshape(-1, 2)
