"""What every figure is drawn with: colours, plain axes, and PNGs of equal bytes for equal pixels."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from sae_research.store import write_bytes

INK, MUTED, GRID = "#222222", "#6B6B6B", "#E6E6E6"
TEXT, SMALL = 9.0, 7.5
"""Font sizes in points."""


def pixels_of(figure: Figure) -> np.ndarray:
    """Draw a figure. [height, width, 3] of uint8"""
    figure.canvas.draw()
    return np.asarray(figure.canvas.buffer_rgba())[..., :3]


def save(pixels: np.ndarray, path: Path, dpi: int) -> None:
    """Write a PNG. The same pixels give the same bytes: no software version or date goes in."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="png", compress_level=2, dpi=(dpi, dpi))
    write_bytes(path, buffer.getvalue())


def plain(axes: Axes, x_label: str, y_label: str) -> None:
    """Axes without box: two spines, a light grid, muted numbers."""
    axes.set_xlabel(x_label, fontsize=TEXT, color=INK)
    axes.set_ylabel(y_label, fontsize=TEXT, color=INK)
    axes.yaxis.set_label_coords(-0.115, 0.5)  # so that the panels of a sheet line up
    axes.tick_params(labelsize=TEXT - 1, colors=MUTED, length=3)
    axes.grid(color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#B0B0B0")
