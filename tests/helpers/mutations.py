"""Files changed at random: values of every kind in configurations, bytes cut, flipped, doubled and exchanged."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    1e18,
    10**18,
    10**400,
    1.5,
    "",
    "none",
    "../evil",
    "/etc/passwd",
    [],
    {},
    [1, 2],
    {"a": 1},
    "relu",
    "topk",
    "jumprelu",
    "standard",
    "gated",
    "NaN",
    "x" * 5000,
    "layer_norm",
]
"""What a key may be given by mistake."""


def mappings_of(value: Any, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The paths of all keys in nested mappings, the whole (`()`) first."""
    return (
        [prefix, *(path for key, inner in value.items() for path in mappings_of(inner, (*prefix, key)))]
        if isinstance(value, dict)
        else [prefix]
    )


def changed_mapping(values: dict[str, Any], rng: random.Random, kind: str, keys: list[str]) -> tuple[dict[str, Any], str]:
    """A copy with one key replaced, deleted or added (one of `keys`), as `kind` says, and what was changed in words."""
    changed = copy.deepcopy(values)
    where = rng.choice(mappings_of(values))
    inside = changed
    for key in where[:-1]:
        inside = inside[key]
    value = rng.choice(VALUES)
    if kind == "replace" and where:
        inside[where[-1]] = value
    elif kind == "delete" and where:
        del inside[where[-1]]
    elif kind == "add":
        target = inside[where[-1]] if where and isinstance(inside[where[-1]], dict) else changed
        where = (*where, rng.choice(keys))
        target[where[-1]] = value
    return changed, f"{kind} {'.'.join(where)} = {str(value)[:30]}"


def _place(data: bytes, rng: random.Random) -> int:
    return rng.randrange(len(data)) if data else 0


def _flipped(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + bytes(byte ^ 1 << rng.randrange(8) for byte in data[at : at + 1]) + data[at + 1 :]


def _written_over(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]


def _inserted(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    what = rng.choice([b'"', b"\n", b"\0", b",", b"\t", b"{", b"\xff", b"\xef\xbb\xbf", b"\r", b"- "])
    return data[:at] + what + data[at:]


def _hole(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + bytes(len(data[at : at + 512])) + data[at + 512 :]


def _part_gone(data: bytes, rng: random.Random) -> bytes:
    at = _place(data, rng)
    return data[:at] + data[at + rng.randrange(1, 200) :]


def _line_twice(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines(keepends=True)
    at = _place(lines, rng)  # type: ignore[arg-type]
    return b"".join([*lines[: at + 1], *lines[at:]])


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "cut": lambda data, rng: data[: _place(data, rng)],
    "emptied": lambda data, rng: b"",
    "zeroed": lambda data, rng: bytes(len(data)),
    "longer": lambda data, rng: data + bytes(rng.randrange(1, 20)),
    "doubled": lambda data, rng: data + data,
    "bit flipped": _flipped,
    "written over": _written_over,
    "inserted": _inserted,
    "hole": _hole,
    "part gone": _part_gone,
    "line twice": _line_twice,
    "noise": lambda data, rng: rng.randbytes(200),
}
"""Ways in which the bytes of a file may come to differ."""


def changed_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    """Other bytes in place of `data`, and how they came about."""
    kind = rng.choice(sorted(BYTES))
    return BYTES[kind](data, rng), kind
