"""Core evaluation: sparsity, reconstruction and what the reconstruction does to the model's predictions."""

from sae_research.evals.core.evaluation import evaluate

__all__ = ["evaluate"]
