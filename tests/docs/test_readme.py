"""Numbers in the README are those of the committed run."""

from __future__ import annotations

import json
import re
from pathlib import Path

from sae_research.config.evaluations import EVALUATIONS
from sae_research.runtime.formatting import number

ROOT = Path(__file__).parents[2]
COLUMNS = (
    ("core", "l0"),
    ("core", "variance_explained"),
    ("core", "loss_recovered"),
    ("core", "kl"),
    ("sparse_probing", "sae_top_1_accuracy"),
)


def test_the_table_of_the_run_is_the_runs() -> None:
    metrics = json.loads((ROOT / "metrics/all_metrics.json").read_text())
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ((?:[\d.]+ \| ?){5})$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) >= 6
    for name, cells in rows:
        want = [number(metrics[name][evaluation][key]) for evaluation, key in COLUMNS]
        assert [cell.strip() for cell in cells.strip("| ").split("|")] == want, name


def test_what_the_text_says_of_two_rows_is_theirs() -> None:
    metrics = json.loads((ROOT / "metrics/all_metrics.json").read_text())
    said = re.search(r"\(`(\w+)` against `(\w+)`: ([\d.]+) and ([\d.]+) of the variance", (ROOT / "README.md").read_text())
    assert said is not None
    for name, value in zip(said.group(1, 2), said.group(3, 4), strict=True):
        assert number(metrics[name]["core"]["variance_explained"]) == value


def test_the_table_of_evaluations_has_every_evaluation_and_its_default() -> None:
    table = (ROOT / "README.md").read_text().split("| `eval_types` |")[1].split("\n\n")[0]
    first = re.findall(r"^\| ((?:`\w+`(?:, )?)+)( \(on\))? \|", table, re.MULTILINE)
    said = {name: bool(on) for cell, on in first for name in re.findall(r"`(\w+)`", cell)}
    assert said == {name: one.on for name, one in EVALUATIONS.items()}
