"""A sweep over many devices: `python -m scripts.run_experiments --sweep_config sweep.yaml`."""

from __future__ import annotations

from sae_research.runtime.errors import run_main


def main() -> int:
    from sae_research.cli.experiments import main as commands

    return commands("sweep")


if __name__ == "__main__":
    run_main(main)
