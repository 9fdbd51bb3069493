"""The language model under study: where it comes from, hook points, prefix, resume."""

from sae_research.lm.activations import ActivationPool, Batch, SharedPrefixes, collect, collect_hooks
from sae_research.lm.load import PACKAGED, load_configured, load_language_model, pick_device
from sae_research.lm.mask import median_activation_norm, sae_bench_mask, token_mask
from sae_research.lm.model import LanguageModel

__all__ = [
    "PACKAGED",
    "ActivationPool",
    "Batch",
    "LanguageModel",
    "SharedPrefixes",
    "collect",
    "collect_hooks",
    "load_configured",
    "load_language_model",
    "median_activation_norm",
    "pick_device",
    "sae_bench_mask",
    "token_mask",
]
