"""The documentation's commands, run page by page in a copy of the project with a tiny model; then the page's Python."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.helpers.doc_pages import APPLIED, Command, blocks, commands, pages, python
from tests.helpers.doc_runs import (
    NAMES,
    NOT_RUN,
    OWN,
    PARAMS,
    PREPARED,
    SMALLER,
    executed,
    not_put_in,
    run_command,
    run_python,
    write_shown_files,
)
from tests.helpers.dvc_project import make_project, run, set_params


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path) -> Path:
    """A small project that ran once, with its results committed."""
    folder = make_project(tmp_path_factory.mktemp("clone") / "repo", tiny_inputs)
    set_params(folder, PARAMS)
    run(folder, sys.executable, "-m", "sae_research", "repro")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "results")
    return folder


RUN = [page for page in pages() if page not in APPLIED and (executed(page) or [*python(page)])]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", RUN)
def test_a_pages_commands_run(page: str, ready: Path, tmp_path: Path) -> None:
    project = tmp_path / "repo"
    shutil.copytree(ready, project, symlinks=True)
    run(project, "git", "commit", "--allow-empty", "-qm", "next")  # there is a commit before the last
    write_shown_files(page, project)
    for command in executed(page):
        if command.place == "prose":  # it speaks of the project as it comes, not of what the page's blocks made of it
            run(project, "git", "checkout", "-q", "--", "params.yaml")
        run_command(command, project)
    run_python(page, project)


def _all() -> list[Command]:
    return [command for page in pages() for command in commands(page)]


def test_every_command_is_run_or_its_page_or_a_list_says_why_not() -> None:
    run_here = {command.text for page in RUN for command in executed(page)}
    excused = {command.text for command in _all() if command.needs} | {*NOT_RUN, *NAMES}
    left = [str(command) for command in _all() if command.text not in run_here | excused]
    assert not left, "neither run, nor marked `<!-- needs: ... -->`, nor in NOT_RUN:\n" + "\n".join(left)
    shown = [command for command in _all() if command.place != "prose" and command.page not in APPLIED and not command.needs]
    left = [str(command) for command in shown if command.text not in run_here | {*NOT_RUN}]
    assert not left, "another page's marker does not speak for these:\n" + "\n".join(left)


def test_what_is_not_run_has_one_reason() -> None:
    run_here = {command.text for page in RUN for command in executed(page)}
    assert not run_here & {*NOT_RUN, *NAMES}, sorted(run_here & {*NOT_RUN, *NAMES})
    assert not {*NOT_RUN} & {*NAMES}
    whole = run_here | {command.text for command in _all() if command.needs}
    alone = [name for name in NAMES if not any(text.startswith(f"{name} ") for text in whole)]
    assert not alone, f"no command that is run or marked begins with {alone}"


def test_what_is_the_readers_own_is_put_in() -> None:
    left = [f"{command}: {found}" for page in RUN for command in executed(page) if (found := not_put_in(command))]
    assert not left, "\n".join(left)


def test_nothing_is_left_out_or_changed_that_no_page_holds() -> None:
    texts = [command.text for command in _all()]
    shown = [*texts, *(block.text for page in pages() for block in blocks(page))]
    assert {*NOT_RUN, *NAMES} <= {*texts}, sorted({*NOT_RUN, *NAMES} - {*texts})
    unused = [old for old, _ in (*SMALLER, *OWN) if not any(old in text for text in shown)]
    assert not unused, unused
    assert set(PREPARED) <= {page for page in pages() if any(python(page))}
