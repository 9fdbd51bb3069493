"""What runs and sweeps are doing: `python -m scripts.monitor_experiments --watch`."""

from __future__ import annotations

from functools import partial

from sae_research.errors import run_main
from sae_research.experiments.commands import main

if __name__ == "__main__":
    run_main(partial(main, "monitor"))
