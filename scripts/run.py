"""Train SAEs from one file: `python -m scripts.run --config_path configs/tinystories/relu.yaml`."""

from __future__ import annotations

from sae_research.runtime.errors import run_main


def main() -> int:
    from sae_research.cli.experiments import main as commands

    return commands("run")


if __name__ == "__main__":
    run_main(main)
