"""How SAEs look and what they are called in figures: one marker and colour per architecture, short names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from sae_research.reporting.run import Row


class Look(NamedTuple):
    """A marker (matplotlib's letters) and a colour."""

    marker: str
    color: str


# Okabe and Ito's palette: told apart under every common colour blindness
KNOWN: dict[str, Look] = {
    "standard": Look("o", "#0072B2"),
    "topk": Look("s", "#D55E00"),
    "ihtp": Look("^", "#009E73"),
    "mpsae": Look("v", "#CC79A7"),
    "omp": Look("*", "#000000"),
    "gated": Look("P", "#E69F00"),
    "jumprelu": Look("X", "#56B4E9"),
    "batchtopk": Look("p", "#A6761D"),
    "matryoshka_batchtopk": Look("h", "#7A5195"),
    "hard_concrete": Look("<", "#B2182B"),
    "gated_hard_concrete": Look(">", "#1B7837"),
    "control": Look("D", "#8C8C8C"),
}
_SPARE = (
    Look("*", "#000000"),
    Look("8", "#4B6FA5"),
    Look("d", "#B8860B"),
    Look("H", "#8B3A62"),
    Look("p", "#2F4F4F"),
)

_SIZES = {"D": 0.85, "s": 0.92, "*": 1.5}
"""Markers that look larger or smaller than a circle of the same size."""


def marker_size(look: Look, circle: float) -> float:
    """Points at which a look's marker appears as large as a circle of `circle` points."""
    return circle * _SIZES.get(look.marker, 1.0)


def looks(architectures: Iterable[str], chosen: Mapping[str, Look] | None = None) -> dict[str, Look]:
    """A look for every architecture: the user's choice, else the known one, else the next spare one."""
    chosen, names = chosen or {}, list(dict.fromkeys(architectures))
    unknown = sorted(name for name in names if name not in chosen and name not in KNOWN)
    spare = {name: _SPARE[index % len(_SPARE)] for index, name in enumerate(unknown)}
    return {name: chosen.get(name) or KNOWN.get(name) or spare[name] for name in names}


def short_names(rows: Iterable[Row]) -> dict[str, str]:
    """`standard_ihtp_k5` -> `k5`: legend and colour say the rest. Names that would clash keep their base."""
    rows = list(rows)
    full = {row.name: " ".join(row.name.split("_")) for row in rows}
    middle = {row.name: _without(row.name, {row.group}) for row in rows}
    short = {
        row.name: _without(row.name, {row.group, *(row.cfg.get("base") or "").split("_")}) for row in rows
    }
    for preferred in (short, middle):
        times = Counter((row.group, preferred[row.name]) for row in rows)
        clashing = [row for row in rows if times[row.group, preferred[row.name]] > 1]
        for row in clashing:
            short[row.name] = (middle if preferred is short else full)[row.name]
    return {name: label or full[name] for name, label in short.items()}


def _without(name: str, dropped: set[str]) -> str:
    return " ".join(part for part in name.split("_") if part not in dropped)
