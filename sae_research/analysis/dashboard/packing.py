"""Data files of a site. A page opened from disk may not `fetch` anything, so each is a script that hands its content to
`lab.put`."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from sae_research.runtime.files import write_bytes


def pack(values: np.ndarray) -> str:
    """Base64 of an array's bytes."""
    return base64.b64encode(values.tobytes()).decode()


def write_script(path: Path, key: str, content: Any) -> None:
    """A data file: content under a key."""
    data = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)
    write_bytes(path, b"lab.put(" + orjson.dumps(key) + b"," + data + b");\n")
