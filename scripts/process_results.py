"""Merge the results of all evaluations into eval_results/merged, one file per SAE."""

from __future__ import annotations

from sae_research.runtime.errors import run_main


def main() -> None:
    from sae_research.reporting.results import merge

    print(f"merged {len(merge())} SAEs")


if __name__ == "__main__":
    run_main(main)
