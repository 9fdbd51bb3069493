"""The setup stage: gather, make and check every SAE of the comparison in downloaded_saes/.

python -m scripts.setup_saes
"""

from __future__ import annotations

from sae_research.runtime.errors import run_main


def main() -> None:
    from sae_research.config.params import load_params
    from sae_research.runtime.stages import writing
    from sae_research.saes.sources import PREPARED
    from sae_research.setup.stage import run_setup

    with writing(PREPARED):
        run_setup(load_params())


if __name__ == "__main__":
    run_main(main)
