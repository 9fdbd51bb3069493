"""Stage `sparse_probing_eval`: writes `eval_results/sparse_probing/`."""

from sae_research.runtime.errors import run_main


def main() -> None:
    from sae_research.config.params import load_params
    from sae_research.evals.run import run_evaluation

    run_evaluation("sparse_probing", load_params())


if __name__ == "__main__":
    run_main(main)
