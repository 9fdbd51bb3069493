"""Six sparsities of each recipe: `python -m scripts.demo --save_dir saes --layers 8 --architectures top_k`."""

from __future__ import annotations

from sae_research.runtime.errors import run_main


def main() -> int:
    from sae_research.experiments.demo import main as demo

    return demo()


if __name__ == "__main__":
    run_main(main)
