"""`dvc repro` killed at random moments: the next run mends what is left, and ends in the bytes of a run undisturbed.

One signal meets all processes at once (a closed terminal, a machine that goes down), another DVC alone, a third the stage
at work (a machine that is out of memory chooses one).
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.helpers.dvc_project import ENV, make_project, run

KILLS = 10
REPRO = (sys.executable, "-m", "sae_research", "repro")
RESULTS = ("METRICS.md", "metrics", "images", "report")


def results(project: Path) -> dict[str, bytes]:
    """What a run leaves in git."""
    paths = [path for name in RESULTS for path in sorted([project / name, *(project / name).rglob("*")]) if path.is_file()]
    return {str(path.relative_to(project)): path.read_bytes() for path in paths}


def all_of(process: psutil.Process, number: int) -> None:
    os.killpg(process.pid, number)


def dvc_alone(process: psutil.Process, number: int) -> None:
    for child in process.children():  # of `python -m sae_research`
        child.send_signal(number)


def innermost(process: psutil.Process, number: int) -> None:
    *_, last = [process, *process.children(recursive=True)]
    last.send_signal(number)


TARGETS: list[Callable[[psutil.Process, int], None]] = [all_of, dvc_alone, innermost]


def killed(project: Path, seconds: float, target: Callable[[psutil.Process, int], None], number: int) -> tuple[int, str]:
    """Exit code and messages of a run that gets a signal after so many seconds, or ends before; 0 for the latter."""
    with (project.parent / "said").open("w+") as said:
        process = subprocess.Popen(REPRO, cwd=project, env=ENV, stdout=said, stderr=said, start_new_session=True)
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        if process.poll() is None:
            with suppress(psutil.NoSuchProcess):  # one that ended in this moment
                target(psutil.Process(process.pid), number)
        code = process.wait(300)
        until = time.monotonic() + 120  # a stage whose DVC was killed goes on to its end
        while any(os.getpgid(pid) == process.pid for pid in psutil.pids() if _lives(pid)):
            assert time.monotonic() < until, "a stage hangs"
            time.sleep(0.1)
        said.seek(0)
        return code, said.read()


def _lives(pid: int) -> bool:
    with suppress(psutil.Error, ProcessLookupError):
        os.getpgid(pid)
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def start_again(project: Path) -> None:
    """As after a clone: no results, no caches."""
    run(project, "git", "clean", "-qfdx", "-e", ".dvc/tmp")
    run(project, "git", "checkout", "-q", ".")


@pytest.mark.slow
def test_a_run_killed_ten_times_ends_with_the_same_bytes(tmp_path: Path, tiny_inputs: Path) -> None:
    project = make_project(tmp_path / "project", tiny_inputs)
    undisturbed = Path(shutil.copytree(project, tmp_path / "undisturbed", symlinks=True))
    began = time.monotonic()
    run(undisturbed, *REPRO)
    duration = time.monotonic() - began
    want, moments, kills = results(undisturbed), random.Random(0), 0
    for attempt in range(3 * KILLS):
        number = (signal.SIGKILL, signal.SIGTERM)[attempt % 2]
        target = TARGETS[attempt % len(TARGETS)]
        code, said = killed(project, moments.uniform(0.02, 0.25) * duration, target, number)
        print(f"{target.__name__} {signal.Signals(number).name}: exit {code}\n{said[-600:]}")
        own = [line for line in said.splitlines() if line.startswith("error:")]
        assert "Traceback" not in said and "Error:" not in said, said[-3000:]
        assert all(len(line) < 600 for line in own)
        kills += code != 0
        if kills == KILLS:
            break
        if code == 0:
            assert results(project) == want
            start_again(project)
    assert kills == KILLS
    run(project, *REPRO)
    assert results(project) == want
    assert (
        run(project, "git", "status", "--porcelain", "--untracked-files=all").stdout
        == run(undisturbed, "git", "status", "--porcelain", "--untracked-files=all").stdout
    )
    strays = [
        path
        for path in project.rglob("*")
        if ".git" not in path.parts and path.suffix in (".tmp", ".lock") and path.name.startswith(".")
    ]
    assert not strays
