"""A sweep over many devices: `python -m scripts.run_experiments --sweep_config sweep.yaml`."""

from __future__ import annotations

from functools import partial

from sae_research.errors import run_main
from sae_research.experiments.commands import main

if __name__ == "__main__":
    run_main(partial(main, "sweep"))
