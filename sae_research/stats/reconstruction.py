"""Statistics of a reconstruction from one pass over batches, in memory that does not grow with tokens; and clusters of text.

Contexts are packed from documents end to end, so a document may fill several contexts and a context may hold several
documents. Every token therefore counts for its own document, wherever it was packed. Documents of one source (a packaged
set, a file) resemble each other; with at least `MIN_SOURCES` sources the sources are the clusters, else the documents
are.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from sae_research.runtime.files import fingerprint
from sae_research.text.tokens import Contexts

HISTOGRAM_EDGES = [x / 4 for x in range(-20, 1)]
"""log10 of density, from 1e-5 to 1"""


def density_histogram(density_F: Tensor) -> dict[str, Any]:
    """Latents by the decimal logarithm of the fraction of tokens they fire on [d_sae]; those that never do apart."""
    alive = density_F[density_F > 0].log10()
    counts = torch.histc(alive.clamp(HISTOGRAM_EDGES[0], 0), len(HISTOGRAM_EDGES) - 1, HISTOGRAM_EDGES[0], 0)
    return {"log10_edges": HISTOGRAM_EDGES, "counts": [int(c) for c in counts], "dead": int((density_F == 0).sum())}


class ReconstructionStats:
    """How well `x_hat` stands for `x`, and how sparsely, over all tokens that count.

    Definitions (lab_v1), over counted tokens t and dimensions d, sums in float64:
    - `variance_explained`: 1 - sum |x - x_hat|^2 / sum |x - mean(x)|^2, the mean taken over all tokens seen.
    - `variance_explained_per_dim`: the same for each dimension, averaged over dimensions of non-zero variance, so
      that one dimension holding much of the variance does not decide alone.
    - `mse`: mean over tokens and dimensions of (x - x_hat)^2.
    - `cosine_similarity`, `l2_ratio`: means over tokens of cos(x, x_hat) and |x_hat| / |x|.
    - `relative_reconstruction_bias`: mean |x_hat|^2 / mean <x, x_hat> (arXiv 2404.16014, equation 10).
    - `l0`: mean number of activations != 0; `l1`: mean sum of absolute activations.
    - `fraction_alive`: fraction of latents with an activation != 0 on any token.
    """

    def __init__(self, d_in: int, d_sae: int, device: torch.device | str = "cpu") -> None:
        def zeros(*shape: int) -> Tensor:
            # float64 sums: MPS has none and falls back to float32
            return torch.zeros(
                *shape, dtype=torch.float32 if str(device).startswith("mps") else torch.float64, device=device
            )

        self.tokens = 0
        self.sum_D, self.sum_squares_D, self.residual_D = zeros(d_in), zeros(d_in), zeros(d_in)
        self.firing_F = zeros(d_sae)
        self.cosine, self.ratio, self.norm_squared, self.dot, self.l1 = zeros(5)

    @torch.no_grad()
    def update(self, x: Tensor, x_hat: Tensor, z: Tensor, mask: Tensor) -> None:
        """Add a batch. x, x_hat: [batch, seq, d_in]; z: [batch, seq, d_sae]; mask: bool [batch, seq]."""
        x_TD, hat_TD, z_TF = x[mask].float(), x_hat[mask].float(), z[mask]
        wide = self.sum_D.dtype
        self.tokens += len(x_TD)
        self.sum_D += x_TD.sum(0, dtype=wide)
        self.sum_squares_D += x_TD.square().sum(0, dtype=wide)
        self.residual_D += (x_TD - hat_TD).square().sum(0, dtype=wide)
        self.firing_F += (z_TF != 0).float().sum(0)  # sums of booleans are slow
        self.l1 += torch.linalg.vector_norm(z_TF, 1, dim=1, dtype=torch.float32).sum(dtype=wide)
        norm_T, hat_norm_T, dot_T = x_TD.norm(dim=1), hat_TD.norm(dim=1), (x_TD * hat_TD).sum(1)
        self.cosine += (dot_T / (norm_T * hat_norm_T).clamp_min(1e-12)).sum(dtype=wide)
        self.ratio += (hat_norm_T / norm_T.clamp_min(1e-12)).sum(dtype=wide)
        self.norm_squared += hat_norm_T.square().sum(dtype=wide)
        self.dot += dot_T.sum(dtype=wide)

    @property
    def density(self) -> Tensor:
        """Fraction of counted tokens on which each latent fires [d_sae]."""
        return (self.firing_F / max(self.tokens, 1)).float().cpu()

    def variance_explained_by_part(self, n_parts: int) -> list[float]:
        """`variance_explained` of every n-th of the dimensions: of a crosscoder hook by hook. NaN where a part has no
        variance."""
        total_D = self.sum_squares_D - self.sum_D.square() / max(self.tokens, 1)
        residuals, totals = (values.unflatten(0, (n_parts, -1)).sum(1) for values in (self.residual_D, total_D))
        return torch.where(totals > 0, 1 - residuals / totals, torch.nan).tolist()

    def metrics(self) -> dict[str, float]:
        """Every value above, as plain floats; empty when no token counted. A 0/0 is left out, never NaN."""
        if self.tokens == 0:
            return {}
        n = self.tokens
        total_D = self.sum_squares_D - self.sum_D.square() / n
        # A dimension that is constant but for rounding has no variance to explain.
        varied = total_D > 1e-9 * self.sum_squares_D.clamp_min(1e-30)
        values = {
            "tokens": float(n),
            "l0": float(self.firing_F.sum() / n),
            "l1": float(self.l1 / n),
            "mse": float(self.residual_D.sum() / (n * len(self.residual_D))),
            "cosine_similarity": float(self.cosine / n),
            "l2_ratio": float(self.ratio / n),
            "fraction_alive": float((self.firing_F > 0).float().mean()),
        }
        if varied.any():
            values["variance_explained"] = float(1 - self.residual_D.sum() / total_D.sum())
            values["variance_explained_per_dim"] = float((1 - self.residual_D[varied] / total_D[varied]).mean())
        if float(self.dot) != 0:
            values["relative_reconstruction_bias"] = float(self.norm_squared / self.dot)
        return values


MIN_SOURCES = 10
MAX_CLUSTERS = 256
"""More documents than this are pooled at random, by their id: results stay small, intervals valid."""


class Clusters(NamedTuple):
    """Clusters of some contexts."""

    index: np.ndarray
    """Cluster of every token, -1 for none [contexts, seq]."""
    count: int
    about: dict[str, Any]
    """What is stored of them: level (source, document or context), how many clusters, documents and sources, and a
    key that is equal only for equal clusters of equal tokens."""

    def sums(self, contexts: Tensor, counted: Tensor, values: Tensor) -> np.ndarray:
        """Sums of `values` [batch, seq] over counted tokens, by cluster [clusters], float64.

        contexts: numbers of the batch's contexts [batch]; counted: bool [batch, seq], where seq may end before the
        contexts do. Summed on the CPU in a fixed order, so that equal runs agree to the last digit.
        """
        index = self.index[contexts.cpu().numpy(), : counted.shape[1]]
        kept = counted.cpu().numpy() & (index >= 0)
        return np.bincount(index[kept], values.double().cpu().numpy()[kept], minlength=self.count)


def clusters_of(contexts: Contexts, first: int, last: int) -> Clusters:
    """Clusters of the contexts numbered `first` to `last` (not included); the index covers all contexts."""
    doc_ids = contexts.doc_ids.numpy()[first:last]
    used = np.unique(doc_ids[doc_ids >= 0])
    sources = [contexts.sources[i] for i in used]
    level = "source" if len(set(sources)) >= MIN_SOURCES else "document"
    names = sources if level == "source" else [contexts.documents[i] for i in used]
    if len(set(names)) > MAX_CLUSTERS:
        names = [str(int(fingerprint(name)[:12], 16) % MAX_CLUSTERS) for name in names]
    labels, cluster_of = np.unique(names, return_inverse=True) if names else (np.empty(0), np.empty(0, np.int64))
    table = np.full(len(contexts.documents) + 1, -1)  # the last entry is where a separator's -1 leads
    table[used] = cluster_of
    index = np.full(contexts.doc_ids.shape, -1)
    index[first:last] = table[doc_ids]
    return _clusters(
        index, len(labels), contexts.tokens[first:last], level=level, documents=len(used), sources=len(set(sources))
    )


def clusters_by_context(tokens: Tensor, first: int, last: int) -> Clusters:
    """Every context a cluster of its own: for tokens of which no documents are known."""
    index = np.full(tokens.shape, -1)
    index[first:last] = np.arange(last - first)[:, None]
    return _clusters(index, last - first, tokens[first:last], level="context")


def _clusters(index: np.ndarray, count: int, tokens: Tensor, **about: Any) -> Clusters:
    key = fingerprint([tokens.tolist(), index.tolist()])[:16]
    return Clusters(index, count, {**about, "clusters": count, "key": key})


class ReconstructionSums:
    """One SAE's sums by cluster, for L0, variance explained, and cosine and bias about the mean.

    n_parts: of a crosscoder, its hooks: beside `residual` and `total` the same of each part of the dimensions, in
    `residual@0`, `total@0`, ...
    """

    def __init__(self, clusters: Clusters, n_parts: int = 1) -> None:
        self.clusters, self.n_parts = clusters, n_parts
        self.sums = {
            name: np.zeros(clusters.count) for name in ("tokens", "l0", "residual", "total", "cosine", "rebuilt", "shared")
        }
        if n_parts > 1:
            self.sums |= {
                f"{name}@{part}": np.zeros(clusters.count) for name in ("residual", "total") for part in range(n_parts)
            }

    @torch.no_grad()
    def update(self, contexts: Tensor, x: Tensor, x_hat: Tensor, z: Tensor, mask: Tensor, mean_D: Tensor) -> None:
        """Add a batch. x, x_hat: [batch, seq, d_in]; z: [batch, seq, d_sae]; mask: bool [batch, seq]; mean_D: mean of x
        over all tokens that count. It stays where it is when clusters are drawn anew."""

        def add(values: Tensor) -> np.ndarray:
            return self.clusters.sums(contexts, mask, values)

        x, x_hat = x.float(), x_hat.float()
        self.sums["tokens"] += add(mask)
        # the norm of order 0 counts, five times as fast as `count_nonzero`
        self.sums["l0"] += add(torch.linalg.vector_norm(z, 0, dim=-1, dtype=torch.float32))
        self.sums["residual"] += add((x - x_hat).square().sum(-1))
        for part in range(self.n_parts if self.n_parts > 1 else 0):
            own, hat, mean = (side.chunk(self.n_parts, dim=-1)[part] for side in (x, x_hat, mean_D))
            self.sums[f"residual@{part}"] += add((own - hat).square().sum(-1))
            self.sums[f"total@{part}"] += add((own - mean).square().sum(-1))
        x, x_hat = x - mean_D, x_hat - mean_D
        total, rebuilt, shared = x.square().sum(-1), x_hat.square().sum(-1), (x * x_hat).sum(-1)
        self.sums["total"] += add(total)
        self.sums["rebuilt"] += add(rebuilt)
        self.sums["shared"] += add(shared)
        self.sums["cosine"] += add(shared / (total * rebuilt).sqrt().clamp_min(1e-30))

    def as_lists(self) -> dict[str, list[float]]:
        return {name: values.tolist() for name, values in self.sums.items()}


T = TypeVar("T")
_FIXED = ("shift", "dtype")


def together(kept: T, removed: T) -> T:
    """The statistics over both sets of tokens: every number and tensor of `removed` added to a copy of `kept`.

    For classes all of whose numbers and tensors are sums over tokens, but for those named in `_FIXED`; they may hold others
    of their kind.
    """
    total = copy.copy(kept)
    for name, value in vars(removed).items():
        if name not in _FIXED:
            own = getattr(kept, name)
            setattr(total, name, own + value if isinstance(value, Tensor | int | float) else together(own, value))
    return total


def sums_dtype(device: torch.device) -> torch.dtype:
    """Precision of sums: MPS has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def counted(values: Tensor, edges: list[float]) -> Tensor:
    """How many values fall into each bin between `edges` [bins]; those outside count in the outermost."""
    bins = torch.bucketize(values, torch.tensor(edges[1:-1], dtype=values.dtype, device=values.device), right=True)
    return torch.bincount(bins, minlength=len(edges) - 1).to(sums_dtype(values.device))
