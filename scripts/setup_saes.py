"""The setup stage: gather, make and check every SAE of the comparison in downloaded_saes/.

    python -m scripts.setup_saes
"""

from __future__ import annotations

from sae_research.errors import run_main


def main() -> None:
    from sae_research.params import load_params
    from sae_research.setup.run import OUTPUT, run_setup
    from sae_research.store_stages import writing

    with writing(OUTPUT):
        run_setup(load_params())


if __name__ == "__main__":
    run_main(main)
