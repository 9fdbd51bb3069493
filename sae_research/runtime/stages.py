"""A stage's output: one process writes it, its status says how far it got, and its results are read back."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from sae_research.runtime.errors import NotApplicable, UserError
from sae_research.runtime.files import RESULT_SUFFIX, checked_name, read_json, write_json

STATUS_FILE = "_status.json"
APART = "to run several at once give each a copy of its own: `dvc exp run --temp`, or `--queue` and `dvc queue start`"


# --- one process for an output ---------------------------------------------------------------


@contextmanager
def writing(output: str | Path) -> Generator[None]:
    """Hold the right to write a stage's output during the block. The system lets go of it when the process ends.

    Raises `UserError` where another process writes the same output, or where an experiment (`dvc exp run`) and another
    run would work in one workspace: DVC then puts other versions of the outputs under a stage at work.
    """
    here = Path.cwd().resolve()
    experiment = bool(os.environ.get("DVC_EXP_NAME"))
    with ExitStack() as held:
        other = held.enter_context(_locked(str(here), fcntl.LOCK_EX if experiment else fcntl.LOCK_SH))
        if other is not None:
            raise UserError(
                f"an experiment and another run would work in {here} at once ({other or 'another stage'}); "
                f"wait for it; {APART}"
            )
        other = held.enter_context(_locked(f"{Path(output).resolve()}/", fcntl.LOCK_EX))
        if other is not None:
            raise UserError(f"{output}: {other or 'another process'} is writing it; wait for it, or end it; {APART}")
        yield


@contextmanager
def _locked(what: str, how: int) -> Generator[str | None]:
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
        write_json(
            self.folder / STATUS_FILE, {"status": status, "message": message, "skipped": self.skipped, "notes": self.notes}
        )

    def skip(self, what: str, why: str) -> None:
        """Record that a task, letter or SAE does not qualify; a skip alone is no failure."""
        self.skipped[what] = why
        print(f"skipped {what}: {why}", flush=True)

    def write_result(self, name: str, result: dict[str, Any]) -> None:
        write_json(self.folder / f"{name}{RESULT_SUFFIX}", result)


@contextmanager
def stage_folder(path: str | Path, enabled: bool = True, emptied: bool = True) -> Generator[StageFolder | None]:
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
                raise UserError(
                    f"{folder} was replaced while the stage was at work (by `dvc exp run` or `dvc checkout`?); "
                    f"run it again: what was finished is in the cache; {APART}"
                )
        except NotApplicable as reason:
            stage.set_status("not_applicable", str(reason))
            print(f"{folder}: not applicable: {reason}", flush=True)
            return
        except BaseException as error:
            stage.set_status(
                "failed", f"{type(error).__name__}: {error}" if not isinstance(error, UserError) else str(error)
            )
            raise
        finally:
            os.close(descriptor)
        stage.set_status("ok")


def write_disabled(path: str | Path) -> None:
    """All that a stage which is switched off does, before it imports what computes: torch takes seconds."""
    with stage_folder(path, enabled=False):
        pass


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
    if (
        not isinstance(status, dict)
        or not isinstance(status.get("status"), str)
        or not all(isinstance(status.get(key, {}), dict) for key in ("skipped", "notes"))
    ):
        raise UserError(f"{path}: not the status of a stage; run the stage again")
    return status


def read_results(folder: Path) -> dict[str, dict[str, Any]]:
    """Every SAE's result in an evaluation folder, by SAE name, in alphabetical order."""
    return {
        checked_name(path.name.removesuffix(RESULT_SUFFIX), str(path)): read_json(path)
        for path in sorted(folder.glob(f"*{RESULT_SUFFIX}"))
    }


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
    if len(set(order)) < len(order) or "saes" in values and set(order) != set(saes):
        raise UserError(f"{path}: its order and its SAEs are not the same names; run the stage that writes it again")
    return values
