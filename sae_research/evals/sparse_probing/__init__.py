"""Sparse probing: probes on a few latents of an SAE, on labelled texts."""

from sae_research.evals.sparse_probing.evaluation import evaluate

__all__ = ["evaluate"]
