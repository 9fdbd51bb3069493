"""The figures, pictures and tables of docs/pursuit.md: `python -m scripts.pursuit_study [--draw-only]`.

Reads `downloaded_saes/` (run the setup stage first) and writes `docs/pursuit/study.json`, `docs/pursuit/*.png` and the
tables of the page. Some minutes on the packaged model; `--draw-only` keeps the figures there are. The table of speeds
comes from `python -m benchmarks.pursuit --json docs/pursuit/speed.json`.
"""

import argparse
from pathlib import Path

from sae_research.runtime.errors import run_main

PAGE = Path("docs/pursuit.md")
FOLDER = Path("docs/pursuit")


def main() -> None:
    parser = argparse.ArgumentParser(description="Figures, pictures and tables of docs/pursuit.md")
    parser.add_argument("--draw-only", action="store_true", help="pictures and tables from the figures there are")
    draw_only = parser.parse_args().draw_only

    from sae_research.reporting import pursuit_page

    if not draw_only:
        from sae_research.config.params import load_params
        from sae_research.evals import harness, pursuit_study
        from sae_research.lm import load_language_model
        from sae_research.runtime.files import write_json

        params = load_params()
        lm = load_language_model(params.model.name, params.model.device, params.model.torch_dtype)
        write_json(FOLDER / "study.json", pursuit_study.study(harness.SAE_FOLDER, lm, params))
    for path in pursuit_page.draw(FOLDER):
        print(path)
    pursuit_page.write_tables(PAGE, FOLDER)


if __name__ == "__main__":
    run_main(main)
