"""Train the SAEs of `params.yaml` (train.saes) into trained_saes/.

python -m scripts.train_saes
"""

from __future__ import annotations

from sae_research.runtime.errors import run_main


def main() -> None:
    from sae_research.config.params import check_trained_names, load_params
    from sae_research.runtime.stages import writing
    from sae_research.training.stage import OUTPUT, train

    params = load_params()
    check_trained_names(params)
    with writing(OUTPUT):
        train(params, compared=True)


if __name__ == "__main__":
    run_main(main)
