"""How long each stage of `dvc repro` takes from empty caches.

    python -m benchmarks.default_run    # writes docs/default_run.json and the table of docs/speed.md

Moves `.cache` and DVC's cache of outputs aside, so that everything is computed, and puts nothing back: run it in a clone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.pages import write_between
from sae_research.cli.pipeline import RUNNING
from sae_research.runtime.errors import UserError, run_main
from sae_research.runtime.files import project_root, write_json
from sae_research.runtime.formatting import duration, markdown_table

RECORD, PAGE = Path("docs/default_run.json"), Path("docs/speed.md")
BEGIN, END = "<!-- default run -->", "<!-- end of default run -->"
SHOWN_SECONDS = 15
"""Stages shorter than this are added up."""


def main() -> None:
    root = project_root()
    if (root / ".cache").exists():
        raise UserError(f"{root / '.cache'} exists; run this in a fresh clone (git clone), where everything is computed")
    write_json(root / RECORD, {"seconds": measure(root)})
    write_between(root / PAGE, BEGIN, END, table(root / RECORD))


def measure(root: Path) -> dict[str, float]:
    """Seconds of every stage, and of DVC before the first (`start`). A stage's time goes on until the next one begins.
    Raises `UserError` where the pipeline fails."""
    seconds, current, began = {}, "start", time.monotonic()
    with subprocess.Popen(["dvc", "repro", "--force"], cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            sys.stdout.write(line)
            if found := RUNNING.match(line):
                now = time.monotonic()
                seconds[current], current, began = round(now - began, 1), found[1], now
    seconds[current] = round(time.monotonic() - began, 1)
    if process.returncode:
        raise UserError(f"dvc repro ended with {process.returncode}")
    return seconds


def table(record: Path) -> str:
    """The page's table: stages by time, the short ones together, and the whole."""
    seconds = json.loads(record.read_text())["seconds"]
    long = {name: value for name, value in seconds.items() if value >= SHOWN_SECONDS}
    rows = [[f"`{name}`", duration(value)] for name, value in sorted(long.items(), key=lambda item: -item[1])]
    rest = sum(seconds.values()) - sum(long.values())
    rows += [[f"{len(seconds) - len(long)} others, DVC included", duration(rest)], ["all", duration(sum(seconds.values()))]]
    return markdown_table(["stage", "time"], rows)


if __name__ == "__main__":
    run_main(main)
