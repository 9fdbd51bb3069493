"""The stage `ground_truth_eval`: SAEs on synthetic activations whose true features are known.

python -m scripts.run_ground_truth                                        # the stage: eval_results/ground_truth/
python -m scripts.run_ground_truth --sae custom_saes.example:AbsTopK      # a class of your own beside it, as a table
python -m scripts.run_ground_truth --sae my_saes/one --sae 'my_saes/*'    # SAE folders of the right width
python -m scripts.run_ground_truth --save-worlds worlds                   # the true features, to train on elsewhere
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sae_research.runtime.errors import run_main


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sae", action="append", default=[], help="module:Class, or a folder (glob); writes no results")
    parser.add_argument("--save-worlds", type=Path, help="write every seed's synthetic model into this folder, and stop")
    arguments = parser.parse_args()
    from sae_research.config.params import load_params
    from sae_research.evals.ground_truth import evaluation

    params = load_params()
    if arguments.save_worlds is not None:
        evaluation.save_worlds(params, arguments.save_worlds)
    elif arguments.sae:
        from sae_research.reporting.ground_truth import plain_table

        print(plain_table(evaluation.evaluate(evaluation.beside(params, arguments.sae))))
    else:
        evaluation.run_stage(params)


if __name__ == "__main__":
    run_main(main)
