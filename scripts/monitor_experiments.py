"""What runs and sweeps are doing: `python -m scripts.monitor_experiments --watch`."""

from __future__ import annotations

from sae_research.errors import run_main


def main() -> int:
    from sae_research.experiments.commands import main as commands

    return commands("monitor")


if __name__ == "__main__":
    run_main(main)
