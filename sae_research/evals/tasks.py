"""The labelled tasks that an evaluation names: those that can be had, and an error when none can."""

from __future__ import annotations

from collections.abc import Sequence, Sized

from sae_research.errors import UserError
from sae_research.store_stages import StageFolder
from sae_research.text.local import listed
from sae_research.text.tasks import Task, TaskUnavailable, load_task


def load_tasks(names: Sequence[str], train_size: int, test_size: int, seed: int, stage: StageFolder) -> list[Task]:
    """Every task of `names` that has texts enough (sizes as for `text.tasks.load_task`); `stage` notes why others, and rare
    classes of a task, are skipped. Raises `UserError` for an unknown name, unreadable files or a hub out of reach."""
    tasks = []
    for name in names:
        try:
            task = load_task(name, train_size, test_size, seed)
        except TaskUnavailable as error:
            stage.skip(name, str(error))
            continue
        if rare := task.notes.get("classes_left_out"):
            stage.skip(f"{name}: {len(rare)} of {len(rare) + len(task.train)} classes",
                       f"fewer than {train_size // 2} train and {test_size // 2} test texts in {listed(rare)}")
        tasks.append(task)
    return tasks


def need_one(section: str, tasks: Sized, stage: StageFolder) -> None:
    """Raises `UserError` that says why no task of the section's `dataset_names` is left, when none is."""
    if not len(tasks):
        raise UserError(f"{section}.dataset_names: no task is usable: " + (
            "; ".join(stage.skipped.values()) or "the list is empty"))
