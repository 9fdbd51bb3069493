"""Where training curves go besides `trained_saes/`: Weights & Biases, when a project is named."""

from __future__ import annotations

from typing import Literal

from sae_research.section import Name, Section


class Tracking(Section):
    """Changes nothing about the SAEs: the train stage does not run again for it."""

    project: Name | None = None
    """Of Weights & Biases; null tracks nothing there. The key comes from WANDB_API_KEY, in the environment or `.env`."""
    entity: Name | None = None
    """User or team; null takes WANDB_ENTITY, else the key's own."""
    tags: list[Name] = []
    name: Name = "{sae}"
    """Of a run, one for each SAE: {sae}, {recipe}, {model}, {hook}, {seed}, {tokens}, or any parameter of the SAE's entry
    such as {learning_rate}, {d_sae} or {k} (empty where its recipe has none)."""
    mode: Literal["online", "offline"] = "online"
    """offline writes to wandb/ only; `wandb sync` sends it later. WANDB_MODE has the last word."""
