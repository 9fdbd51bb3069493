"""Real four-choice questions that come with the packaged text."""

from __future__ import annotations

import re
from typing import Any

from sae_research.text.packaged import read_packaged


def open_book_rows(n: int) -> list[dict[str, Any]]:
    """`n` real four-choice questions, the shortest of the packaged `55_open_qa`, in WMDP's layout."""
    frame = read_packaged("55_open_qa")
    rows = []
    for text, letter in sorted(zip(frame["prompt"], frame["target"], strict=True), key=lambda row: (len(row[0]), row[0])):
        parts = re.split(r" \([ABCD]\) ", text)
        if len(parts) == 5 and all(part.strip() for part in parts):
            rows.append({"question": parts[0], "choices": parts[1:], "answer": "ABCD".index(letter)})
        if len(rows) == n:
            break
    return rows
