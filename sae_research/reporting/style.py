"""Markers, colours and short names of SAEs in figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from itertools import cycle
from typing import NamedTuple

from sae_research.config.reporting import Visualization
from sae_research.reporting.rows import Row
from sae_research.runtime.errors import UserError


class MarkerStyle(NamedTuple):
    """A marker (matplotlib's letters) and a colour."""

    marker: str
    color: str


# Okabe and Ito's palette: distinct under every common colour blindness
KNOWN: dict[str, MarkerStyle] = {
    "standard": MarkerStyle("o", "#0072B2"),
    "topk": MarkerStyle("s", "#D55E00"),
    "ihtp": MarkerStyle("^", "#009E73"),
    "mpsae": MarkerStyle("v", "#CC79A7"),
    "omp": MarkerStyle("*", "#000000"),
    "gated": MarkerStyle("P", "#E69F00"),
    "jumprelu": MarkerStyle("X", "#56B4E9"),
    "batchtopk": MarkerStyle("p", "#A6761D"),
    "matryoshka_batchtopk": MarkerStyle("h", "#7A5195"),
    "hard_concrete": MarkerStyle("<", "#B2182B"),
    "gated_hard_concrete": MarkerStyle(">", "#1B7837"),
    "control": MarkerStyle("D", "#8C8C8C"),
}
_SPARE_COLORS = ("#4B6FA5", "#B8860B", "#8B3A62", "#2F4F4F", "#66A61E", "#A0522D", "#5D3FD3", "#C71585")
_SPARE_MARKERS = ("8", "d", "H")
"""No known style has any of these."""

_SIZES = {"D": 0.85, "s": 0.92, "*": 1.5}
"""Markers that look larger or smaller than a circle of the same size."""

# of ground truth: trained methods by turns, the dictionaries that pursuit encodes over, pursuit encoders
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#A6761D", "#7A5195", "#8C8C8C", "#444444")
DICTIONARY_COLORS = {"truth": "#009E73", "trained": "#0072B2", "untrained": "#8C8C8C"}
ENCODER_MARKERS = {"ihtp": "X", "mpsae": "s", "omp": "D", "topk_refit": "v", "nn_mpsae": "P", "nn_omp": "^"}


def marker_size(style: MarkerStyle, circle: float) -> float:
    """Points at which its marker appears as large as a circle of `circle` points."""
    return circle * _SIZES.get(style.marker, 1.0)


def marker_styles(architectures: Iterable[str], chosen: Mapping[str, MarkerStyle] | None = None) -> dict[str, MarkerStyle]:
    """A style for every architecture: the user's choice, else the known one, else a spare one.

    A spare style is none of the known or chosen ones, and no two are equal as long as there are any left.
    """
    chosen, names = chosen or {}, list(dict.fromkeys(architectures))
    unknown = sorted(name for name in names if name not in chosen and name not in KNOWN)
    spare = dict(zip(unknown, cycle(_spare_styles({*KNOWN.values(), *chosen.values()})), strict=False))
    return {name: chosen.get(name) or KNOWN.get(name) or spare[name] for name in names}


def chosen_styles(style: Visualization) -> dict[str, MarkerStyle]:
    """The user's markers and colours. Raises `UserError` where matplotlib does not know one."""
    if not style.architectures:
        return {}
    from matplotlib.colors import is_color_like  # only where there is something to check
    from matplotlib.markers import MarkerStyle as Outline

    for architecture, chosen in style.architectures.items():
        key = f"visualization.architectures.{architecture}"
        if chosen.marker not in Outline.markers:
            raise UserError(f"{key}: unknown marker {chosen.marker!r}; matplotlib's letters, such as o s ^ v D P X *")
        if not is_color_like(chosen.color):
            raise UserError(f"{key}: unknown color {chosen.color!r}; a name such as red, or #RRGGBB")
    return {name: MarkerStyle(chosen.marker, chosen.color) for name, chosen in style.architectures.items()}


def _spare_styles(taken: Collection[MarkerStyle]) -> list[MarkerStyle]:
    """Every spare style: first those whose marker and colour are both new, and all colours before one comes again."""
    turns = range(len(_SPARE_MARKERS))
    every = [
        MarkerStyle(_SPARE_MARKERS[(turn + index) % len(_SPARE_MARKERS)], color)
        for turn in turns
        for index, color in enumerate(_SPARE_COLORS)
    ]
    every += [
        MarkerStyle(marker, color)
        for marker in dict.fromkeys(style.marker for style in KNOWN.values())
        for color in _SPARE_COLORS
    ]
    return [style for style in every if style not in taken]


def short_names(rows: Iterable[Row]) -> dict[str, str]:
    """`standard_ihtp_k5` -> `k5`: legend and colour say the rest. Names that would clash keep their base."""
    rows = list(rows)
    full = {row.name: " ".join(row.name.split("_")) for row in rows}
    middle = {row.name: _without(row.name, {row.group}) for row in rows}
    short = {row.name: _without(row.name, {row.group, *(row.cfg.get("base") or "").split("_")}) for row in rows}
    for preferred in (short, middle):
        times = Counter((row.group, preferred[row.name]) for row in rows)
        clashing = [row for row in rows if times[row.group, preferred[row.name]] > 1]
        for row in clashing:
            short[row.name] = (middle if preferred is short else full)[row.name]
    return {name: label or full[name] for name, label in short.items()}


def _without(name: str, dropped: set[str]) -> str:
    return " ".join(part for part in name.split("_") if part not in dropped)
