"""SAE training: one activation stream, many SAEs; recipes (losses) and schedules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_research.training.recipes import RECIPES, Recipe

__all__ = ["RECIPES", "Recipe"]


def __getattr__(name: str) -> Any:
    """Recipes when first asked for: importing the package alone needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sae_research.training import recipes

    return getattr(recipes, name)
