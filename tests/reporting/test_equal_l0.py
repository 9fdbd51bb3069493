"""Metrics at equal L0: interpolated between points, never beyond them, and areas by hand."""

from __future__ import annotations

import math

import pytest

from sae_research.reporting.comparisons import area, at, common_l0, common_range, grids, pareto, unmatched
from sae_research.reporting.figures import RunFigures
from sae_research.reporting.metrics import headline
from sae_research.reporting.report import report
from sae_research.reporting.results import merge
from sae_research.reporting.rows import Row, Run, read_run
from tests.helpers.results import STYLE, Lab, section

LINE = [(10.0, 0.2), (100.0, 0.6), (1000.0, 0.8)]


def row(name: str, l0: float, explained: float, **cfg: object) -> Row:
    core = {"metrics": {"l0": l0, "variance_explained": explained}, "interpolating": cfg.pop("interpolating", False)}
    return Row(name, {"architecture": "topk", "d_sae": 64, **cfg}, {"core": core})


def run(*rows: Row) -> Run:
    return Run(list(rows), {}, {}, [])


def test_between_points_a_figure_is_linear_in_log_l0_and_beyond_them_there_is_none() -> None:
    assert at(LINE, math.sqrt(1000)) == pytest.approx(0.4)
    assert at(LINE, 10**2.5) == pytest.approx(0.7)
    assert [at(LINE, l0) for l0, _ in LINE] == [0.2, 0.6, 0.8]
    assert at(LINE, 9.99) is None and at(LINE, 1001) is None
    assert at([(32.0, 0.5)], 32.0) == 0.5 and at([(32.0, 0.5)], 33.0) is None and at([], 1.0) is None


def test_common_values_lie_on_a_measured_stretch() -> None:
    assert common_l0([LINE[:2], [(600.0, 0.1), (1100.0, 0.2)]]) == [16, 32, 64, 1024]
    assert common_l0([[(32.0, 0.5)]]) == []
    assert common_range([LINE, [(20.0, 0.1), (500.0, 0.3)], [(3.0, 0.1)]]) == (20.0, 500.0)
    assert common_range([LINE[:2], [(200.0, 0.1), (500.0, 0.3)]]) is None


def test_area_by_hand() -> None:
    assert area(LINE, "higher", 10, 100) == pytest.approx(0.4)
    assert area(LINE, "higher", 10, 1000) == pytest.approx((0.4 + 0.7) / 2)
    # 0.2 to 0.6 over a decade, then a dip to 0.4 that spending less avoids
    dip = [(10.0, 0.2), (100.0, 0.6), (1000.0, 0.4)]
    assert pareto(dip, "higher") == [(10.0, 0.2), (100.0, 0.6), (1000.0, 0.6)]
    assert area(dip, "higher", 10, 1000) == pytest.approx((0.4 + 0.6) / 2)
    assert area(dip, "higher", 200, 1000) == pytest.approx(0.6), "the best so far lies below the range"
    assert area(dip, "lower", 10, 1000) == pytest.approx(0.2)


def test_a_grid_is_one_architecture_over_one_dictionary_without_interpolating_rows_and_controls() -> None:
    found = grids(
        run(
            row("a", 40, 0.5),
            row("b", 10, 0.3),
            row("c", 90, 0.99, interpolating=True),
            row("d", 20, 0.4, d_sae=128),
            row("e", 5, 0.1, architecture="gated"),
            row("g", 5, 0.1, architecture="relu", hook_name="one"),
            row("h", 5, 0.1, architecture="relu", hook_name="two"),
            row("f", 5, 0.1, role="control", architecture="control"),
        )
    )
    assert [(grid.label, [member.name for member in grid.members]) for grid in found] == [
        ("topk (64)", ["a", "b"]),
        ("topk (128)", ["d"]),
        ("gated", ["e"]),
        ("relu (one)", ["g"]),  # as wide as the other
        ("relu (two)", ["h"]),
    ]
    assert found[0].curve(headline("variance_explained")) == [(10, 0.3), (40, 0.5)]


