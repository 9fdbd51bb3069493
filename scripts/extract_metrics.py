"""Extract the metrics of one evaluation, or gather those of all into one file.

python -m scripts.extract_metrics core eval_results/core metrics/core.json
python -m scripts.extract_metrics aggregate metrics/core.json metrics/scr.json metrics/all_metrics.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

from sae_research.runtime.errors import run_main


def main() -> None:
    from sae_research.config.evaluations import EVALUATIONS
    from sae_research.reporting.ground_truth import extract_ground_truth
    from sae_research.reporting.results import aggregate, extract
    from sae_research.reporting.transfer import extract_transfer

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in EVALUATIONS:
        command = commands.add_parser(name, help=f"metrics of the {name} evaluation")
        command.add_argument("results", type=Path, help="folder of *_eval_results.json")
        command.add_argument("output", type=Path)
    command = commands.add_parser("aggregate", help="gather metric files into one, by SAE")
    command.add_argument("inputs", type=Path, nargs="+")
    command.add_argument("output", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "aggregate":
        aggregate(arguments.inputs, arguments.output)
    elif arguments.command == "transfer":
        extract_transfer(arguments.results, arguments.output)
    elif arguments.command == "ground_truth":
        extract_ground_truth(arguments.results, arguments.output)
    else:
        extract(arguments.command, arguments.results, arguments.output)


if __name__ == "__main__":
    run_main(main)
