"""Unlearning: can clamping a few latents make the model forget one field and keep the others?"""

from sae_research.evals.unlearning.evaluation import evaluate

__all__ = ["evaluate"]
