"""The one loader of labelled tasks: what cannot be had is skipped with its reason, nothing left is an error."""

from __future__ import annotations

from pathlib import Path

import pytest

from sae_research.evals.harness import load_tasks, need_one
from sae_research.runtime.errors import UserError
from sae_research.runtime.stages import StageFolder


def table(path: Path, count: int) -> str:
    rows = [f"{label} text number {i},{label}" for label in ("cat", "dog") for i in range(count)]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    return str(path)


def test_tasks_with_too_few_texts_are_skipped_and_named(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path)
    large, small = table(tmp_path / "large.csv", 200), table(tmp_path / "small.csv", 3)
    tasks = load_tasks([large, small], 8, 4, 0, stage)
    assert [task.name for task in tasks] == [large]
    assert list(stage.skipped) == [small] and "each class needs" in stage.skipped[small]
    need_one("sparse_probing", tasks, stage)
    with pytest.raises(UserError, match=r"sparse_probing.dataset_names: no task is usable: task .*small.csv"):
        need_one("sparse_probing", [], stage)


def test_an_empty_list_is_named(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path)
    with pytest.raises(UserError, match="scr.dataset_names: no task is usable: the list is empty"):
        need_one("scr", load_tasks([], 8, 4, 0, stage), stage)
