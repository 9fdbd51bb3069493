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
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from sae_research.errors import NotApplicable, UserError

STATUS_FILE = "_status.json"
RESULT_SUFFIX = "_eval_results.json"
SLUG = re.compile(r"^[a-z0-9_]+$")
FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")
APART = "to run several at once give each a copy of its own: `dvc exp run --temp`, or `--queue` and `dvc queue start`"


# --- names -----------------------------------------------------------------------------------

def slugify(name: str) -> str:
    """`Pythia-70m/Layer 4` -> `pythia_70m_layer_4`. Raises `UserError` if nothing is left."""
    slug = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    if not slug:
        raise UserError(f"the name {name!r} holds no letter or digit to build an SAE name from")
    return slug


def checked_name(name: Any, where: str | Path) -> str:
    """The name, where it may be part of a path. where: what it was read from, for the message.

    Raises `UserError` for one that leads elsewhere (`../x`, `/x`), is hidden, empty, longer than file systems take, or no
    text.
    """
    if not isinstance(name, str) or not FILE_NAME.fullmatch(name):
        shown = repr(name) if len(repr(name)) <= 80 else f"{repr(name)[:80]}…"
        raise UserError(f"{where}: the name {shown} may hold only letters, digits and . _ + -, at most 200 of them, and "
                        "begins with none of . + -")
    return name


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


def keep_first(temporary: Path, folder: Path) -> None:
    """Move a finished folder into place; where another process was faster, its equal folder stays."""
    try:
        temporary.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(temporary)


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


# --- one process for an output ---------------------------------------------------------------

@contextmanager
def writing(output: str | Path) -> Iterator[None]:
    """Hold the right to write a stage's output during the block. The system lets go of it when the process ends.

    Raises `UserError` where another process writes the same output, or where an experiment (`dvc exp run`) and another
    run would work in one workspace: DVC then puts other versions of the outputs under a stage at work.
    """
    here = Path.cwd().resolve()
    experiment = bool(os.environ.get("DVC_EXP_NAME"))
    with ExitStack() as held:
        other = held.enter_context(_locked(str(here), fcntl.LOCK_EX if experiment else fcntl.LOCK_SH))
        if other is not None:
            raise UserError(f"an experiment and another run would work in {here} at once ({other or 'another stage'}); "
                            f"wait for it; {APART}")
        other = held.enter_context(_locked(f"{Path(output).resolve()}/", fcntl.LOCK_EX))
        if other is not None:
            raise UserError(f"{output}: {other or 'another process'} is writing it; wait for it, or end it; {APART}")
        yield


@contextmanager
def _locked(what: str, how: int) -> Iterator[str | None]:
    """Lock a name for all processes of this user. Gives None when it is ours, else who holds it, as far as is known."""
    folder = Path(tempfile.gettempdir()) / f"sae_research-{os.getuid()}"  # a project may be read-only, and stays clean
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / hashlib.sha256(what.encode()).hexdigest()[:32]
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        try:
            fcntl.flock(descriptor, how | fcntl.LOCK_NB)
        except BlockingIOError:
            yield os.pread(descriptor, 300, 0).decode(errors="replace")
            return
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()}".encode(), 0)
        yield None
    finally:
        os.close(descriptor)


# --- stage folders ---------------------------------------------------------------------------

class StageFolder:
    """The output folder of an evaluation stage: one result per SAE and a `_status.json` that says how it ended."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.skipped: dict[str, str] = {}
        self.notes: dict[str, Any] = {}
        """What the report says of the setting. No times, hosts or durations: two equal runs leave equal bytes."""

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
    with writing(path):
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
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            yield stage
            if not _is_still(folder, descriptor):
                raise UserError(f"{folder} was replaced while the stage was at work (by `dvc exp run` or `dvc checkout`?); "
                                f"run it again: what was finished is in the cache; {APART}")
        except NotApplicable as reason:
            stage.set_status("not_applicable", str(reason))
            print(f"{folder}: not applicable: {reason}", flush=True)
            return
        except BaseException as error:
            stage.set_status(
                "failed", f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error))
            raise
        finally:
            os.close(descriptor)
        stage.set_status("ok")


def _is_still(folder: Path, descriptor: int) -> bool:
    """Whether a path still leads to the folder that was opened; an open one's number is not given to another."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), folder.stat())
    return False


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
