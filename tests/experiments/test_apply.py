"""`python -m sae_research apply` in a clone that has not run everything, with DVC itself."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sae_research.experiments.history import apply_experiment
from sae_research.runtime.errors import UserError

PIPELINE = """stages:
  one:
    cmd: mkdir -p out/one && cp params.yaml out/one/
    params: [a]
    outs: [out/one]
  two:
    cmd: mkdir -p out/two && cp out/one/params.yaml out/two/
    deps: [out/one]
    outs: [out/two]
"""


def test_saes_that_no_run_made_are_not_removed(tmp_path: Path) -> None:
    """Before DVC is asked: applying would replace the folder."""
    for command in (
        ["git", "init", "-q"],
        ["git", "-c", "user.name=t", "-c", "user.email=t", "commit", "-qm", "x", "--allow-empty"],
    ):
        subprocess.run(command, cwd=tmp_path, check=True)
    for folder in (".dvc", "trained_saes/topk", "trained_saes/mine"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "trained_saes/training_report.json").write_text('{"saes": {"topk": {}}}')
    with pytest.raises(UserError, match=r"trained_saes/mine: no run trained it here, .* move it out of trained_saes/"):
        apply_experiment(tmp_path, "any")
    (tmp_path / "trained_saes/mine").rmdir()
    with pytest.raises(UserError, match="no experiment 'any'; there is none yet"):
        apply_experiment(tmp_path, "any")


@pytest.mark.slow
def test_an_experiment_of_some_stages_is_applied(tmp_path: Path) -> None:
    def run(folder: Path, *command: str) -> None:
        subprocess.run(command, cwd=folder, check=True, capture_output=True)

    first, clone = tmp_path / "first", tmp_path / "clone"
    first.mkdir()
    for command in (
        ["git", "init", "-q", "-b", "main"],
        ["git", "config", "user.name", "t"],
        ["git", "config", "user.email", "t@localhost"],
        ["dvc", "init", "-q"],
    ):
        run(first, *command)
    (first / "dvc.yaml").write_text(PIPELINE)
    (first / "params.yaml").write_text("a: 1\n")
    (first / ".gitignore").write_text("/out/\n")
    run(first, "dvc", "repro", "-q")
    run(first, "git", "add", "-A")
    run(first, "git", "commit", "-q", "-m", "x")
    run(tmp_path, "git", "clone", "-q", str(first), str(clone))
    run(clone, "git", "config", "user.name", "t")
    run(clone, "git", "config", "user.email", "t@localhost")
    run(clone, "dvc", "exp", "run", "-q", "--temp", "-S", "a=5", "-n", "mine", "one")
    (clone / "out/two").mkdir(parents=True)
    (clone / "out/two/stale").write_text("of a run that was killed")
    assert apply_experiment(clone, "mine") == ["out/two"]
    assert (clone / "out/one/params.yaml").read_text() == (clone / "params.yaml").read_text() == "a: 5\n"
    assert not (clone / "out/two").exists()
    with pytest.raises(UserError, match="no experiment 'mien', did you mean mine"):
        apply_experiment(clone, "mien")
