"""`python -m sae_research VERB`."""

from sae_research.runtime.errors import run_main


def main() -> int:
    from sae_research.cli.main import main as verbs

    return verbs()


if __name__ == "__main__":
    run_main(main)
