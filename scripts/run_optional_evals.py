"""Stages `scr_eval`, `tpp_eval`, `absorption_eval`, `unlearning_eval`: `python -m scripts.run_optional_evals scr`."""

import sys

from sae_research.errors import UserError, run_main


def main() -> None:
    from sae_research.evals.run import NOT_YET, run_optional
    from sae_research.params import load_params

    if len(sys.argv) != 2:
        raise UserError(f"usage: python -m scripts.run_optional_evals {{{'|'.join(NOT_YET)}}}")
    run_optional(sys.argv[1], load_params())


if __name__ == "__main__":
    run_main(main)
