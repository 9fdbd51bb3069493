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


def find_packaged(name: str) -> Path | None:
    """The folder of one; hyphens and underscores are alike, as names in tables have no hyphens."""
    return next((FOLDER / known for known in packaged_names() if slugify(known) == slugify(name)), None)


def packaged_place(name: str) -> Path:
    """The folder of one. Raises `UserError` naming those there are."""
    folder = find_packaged(name)
    if folder is None:
        raise UserError(f"{PREFIX}{name}: no such packaged dictionary; there are {', '.join(packaged_names()) or 'none'}")
    return folder
