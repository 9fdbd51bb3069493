"""Which tokens vary together: clusters of documents or sources, and sums over them.

Contexts are packed from documents end to end, so a document may fill several contexts and a context may hold several
documents. Every token therefore counts for its own document, wherever it was packed. Documents of one source (a
packaged set, a file) resemble each other; with at least `MIN_SOURCES` sources the sources are the clusters, else the
documents are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_research.store import fingerprint
from sae_research.text.stream import Contexts

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
        index = self.index[contexts.cpu().numpy(), :counted.shape[1]]
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
    return _clusters(index, len(labels), contexts.tokens[first:last], level=level, documents=len(used),
                     sources=len(set(sources)))


def clusters_by_context(tokens: Tensor, first: int, last: int) -> Clusters:
    """Every context a cluster of its own: for tokens of which no documents are known."""
    index = np.full(tokens.shape, -1)
    index[first:last] = np.arange(last - first)[:, None]
    return _clusters(index, last - first, tokens[first:last], level="context")


def _clusters(index: np.ndarray, count: int, tokens: Tensor, **about: Any) -> Clusters:
    key = fingerprint([tokens.tolist(), index.tolist()])[:16]
    return Clusters(index, count, {**about, "clusters": count, "key": key})


class ReconstructionSums:
    """One SAE's sums by cluster, for L0, variance explained, and cosine and bias about the mean."""

    def __init__(self, clusters: Clusters) -> None:
        self.clusters = clusters
        self.sums = {name: np.zeros(clusters.count) for name in (
            "tokens", "l0", "residual", "total", "cosine", "rebuilt", "shared")}

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
        x, x_hat = x - mean_D, x_hat - mean_D
        total, rebuilt, shared = x.square().sum(-1), x_hat.square().sum(-1), (x * x_hat).sum(-1)
        self.sums["total"] += add(total)
        self.sums["rebuilt"] += add(rebuilt)
        self.sums["shared"] += add(shared)
        self.sums["cosine"] += add(shared / (total * rebuilt).sqrt().clamp_min(1e-30))

    def as_lists(self) -> dict[str, list[float]]:
        return {name: values.tolist() for name, values in self.sums.items()}
