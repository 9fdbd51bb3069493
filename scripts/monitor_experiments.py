"""What runs and sweeps are doing: `python -m scripts.monitor_experiments --watch`."""

from __future__ import annotations

from sae_research.runtime.errors import run_main


def main() -> int:
    from sae_research.cli.experiments import main as commands

    return commands("monitor")


if __name__ == "__main__":
    run_main(main)
