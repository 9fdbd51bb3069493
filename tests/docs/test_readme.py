"""Numbers in the README are those of the committed run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from benchmarks.study_figures import SHORT
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
    assert len(rows) == 5
    for name, cells in rows:
        want = [number(metrics[name][evaluation][key]) for evaluation, key in COLUMNS]
        assert [cell.strip() for cell in cells.strip("| ").split("|")] == want, name


def test_what_the_text_says_of_two_rows_is_theirs() -> None:
    metrics = json.loads((ROOT / "metrics/all_metrics.json").read_text())
    said = re.search(r"\(`(\w+)` against `(\w+)`: ([\d.]+) and ([\d.]+) of the variance", (ROOT / "README.md").read_text())
    assert said is not None
    for name, value in zip(said.group(1, 2), said.group(3, 4), strict=True):
        assert number(metrics[name]["core"]["variance_explained"]) == value


def test_the_front_page_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_every_number_of_the_findings_is_the_studys() -> None:
    """Five bullets; docs/study, whose page is made of its record, has each value behind the same name, each difference with
    the same sign and interval, and every other number somewhere."""
    section = (ROOT / "README.md").read_text().split("## What the study found")[1].split("\n## ")[0]
    bullets = [" ".join(found.split()) for found in re.findall(r"^- (.+(?:\n  .+)*)", section, re.MULTILINE)]
    study = (ROOT / "docs/study/index.md").read_text().replace("−", "-")
    assert len(bullets) == 5
    for bullet in bullets:
        named = [(SHORT.get(name, name), value) for name, value in re.findall(r"`(\w+)` (\d+\.\d+)", bullet)]
        differences = re.findall(r"[+-]\d+\.\d+ \[[^\]]+\]", bullet)
        missing = [said for said in (*(f"`{name}` {value}" for name, value in named), *differences) if said not in study]
        assert not missing, missing
        numbers = re.findall(r"\d+\.\d+", bullet)
        assert numbers, bullet
        for value in numbers:
            assert re.search(rf"(?<![\d.]){re.escape(value)}(?!\d)", study), (value, bullet)


@pytest.mark.parametrize(
    ("task", "answer"),
    [
        ("Evaluate a released SAE", "make repro PRESET=gemma-2-2b"),
        (
            "Know what a metric means, `loss_recovered` say",
            "Loss recovered: `(CE_zero − CE_patched) / (CE_zero − CE_clean)`",
        ),
        ("Add a metric or an evaluation", "## A metric"),
        ("Come from SAE Bench", "`python -m sae_bench.evals.core.main`"),
    ],
)
def test_one_click_from_the_front_page_answers(task: str, answer: str) -> None:
    (row,) = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| {task}")]
    place, _, anchor = re.findall(r"\]\(([^)#]+)(#?)([^)]*)\)", row)[0]
    page = (ROOT / place).read_text()
    section = page[page.index(f"## {anchor.capitalize()}") :] if anchor else page
    assert answer in "\n".join(section.splitlines()[:40])
