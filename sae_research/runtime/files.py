"""Files and folders: names, fingerprints, JSON, and replacement of either as a whole.

A folder is made as a hidden neighbour of its target, `.<target>.<random>.tmp`, and moved into place when it is finished.
What it replaces waits as `.<target>.<random>.old.tmp` until the new one stands, so that a process killed between the two
renames loses nothing: whoever writes the target next puts the old one back first, and removes what else was left. The
process at work holds its folders by a lock that the system lifts when the process ends, whatever ends it; nobody else's
folders are touched. Git and DVC ignore `.*.tmp`. No torch here: the reporting stages start in a fraction of a second.
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
from collections.abc import Generator, Iterable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sae_research.runtime.errors import UserError

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
        slug = f"{slug[: NAME_LIMIT - 11]}_{hashlib.sha256(slug.encode()).hexdigest()[:10]}"
    return slug


def checked_name(
    name: Any, where: str | Path, mend: str = "it was damaged or made by something else: write it again"
) -> str:
    """A name from a file or from parameters, fit to be one part of a path. Raises `UserError`, with `mend`, for one that
    leads elsewhere (`../x`, `/x`), is hidden, holds control characters, or is too long."""
    if (
        not isinstance(name, str)
        or not name
        or name.startswith(".")
        or re.search(r"[/\\\x00-\x1f\x7f]", name)
        or len(name.encode(errors="replace")) > NAME_LIMIT
    ):
        shown = repr(name)
        raise UserError(
            f"{where}: the name {shown if len(shown) < 80 else shown[:79] + '…'} is no name that a file could "
            f"be called after; {mend}"
        )
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


# --- the project -----------------------------------------------------------------------------


ROOT_VARIABLE = "SAE_RESEARCH_ROOT"
"""The project that an experiment belongs to, where it runs in a clone."""


def project_root() -> Path:
    """The DVC project: the one that an experiment of a sweep belongs to, `$DVC_ROOT` inside a stage (the parent repository
    in an experiment that DVC queued), else the nearest folder above the working directory that has a `params.yaml`."""
    given = os.environ.get(ROOT_VARIABLE) or os.environ.get("DVC_ROOT")
    if given:
        return Path(given)
    here = Path.cwd()
    for folder in (here, *here.parents):
        if (folder / "params.yaml").is_file():
            return folder
    return here


def find_local(name: str) -> Path | None:
    """The file or folder that `name` means, or None if there is none.

    A relative path counts from the working directory, then from the project's folder: in a queued experiment
    these differ, and data that Git ignores lies only in the latter.
    """
    path = Path(name).expanduser()
    for candidate in (path, project_root() / path):
        with suppress(OSError):  # too long for a file's name: a name of something else
            if candidate.exists():
                return candidate
    return None


# --- folders ---------------------------------------------------------------------------------

TEMPORARY, REPLACED = ".tmp", ".old.tmp"
RESERVE = "_" * len("._eval_results.json.xxxxxxxx.tmp")
"""As much as names of files that later stages derive from an SAE's name are longer."""


@contextmanager
def replaced_folder(target: str | Path) -> Generator[Path]:
    """A new folder that takes the place of `target`, and of all it holds, once the block is done; it goes if the block
    fails. At no moment is neither there for the next run. A link to a folder stays a link.

    Raises `UserError` where `target` is a file, and `OSError`, naming `target`, where nothing can be written there.
    """
    target = Path(os.path.realpath(target))
    _refuse_file(target)
    with _new_folder(target) as temporary:
        yield temporary
        _replace(target, temporary)


def check_writable(target: str | Path, names: Iterable[str], where: str) -> None:
    """Look before the work whether its results can be written: `target`, with something called `<name>` inside and files
    that later stages derive from it. Raises `UserError` for a name that the file system does not take, saying that it stands
    `where`, and `OSError`, naming `target`, where nothing can be written."""
    target = Path(os.path.realpath(target))
    _refuse_file(target)
    with _new_folder(target) as temporary:
        for name in names:
            try:
                (temporary / f"{name}{RESERVE}").mkdir()
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:
                    raise
                raise UserError(
                    f"{where}: the name {name[:32]}… of {len(name)} characters is too long for this file system; shorten it"
                ) from None


def _refuse_file(target: Path) -> None:
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file where a folder is to be written: move it away")


def clear_leftovers(target: Path) -> None:
    """Put `target` back where a process was killed while replacing it, and remove what killed processes left unfinished
    beside it. What a living process is at work on stays."""
    name = re.escape(target.name)
    # the second form is what version 0.1.0 left; its random part nearly always holds a digit, a word somebody chose does not
    ours = re.compile(rf"\.{name}\.([a-z0-9_]{{8}}(\.old)?\.tmp|(?=[a-z_]*\d)[a-z0-9_]{{8}}(\.old)?)")
    for stray in sorted(target.parent.glob(f".{_escaped(target.name)}.*")):
        if ours.fullmatch(stray.name):
            _settle(stray, target if stray.name.endswith((REPLACED, ".old")) and not target.exists() else None)


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left unfinished in `folder`, a cache, whatever it was to become."""
    for stray in sorted(folder.glob(f".*{TEMPORARY}")):
        _settle(stray, None)


def _settle(stray: Path, target: Path | None) -> None:
    """Move what nobody holds to `target`, or remove it where that is None."""
    with suppress(PermissionError), _locked(stray, fcntl.LOCK_EX | fcntl.LOCK_NB) as free:  # not another user's
        if free and target is not None:
            stray.rename(target)
            print(f"{target}: restored what was there before a run that was killed", flush=True)
        elif free:
            shutil.rmtree(stray)


@contextmanager
def _new_folder(target: Path) -> Generator[Path]:
    """A folder beside `target`, held, and removed at the end unless it was moved away."""
    with _naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(target)
        with _made(target) as temporary:
            try:
                temporary.chmod(0o755)
                yield temporary
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _made(target: Path) -> Generator[Path]:
    while True:
        try:
            temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=TEMPORARY))
        except OSError as error:
            error.filename = str(target)
            raise
        with _locked(temporary, fcntl.LOCK_SH) as held:
            if held:  # or another process took it for a leftover, in the moment before it was held
                yield temporary
                return


def _replace(target: Path, temporary: Path) -> None:
    """Move a finished folder to where another may stand."""
    if not target.exists():
        with suppress(FileExistsError), _existing_is_one_error():
            temporary.rename(target)
            return  # else another process wrote one in this moment: this one is newer
    old = temporary.with_name(temporary.name.removesuffix(TEMPORARY) + REPLACED)
    with _locked(target, fcntl.LOCK_SH):
        target.rename(old)
        try:
            temporary.rename(target)
        except BaseException:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)  # what cannot be removed now is a leftover of the next run


@contextmanager
def _locked(folder: Path, operation: int) -> Generator[bool]:
    """Hold a folder by its inode, wherever it is moved; False where somebody else holds it or it is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        yield False
        return
    try:
        try:
            fcntl.flock(descriptor, operation)
            free = os.path.samestat(os.fstat(descriptor), folder.stat())
        except (BlockingIOError, FileNotFoundError):
            free = False
        yield free
    finally:
        os.close(descriptor)


@contextmanager
def _naming(target: Path) -> Generator[None]:
    """An `OSError` without a file, as writing to an open one raises it, names the folder that was to be."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(target)
        raise


@contextmanager
def _existing_is_one_error() -> Generator[None]:
    """A rename onto a folder that holds something is `ENOTEMPTY` on some systems, `EEXIST` on others."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError(*error.args) from None
        raise


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)
