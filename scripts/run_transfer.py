"""The stage `transfer_eval`: does an SAE of a base model serve a finetuned one? Writes `eval_results/transfer/`."""

from sae_research.runtime.errors import run_main


def main() -> None:
    from sae_research.config.params import load_params
    from sae_research.runtime.stages import write_disabled

    params = load_params()
    if not params.eval_types.transfer:
        write_disabled("eval_results/transfer")
        return
    from sae_research.transfer.stage import run_stage

    run_stage(params)


if __name__ == "__main__":
    run_main(main)