def test_training_on_whitened_activations_is_another_architecture() -> None:
    rows = [row("a", 40, 0.5), row("b", 10, 0.3)]
    assert [grid.label for grid in grids(run(*rows))] == ["topk"]
    rows[1].cfg["provenance"] = {"hyper_parameters": {"whiten": True, "skip": False}}
    assert [grid.label for grid in grids(run(*rows))] == ["topk", "topk (whitened)"]


def test_only_what_writes_one_hook_is_compared() -> None:
    """SAEs of several hooks as ever; a transcoder with transcoders and controls of its written hook; a crosscoder with those
    of its hooks."""

    def at_hook(hook: str) -> dict[str, str]:
        return {"hook_name": hook, "hook_out": hook}  # as the manifest has it

    written = {"hook_name": "mlp_in", "hook_out": "mlp_out"}
    rows = [
        row("a", 10, 0.5, **at_hook("one")),
        row("b", 20, 0.5, **at_hook("mlp_out")),
        row("c", 40, 0.5, **written),
        row("d", 80, 0.5, role="control", architecture="control", **written),
    ]
    rows += [
        row("e", 160, 0.5, **at_hook("one + two")),
        row("f", 320, 0.5, **at_hook("one + two") | {"d_sae": 128}),
        row("g", 640, 0.5, **at_hook("one + three")),
    ]
    assert [one.hooks for one in rows[:4]] == ["one", "mlp_out", "mlp_in -> mlp_out", "mlp_in -> mlp_out"]
    names = [tuple(grid.members[0].name for grid in pair) for pair in unmatched(run(*rows))]
    assert names == [("a", "b"), ("c", "d"), ("e", "f")]


def test_seeds_of_a_recipe_are_one_point() -> None:
    seeds = [row(f"a_s{i}", l0, y, provenance={"recipe_id": "r"}) for i, (l0, y) in enumerate(((10, 0.3), (14, 0.5)))]
    (grid,) = grids(run(*seeds, row("b", 40, 0.7)))
    assert grid.curve(headline("variance_explained")) == [(12, pytest.approx(0.4)), (40, 0.7)]


def test_the_report_has_both_tables_and_names_what_is_left_out(lab: Lab) -> None:
    merge(lab.root)
    text = section(report(read_run(lab.root)), "At equal L0")
    assert "left out (`standard_ihtp_k10`)" in text
    assert "`standard` (L0 61.3), `topk` (L0 32.0)" in text
    lines = [line.split(" | ")[:3] for line in text.splitlines() if line.startswith("| mpsae | ")]
    assert [line[1] for line in lines[:-1]] == ["16", "32", "64"], "10 to 100, nothing beyond"
    at_32 = 0.571 + (0.843 - 0.571) * math.log(3.2) / math.log(5)
    assert lines[1][2] == f"{at_32:.3f}"
    assert "from 88.0 to 100" in text, "where ihtp (88 to 331) and mpsae (10 to 100) overlap"
    ihtp = [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| ihtp | ")]
    assert ihtp[:-1] == ["128", "256"], "88 to 331"


def test_without_a_grid_the_report_says_so(lab: Lab) -> None:
    for path in (lab.root / "eval_results").rglob("*_ihtp_*.json"):
        path.unlink()
    for path in (lab.root / "eval_results").rglob("*_mpsae_*.json"):
        path.unlink()
    merge(lab.root)
    assert "No architecture has two points yet" in section(report(read_run(lab.root)), "At equal L0")


def test_the_picture_draws_lines_between_points_and_points_alone(lab: Lab) -> None:
    merge(lab.root)
    figure = RunFigures(read_run(lab.root), STYLE).equal_l0()
    assert len(figure.axes) == 6
    drawn = [line for line in figure.axes[0].lines if line.get_linestyle() != "None" and len(line.get_xdata()) > 1]
    assert sorted((min(line.get_xdata()), max(line.get_xdata())) for line in drawn) == [(10.0, 100.0), (88.0, 331.0)]
    assert figure.axes[0].patches, "the shared range is shaded"


def test_the_picture_of_a_run_without_results_says_why(lab: Lab) -> None:
    for name in ("core", "sparse_probing"):
        lab.disable(name)
    merge(lab.root)
    texts = [text.get_text() for axes in RunFigures(read_run(lab.root), STYLE).equal_l0().axes for text in axes.texts]
    assert len(texts) == 6 and all("disabled" in text.replace("\n", " ") for text in texts)
