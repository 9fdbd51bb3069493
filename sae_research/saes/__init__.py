"""Sparse autoencoders: contract, inference forms, files."""

from sae_research.saes.base import SAEConfig, SparseAutoencoder, encode_each, families
from sae_research.saes.files import load_sae, save_sae, save_variant
from sae_research.saes.registry import form_class, registry

__all__ = [
    "SAEConfig",
    "SparseAutoencoder",
    "encode_each",
    "families",
    "form_class",
    "load_sae",
    "registry",
    "save_sae",
    "save_variant",
]
