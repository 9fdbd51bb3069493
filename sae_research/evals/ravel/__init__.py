"""RAVEL: whether single latents carry single attributes of an entity."""

from sae_research.evals.ravel.evaluation import evaluate

__all__ = ["evaluate"]
