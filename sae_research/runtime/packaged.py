"""Dictionaries that come with the package, trained by it: weights in bfloat16, and a card that says how and how good.

Each is a folder below `sae_research/packaged/` in SAELens layout, written by `python -m benchmarks.packaged`.
"""

from __future__ import annotations

from pathlib import Path

from sae_research.runtime.errors import UserError
from sae_research.runtime.files import slugify

PREFIX = "packaged:"
FOLDER = Path(__file__).parents[1] / "packaged"
CARD = "card.json"


def packaged_names() -> list[str]:
    """Names of the dictionaries that the package holds."""
    return sorted(path.parent.name for path in FOLDER.glob("*/cfg.json"))


def packaged_place(name: str) -> Path:
    """The folder of one; hyphens and underscores are alike, as names in tables have no hyphens. Raises `UserError` naming
    those there are."""
    names = {slugify(known): known for known in packaged_names()}
    if slugify(name) not in names:
        raise UserError(f"{PREFIX}{name}: no such packaged dictionary; there are {', '.join(names.values()) or 'none'}")
    return FOLDER / names[slugify(name)]
