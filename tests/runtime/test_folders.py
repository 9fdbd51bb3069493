"""Folders that appear whole or not at all, however a process ends."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sae_research.runtime import files
from sae_research.runtime.cache import new_entry
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import remove_leftovers, replaced_folder

ROOT = Path(__file__).parents[2]


def write(target: Path, text: str) -> None:
    with replaced_folder(target) as folder:
        (folder / "a").write_text(text)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def killed(work: Callable[[], None]) -> None:
    """Run in a process that ends by SIGKILL."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(20)
    assert process.exitcode == -signal.SIGKILL


def die(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_folder_is_replaced_whole_and_stays_when_the_block_fails(tmp_path: Path) -> None:
    write(tmp_path / "out", "one")
    (tmp_path / "out" / "further").touch()
    write(tmp_path / "out", "two")
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["a"]
    with pytest.raises(RuntimeError), replaced_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("three")
        raise RuntimeError
    assert (tmp_path / "out" / "a").read_text() == "two" and names(tmp_path) == ["out"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o755


def test_a_kill_between_the_two_renames_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "out", "before")
    original = Path.rename

    def work() -> None:
        def rename(self: Path, target: Path) -> Path:
            if Path(target) == tmp_path / "out":
                die()
            return original(self, target)

        monkeypatch.setattr(Path, "rename", rename)
        write(tmp_path / "out", "new")

    killed(work)
    assert not (tmp_path / "out").exists() and len(names(tmp_path)) == 2
    with pytest.raises(RuntimeError), replaced_folder(tmp_path / "out"):
        assert (tmp_path / "out" / "a").read_text() == "before"
        raise RuntimeError
    assert names(tmp_path) == ["out"] and "restored what was there" in capsys.readouterr().out


@pytest.mark.parametrize("where", ["in the block", "while the old one goes"])
def test_what_a_kill_leaves_goes_with_the_next_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    write(tmp_path / "out", "before")

    def work() -> None:
        if where == "in the block":
            with replaced_folder(tmp_path / "out") as folder:
                (folder / "a").write_text("half")
                die()
        monkeypatch.setattr(files.shutil, "rmtree", die)
        write(tmp_path / "out", "new")

    killed(work)
    assert (tmp_path / "out" / "a").read_text() == ("before" if where == "in the block" else "new")
    assert len(names(tmp_path)) == 2
    write(tmp_path / "out", "last")
    assert names(tmp_path) == ["out"] and (tmp_path / "out" / "a").read_text() == "last"


def test_a_living_process_keeps_its_folder(tmp_path: Path) -> None:
    with replaced_folder(tmp_path / "out") as slow:
        (slow / "a").write_text("slow")
        write(tmp_path / "out", "quick")
        remove_leftovers(tmp_path)
        assert slow.is_dir()
    assert (tmp_path / "out" / "a").read_text() == "slow" and names(tmp_path) == ["out"]


def test_only_leftovers_are_removed(tmp_path: Path) -> None:
    theirs = [".out.backup", ".out.original", ".out.2024", ".out.d.ab12cd34.tmp", "out.ab12cd34.tmp", ".other.ab12cd34.tmp"]
    for name in [*theirs, ".out.ab12cd34", ".out.ab12cd34.tmp", ".out.ab12cd34.old.tmp", ".out.ab12cd34.old"]:
        (tmp_path / name).mkdir()
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "x")
    assert names(tmp_path) == sorted([*theirs, "out"])


def test_a_link_stays_a_link_and_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    write(tmp_path / "out", "one")
    write(tmp_path / "out", "two")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "disk" / "out" / "a").read_text() == "two"
    assert names(tmp_path) == ["disk", "out"] and names(tmp_path / "disk") == ["out"]
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file where a folder"):
        write(tmp_path / "file", "x")


def test_a_cache_is_cleared_of_every_leftover(tmp_path: Path) -> None:
    def work() -> None:
        with new_entry(tmp_path / "key"):
            die()

    killed(work)
    assert len(names(tmp_path)) == 1
    with new_entry(tmp_path / "other"):
        assert len(names(tmp_path)) == 1
    assert names(tmp_path) == ["other"]


def test_errors_name_the_folder_that_was_to_be(tmp_path: Path) -> None:
    with pytest.raises(OSError) as caught, replaced_folder(tmp_path / "out"):
        raise OSError(errno.EFBIG, "File too large")
    assert caught.value.filename == str(tmp_path / "out") and names(tmp_path) == []


def test_replacing_under_fire(tmp_path: Path) -> None:
    """Kills at any moment: what is there, or is put back, is whole."""

    def work() -> None:
        for number in range(10**6):
            with replaced_folder(tmp_path / "out") as folder:
                for name in "abc":
                    (folder / name).write_text(str(number))

    write(tmp_path / "out", "-1")
    for number in range(12):
        process = multiprocessing.get_context("fork").Process(target=work)
        process.start()
        time.sleep(0.02 + 0.003 * number)
        process.kill()
        process.join()
        files.clear_leftovers(tmp_path / "out")
        assert names(tmp_path) == ["out"]
        assert len({file.read_text() for file in (tmp_path / "out").iterdir()}) == 1


def test_git_and_dvc_ignore_leftovers(tmp_path: Path) -> None:
    shutil.copy(ROOT / ".gitignore", tmp_path)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    for name in (
        ".trained_saes.ab12cd34.tmp",
        ".downloaded_saes.ab12cd34.old.tmp",
        ".trained_saes.ab12cd34",
        "images/.a.x.tmp",
    ):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "weights").touch()
    status = subprocess.run(["git", "status", "--porcelain"], cwd=tmp_path, check=True, capture_output=True, text=True)
    assert status.stdout.split() == ["??", ".gitignore"]
    assert {".*.tmp", "/.trained_saes.*", "/.downloaded_saes.*"} <= set((ROOT / ".dvcignore").read_text().split())
