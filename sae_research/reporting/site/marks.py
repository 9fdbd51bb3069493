"""Markers and colours of the figures for Vega: matplotlib's own outlines as SVG paths, its colours as #RRGGBB."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from matplotlib.colors import to_hex
from matplotlib.markers import MarkerStyle as Outline
from matplotlib.path import Path as Polygon

from sae_research.reporting.style import MarkerStyle, marker_size

_LETTERS: Mapping[int, str] = {
    int(Polygon.MOVETO): "M",
    int(Polygon.LINETO): "L",
    int(Polygon.CURVE3): "Q",
    int(Polygon.CURVE4): "C",
}


def mark(style: MarkerStyle) -> dict[str, Any]:
    """`path` within [-1, 1] in both directions, `color`, and `scale`: its size over a circle's that looks as large."""
    return {"path": path(style.marker), "color": to_hex(style.color).upper(), "scale": marker_size(style, 1.0)}


@cache
def path(marker: str) -> str:
    """The outline of one of matplotlib's markers as an SVG path, y downwards.

    >>> path("s")
    'M-1,1 L1,1 L1,-1 L-1,-1 Z'
    """
    outline = Outline(marker)
    polygon = outline.get_path().transformed(outline.get_transform())
    parts = []
    for points, code in polygon.iter_segments(simplify=False):
        if code == Polygon.CLOSEPOLY:
            parts.append("Z")
        else:
            parts.append(_LETTERS[int(code)] + ",".join(_short(2 * each) for each in np.ravel(points) * _flip(len(points))))
    return " ".join(parts)


def _flip(length: int) -> np.ndarray:
    return np.tile([1.0, -1.0], length // 2)


def _short(value: float) -> str:
    return f"{round(value, 4) + 0.0:g}"
