"""A sweep over many devices: `python -m scripts.run_experiments --sweep_config sweep.yaml`."""

from __future__ import annotations

from sae_research.errors import run_main


def main() -> int:
    from sae_research.experiments.commands import main as commands

    return commands("sweep")


if __name__ == "__main__":
    run_main(main)
