"""`python -m sae_research analyze`, under the name of a script."""

from __future__ import annotations

import sys

from sae_research.runtime.errors import run_main


def main() -> int:
    from sae_research.cli.main import main as verbs

    return verbs(["analyze", *sys.argv[1:]])


if __name__ == "__main__":
    run_main(main)
