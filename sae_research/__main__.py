"""`python -m sae_research VERB`."""

from sae_research.cli import main
from sae_research.errors import run_main

if __name__ == "__main__":
    run_main(main)
