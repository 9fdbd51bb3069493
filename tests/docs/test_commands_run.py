"""The documentation's commands, run page by page in a copy of the project with a tiny model; then the page's Python."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.docs.test_commands import APPLIED
from tests.helpers.doc_pages import blocks, commands, pages, python
from tests.helpers.doc_runs import (
    NOT_RUN,
    OWN,
    PARAMS,
    PREPARED,
    SMALLER,
    executed,
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


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in pages() if page not in APPLIED and (executed(page) or [*python(page)])])
def test_a_pages_commands_run(page: str, ready: Path, tmp_path: Path) -> None:
    project = tmp_path / "repo"
    shutil.copytree(ready, project, symlinks=True)
    run(project, "git", "commit", "--allow-empty", "-qm", "next")  # there is a commit before the last
    write_shown_files(page, project)
    for command in executed(page):
        run_command(command, project)
    run_python(page, project)


def test_nothing_is_left_out_or_changed_that_no_page_holds() -> None:
    texts = [command.text for page in pages() for command in commands(page)]
    shown = [*texts, *(block.text for page in pages() for block in blocks(page))]
    assert set(NOT_RUN) <= set(texts), sorted(set(NOT_RUN) - set(texts))
    unused = [old for old, _ in (*SMALLER, *OWN) if not any(old in text for text in shown)]
    assert not unused, unused
    assert set(PREPARED) <= {page for page in pages() if any(python(page))}
