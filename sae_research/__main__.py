"""`sae-research VERB`, also `python -m sae_research VERB`."""

from sae_research.runtime.errors import run_main


def main() -> int:
    from sae_research.cli.main import main as verbs

    return verbs()


def command() -> None:
    """The installed command `sae-research`."""
    run_main(main)


if __name__ == "__main__":
    command()
