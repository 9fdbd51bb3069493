"""What `make repro` mends before DVC runs, and when it and a stage refuse to start beside another."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from sae_research.runtime import workspace
from sae_research.runtime.errors import UserError
from sae_research.runtime.stages import read_status, stage_folder, writing
from sae_research.runtime.workspace import prepare

LOCK = "schema: '2.0'\nstages:\n  one:\n    cmd: echo\n    outs:\n    - path: out\n      md5: 0\n"


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository with what `prepare` looks at; DVC itself is not needed to mend its files."""
    git(tmp_path, "init", "-q", "-b", "main")
    for key, value in (("user.name", "t"), ("user.email", "t@localhost")):
        git(tmp_path, "config", key, value)
    (tmp_path / ".dvc/tmp/exps").mkdir(parents=True)
    (tmp_path / "dvc.lock").write_text(LOCK)
    git(tmp_path, "add", "dvc.lock")
    git(tmp_path, "commit", "-q", "-m", "x")
    return tmp_path


def locks(pid: int, command: str = "/usr/bin/dvc repro") -> str:
    entry = {"pid": pid, "cmd": command}
    return json.dumps({"write": {"/project/out": entry}, "read": {"/project/in": [entry]}})


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is none of DVC's."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield process
    process.kill()
    process.wait()


