"""Draw images/*.png and write the rows that `dvc plots` shows to metrics/plots."""

from __future__ import annotations

import gc
import os
import sys

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's idle threads would spin beside the drawing
gc.disable()  # a process of a second that only makes objects: looking through them again and again took a tenth of it

from sae_research.runtime.errors import run_main  # noqa: E402


def main() -> None:
    from sae_research.config.reporting import load_visualization
    from sae_research.reporting.figures import draw_all
    from sae_research.reporting.ground_truth_figures import draw_ground_truth
    from sae_research.reporting.rows import read_run
    from sae_research.reporting.tables import write_plot_data
    from sae_research.reporting.transfer_figures import draw_transfer

    style = load_visualization()
    run = read_run()
    write_plot_data(run)
    workers = 2 if sys.platform == "linux" else 1  # forking after matplotlib's import is safe on Linux only
    drawn = [*draw_all(run, style, workers=workers), *draw_transfer(style), *draw_ground_truth(style)]
    print(f"drew {len(drawn)} images")


if __name__ == "__main__":
    run_main(main)
