"""Small dashboards, and their data files read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sae_research.config.reporting import Dashboards


def small(**settings: Any) -> Dashboards:
    return Dashboards(**{"window": 5, "logits": 3, "neighbours": 4, **settings})


def content(path: Path) -> Any:
    """What a data file hands to `lab.put`."""
    text = path.read_text()
    assert text.startswith("lab.put(") and text.endswith(");\n")
    return json.loads(f"[{text.removeprefix('lab.put(').removesuffix(');' + chr(10))}]")[1]
