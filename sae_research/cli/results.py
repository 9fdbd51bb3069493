"""The verbs report, metrics and compare: results to look at, of the workspace, a commit or an experiment."""

from __future__ import annotations

import argparse
import shutil
import webbrowser
from pathlib import Path
from typing import TYPE_CHECKING

from sae_research.runtime.errors import UserError
from sae_research.runtime.files import project_root, slugify

if TYPE_CHECKING:
    from sae_research.reporting.revisions import Snapshot

WORKSPACE = "workspace"
COMPARISONS = Path("report_comparisons")
ANY = "a commit, a branch, an experiment, or `workspace`"


def add_verbs(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register the verbs; each sets `run`, a function of the parsed options that returns the exit code."""
    report = verbs.add_parser(
        "report",
        help="where the results site is; or a page that holds two runs side by side",
        description="Example: python -m sae_research report --compare HEAD~1 workspace --open",
    )
    report.add_argument("--compare", nargs=2, metavar=("A", "B"), help=f"each {ANY}")
    report.add_argument("--out", type=Path, help=f"folder of that page ({COMPARISONS}/A_and_B)")
    report.add_argument("--open", action="store_true", help="open it in the browser too")
    report.set_defaults(run=_report)

    metrics = verbs.add_parser(
        "metrics",
        help="the results as a table that fits the terminal",
        description="Example: python -m sae_research metrics --intervals. `dvc metrics show` puts every metric of every SAE "
        "into one line.",
    )
    metrics.add_argument("revision", nargs="?", default=WORKSPACE, help=f"{ANY} (the default)")
    metrics.add_argument("--intervals", action="store_true", help="95 %% intervals beside the values")
    _add_choice(metrics)
    metrics.set_defaults(run=_metrics)

    compare = verbs.add_parser(
        "compare",
        help="what changed between two runs: values and parameters",
        description="Example: python -m sae_research compare HEAD workspace",
    )
    compare.add_argument("one", help=ANY)
    compare.add_argument("other", nargs="?", default=WORKSPACE, help="as the first (workspace)")
    _add_choice(compare)
    compare.set_defaults(run=_compare)


def _add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--metric", action="append", default=[], metavar="KEY", help="this one; may be given several times")
    parser.add_argument("--eval", metavar="NAME", help="all metrics of one evaluation, e.g. core")


def _report(options: argparse.Namespace) -> int:
    root = project_root()
    if options.compare:
        from sae_research.config.reporting import load_visualization
        from sae_research.reporting.site.compare import write_comparison

        one, other = (snapshot(root, name) for name in options.compare)
        folder = options.out or root / COMPARISONS / f"{slugify(one.name)}_and_{slugify(other.name)}"
        write_comparison(one, other, load_visualization(root / "params.yaml"), folder)
        page = folder / "index.html"
    else:
        if options.out:
            raise UserError("--out: belongs to --compare; the results site is the folder report/")
        from sae_research.reporting.site.pages import SITE

        page = root / SITE / "index.html"
        if not page.is_file():
            raise UserError(f"{SITE}/index.html: not there yet; run `dvc repro generate_report`")
    print(page)
    if options.open and not webbrowser.open(page.resolve().as_uri()):
        raise UserError("no browser to open it in; open the file by hand")
    return 0


def _metrics(options: argparse.Namespace) -> int:
    from sae_research.reporting.revisions import chosen_metrics, metrics_table

    run = snapshot(project_root(), options.revision).run
    print(metrics_table(run, chosen_metrics(run, options.metric, options.eval), _width(), options.intervals))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from sae_research.reporting.revisions import changed_params, chosen_metrics, comparison_table, fitted, only, shortened

    root = project_root()
    one, other = snapshot(root, options.one), snapshot(root, options.other)
    print(comparison_table(one, other, chosen_metrics(one.run, options.metric, options.eval), _width()))
    for here, there in ((one, other), (other, one)):
        if names := only(here, there):
            print(f"\nonly in {here.name}: {', '.join(names)}")
    changed = changed_params(one, other)
    if changed:
        width = _width()
        rows = [[shortened(cell, width // 3 - 2) for cell in row] for row in changed]
        print("\n" + fitted([["parameter", one.name, other.name], *rows], width, left=3))
    return 0


def snapshot(root: Path, name: str) -> Snapshot:
    """The results under a name. Raises `UserError` for an unknown one, and for one without results."""
    from sae_research.experiments.history import file_at, revision
    from sae_research.reporting.revisions import read_snapshot

    if name == WORKSPACE:
        return read_snapshot(name, lambda path: (root / path).read_text() if (root / path).is_file() else None)
    commit = revision(root, name)
    return read_snapshot(name, lambda path: file_at(root, commit, path))


def _width() -> int:
    return shutil.get_terminal_size().columns
