"""Train the SAEs of `params.yaml` (train.saes) into trained_saes/.

python -m scripts.train_saes
"""

from __future__ import annotations

from sae_research.errors import run_main
from sae_research.params import load_params
from sae_research.store import writing
from sae_research.training.run import OUTPUT, train


def main() -> None:
    with writing(OUTPUT):
        train(load_params())


if __name__ == "__main__":
    run_main(main)
