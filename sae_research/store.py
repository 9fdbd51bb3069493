"""Where results live and how they are named: fingerprints, atomic writes, the result cache, `_status.json`.

No torch here: the reporting stages import this module and must start in a fraction of a second.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sae_research.errors import NotApplicable, UserError
from sae_research.folders import TEMPORARY

STATUS_FILE = "_status.json"
RESULT_SUFFIX = "_eval_results.json"
SLUG = re.compile(r"^[a-z0-9_]{1,150}$")
"""Names of SAEs: files are called by them, and by what variants and evaluations add; file systems take 255 bytes."""


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


def cache_dir(kind: str) -> Path:
    """`.cache/<kind>` of the project: `models`, `activations`, `results` or `train`."""
    folder = project_root() / ".cache" / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


class ResultCache:
    """Finished results by key, as JSON files: what an interrupted or extended run need not compute again.

    `SAE_RESEARCH_NO_CACHE=1` in the environment makes every lookup miss.
    """

    def __init__(self, kind: str) -> None:
        self.folder = cache_dir("results") / kind
        self.readable = os.environ.get("SAE_RESEARCH_NO_CACHE", "") in ("", "0")

    def get(self, key: str) -> Any | None:
        path = self.folder / f"{key}.json"
        if not self.readable or not path.is_file():
            return None
        try:
            return json.loads(path.read_text())
        except ValueError:  # a file damaged on disk costs time, never correctness
            path.unlink()
            return None

    def put(self, key: str, value: Any) -> None:
        write_json(self.folder / f"{key}.json", value)


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
def stage_folder(path: str | Path, enabled: bool = True, emptied: bool = True) -> Iterator[StageFolder | None]:
    """Open an evaluation's output folder; `_status.json` tells at any moment how far it got. A stage's folder is emptied: it
    holds the stage's output and nothing else. In a user's folder (`emptied=False`) only earlier results and status go.

    Yields None when the evaluation is disabled. `NotApplicable` ends it with that status and without an error. On
    any other error the status becomes `failed`, with the message, and the error goes on: the stage exits with 1 and
    what was finished stays in the result cache.
    """
    folder = Path(path)
    _make_room(folder, emptied)
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


def _make_room(folder: Path, emptied: bool) -> None:
    if emptied and folder.is_dir():
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder}: a file stands where this folder, or one above it, belongs") from None
    for file in (*folder.glob(f"*{RESULT_SUFFIX}"), folder / STATUS_FILE):
        if not file.is_dir():
            file.unlink(missing_ok=True)


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
