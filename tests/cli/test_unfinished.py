"""A stage that was killed is named, although DVC under --ignore-errors counts the run as done."""

from __future__ import annotations

import subprocess
from pathlib import Path

from sae_research.cli.pipeline import unfinished_stages

PIPELINE = """
stages:
  always:
    cmd: echo {} > fingerprint
    always_changed: true
    outs: [{fingerprint: {cache: false}}]
  part:
    cmd: test -e well && echo 1 > part.json || kill -TERM $$
    deps: [fingerprint]
    outs: [{part.json: {cache: false}}]
  whole:
    cmd: cat part.json > whole.json
    deps: [part.json]
    outs: [{whole.json: {cache: false}}]
"""


def test_a_killed_stage_and_what_follows_from_it_are_named(in_project: Path) -> None:
    def dvc(*arguments: str) -> int:
        return subprocess.run(["dvc", *arguments], capture_output=True).returncode

    dvc("init", "--no-scm")
    Path("dvc.yaml").write_text(PIPELINE)
    assert dvc("repro", "--ignore-errors") == 0, "DVC itself is content"
    assert [line.partition(":")[0] for line in unfinished_stages()] == ["part", "whole"]
    Path("well").touch()
    assert dvc("repro", "--ignore-errors") == 0 and Path("whole.json").read_text() == "1\n"
    assert unfinished_stages() == []


def test_no_pipeline_is_a_line(in_project: Path) -> None:
    (line,) = unfinished_stages()
    assert line.startswith("dvc status: ERROR: you are not inside of a DVC repository")
