"""Where results live and how they are named: fingerprints, atomic writes, the result cache, `_status.json`.

No torch here: the reporting stages import this module and must start in a fraction of a second.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import tempfile
from pathlib import Path
from typing import Any

from sae_research.errors import UserError
from sae_research.folders import TEMPORARY

RESULT_SUFFIX = "_eval_results.json"
NAME_LIMIT = 150
"""Longest name of an SAE: file systems take 255 bytes, and files are called after an SAE with up to 100 more."""
SLUG = re.compile(rf"^[a-z0-9_]{{1,{NAME_LIMIT}}}$")


# --- names -----------------------------------------------------------------------------------

def slugify(name: str) -> str:
    """`Pythia-70m/Layer 4` -> `pythia_70m_layer_4`. Raises `UserError` if nothing is left.

    A name beyond `NAME_LIMIT` is cut, and ends with 10 digits of its SHA-256: two long names stay two.
    """
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    if not slug:
        raise UserError(f"the name {name!r} holds no letter or digit to build an SAE name from")
    if len(slug) > NAME_LIMIT:
        slug = f"{slug[:NAME_LIMIT - 11]}_{hashlib.sha256(slug.encode()).hexdigest()[:10]}"
    return slug


def checked_name(name: Any, where: str | Path,
                 mend: str = "it was damaged or made by something else: write it again") -> str:
    """A name from a file or from parameters, fit to be one part of a path. Raises `UserError`, with `mend`, for one that
    leads elsewhere (`../x`, `/x`), is hidden, holds control characters, or is too long."""
    if (not isinstance(name, str) or not name or name.startswith(".") or re.search(r"[/\\\x00-\x1f\x7f]", name)
            or len(name.encode(errors="replace")) > NAME_LIMIT):
        shown = repr(name)
        raise UserError(f"{where}: the name {shown if len(shown) < 80 else shown[:79] + '…'} is no name that a file could "
                        f"be called after; {mend}")
    return name


def user_path(path: str | Path) -> Path:
    """A path as a user writes it, `~/` being the home folder. Raises `UserError` for a home there is not."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no such home folder") from None


# --- fingerprints ----------------------------------------------------------------------------

def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON-able value, independent of the order of keys. [64 hex digits]"""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes. Raises `UserError` if the file is missing."""
    with regular_file(path).open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


# --- files -----------------------------------------------------------------------------------

def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: into a temporary neighbour first (`.*.tmp`, which Git and DVC ignore), then
    renamed. Raises `OSError` that names `path`."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:  # of a write to an open file it names none, of a rename the temporary one
        error.filename, error.filename2 = str(path), None
        raise


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, with sorted keys. Raises `ValueError` on NaN or infinity, which JSON lacks."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def regular_file(path: Path) -> Path:
    """The path, where a plain file (or a link to one) can be read: opening a pipe or a device would wait for ever. Raises
    `UserError` for anything else."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # a name too long, a loop of links, a character no path can hold
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: is a {'folder' if stat.S_ISDIR(mode) else 'pipe or device'}, not a file")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path}: may not be read; check its permissions")
    return path


def read_json(path: Path, mend: str = "delete it and run the stage again") -> Any:
    """Read JSON. Raises `UserError` naming the file when it is missing or damaged, and `mend`."""
    return _parsed_json(path, mend)


def read_settings(path: Path) -> dict[str, Any]:
    """Read a JSON object that someone else may have written, where a doubtful value must not pass: no key twice, no NaN
    and no infinity. Raises `UserError` naming the file."""
    values = _parsed_json(path, "mend it or fetch it again", object_pairs_hook=_unique, parse_constant=_no_constant)
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a JSON object of settings")
    return values


def _parsed_json(path: Path, mend: str, **rules: Any) -> Any:
    try:
        return json.loads(regular_file(path).read_text(encoding="utf-8-sig"), **rules)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({str(error)[:120]}); {mend}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands there twice")
    return values


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def round_significant(value: Any, digits: int = 4) -> Any:
    """Round floats, also inside dicts and lists, to `digits` significant digits."""
    if isinstance(value, dict):
        return {key: round_significant(item, digits) for key, item in value.items()}
    if isinstance(value, list):
        return [round_significant(item, digits) for item in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.{digits}g}")
    return value


# --- caches ----------------------------------------------------------------------------------

def project_root() -> Path:
    """The DVC project: `$DVC_ROOT` inside a stage (the parent repository in a queued experiment),
    else the nearest folder above the working directory that has a `params.yaml`."""
    if os.environ.get("DVC_ROOT"):
        return Path(os.environ["DVC_ROOT"])
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "params.yaml").is_file():
            return folder
    return here


_CHECKSUM, _VALUE = b'{"sha256": "', b'", "value": '
