"""Probing tasks: sizes, the one split, duplicates, and tasks that cannot be had."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from sae_research.runtime.errors import UserError
from sae_research.text.packaged import PACKAGED_TASKS
from sae_research.text.split import split_of, text_hash
from sae_research.text.tasks import Task, TaskUnavailable, load_task, task_fingerprint


@pytest.fixture(scope="module")
def packaged() -> dict[str, Task]:
    return {name: load_task(name, 120, 60, seed=1) for name in PACKAGED_TASKS}


def local_task(path: Path, rows: list[tuple[str, object]]) -> str:
    pd.DataFrame(rows, columns=["text", "label"]).to_csv(path, index=False)
    return str(path)


def plenty(label: str) -> list[tuple[str, object]]:
    return [(f"{label} text number {number}", label) for number in range(200)]


def test_every_packaged_task_can_be_had(packaged: dict[str, Task]) -> None:
    assert len(packaged) >= 8
    for name, task in packaged.items():
        assert task.name == name and len(task.train) >= 2 and list(task.train) == list(task.test)
        assert {len(texts) for texts in task.train.values()} == {60}
        assert {len(texts) for texts in task.test.values()} == {30}


def test_packaged_tasks_keep_the_one_split(packaged: dict[str, Task]) -> None:
    """Across all tasks together: no text of any train part is in any test part."""
    train = [text for task in packaged.values() for texts in task.train.values() for text in texts]
    test = [text for task in packaged.values() for texts in task.test.values() for text in texts]
    assert {split_of(text) for text in train} == {"probe_train"}
    assert {split_of(text) for text in test} == {"probe_test"}
    assert not {text_hash(text) for text in train} & {text_hash(text) for text in test}


def test_no_text_stands_twice_in_a_task(packaged: dict[str, Task]) -> None:
    for task in packaged.values():
        classes = [*task.train.values(), *task.test.values()]
        hashes = [text_hash(text) for texts in classes for text in texts]
        assert len(hashes) == len(set(hashes))


def test_code_is_long_enough_for_a_context(packaged: dict[str, Task]) -> None:
    assert min(len(text) for texts in packaged["code_language"].train.values() for text in texts) >= 384


def test_selection_depends_on_the_seed_alone(packaged: dict[str, Task]) -> None:
    again, other = load_task("film_sentiment", 120, 60, seed=1), load_task("film_sentiment", 120, 60, seed=2)
    assert again == packaged["film_sentiment"]
    assert task_fingerprint(again) == task_fingerprint(packaged["film_sentiment"]) != task_fingerprint(other)
    more = load_task("film_sentiment", 200, 60, seed=1)
    assert all(more.train[label][:60] == texts for label, texts in again.train.items())


def test_fingerprint_knows_labels(packaged: dict[str, Task]) -> None:
    task = packaged["film_sentiment"]
    swapped = task._replace(train=dict(zip(task.train, reversed(task.train.values()), strict=True)))
    assert task_fingerprint(swapped) != task_fingerprint(task)


def test_dropped_rows_are_counted(packaged: dict[str, Task]) -> None:
    assert packaged["film_sentiment"].notes["copies_dropped"] > 1_000
    assert packaged["disease_area"].notes["conflicting_dropped"] > 50
    assert "purchase" in packaged["ticket_topic"].notes["caveat"]


def test_packaged_tasks_that_are_too_small_say_so() -> None:
    with pytest.raises(TaskUnavailable, match=r"needs 2000 train and 30 test.*at most \d+ and \d+") as error:
        load_task("disease_area", 4_000, 60, seed=1)
    assert "neoplasms has" in str(error.value)


def test_the_sizes_a_task_offers_do_fit() -> None:
    with pytest.raises(TaskUnavailable) as error:
        load_task("disease_area", 100_000, 100_000, seed=1)
    train, test = str(error.value).rsplit("at most ", 1)[1].split(" and ")
    load_task("disease_area", int(train), int(test), seed=1)


def test_local_task(tmp_path: Path) -> None:
    conflict: list[tuple[str, object]] = [("Same words", "cat"), ("same words!", "dog")]
    name = local_task(tmp_path / "mine.csv", [*plenty("cat"), *plenty("dog"), *plenty("cat"), *conflict])
    task = load_task(name, 40, 20, seed=3)
    assert list(task.train) == ["cat", "dog"] and len(task.train["cat"]) == 20 and len(task.test["dog"]) == 10
    assert task.notes["copies_dropped"] == 201 and task.notes["conflicting_dropped"] == 1
    assert load_task(str(tmp_path), 40, 20, seed=3).train == task.train


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_local_task_formats_and_number_labels(tmp_path: Path, suffix: str) -> None:
    frame = pd.DataFrame(
        [(text, number) for number in (0, 1) for text, _ in plenty(f"class {number}")], columns=["text", "label"]
    )
    path = tmp_path / f"mine.{suffix}"
    frame.to_json(path, orient="records", lines=True) if suffix == "jsonl" else frame.to_parquet(path)
    assert list(load_task(str(path), 40, 20, seed=3).train) == ["0", "1"]


def test_one_class_is_no_task(tmp_path: Path) -> None:
    with pytest.raises(TaskUnavailable, match="two classes, found cat"):
        load_task(local_task(tmp_path / "mine.csv", plenty("cat")), 4, 4, seed=1)


def test_local_task_without_labels(tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_text("text,class\nhello,1\n")
    with pytest.raises(UserError, match="no column 'label'; available: text, class") as error:
        load_task(str(tmp_path / "mine.csv"), 4, 4, seed=1)
    assert not isinstance(error.value, TaskUnavailable)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("news_topics", "did you mean news_topic"),
        ("LabHC/bias_in_bios_class_set4", "did you mean LabHC/bias_in_bios_class_set"),
        ("zzz", "known: news_topic"),
        ("./mine.csv", "no such file or folder"),
    ],
)
def test_unknown_task(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_task(name, 4, 4, seed=1)
    assert not isinstance(error.value, TaskUnavailable)
