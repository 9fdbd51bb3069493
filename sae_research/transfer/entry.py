"""Where the stage begins: what is switched off must not wait for torch."""

from __future__ import annotations

from pathlib import Path

from sae_research.params import Params
from sae_research.store_stages import stage_folder

RESULTS = Path("eval_results/transfer")


def run_stage(params: Params, folder: Path = RESULTS) -> None:
    """One run: results and status in `folder`. Raises `UserError` for what cannot be compared."""
    with stage_folder(folder, params.eval_types.transfer) as stage:
        if stage is None:
            return
        from sae_research.transfer.stage import run

        run(params, stage)
