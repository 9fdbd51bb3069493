"""Recipes by name: how an SAE is trained. One file each."""

from __future__ import annotations

from sae_research.training.recipes.base import Recipe, StepOutput
from sae_research.training.recipes.batch_top_k import BatchTopK
from sae_research.training.recipes.gated import Gated
from sae_research.training.recipes.gated_hard_concrete import GatedHardConcrete
from sae_research.training.recipes.gated_rajamanoharan import GatedRajamanoharan
from sae_research.training.recipes.hard_concrete import HardConcrete
from sae_research.training.recipes.jump_relu import JumpReLU
from sae_research.training.recipes.matching_pursuit import MatchingPursuit
from sae_research.training.recipes.matryoshka_batch_top_k import MatryoshkaBatchTopK
from sae_research.training.recipes.p_anneal import PAnneal
from sae_research.training.recipes.relu import Relu
from sae_research.training.recipes.standard import Standard
from sae_research.training.recipes.standard_new import StandardNew
from sae_research.training.recipes.top_k import TopK

RECIPES: dict[str, type[Recipe]] = {
    "relu": Relu,
    "gated": Gated,
    "hard_concrete": HardConcrete,
    "gated_hard_concrete": GatedHardConcrete,
    "standard": Standard,
    "standard_new": StandardNew,
    "gated_rajamanoharan": GatedRajamanoharan,
    "jump_relu": JumpReLU,
    "top_k": TopK,
    "batch_top_k": BatchTopK,
    "matryoshka_batch_top_k": MatryoshkaBatchTopK,
    "p_anneal": PAnneal,
    "matching_pursuit": MatchingPursuit,
}

__all__ = ["RECIPES", "Recipe", "StepOutput"]
