"""SAE training: one activation stream, many SAEs; recipes (losses) and schedules."""

from sae_research.training.recipes import RECIPES, Recipe

__all__ = ["RECIPES", "Recipe"]
