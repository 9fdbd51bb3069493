"""What the training tests share besides fixtures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from sae_research.config.params import Train
from sae_research.config.recipes import TrainedSAE
from sae_research.training import stage
from sae_research.training.buffer import StreamBatch
from sae_research.training.loop import Stop
from sae_research.training.training_sae import TrainingSAE, train_step

HOOK = "blocks.1.hook_resid_post"
STANDARD = {"recipe": "standard", "d_sae": 64, "l1_coefficient": 0.1, "learning_rate": 0.003}
TOP_K = {"recipe": "top_k", "d_sae": 64, "k": 4, "learning_rate": 0.003}
_OWN: dict[str, dict[str, Any]] = {
    **{
        name: {"l1_coefficient": 0.05}
        for name in ("relu", "gated", "gated_rajamanoharan", "standard", "standard_new", "p_anneal")
    },
    **{name: {"l0_coefficient": 0.003} for name in ("hard_concrete", "gated_hard_concrete")},
    **{name: {"k": 4} for name in ("top_k", "abs_top_k", "batch_top_k", "matryoshka_batch_top_k")},
    "jump_relu": {"target_l0": 4},
    "tanh_jump_relu": {"sparsity_coefficient": 1.0},
    "cross_layer": {"sparsity_coefficient": 1.0},
    "matching_pursuit": {"s": 4},
}
CONFIGS = {name: {"recipe": name, "d_sae": 64, **own} for name, own in _OWN.items()}
"""Every recipe, small."""


def recipe_of(cls: type, d_in: int, rows: torch.Tensor, seed: int = 0, **config: Any) -> Any:
    """An initialised recipe."""
    recipe = cls(d_in, TypeAdapter(TrainedSAE).validate_python(config), Train(precision="float32"))
    recipe.initialise(rows, torch.Generator().manual_seed(seed))
    return recipe


def trained(recipe: Any, rows: torch.Tensor, steps: int = 200, batch: int = 128) -> Any:
    """The recipe after a short run of its own, as the trainer would do it."""
    optimiser = torch.optim.Adam(recipe.parameters(), lr=recipe.config.learning_rate, betas=recipe.betas)
    member = TrainingSAE("sae", recipe, optimiser, torch.zeros(()), torch.zeros((), dtype=torch.long))
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        x = rows[torch.randint(len(rows), (batch,), generator=generator)]
        train_step(member, StreamBatch(x, (step + 0.5) / steps))
    return recipe


def train_with_a_stop(params: Any, folder: Path, calls_before: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train into `folder/rest` with caches of its own: Ctrl-C after so many calls between steps, then once more."""
    (folder / "other").mkdir()
    monkeypatch.setenv("DVC_ROOT", str(folder / "other"))
    calls, real = [], stage.Trainer.run

    def run(self: Any) -> None:
        def stop(fraction: float) -> None:
            calls.append(fraction)
            if len(calls) == calls_before:
                self.signals.received = 2

        self.at_step = stop
        real(self)

    monkeypatch.setattr(stage.Trainer, "run", run)
    with pytest.raises((Stop, KeyboardInterrupt)):
        stage.train(params, folder / "rest")
    monkeypatch.setattr(stage.Trainer, "run", real)
    stage.train(params, folder / "rest")
