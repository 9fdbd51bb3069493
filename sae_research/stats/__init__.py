"""Streaming statistics shared by training, set-up and the evaluations."""

from sae_research.stats.predictions import CleanPredictions
from sae_research.stats.reconstruction import ReconstructionStats, density_histogram
from sae_research.stats.sae_bench import LatentWeights, latent_weights

__all__ = ["CleanPredictions", "LatentWeights", "ReconstructionStats", "density_histogram", "latent_weights"]
