"""What `dvc plots` draws with: `python -m sae_research.cli.plots` writes `.dvc/plots/`, from the figures' own colours and
markers; a test holds the files to that."""

from __future__ import annotations

from sae_research.reporting.dvc_plots import templates
from sae_research.runtime.errors import run_main
from sae_research.runtime.files import write_text
from sae_research.runtime.sources import PROJECT

FOLDER = PROJECT / ".dvc/plots"


def main() -> None:
    for name, text in templates().items():
        write_text(FOLDER / name, text)
    print(f"{FOLDER.relative_to(PROJECT)}: written")


if __name__ == "__main__":
    run_main(main)
