"""Folders that appear whole or not at all, one way for everything that writes one.

A folder is made as a hidden neighbour of its target, `.<target>.<random>.tmp`, and moved into place when it is finished.
What it replaces waits as `.<target>.<random>.old.tmp` until the new one stands, so that a process killed between the two
renames loses nothing: whoever writes the target next puts the old one back first, and removes what else was left. The
process at work holds its folders by a lock that the system lifts when the process ends, whatever ends it; nobody else's
folders are touched. Git and DVC ignore `.*.tmp`.

No torch here: the reporting stages import this module and must start in a fraction of a second.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sae_research.errors import UserError

TEMPORARY, REPLACED = ".tmp", ".old.tmp"
RESERVE = "_" * len("._eval_results.json.xxxxxxxx.tmp")
"""As much as names of files that later stages derive from an SAE's name are longer."""


@contextmanager
def replaced_folder(target: str | Path) -> Iterator[Path]:
    """A new folder that takes the place of `target`, and of all it holds, once the block is done; it goes if the block
    fails. At no moment is neither there for the next run. A link to a folder stays a link.

    Raises `UserError` where `target` is a file, and `OSError`, naming `target`, where nothing can be written there.
    """
    target = Path(os.path.realpath(target))
    _refuse_file(target)
    with _new_folder(target) as temporary:
        yield temporary
        _replace(target, temporary)


@contextmanager
def first_folder(target: Path) -> Iterator[Path]:
    """A new folder that becomes `target` once the block is done, for caches whose names say what is inside: where another
    process was faster, its equal folder stays. It goes if the block fails; raises `OSError`, naming `target`."""
    with _new_folder(target) as temporary:
        remove_leftovers(target.parent)
        yield temporary
        with suppress(FileExistsError), _existing_is_one_error():
            temporary.rename(target)


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
                raise UserError(f"{where}: the name {name[:32]}… of {len(name)} characters is too long for this file "
                                "system; shorten it") from None


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
def _new_folder(target: Path) -> Iterator[Path]:
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
def _made(target: Path) -> Iterator[Path]:
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
def _locked(folder: Path, operation: int) -> Iterator[bool]:
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
def _naming(target: Path) -> Iterator[None]:
    """An `OSError` without a file, as writing to an open one raises it, names the folder that was to be."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(target)
        raise


@contextmanager
def _existing_is_one_error() -> Iterator[None]:
    """A rename onto a folder that holds something is `ENOTEMPTY` on some systems, `EEXIST` on others."""
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError(*error.args) from None
        raise


def _escaped(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)
