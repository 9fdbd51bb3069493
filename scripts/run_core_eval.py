"""Stage `core_eval`: writes `eval_results/core/`."""

from sae_research.runtime.errors import run_main


def main() -> None:
    from sae_research.config.params import load_params
    from sae_research.evals.run import run_evaluation

    run_evaluation("core", load_params())


if __name__ == "__main__":
    run_main(main)
