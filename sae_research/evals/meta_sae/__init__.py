"""Meta-SAE: an SAE trained on another's decoder rows."""

from sae_research.evals.meta_sae.evaluation import evaluate

__all__ = ["evaluate"]
