"""Write METRICS.md and metrics/results.csv from the merged results."""

from __future__ import annotations

from sae_research.runtime.errors import run_main


def main() -> None:
    from sae_research.reporting.report import write_report
    from sae_research.reporting.results import read_run
    from sae_research.reporting.tables import write_results_csv

    run = read_run()
    write_report(run)
    write_results_csv(run)


if __name__ == "__main__":
    run_main(main)
