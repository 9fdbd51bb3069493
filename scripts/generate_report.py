"""Write METRICS.md, metrics/results.csv, metrics/differences.csv and the results site report/ from the merged results."""

from __future__ import annotations

from sae_research.runtime.errors import run_main


def main() -> None:
    from sae_research.config.reporting import load_visualization
    from sae_research.reporting.comparisons import comparisons
    from sae_research.reporting.report import write_report
    from sae_research.reporting.rows import read_run
    from sae_research.reporting.site.pages import write_site
    from sae_research.reporting.tables import write_results_csv

    run, style = read_run(), load_visualization()
    found = comparisons(run)
    write_report(run, found)
    write_results_csv(run)
    write_site(run, found, style)


if __name__ == "__main__":
    run_main(main)
