"""Where results live and how they are named: fingerprints, atomic writes, the result cache, `_status.json`.

No torch here: the reporting stages import this module and must start in a fraction of a second.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import inspect
import json
import math
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from sae_research.errors import NotApplicable, UserError

STATUS_FILE = "_status.json"
RESULT_SUFFIX = "_eval_results.json"
SLUG = re.compile(r"^[a-z0-9_]+$")


# --- names -----------------------------------------------------------------------------------

def slugify(name: str) -> str:
    """`Pythia-70m/Layer 4` -> `pythia_70m_layer_4`. Raises `UserError` if nothing is left."""
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    if not slug:
        raise UserError(f"the name {name!r} holds no letter or digit to build an SAE name from")
    return slug


# --- fingerprints ----------------------------------------------------------------------------

def fingerprint(value: Any) -> str:
    """SHA-256 of a JSON-able value, independent of the order of keys. [64 hex digits]"""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes. Raises `UserError` if the file is missing."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def source_fingerprint(modules: Iterable[ModuleType]) -> str:
    """SHA-256 over the source text of modules: results computed by other code are other results.

    A package stands for all its files, so that none is forgotten: also those that this machine could not import.
    """
    return fingerprint({module.__name__: _source(module) for module in modules})


def _source(module: ModuleType) -> str | dict[str, str]:
    if not hasattr(module, "__path__"):
        try:
            return inspect.getsource(module)
        except (OSError, TypeError):  # a notebook's cells: unread code is never taken for code seen before
            return uuid.uuid4().hex
    return {path.relative_to(folder).as_posix(): path.read_text()
            for folder in map(Path, module.__path__) for path in sorted(folder.rglob("*.py"))}


# --- files -----------------------------------------------------------------------------------

def write_bytes(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: into a temporary neighbour first, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(data)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, with sorted keys. Raises `ValueError` on NaN or infinity, which JSON lacks."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON. Raises `UserError` naming the file when it is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); delete it and run the stage again") from None


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


_CHECKSUM, _VALUE = b'{"sha256": "', b'", "value": '


def write_checked_json(path: Path, value: Any) -> None:
    """Write `{"sha256": "<64 hex digits>", "value": <JSON>}` atomically; the checksum is that of the value's own text."""
    write_bytes(path, _with_checksum(json.dumps(value, sort_keys=True, allow_nan=False).encode()))


def read_checked_json(path: Path) -> Any | None:
    """The value that `write_checked_json` wrote; None where there is no file, or (one printed line says so) another text."""
    if not path.is_file():
        return None
    data = path.read_bytes()
    text = data[len(_CHECKSUM) + 64 + len(_VALUE):-2]
    if data != _with_checksum(text):
        print(f"{os.path.relpath(path)}: not what was written; not used, made again", flush=True)
        return None
    return json.loads(text)


def _with_checksum(text: bytes) -> bytes:
    return _CHECKSUM + hashlib.sha256(text).hexdigest().encode() + _VALUE + text + b"}\n"


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


# --- stage folders ---------------------------------------------------------------------------

class StageFolder:
    """The output folder of an evaluation stage: one result per SAE and a `_status.json` that says how it ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.skipped: dict[str, str] = {}
        self.notes: dict[str, Any] = {}

    def set_status(self, status: str, message: str = "") -> None:
        """`status` is one of disabled, incomplete, failed, not_applicable, ok."""
        write_json(self.folder / STATUS_FILE, {
            "status": status, "message": message, "skipped": self.skipped, "notes": self.notes})

    def skip(self, what: str, why: str) -> None:
        """Record that a task, letter or SAE does not qualify; a skip alone is no failure."""
        self.skipped[what] = why
        print(f"skipped {what}: {why}", flush=True)

    def write_result(self, name: str, result: dict[str, Any]) -> None:
        write_json(self.folder / f"{name}{RESULT_SUFFIX}", result)


@contextmanager
def stage_folder(path: str | Path, enabled: bool = True) -> Iterator[StageFolder | None]:
    """Open an evaluation's output folder, emptied; `_status.json` tells at any moment how far it got.

    Yields None when the evaluation is disabled. `NotApplicable` ends it with that status and without an error. On
    any other error the status becomes `failed`, with the message, and the error goes on: the stage exits with 1 and
    what was finished stays in the result cache.
    """
    folder = Path(path)
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    stage = StageFolder(folder)
    if not enabled:
        stage.set_status("disabled", "switched off in params.yaml (eval_types)")
        yield None
        return
    stage.set_status("incomplete", "the stage is running or was killed")
    try:
        yield stage
    except NotApplicable as reason:
        stage.set_status("not_applicable", str(reason))
        print(f"{folder}: not applicable: {reason}", flush=True)
        return
    except BaseException as error:
        stage.set_status("failed", f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error))
        raise
    stage.set_status("ok")


def read_status(folder: Path) -> dict[str, Any]:
    """The `_status.json` of an evaluation folder; a folder without one counts as `missing`."""
    path = folder / STATUS_FILE
    if not path.is_file():
        return {"status": "missing", "message": f"{folder} has no {STATUS_FILE}: run its stage", "skipped": {}, "notes": {}}
    return read_json(path)


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Every SAE's result in an evaluation folder, by SAE name, in alphabetical order."""
    return {path.name.removesuffix(RESULT_SUFFIX): read_json(path)
            for path in sorted(folder.glob(f"*{RESULT_SUFFIX}"))}
