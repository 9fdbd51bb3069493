"""Figures of an analysis: every panel has a title and labels, and no legend lies over it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sae_research.analysis import plots
from sae_research.analysis.attribute import attribute
from sae_research.analysis.context import AnalysisContext
from sae_research.analysis.steer import Steering, Strength
from sae_research.analysis.subspace import subspace

PROMPT = "the time that people use water"


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures in place of files."""
    found: list[Figure] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: found.append(figure))
    return found


def strength(at: float | None, rate: float) -> Strength:
    return Strength(at, at or 0.0, [], rate, rate / 2, rate * 2, None, None, None, 0.0, rate, rate / 3, 0)


def test_legends_cover_nothing(analysis: AnalysisContext, drawn: list[Figure]) -> None:
    stats, path = analysis.stats("late"), Path("unused.png")
    plots.density_histogram(stats, path)
    plots.density_against_cah(stats, path)
    plots.final_token("late", np.arange(64.0), "x", path)
    plots.attribution_bars(attribute(analysis, PROMPT), path)
    plots.subspace_scatter(subspace(stats, analysis.saes["late"], [58, 60, 61, 62]), path)
    steering = Steering("add", 3, 10.0, [" a"], 64, [strength(None, 0.01), strength(0.5, 0.2), strength(1.0, 0.4)])
    plots.steering_sweep(steering, path)
    assert len(drawn) == 6
    for figure in drawn:
        FigureCanvasAgg(figure).draw()
        title = figure.get_suptitle()
        for axes in figure.axes:
            assert title or axes.get_title(loc="left")
            assert axes.get_xlabel() and axes.get_ylabel()
            for legend in (*figure.legends, axes.get_legend()):
                if legend is not None:
                    assert not legend.get_window_extent().overlaps(axes.get_window_extent())
                    assert legend.get_window_extent().x0 >= 0 and legend.get_window_extent().y0 >= 0


def test_a_steering_sweep_shows_its_intervals(drawn: list[Figure]) -> None:
    rows = [strength(None, 0.01), strength(0.5, 0.2), strength(1.0, 0.4)]
    plots.steering_sweep(Steering("add", 3, 10.0, [" a"], 64, rows), Path("unused.png"))
    (bars,) = drawn[0].axes[0].collections[:1]
    np.testing.assert_allclose([part[:, 1] for part in bars.get_segments()], [[0.1, 0.4], [0.2, 0.8]])
