"""The one exception a user may cause, and the one place that turns it into a line and an exit code."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable


class UserError(Exception):
    """A mistake or shortage outside the program: says in one line what is wrong and how to mend it."""


class NotApplicable(UserError):
    """What was asked has no meaning for this model or these SAEs: no score, and no failure either."""


class Interrupted(KeyboardInterrupt):
    """SIGTERM or Ctrl-C, met in good order: the message says what was kept, `code` is 128 plus the signal's number."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.code = 128 + signal_number


def run_main(main: Callable[[], int | None]) -> None:
    """Run a command and exit: 0 when done, 1 after one clear line for a `UserError`, 130 on Ctrl-C, 143 on a
    SIGTERM that the command answers (`Interrupted`).

    Anything else is a defect of the program and keeps its traceback.
    """
    try:
        code = main() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        code = 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"error: no space left on the disk ({error.filename or 'temporary file'}): "
              "free some, or `make clean-cache`; results finished so far are kept", file=sys.stderr)
        code = 1
    except Interrupted as stop:
        print(f"interrupted: {stop}", file=sys.stderr)
        code = stop.code
    except KeyboardInterrupt:
        print("interrupted: results finished so far are kept in .cache and will be reused", file=sys.stderr)
        code = 130
    sys.exit(code)
