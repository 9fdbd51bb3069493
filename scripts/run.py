"""Train SAEs from one file: `python -m scripts.run --config_path configs/tinystories/relu.yaml`."""

from __future__ import annotations

from functools import partial

from sae_research.errors import run_main
from sae_research.experiments.commands import main

if __name__ == "__main__":
    run_main(partial(main, "run"))
