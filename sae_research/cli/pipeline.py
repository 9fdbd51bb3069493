"""`sae-research repro`: the pipeline through DVC, a line for each stage with what is left, and at its end where to look."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from sae_research.cli.plan import plan_of, read_with, stage_of
from sae_research.config.yaml_files import read_mapping
from sae_research.reporting import shapes
from sae_research.runtime.errors import UserError
from sae_research.runtime.formatting import duration
from sae_research.runtime.former_names import elsewhere
from sae_research.runtime.workspace import prepare

PRESETS = Path("presets")
RUNNING = re.compile(r"^Running stage '(?:dvc\.yaml:)?(\w+)':")
"""What DVC says before it runs a stage."""
_SKIPPED = re.compile(r"^Stage '(?:dvc\.yaml:)?(\w+)' (?:didn't change|is cached)")
_DVCS_OWN = re.compile(
    r"^(> python -m scripts\.|Updating lock file|Generating lock file|Use `dvc push|To track the changes|\s*git add )"
)
"""Lines of DVC that say nothing here: what a stage runs, and what to do with files that it wrote."""
SHORT = 1.0
"""Seconds of a stage that no plan foretells."""


def run_pipeline(preset: str) -> int:
    """`dvc repro --ignore-errors` (or `dvc exp run` with a preset's overrides), then the check.

    An evaluation that fails does not stop the others; its status says so and the exit code is 1. Files of DVC that a
    killed run left damaged are mended first. Raises `UserError` where another DVC process is at work in the workspace.
    """
    for line in prepare(Path.cwd()):
        print(line, flush=True)
    overrides = read_preset(preset) if preset else []
    if preset:
        command = ["dvc", "exp", "run", "--ignore-errors"]
        for override in overrides:
            command += ["-S", override]
    else:
        command = ["dvc", "repro", "--ignore-errors"]
    code = followed(command, Following(expected_seconds(overrides)))
    unchanged = (
        subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "params.yaml"], check=False, capture_output=True).returncode
        == 0
    )
    return shapes.report(compare=unchanged and not preset, unfinished=unfinished_stages) or code


def followed(command: list[str], following: Following) -> int:
    """Run DVC and print what it and its stages say, DVC's own lines replaced by ours. Returns its exit code."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}  # what a stage says is read as it says it
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, errors="replace", env=environment) as process:
        assert process.stdout is not None
        for line in process.stdout:
            for said in following.lines(line.rstrip("\n")):
                print(said, flush=True)
    return process.returncode


def expected_seconds(overrides: list[str]) -> dict[str, float]:
    """What the plan foretells of every stage of `dvc.yaml`; `SHORT` for the others. What cannot be planned (a model on a hub
    that is out of reach) has no time, and the stage that needs it says why."""
    stages = dict.fromkeys(read_mapping(Path("dvc.yaml")).get("stages", {}), SHORT)
    try:
        rows = plan_of(*read_with(overrides)).plan.rows
    except UserError:
        return stages
    named = {row.stage if row.stage in stages else stage_of(row.stage): row.seconds for row in rows}
    return {stage: max(named.get(stage, SHORT), SHORT) for stage in stages}


class Following:
    """Where a run is: told DVC's lines, it gives those to print."""

    def __init__(self, expected: Mapping[str, float]) -> None:
        self.left = dict(expected)
        """Seconds foretold of the stages that have not begun."""
        self.total, self.number = len(expected), 0
        self.begun: float | None = None
        self.current = ""
        self.foretold, self.taken = 0.0, 0.0
        """Seconds of the stages that ran, as planned and as measured."""

    def lines(self, line: str, now: float | None = None) -> Iterator[str]:
        """now: seconds, of any clock that runs on."""
        now = time.monotonic() if now is None else now
        if skipped := _SKIPPED.match(line):
            self._ended(now)
            self.left.pop(skipped[1], None)
            self.number += 1
        elif running := RUNNING.match(line):
            self._ended(now)
            self.current, self.begun = running[1], now
            self.number += 1
            yield self._headed(self.left.get(running[1], SHORT))
        elif line.strip() and not _DVCS_OWN.match(line):
            yield line

    def _ended(self, now: float) -> None:
        if self.begun is not None:
            self.foretold += self.left.pop(self.current, SHORT)
            self.taken += now - self.begun
            self.begun = None

    def _headed(self, seconds: float) -> str:
        pace = self.taken / self.foretold if self.taken > 10 * SHORT else 1.0
        times = f"about {duration(pace * seconds)}" if seconds > 2 * SHORT else "moments"
        left = duration(pace * sum(self.left.values()))
        return f"[{self.number}/{self.total}] {self.current}: {times}, about {left} to the end"


def unfinished_stages() -> list[str]:
    """One line for each stage that DVC would run again: one that was killed, and what follows from it. With --ignore-errors
    DVC itself counts such a run as done."""
    done = subprocess.run(["dvc", "status", "--json"], check=False, capture_output=True, text=True)
    if done.returncode:
        return [f"dvc status: {(done.stderr.strip().splitlines() or ['it ended without a word'])[-1]}"]
    changed = {name: why for name, why in json.loads(done.stdout).items() if why != ["always changed"]}
    return [f"{name}: it was killed, or follows from a stage that was; run it again (dvc repro)" for name in changed]


def read_preset(name: str) -> list[str]:
    """The overrides of a preset, without comments and blank lines. Raises `UserError` naming those there are."""
    path = PRESETS / f"{name}.txt"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.txt")))
        raise UserError(f"no preset {name!r}{elsewhere(name, 'file') or f'; known: {known}'}")
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]
