"""Figures: they exist, show something, are the same twice, and never fall over a missing evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sae_research.config.reporting import Style, Visualization
from sae_research.plotting.axes import Box, place_labels
from sae_research.reporting.figures import CUT, RunFigures, draw_all
from sae_research.reporting.rows import Row, Run
from sae_research.reporting.style import KNOWN, MarkerStyle, marker_styles, short_names
from sae_research.reporting.tables import CURVE_POINTS, points, write_plot_data
from sae_research.runtime.errors import UserError
from tests.helpers.results import SAES, STYLE, Lab, build, core_result

TEMPLATES = Path(__file__).parents[2] / ".dvc" / "plots"


def ink(path: Path) -> float:
    """Fraction of pixels that are not white."""
    return float((np.asarray(Image.open(path).convert("L")) < 250).mean())


def test_images_are_written_not_empty_and_the_same_twice(lab: Lab):
    run = build(lab)
    (lab.root / "images").mkdir()
    (lab.root / "images/l0_vs_gone.png").write_bytes(b"old")
    written = draw_all(run, STYLE, lab.root)
    assert {path.stem for path in written} == {
        "overview",
        "equal_l0",
        "latent_density",
        "training_curves",
        *(f"l0_vs_{key}" for key in run.plotted),
    }
    assert {path.name for path in (lab.root / "images").iterdir()} == {path.name for path in written}
    assert all(ink(path) > 0.01 for path in written)
    first = {path: path.read_bytes() for path in written}
    assert all(path.read_bytes() == first[path] for path in draw_all(run, STYLE, lab.root))


@pytest.mark.parametrize("off", [("core",), ("sparse_probing",), ("core", "sparse_probing")])
def test_disabled_evaluations_leave_a_panel_that_says_so(lab: Lab, off: tuple[str, ...]):
    for name in off:
        lab.disable(name)
    run = build(lab)
    assert all(path.is_file() for path in draw_all(run, STYLE, lab.root))
    key = "kl" if "core" in off else "sae_top_1_accuracy"
    texts = [text.get_text() for text in RunFigures(run, STYLE).against_l0(key).axes[0].texts]
    assert any("evaluation: disabled" in text.replace("\n", " ") for text in texts)


def test_without_training_and_with_odd_values(lab: Lab):
    for path in (lab.root / "trained_saes").rglob("*.*"):
        path.unlink()
    odd = core_result("topk")
    odd["eval_result_unstructured"]["lab_v1"]["metrics"].update(kl=0.0, l0=0.0, loss_recovered=-40.0)
    odd["eval_result_unstructured"]["lab_v1"]["density_histogram"] = {
        "log10_edges": [-1, 0],
        "counts": [0],
        "dead": 9,
    }
    lab.result("core", "topk", odd)
    run = build(lab)
    draw_all(run, STYLE, lab.root)
    assert "topk" not in {point.row.name for point in points(run, "loss_recovered")}


def test_interpolating_points_are_hollow_and_only_they(lab: Lab):
    axes = RunFigures(build(lab), STYLE).against_l0("variance_explained").axes[0]
    markers = [line for line in axes.lines if line.get_linestyle() == "None"]
    hollow = [line for line in markers if line.get_markerfacecolor() == "white"]
    assert [float(x) for line in hollow for x in line.get_xdata()] == [576.0]
    assert sum(len(line.get_xdata()) for line in markers) == len(SAES)


def test_a_cut_interval_has_an_arrow_and_only_it(lab: Lab):
    run = build(lab)
    row = next(row for row in run.rows if row.interval("variance_explained"))
    row.evals["core"]["intervals"]["variance_explained"] = [-40.0, 0.9]
    figures = RunFigures(run, STYLE)
    figure = figures.against_l0("variance_explained")
    arrows = [line for line in figure.axes[0].lines if line.get_marker() == CUT]
    assert [line.get_xdata()[0] for line in arrows] == [row.value("l0")]
    assert arrows[0].get_ydata()[0] >= figure.axes[0].get_ylim()[0], "it points from what is shown"
    assert any("goes on" in text.get_text() for text in figure.legends[0].texts)
    whole = RunFigures(build(lab), STYLE).against_l0("variance_explained")
    assert not any("goes on" in text.get_text() for text in whole.legends[0].texts)


def test_residual_stream_is_drawn_in_probing_panels_only(lab: Lab):
    figures = RunFigures(build(lab), STYLE)
    named = {key: [text.get_text() for text in figures.against_l0(key).axes[0].texts] for key in figures.run.plotted}
    assert "raw residual stream, top-5" in named["sae_top_5_accuracy"]
    assert not any("residual" in text for text in named["kl"])


def test_architectures_have_distinct_looks_and_the_user_may_choose():
    found = marker_styles(["standard", "brand_new", "other_new", "control"], {"standard": MarkerStyle("x", "#123456")})
    assert found["standard"] == MarkerStyle("x", "#123456") and found["control"] == KNOWN["control"]
    assert len(set(found.values())) == 4
    assert len(set(KNOWN.values())) == len(KNOWN)
    style = Visualization(architectures={"topk": Style(marker="*", color="red")})
    assert RunFigures(Run([], {}, {}, []), style).markers == {}


def test_an_architecture_of_ones_own_never_looks_like_a_known_one():
    own = [f"own_{number}" for number in range(100)]
    found = marker_styles([*own, *KNOWN])
    assert len(set(found.values())) == len(found), "pairs of marker and colour"
    known = {part for look in KNOWN.values() for part in look}
    assert not known & {part for name in marker_styles(own[:24]).values() for part in name}
    first = [marker_styles(own[:8])[name] for name in own[:8]]
    assert len({look.color for look in first}) == 8, "lines of training curves have no marker"
    taken = MarkerStyle(*first[0])
    assert marker_styles(["own_0", "mine"], {"mine": taken})["own_0"] != taken, "nor like one that the user chose"
    assert set(marker_styles(f"own_{number}" for number in range(200))) == {f"own_{number}" for number in range(200)}


@pytest.mark.parametrize(("marker", "color"), [("circle", "red"), ("o", "reddish")])
def test_a_look_that_matplotlib_does_not_know_is_a_user_error(marker: str, color: str):
    style = Visualization(architectures={"topk": Style(marker=marker, color=color)})
    with pytest.raises(UserError, match="visualization.architectures.topk: unknown"):
        RunFigures(Run([], {}, {}, []), style)


def test_short_names_drop_what_the_legend_says_and_stay_distinct(lab: Lab):
    names = short_names(build(lab).rows)
    assert names["standard_ihtp_k5"] == "k5" and names["standard"] == "standard"
    assert names["control_data_rows"] == "data rows"
    twins = [Row(f"{base}_ihtp_k5", {"architecture": "ihtp", "base": base}, {}) for base in ("standard", "topk")]
    assert set(short_names(twins).values()) == {"standard k5", "topk k5"}


def test_labels_keep_clear_of_points_and_each_other():
    places = [(50.0 + 3 * index, 50.0 + 2 * index) for index in range(5)]
    boxes = place_labels(places, [(30.0, 8.0)] * 5, Box(0, 0, 200, 200), radius=3.0)
    assert all(one.overlap(other) == 0 for index, one in enumerate(boxes) for other in boxes[:index])


def test_plot_rows_hold_what_a_tooltip_shows(lab: Lab):
    write_plot_data(build(lab), lab.root)
    rows = lab.read("metrics/plots/sae_top_1_accuracy.json")
    assert {row["sae"] for row in rows} == set(SAES)
    assert {"architecture", "role", "l0", "kl", "interpolating", "residual_stream"} <= set(rows[0])
    curves = lab.read("metrics/plots/training_curves.json")
    assert {row["sae"] for row in curves} == {"standard", "topk"} and len(curves) <= 2 * (CURVE_POINTS + 1)
    assert max(row["tokens"] for row in curves) == 300_000


def test_plot_files_of_a_disabled_evaluation_are_empty_lists(lab: Lab):
    lab.disable("sparse_probing")
    write_plot_data(build(lab), lab.root)
    assert lab.read("metrics/plots/sae_top_5_accuracy.json") == []
    assert len(lab.read("metrics/plots/kl.json")) == len(SAES)


@pytest.mark.parametrize("name", ["sae_scatter", "sae_scatter_log", "sae_lines"])
def test_dvc_fills_the_templates(name: str):
    vega = pytest.importorskip("dvc_render.vega")
    rows = [{"rev": "workspace", "x": 1.0, "y": 2.0, "sae": "a", "architecture": "b", "interpolating": False}]
    renderer = vega.VegaRenderer(rows, "plot", template=name, template_dir=str(TEMPLATES), x="x", y="y", title="t")
    filled = json.dumps(renderer.get_filled_template())
    assert "<DVC_METRIC" not in filled and '"interpolating": false' in filled
