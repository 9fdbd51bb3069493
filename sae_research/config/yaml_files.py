"""YAML 1.2 from files that a user writes: parameters, sweeps and configurations of single runs.

Limits of size, depth and number of values refuse a file that would exhaust memory or time. Every refusal is one line.
"""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML, YAMLError

from sae_research.runtime.errors import UserError
from sae_research.runtime.former_names import elsewhere

MAX_BYTES = 2 * 2**20
MAX_ITEMS = 1_000_000
"""Keys, values and list items once aliases are followed: a few nested ones can stand for more than memory holds."""
MAX_DEPTH = 30
MAX_BITS = 256
"""Of a whole number; longer ones cannot even be printed."""
# What ruamel.yaml's parser and constructors raise for text that is no YAML: also for dates such as 2024-13-01, numbers of
# more than 4,300 digits, and tags that do not suit their value.
_NO_YAML = (YAMLError, ValueError, ArithmeticError, LookupError, AttributeError, TypeError, RecursionError)


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in a file of YAML 1.2, as DVC reads it: `1e-4` is a number, `on` is a word.

    Raises `UserError` where the file is missing, no file, unreadable, not UTF-8, not YAML, or holds no mapping.
    """
    values = parse(_text(Path(path)), str(path))
    if not isinstance(values, dict):
        raise UserError(
            f"{path}: expected keys and values, such as sections of parameters, found "
            f"{'nothing' if values is None else type(values).__name__}"
        )
    return values


def parse(text: str, where: str) -> Any:
    """The value of a YAML text. Raises `UserError` that begins with `where`."""
    brackets = accumulate((character in "[{") - (character in "]}") for character in text)
    if max(brackets, default=0) > 4 * MAX_DEPTH:  # ruamel.yaml takes minutes for some thousand
        raise UserError(f"{where[:80]}: nested too deeply")
    try:
        values = YAML(typ="safe").load(text)
    except RecursionError:
        raise UserError(f"{where}: nested too deeply") from None
    except _NO_YAML as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())[:300]}") from None
    _check(values, where)
    return values


def _text(path: Path) -> str:
    try:
        if not path.exists():
            raise UserError(f"{path}: no such file{elsewhere(path.name, 'file')}")
        if not path.is_file():
            raise UserError(f"{path}: not a file")
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes, more than a file of settings can have ({MAX_BYTES:,})")
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def _check(values: Any, where: str) -> None:
    """Raises `UserError` for what would hang or break whoever walks through the values."""
    waiting, met = [(values, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        met += 1
        if depth > MAX_DEPTH:
            raise UserError(f"{where}: nested more than {MAX_DEPTH} levels deep, or an alias holds itself")
        if met > MAX_ITEMS:
            raise UserError(f"{where}: more than {MAX_ITEMS:,} values once aliases are followed")
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise UserError(f"{where}: a number of {value.bit_length():,} bits")
        if isinstance(value, dict):
            for key in value:
                if not isinstance(key, str):
                    raise UserError(f"{where}: the key {str(key)[:40]} is no text; write it in quotes")
            waiting += [(item, depth + 1) for item in value.values()]
        elif isinstance(value, (list, tuple, set)):
            waiting += [(item, depth + 1) for item in value]
