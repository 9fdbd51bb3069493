"""What a user may cause, what a machine may refuse, and the one place that turns either into a line and an exit code."""

from __future__ import annotations

import difflib
import errno
import os
import select
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path


class UserError(Exception):
    """A mistake or shortage outside the program: says in one line what is wrong and how to mend it."""


class NotApplicable(UserError):
    """What was asked has no meaning for this model or these SAEs: no score, and no failure either."""


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C, met in good order: the message says what was kept, `code` is 128 plus the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.code = 128 + signal_number


def did_you_mean(name: str, known: Iterable[str], otherwise: str | None = None) -> str:
    """`, did you mean X?` for what is nearly a known name; else `otherwise`, by default the list of what is known."""
    known = known if isinstance(known, Sequence) else sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    if close:
        return f", did you mean {close[0]}?"
    return f"; known: {', '.join(known)}" if otherwise is None else otherwise


_SPACE = "free some, or `make clean-cache`; results finished so far are kept"
_RIGHTS = "mend its owner and mode (ls -l), or work in a folder of your own"
_PLACE = "something else lies where a file or folder is to be: move it away"
_SETUP = "run `make setup` in the project's folder, then `source .venv/bin/activate`"
_ENVIRONMENT = {
    errno.ENOSPC: ("no space left on the disk", _SPACE),
    errno.EDQUOT: ("the disk quota is used up", _SPACE),
    errno.EFBIG: ("the file would be larger than allowed", "raise the limit (ulimit -f), or use another file system"),
    errno.EROFS: ("the file system is read-only", "work in a copy of the project that can be written to"),
    errno.EACCES: ("permission denied", _RIGHTS),
    errno.EPERM: ("not permitted", _RIGHTS),
    errno.EMFILE: ("too many open files", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("too many open files on this machine", "end other programs"),
    errno.EIO: ("the disk failed to read or write", "look after the disk or the network file system"),
    errno.ESTALE: ("the network file system lost the file", "start again"),
    errno.ENAMETOOLONG: ("the name or path is too long", "shorten it, or move the project up"),
    errno.ENOTDIR: ("not a folder", _PLACE),
    errno.EISDIR: ("a folder where a file is to be", _PLACE),
    errno.EEXIST: ("there already", _PLACE),
}
"""What the user's machine may refuse whatever the program does: what is wrong, and how to mend it."""
_ANYWHERE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.EIO}
"""Of these, those that are the machine's also where the system names no file."""
_ALLOCATION = ("can't allocate memory", "not enough memory", "Cannot allocate memory", "out of memory")
"""How torch says that memory is used up, by a `RuntimeError`."""


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command and exit: 0 when done, 1 after one clear line for a `UserError` and for what the machine refuses (a
    full or read-only disk, rights, limits, memory, packages that are not installed), 130 on Ctrl-C, 143 on a SIGTERM that
    the command answers (`Interrupted`), 141 when nobody reads its output any more.

    Anything else is a defect of the program and keeps its traceback. `main` imports what it needs, so that a missing
    package is a line too.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except Interrupted as stop:
        print(f"interrupted: {stop}", file=sys.stderr)
        code = stop.code
    except KeyboardInterrupt:
        print("interrupted: results finished so far are kept in .cache and will be reused", file=sys.stderr)
        code = 130
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        code = 141
    except (OSError, MemoryError, RuntimeError, ModuleNotFoundError) as error:
        line = environment_line(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        code = 1
    sys.exit(code)


def _nobody_reads() -> bool:
    """Whether it is this program's own output that broke off (`... | head`), not some connection inside."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def environment_line(error: BaseException) -> str | None:
    """One line for an error that is the machine's or the installation's, None for a defect of the program."""
    if isinstance(error, FileNotFoundError) and _in_subprocess(error):
        return f"the program {error.filename} is not there: {_SETUP}"
    if isinstance(error, OSError):
        if error.errno not in _ENVIRONMENT or (error.filename is None and error.errno not in _ANYWHERE):
            return None
        what, mend = _ENVIRONMENT[error.errno]
        return f"{what} ({error.filename or 'temporary file'}): {mend}"
    if isinstance(error, ModuleNotFoundError):
        return _missing_package(error.name or "")
    if isinstance(error, MemoryError) or any(sign in str(error) for sign in _ALLOCATION):
        reason = " ".join(str(error).split())[:200]
        return f"out of memory{f' ({reason})' if reason else ''}: lower batch sizes, widths or numbers of tokens"
    return None


def require_environment() -> None:
    """Exit with one line where `make setup` never ran: for packages whose modules are programs that import at once what
    they need."""
    if find_spec("torch") is None:
        sys.exit(f"error: {_missing_package('torch')}")


def _missing_package(name: str) -> str | None:
    """None where what is missing is the project's own: a module that was moved or misspelt."""
    package, project = name.partition(".")[0], Path(__file__).parents[2]
    if not package or (project / package).is_dir() or (project / f"{package}.py").is_file():
        return None
    if package in sys.stdlib_module_names:
        return f"this Python ({sys.executable}) was built without {name}: use another"
    version = f" as a version with {name}" if package != name else ""
    return f"the package {package} is not installed{version}: {_SETUP}"


def _in_subprocess(error: BaseException) -> bool:
    """Whether it was a program that could not be started."""
    frames = list(traceback.walk_tb(error.__traceback__))
    return bool(frames) and frames[-1][0].f_code.co_filename == subprocess.__file__
