"""A grid as a Weights & Biases sweep file, for whoever lets W&B's agents run it: `wandb sweep FILE`, `wandb agent ID`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_research.errors import UserError
from sae_research.experiments.config_files import write_yaml
from sae_research.experiments.grid import Point


def write_wandb_sweep(path: Path, points: list[Point], total: int, base: Path | None, arguments: list[str],
                      project: str | None) -> None:
    """Write the sweep file. An agent runs `scripts.run` once for each combination, in a folder of its own.

    total: combinations of the whole grid; `run_cap` carries a limit over. arguments: what `scripts.run` gets beside.
    Raises `UserError` where there is nothing to sweep or no base file that `scripts.run` could read.
    """
    if base is None:
        raise UserError("--wandb_sweep needs --base_config: agents run scripts.run, which reads one file")
    parameters: dict[str, dict[str, list[Any]]] = {}
    for point in points:
        for key, value in point.swept.items():
            values = parameters.setdefault(key, {"values": []})["values"]
            if value not in values:
                values.append(value)
    if not parameters:
        raise UserError("--wandb_sweep: the sweep file lists no value to sweep")
    sweep: dict[str, Any] = {"method": "grid", **({"project": project} if project else {}),
                             "program": "scripts/run.py", "parameters": parameters,
                             "command": ["${env}", "python", "-m", "scripts.run", "--config_path", str(base), *arguments,
                                         "${args_no_hyphens}"]}
    if len(points) < total:
        sweep["run_cap"] = len(points)
    write_yaml(path, sweep)
