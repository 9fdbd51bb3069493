"""Caches under `.cache`: single values with a checksum, folders of files with a list of theirs, size limits, one switch.

What is read back instead of being computed again (activations, mean latents, tokens of long texts, models made here, latent
statistics) decides metrics as much as code does. A file that was cut, emptied, zeroed, exchanged or has a flipped bit costs
time, never correctness. No torch here.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from sae_research.runtime.errors import UserError
from sae_research.runtime.files import (
    file_sha256,
    project_root,
    remove_leftovers,
    replaced_folder,
    write_bytes,
    write_json,
)

_CHECKSUM, _VALUE = b'{"sha256": "', b'", "value": '
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


NO_CACHE = "SAE_RESEARCH_NO_CACHE"


def caches_readable() -> bool:
    """False with `SAE_RESEARCH_NO_CACHE=1` in the environment: every value is computed afresh, none is read from `.cache`.
    What is computed is kept nevertheless, in place of what was there."""
    return os.environ.get(NO_CACHE, "") in ("", "0")


@contextmanager
def cache_writes(folder: Path) -> Generator[None]:
    """Raises `UserError` where the block may not write into `folder` of the cache."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise UserError(
            f"{os.path.relpath(folder)} cannot be written ({error.strerror}) and does not hold all that is "
            "needed here; make .cache writable, or fill it by a run where it is"
        ) from None


def write_checked_json(path: Path, value: Any) -> None:
    """Write `{"sha256": "<64 hex digits>", "value": <JSON>}` atomically; the checksum is that of the file's name, which is a
    result's key, and of the value's own text: under another name it is not what was written."""
    write_bytes(path, _with_checksum(json.dumps(value, sort_keys=True, allow_nan=False).encode(), path))


def read_checked_json(path: Path) -> Any | None:
    """The value that `write_checked_json` wrote; None where there is no file, or (one printed line says so) another text."""
    if not path.is_file():
        return None
    data = path.read_bytes()
    text = data[len(_CHECKSUM) + 64 + len(_VALUE) : -2]
    if data != _with_checksum(text, path):
        print(f"{os.path.relpath(path)}: not what was written; not used, made again", flush=True)
        return None
    return json.loads(text)


def _with_checksum(text: bytes, path: Path) -> bytes:
    return _CHECKSUM + hashlib.sha256(path.name.encode() + b"\n" + text).hexdigest().encode() + _VALUE + text + b"}\n"


_lent: ContextVar[Mapping[str, Any] | None] = ContextVar("lent", default=None)


@contextmanager
def lent_results(values: Mapping[str, Any]) -> Generator[None]:
    """During the block result caches also hold these values, by `kind/key`."""
    token = _lent.set(values)
    try:
        yield
    finally:
        _lent.reset(token)


class ResultCache:
    """Finished results by key, as JSON files with their checksum: what an interrupted or extended run need not compute
    again. `SAE_RESEARCH_NO_CACHE=1` makes every lookup miss."""

    def __init__(self, kind: str) -> None:
        self.kind, self.folder = kind, cache_dir("results") / kind

    def get(self, key: str) -> Any | None:
        if (lent := (_lent.get() or {}).get(f"{self.kind}/{key}")) is not None:
            return lent
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
def held(folder: Path) -> Generator[None]:
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


CHECKSUMS = "checksums.json"
"""In every entry: name of each other file -> {"bytes": length, "sha256": of its bytes}."""

_found_intact: dict[Path, tuple[str, list[tuple[str, int, int, int]]]] = {}
"""Entries that this process has read whole: their list, and what the file system said of each file then."""


def usable(entry: Path, lengths: Mapping[str, int] | None = None) -> bool:
    """Whether a cached folder may be read instead of being computed again: caches may be read, and it is `intact`."""
    return caches_readable() and intact(entry, lengths)


def intact(entry: Path, lengths: Mapping[str, int] | None = None) -> bool:
    """Whether a cached folder is there and holds, byte for byte, what was written; one printed line says where it does not.

    lengths: bytes that some of its files must have for whoever asks. Every file's SHA-256 is computed once per process
    (0.7 s a gigabyte); later calls compare names, lengths and times of change. An entry that is believed counts as used for
    `prune`, where the cache can be written.
    """
    if not entry.is_dir():
        return False
    wrong = damage(entry) or _other_length(entry, lengths or {})
    if wrong is not None:
        print(f"{os.path.relpath(entry)}: {wrong}; not used, made again", flush=True)
        return False
    try:
        os.utime(entry / CHECKSUMS)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
    return True


def damage(entry: Path) -> str | None:
    """In what way a folder is not what was written, in a few words; None where it is just that."""
    try:
        text = (entry / CHECKSUMS).read_text()
        listed = json.loads(text)
        seen = _listing(entry)
        if _found_intact.get(entry) == (text, seen):
            return None
        if not isinstance(listed, dict):
            return f"{CHECKSUMS} is damaged"
        wrong = _first_difference(entry, listed, {name: size for name, size, *_ in seen})
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except ValueError:  # neither UTF-8 nor JSON
        return f"{CHECKSUMS} is damaged"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    if wrong is None:
        _found_intact[entry] = text, seen
    return wrong


def _first_difference(entry: Path, listed: dict[str, object], sizes: dict[str, int]) -> str | None:
    for name in sorted(listed.keys() | sizes.keys()):
        if name not in sizes:
            return f"{name} is missing"
        if name not in listed:
            return f"{name} was not there when it was written"
        want = listed[name]
        if not isinstance(want, dict) or set(want) != {"bytes", "sha256"}:
            return f"{CHECKSUMS} is damaged"
        if sizes[name] != want["bytes"]:
            return f"{name} has {sizes[name]:,} bytes and not the {want['bytes']} it was written with"
        if file_sha256(entry / name) != want["sha256"]:
            return f"{name} has another checksum than when it was written"
    return None


def _other_length(entry: Path, lengths: Mapping[str, int]) -> str | None:
    for name, length in lengths.items():
        size = (entry / name).stat().st_size if (entry / name).is_file() else 0
        if size != length:
            return f"{name} has {size:,} bytes and not {length:,}"
    return None


def _listing(entry: Path) -> list[tuple[str, int, int, int]]:
    """(name, length, time of change, inode) of every file but the list itself and hidden ones, by name."""
    found = []
    for path in sorted(entry.rglob("*")):
        if path.is_file() and path.name != CHECKSUMS and not path.name.startswith("."):
            stat = path.stat()
            found.append((path.relative_to(entry).as_posix(), stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return found


def seal(folder: Path) -> None:
    """Write the list of a finished folder's files."""
    seen = _listing(folder)
    write_json(folder / CHECKSUMS, {name: {"bytes": size, "sha256": file_sha256(folder / name)} for name, size, *_ in seen})
    _found_intact[folder] = (folder / CHECKSUMS).read_text(), seen


@contextmanager
def new_entry(entry: Path) -> Generator[Path]:
    """A temporary folder to write into. When the block ends well it takes the place of `entry`, with the list of its files;
    when not, it is removed. No other process prunes it meanwhile, and whoever has the old one's files open reads on.

    Raises `UserError` where the cache cannot be written.
    """
    with ExitStack() as stack:
        with cache_writes(entry.parent):
            entry.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(entry.parent)
            if entry.is_file():  # of another version, or put there by somebody else
                entry.unlink()
            temporary = stack.enter_context(replaced_folder(entry))
        yield temporary
        seal(temporary)
    _found_intact[entry] = _found_intact.pop(temporary)
