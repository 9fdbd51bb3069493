"""Where results live and how they are named: fingerprints, atomic writes, the result cache, `_status.json`.

No torch here: the reporting stages import this module and must start in a fraction of a second.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from sae_research.errors import NotApplicable, UserError
from sae_research.folders import TEMPORARY

STATUS_FILE = "_status.json"
RESULT_SUFFIX = "_eval_results.json"
NAME_LIMIT = 150
"""Longest name of an SAE: file systems take 255 bytes, and files are called after an SAE with up to 100 more."""
SLUG = re.compile(rf"^[a-z0-9_]{{1,{NAME_LIMIT}}}$")
APART = "to run several at once give each a copy of its own: `dvc exp run --temp`, or `--queue` and `dvc queue start`"


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
def stage_folder(path: str | Path, enabled: bool = True, emptied: bool = True) -> Iterator[StageFolder | None]:
    """Open an evaluation's output folder; `_status.json` tells at any moment how far it got. A stage's folder is emptied: it
    holds the stage's output and nothing else. In a user's folder (`emptied=False`) only earlier results and status go.

    Yields None when the evaluation is disabled. `NotApplicable` ends it with that status and without an error. On
    any other error the status becomes `failed`, with the message, and the error goes on: the stage exits with 1 and
    what was finished stays in the result cache.
    """
    with writing(path):
        folder = Path(path)
        _make_room(folder, emptied)
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
    status = read_json(path)
    if not isinstance(status, dict) or not isinstance(status.get("status"), str) or not all(
            isinstance(status.get(key, {}), dict) for key in ("skipped", "notes")):
        raise UserError(f"{path}: not the status of a stage; run the stage again")
    return status


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Every SAE's result in an evaluation folder, by SAE name, in alphabetical order."""
    return {checked_name(path.name.removesuffix(RESULT_SUFFIX), str(path)): read_json(path)
            for path in sorted(folder.glob(f"*{RESULT_SUFFIX}"))}


def read_manifest(path: Path) -> dict[str, Any]:
    """{"order": names, "saes": rows by name} of setup's manifest, or of another file with such an `order`; every name
    checked. Raises `UserError` where it is missing or not of that shape."""
    values = read_json(path)
    order = values.get("order") if isinstance(values, dict) else None
    saes = values.get("saes", {}) if isinstance(values, dict) else None
    if not (isinstance(order, list) and isinstance(saes, dict) and all(isinstance(row, dict) for row in saes.values())):
        raise UserError(f"{path}: not a list of SAEs; run the stage that writes it again")
    for name in (*order, *saes):
        checked_name(name, str(path))
    if "saes" in values and set(order) != set(saes):
        raise UserError(f"{path}: its order and its SAEs are not the same names; run the stage that writes it again")
    return values
