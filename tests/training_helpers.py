"""What the training tests share besides fixtures."""

from __future__ import annotations

from typing import Any

import torch

from sae_research.params import Train, TrainedSAE

HOOK = "blocks.1.hook_resid_post"
STANDARD = {"recipe": "standard", "d_sae": 64, "l1_coefficient": 0.1, "learning_rate": 0.003}
TOP_K = {"recipe": "top_k", "d_sae": 64, "k": 4, "learning_rate": 0.003}


def recipe_of(cls: type, d_in: int, rows: torch.Tensor, seed: int = 0, **config: Any) -> Any:
    """An initialised recipe."""
    recipe = cls(d_in, TrainedSAE(**config), Train())
    recipe.initialise(rows, torch.Generator().manual_seed(seed))
    return recipe
