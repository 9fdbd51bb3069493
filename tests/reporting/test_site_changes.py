"""What the page of two runs says first: which parameters, SAEs and values changed, or that nothing did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sae_research.reporting.revisions import Snapshot
from sae_research.reporting.rows import Row, Run, read_run
from sae_research.reporting.site.changes import changes, measured
from sae_research.reporting.site.compare import report_address, write_comparison
from tests.helpers.results import STYLE, Lab
from tests.helpers.sites import many

pytest.importorskip("vl_convert", reason="vl-convert-python is not installed: `make setup`")


@pytest.fixture(scope="module")
def run(site_lab: Lab) -> Run:
    return read_run(site_lab.root)


def altered(run: Run, name: str, evaluation: str = "core", **parts: dict[str, Any]) -> Run:
    """The run with other metrics or intervals of one SAE; None takes a metric away."""
    rows = []
    for row in run.rows:
        if row.name == name:
            record = dict(row.evals[evaluation])
            for part, values in parts.items():
                merged = {**record.get(part, {}), **values}
                record[part] = {key: value for key, value in merged.items() if value is not None}
            row = Row(row.name, row.cfg, {**row.evals, evaluation: record})
        rows.append(row)
    return Run(rows, run.evals, run.training, run.curves)


def test_nothing_changed(run: Run) -> None:
    found = changes(Snapshot("before", run, {"seed": 1}), Snapshot("after", run, {"seed": 1}))
    assert found.metrics == [] and len(found.says) == 1
    assert found.says[0].startswith(f"Nothing changed: the same parameters, the same {len(run.rows)} SAEs and")


def test_a_change_below_rounding_is_none(run: Run) -> None:
    value = run.rows[0].value("kl") or 0.0
    same = altered(run, run.rows[0].name, metrics={"kl": value + 1e-6})
    assert changes(Snapshot("before", run, {}), Snapshot("after", same, {})).says[0].startswith("Nothing changed")
    found = changes(Snapshot("before", run, {"seed": 1}), Snapshot("after", same, {"seed": 2}))
    assert found.says[0] == "1 parameter differs: seed." and "No value changed beyond rounding" in found.says[2]


def test_values_that_moved_and_intervals_that_are_apart(run: Run) -> None:
    moved = altered(run, "topk", metrics={"kl": 0.4, "l0": 32.5}, intervals={"kl": [0.39, 0.41], "l0": [20.0, 40.0]})
    found = changes(Snapshot("before", run, {}), Snapshot("after", moved, {}))
    n = len(run.rows)
    assert found.says[:2] == ["No parameter differs.", f"Both hold the same {n} SAEs."]
    assert "Values changed beyond rounding in 2 of" in found.says[2] and "are apart in 1: KL ↓." in found.says[2]
    assert [change.label for change in found.metrics] == ["KL ↓", "L0"]  # intervals apart come first
    assert found.metrics[0].says == (
        f"changed in 1 of {n} SAEs, most in topk: 0.150 → 0.400 (+0.250); the two intervals are apart in topk."
    )
    assert found.metrics[1].says == f"changed in 1 of {n} SAEs, most in topk: 32.0 → 32.5 (+0.500)."


def test_saes_and_metrics_of_one_side_alone(run: Run) -> None:
    fewer = Run(run.rows[1:], run.evals, run.training, run.curves)
    for row in fewer.rows:
        fewer = altered(fewer, row.name, metrics={"mse": None})
    one, other = Snapshot("before", run, {}), Snapshot("after", fewer, {})
    n = len(run.rows)
    for found in (changes(one, other), changes(other, one)):
        assert f"{n - 1} SAEs of the same name are in both. Only in before, 1 SAE: {run.rows[0].name}." in found.says
        assert any(line.startswith("Measured in before alone: ") for line in found.says)
    assert "mse" in {metric.key for metric in measured(other, one)}  # has a table though the first run lacks it


def test_nothing_in_common_is_said(run: Run) -> None:
    found = changes(Snapshot("before", run, {}), Snapshot("after", many(run, 3), {}))
    assert found.says[1].startswith("0 SAEs of the same name are in both. Only in after, 3 SAEs: ") and found.metrics == []
    assert (
        f"Only in before, {len(run.rows)} SAEs: standard, " in found.says[1]
        and f"and {len(run.rows) - 8} more." in found.says[1]
    )


def test_the_page_leads_back_to_the_report_where_there_is_one(run: Run, site_lab: Lab, tmp_path: Path) -> None:
    assert report_address(tmp_path / "anywhere") is None
    (tmp_path / "report").mkdir()
    (tmp_path / "report/index.html").write_text("some other report")
    assert report_address(tmp_path / "anywhere") is None
    (tmp_path / "report/results.csv").write_text("sae\n")
    assert report_address(tmp_path / "report_comparisons/a_and_b") == "../../report/index.html"
    write_comparison(Snapshot("a", run, {}), Snapshot("b", run, {}), STYLE, tmp_path / "report_comparisons/a_and_b")
    page = tmp_path / "report_comparisons/a_and_b/index.html"
    assert '<a href="../../report/index.html">' in page.read_text()
    write_comparison(Snapshot("a", run, {}), Snapshot("b", run, {}), STYLE, tmp_path.parent / f"{tmp_path.name}_out")
    assert "report/index.html" not in (tmp_path.parent / f"{tmp_path.name}_out/index.html").read_text()