@pytest.fixture
def dvc_at_work(root: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that looks like `dvc repro` in the workspace."""
    script = root / "bin/dvc"
    script.parent.mkdir()
    script.write_text("print(1, flush=True)\nimport time\ntime.sleep(60)\n")
    process = subprocess.Popen([sys.executable, str(script), "repro"], cwd=root, stdout=subprocess.PIPE)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


# --- DVC's files ---------------------------------------------------------------------------------


def test_nothing_to_mend(root: Path):
    (root / ".dvc/tmp/rwlock").write_text("{}")
    assert prepare(root) == [] and (root / ".dvc/tmp/rwlock").read_text() == "{}"


def test_damaged_locks_are_removed(root: Path):
    for name in ("rwlock", "exps/rwlock"):
        for text in ("", "{", "[]", "null", '{"write": {"x": 3}}', '{"read": {"x": [{"pid": 1}]}}', "\x00\x00"):
            (root / ".dvc/tmp" / name).write_text(text)
            lines = prepare(root)
            assert len(lines) == 1 and "damaged by a killed run" in lines[0] and name in lines[0], text
            assert not (root / ".dvc/tmp" / name).exists()


def test_locks_of_processes_that_ended_are_removed(root: Path, sleeper: subprocess.Popen[bytes]):
    """Also where the number is another process's by now, or the process waits for a parent that never asks."""
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    time.sleep(0.3)
    for pid in (2**22 - 3, sleeper.pid, zombie.pid):
        (root / ".dvc/tmp/rwlock").write_text(locks(pid))
        assert any("have ended" in line for line in prepare(root)), pid
        assert not (root / ".dvc/tmp/rwlock").exists()
    zombie.wait()


def test_a_lock_file_cut_short_comes_back_from_git(root: Path):
    newer = LOCK.replace("md5: 0", "md5: 1")
    (root / "dvc.lock").write_text(newer)
    git(root, "add", "dvc.lock")
    for text in ("", LOCK[:20], LOCK[:34], "stages:\n  one: {}\n", "\x00", "- 1\n"):
        (root / "dvc.lock").write_text(text)
        assert "git's index" in prepare(root)[0], text
        assert (root / "dvc.lock").read_text() == newer


def test_a_lock_file_from_the_last_commit_and_none(root: Path):
    for path in (root / "dvc.lock", root / "empty"):
        path.write_text("")
    blob = git(root, "hash-object", "-w", "empty")
    git(root, "update-index", "--cacheinfo", f"100644,{blob},dvc.lock")
    assert "the last commit" in prepare(root)[0] and (root / "dvc.lock").read_text() == LOCK
    git(root, "rm", "-q", "--cached", "-f", "dvc.lock")
    git(root, "commit", "-q", "-m", "none")
    (root / "dvc.lock").write_text("")
    assert "removed" in prepare(root)[0] and not (root / "dvc.lock").exists()


def test_a_conflict_is_the_users(root: Path):
    text = f"<<<<<<< ours\n{LOCK}=======\n{LOCK}>>>>>>> theirs\n"
    (root / "dvc.lock").write_text(text)
    assert prepare(root) == [] and (root / "dvc.lock").read_text() == text


def test_what_a_killed_experiment_leaves_in_git(root: Path):
    (root / ".git/index.lock").touch()
    assert "index.lock" in prepare(root)[0]
    git(root, "checkout", "-q", "--detach")
    git(root, "update-ref", "refs/exps/exec/EXEC_BASELINE", "HEAD")
    assert prepare(root) == ["mended: a killed `dvc exp run` had left git's HEAD; back on main"]
    assert git(root, "symbolic-ref", "HEAD") == "refs/heads/main" and prepare(root) == []
    git(root, "checkout", "-q", "--detach")
    assert prepare(root) == [], "a detached HEAD of the user's own stays"


def test_refused_beside_another_run(root: Path, dvc_at_work: subprocess.Popen[bytes]):
    rwlock = root / ".dvc/tmp/rwlock"
    rwlock.write_text(locks(dvc_at_work.pid, f"{root}/bin/dvc repro"))
    with pytest.raises(UserError, match=rf"`dvc repro` \(process {dvc_at_work.pid}\) is at work.*--temp.*--queue"):
        prepare(root)
    rwlock.write_text("")
    with pytest.raises(UserError, match="rwlock is damaged, and `python.* dvc repro`"):
        prepare(root)
    assert rwlock.exists()


def test_refused_while_dvcs_lock_is_held(root: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(workspace, "PATIENCE", 0.2)
    (root / ".dvc/tmp/lock").write_text("garbage")
    assert prepare(root) == [], "DVC's lock file stays behind and says nothing"
    hold = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", hold, root / ".dvc/tmp/lock"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        holder.stdout.readline()
        with pytest.raises(UserError, match="a DVC process is at work"):
            prepare(root)


def test_no_project(tmp_path: Path):
    with pytest.raises(UserError, match="no DVC project"):
        prepare(tmp_path)


# --- stages --------------------------------------------------------------------------------------


def hold(folder: Path, output: str, **environment: str) -> subprocess.Popen[str]:
    """Another process that writes `output` until its input ends."""
    code = (
        "import sys\nfrom sae_research.runtime.stages import writing\n"
        "with writing(sys.argv[1]):\n    print(1, flush=True)\n    input()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, output],
        cwd=folder,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
    )
    process.stdout.readline()
    return process


def test_two_processes_never_write_one_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with stage_folder("eval_results/core") as stage:
        stage.write_result("sae", {"x": 1})
    other = hold(tmp_path, "eval_results/core")
    with (
        pytest.raises(UserError, match=f"eval_results/core: process {other.pid} is writing it"),
        stage_folder("eval_results/core"),
    ):
        pass
    assert read_status(Path("eval_results/core"))["status"] == "ok", "nothing of it was touched"
    with stage_folder("eval_results/scr"):  # another output of the same workspace
        pass
    other.kill()
    other.wait()
    with stage_folder("eval_results/core"):
        pass


def test_an_experiment_and_another_run_never_share_a_workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    other = hold(tmp_path, "trained_saes")
    monkeypatch.setenv("DVC_EXP_NAME", "tidy-mole")
    with pytest.raises(UserError, match="an experiment and another run.*--temp"), writing("downloaded_saes"):
        pass
    apart = tmp_path / ".dvc/tmp/exps/tmp1"
    apart.mkdir(parents=True)
    monkeypatch.chdir(apart)
    with writing("downloaded_saes"):
        pass
    other.communicate("\n")
    monkeypatch.chdir(tmp_path)
    with writing("downloaded_saes"):
        pass


def test_a_folder_replaced_under_its_stage_is_not_called_finished(tmp_path: Path):
    folder = tmp_path / "core"
    with pytest.raises(UserError, match="was replaced while the stage was at work"), stage_folder(folder) as stage:
        stage.write_result("one", {})
        shutil.rmtree(folder)
        stage.write_result("two", {})
    assert read_status(folder)["status"] == "failed"
