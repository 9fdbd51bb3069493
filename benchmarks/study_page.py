"""docs/study/index.md and its figures, made from the record alone."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path("docs/study")
RECORD = FOLDER / "record.json"
TEMPLATE = Path(__file__).with_name("study.md.j2")
