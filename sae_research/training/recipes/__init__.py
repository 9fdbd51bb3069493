"""Recipes by name: how an SAE is trained. One file each."""

from __future__ import annotations

from sae_research.training.recipes.abs_top_k import AbsTopK
from sae_research.training.recipes.base import Recipe, StepOutput
from sae_research.training.recipes.cross_layer import CrossLayer
from sae_research.training.recipes.gated import Gated, GatedRajamanoharan
from sae_research.training.recipes.hard_concrete import GatedHardConcrete, HardConcrete
from sae_research.training.recipes.jump_relu import JumpReLU
from sae_research.training.recipes.l1 import PAnneal, Relu, Standard, StandardNew
from sae_research.training.recipes.matching_pursuit import MatchingPursuit
from sae_research.training.recipes.tanh_jump_relu import TanhJumpReLU
from sae_research.training.recipes.top_k import BatchTopK, MatryoshkaBatchTopK, TopK

RECIPES: dict[str, type[Recipe]] = {
    "relu": Relu,
    "gated": Gated,
    "hard_concrete": HardConcrete,
    "gated_hard_concrete": GatedHardConcrete,
    "standard": Standard,
    "standard_new": StandardNew,
    "gated_rajamanoharan": GatedRajamanoharan,
    "jump_relu": JumpReLU,
    "tanh_jump_relu": TanhJumpReLU,
    "cross_layer": CrossLayer,
    "top_k": TopK,
    "abs_top_k": AbsTopK,
    "batch_top_k": BatchTopK,
    "matryoshka_batch_top_k": MatryoshkaBatchTopK,
    "p_anneal": PAnneal,
    "matching_pursuit": MatchingPursuit,
}

__all__ = ["RECIPES", "Recipe", "StepOutput"]
