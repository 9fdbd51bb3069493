"""k-sparse probing on the 113 binary tasks that come with the package `sae_probes`."""

from sae_research.evals.sae_probes.evaluation import evaluate

__all__ = ["evaluate"]
