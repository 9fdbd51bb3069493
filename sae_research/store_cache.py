"""Store_cache."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sae_research.errors import UserError
from sae_research.store import _CHECKSUM, _VALUE, project_root, write_bytes

UNWRITABLE = (errno.EROFS, errno.EACCES, errno.EPERM)
"""What a file system answers that may be read but not written."""


def cache_dir(kind: str) -> Path:
    """`.cache/<kind>` of the project: `models`, `activations`, `results` or `train`. Not made where it cannot be."""
    folder = project_root() / ".cache" / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
    return folder


def writable_cache_dir(kind: str) -> Path:
    """The same for what is of no use unwritten. Raises `UserError` where it cannot be written."""
    folder = cache_dir(kind)
    with cache_writes(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    return folder


def caches_readable() -> bool:
    """False with `SAE_RESEARCH_NO_CACHE=1` in the environment: every value is computed afresh, none is read from `.cache`.
    What is computed is kept nevertheless, in place of what was there."""
    return os.environ.get("SAE_RESEARCH_NO_CACHE", "") in ("", "0")


@contextmanager
def cache_writes(folder: Path) -> Iterator[None]:
    """Raises `UserError` where the block may not write into `folder` of the cache."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise UserError(f"{os.path.relpath(folder)} cannot be written ({error.strerror}) and does not hold all that is "
                        "needed here; make .cache writable, or fill it by a run where it is") from None


def write_checked_json(path: Path, value: Any) -> None:
    """Write `{"sha256": "<64 hex digits>", "value": <JSON>}` atomically; the checksum is that of the file's name, which is a
    result's key, and of the value's own text: under another name it is not what was written."""
    write_bytes(path, _with_checksum(json.dumps(value, sort_keys=True, allow_nan=False).encode(), path))


def read_checked_json(path: Path) -> Any | None:
    """The value that `write_checked_json` wrote; None where there is no file, or (one printed line says so) another text."""
    if not path.is_file():
        return None
    data = path.read_bytes()
    text = data[len(_CHECKSUM) + 64 + len(_VALUE):-2]
    if data != _with_checksum(text, path):
        print(f"{os.path.relpath(path)}: not what was written; not used, made again", flush=True)
        return None
    return json.loads(text)


def _with_checksum(text: bytes, path: Path) -> bytes:
    return _CHECKSUM + hashlib.sha256(path.name.encode() + b"\n" + text).hexdigest().encode() + _VALUE + text + b"}\n"


class ResultCache:
    """Finished results by key, as JSON files with their checksum: what an interrupted or extended run need not compute
    again. `SAE_RESEARCH_NO_CACHE=1` makes every lookup miss."""

    def __init__(self, kind: str) -> None:
        self.folder = cache_dir("results") / kind

    def get(self, key: str) -> Any | None:
        return read_checked_json(self.folder / f"{key}.json") if caches_readable() else None

    def put(self, key: str, value: Any) -> None:
        with cache_writes(self.folder):
            write_checked_json(self.folder / f"{key}.json", value)


def prune(folder: Path, max_gb: float, keep: Iterable[Path] = ()) -> list[Path]:
    """Delete the least recently used entries of `folder` until it holds at most `max_gb` gigabytes (1e9 bytes).

    Entries named in `keep` stay, and those that a process holds. Returns what was deleted.
    """
    entries = []
    for entry in folder.iterdir():
        stats = []
        for file in [entry] if entry.is_file() else [f for f in entry.rglob("*") if f.is_file()]:
            with suppress(FileNotFoundError):  # another process replaces it
                stats.append(file.stat())
        entries.append((max((s.st_mtime for s in stats), default=0.0), sum(s.st_size for s in stats), entry))
    total, deleted, kept = sum(size for _, size, _ in entries), [], set(keep)
    for _, size, entry in sorted(entries, key=lambda item: (item[0], item[2].name)):
        if total <= max_gb * 1e9:
            break
        if entry in kept or not remove_unheld(entry):
            continue
        total -= size
        deleted.append(entry)
    return deleted


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep `folder`, made where it is missing, from `prune` and `remove_unheld` of any process during the block. The
    system lets go of it when this process ends, whatever ends it. Several may hold the same."""
    descriptor = _hold(folder)
    try:
        yield
    finally:
        os.close(descriptor)


def _hold(folder: Path) -> int:
    while True:
        with cache_writes(folder.parent):
            folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # another process removes it: make it again
            descriptor = os.open(folder, os.O_RDONLY)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), folder.stat()):
                    return descriptor
            os.close(descriptor)


def remove_unheld(path: Path) -> bool:
    """Delete a file or folder unless a process holds it; whether it is gone."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
