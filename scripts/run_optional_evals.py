"""The stages of the optional evaluations: `python -m scripts.run_optional_evals scr` writes `eval_results/scr/`."""

import sys

from sae_research.runtime.errors import UserError, run_main


def main() -> None:
    from sae_research.config.evaluations import OF_SAES
    from sae_research.config.params import load_params
    from sae_research.evals.run import run_evaluation

    if len(sys.argv) != 2 or sys.argv[1] not in OF_SAES:
        raise UserError(f"usage: python -m scripts.run_optional_evals {{{'|'.join(OF_SAES)}}}")
    run_evaluation(sys.argv[1], load_params())


if __name__ == "__main__":
    run_main(main)
