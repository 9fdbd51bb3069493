"""Recipes by name: how an SAE is trained. One file each."""

from __future__ import annotations

from sae_research.training.recipes.base import Recipe, StepOutput
from sae_research.training.recipes.standard import Standard
from sae_research.training.recipes.top_k import TopK

RECIPES: dict[str, type[Recipe]] = {"standard": Standard, "top_k": TopK}

__all__ = ["RECIPES", "Recipe", "StepOutput"]
