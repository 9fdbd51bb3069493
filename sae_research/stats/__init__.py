"""Streaming statistics shared by training, set-up and the evaluations."""

from sae_research.stats.losses import CleanPredictions
from sae_research.stats.reconstruction import ReconstructionStats
from sae_research.stats.weights import LatentWeights, latent_weights

__all__ = ["CleanPredictions", "LatentWeights", "ReconstructionStats", "latent_weights"]
