"""Two-attribute tasks: cells of equal length, the one split, no copies, and tasks that cannot be had."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from sae_research.runtime.errors import UserError
from sae_research.text.crossed_tasks import CELLS, CROSSED_TASKS, CrossedTask, crossed_fingerprint, load_crossed_tasks
from sae_research.text.split import text_hash


def no_skip(name: str, why: str) -> None:
    pytest.fail(f"{name} skipped: {why}")


@pytest.fixture(scope="module")
def packaged() -> dict[str, CrossedTask]:
    return {name: load_crossed_tasks(name, 160, 120, 1, no_skip)[0] for name in CROSSED_TASKS}


def test_cells_have_the_sizes_of_sae_bench(packaged: dict[str, CrossedTask]) -> None:
    assert len(packaged) >= 3
    for name, task in packaged.items():
        assert task.name == name and tuple(task.train) == tuple(task.test) == CELLS
        assert [len(texts) for texts in task.train.values()] == [80, 40, 40, 80]
        assert [len(texts) for texts in task.test.values()] == [60, 30, 30, 60]


def test_length_tells_nothing(packaged: dict[str, CrossedTask]) -> None:
    for name, task in packaged.items():
        limit = CROSSED_TASKS[name].characters
        for part in (task.train, task.test):
            means = [sum(map(len, texts)) / len(texts) for texts in part.values()]
            assert max(means) <= 1.02 * min(means), name
            lengths = [len(text) for texts in part.values() for text in texts]
            assert 0.89 * limit <= min(lengths) and max(lengths) <= limit


def test_no_text_stands_twice_in_a_task(packaged: dict[str, CrossedTask]) -> None:
    for task in packaged.values():
        hashes = [text_hash(text) for part in (task.train, task.test) for texts in part.values() for text in texts]
        assert len(hashes) == len(set(hashes)) == 420


def test_train_and_test_come_from_different_documents(packaged: dict[str, CrossedTask]) -> None:
    """Texts are cut after the split, so the openings of train texts are looked for among those of test texts."""
    openings = [
        {text[:60] for task in packaged.values() for texts in getattr(task, part).values() for text in texts}
        for part in ("train", "test")
    ]
    assert not openings[0] & openings[1]


def test_selection_depends_on_the_seed_alone(packaged: dict[str, CrossedTask]) -> None:
    name = "film_or_product_by_sentiment"
    again, other = (load_crossed_tasks(name, 160, 120, seed, no_skip)[0] for seed in (1, 2))
    assert again == packaged[name]
    assert crossed_fingerprint(again) != crossed_fingerprint(other)


def test_a_task_too_large_says_what_would_fit(packaged: dict[str, CrossedTask]) -> None:
    said: list[str] = []
    name = "restaurant_or_product_by_sentiment"
    assert load_crossed_tasks(name, 10_000, 10_000, 1, lambda *reason: said.extend(reason)) == []
    train, test = said[1].rsplit("at most ", 1)[1].split(" and ")
    assert said[0] == name and load_crossed_tasks(name, int(train), int(test), 1, no_skip)


def test_local_task(tmp_path: Path) -> None:
    rows = [(f"{a} {b} number {i}", a, b) for a in ("cat", "dog") for b in ("old", "new") for i in range(120)]
    rows += [("Same words", "cat", "old"), ("same words!", "cat", "new"), rows[0]]
    pd.DataFrame(rows, columns=["text", "label", "second_label"]).to_csv(tmp_path / "mine.csv", index=False)
    task = load_crossed_tasks(str(tmp_path / "mine.csv"), 32, 16, 1, no_skip)[0]
    assert task.first == ("cat", "dog") and task.second == ("new", "old")
    for (a, b), texts in task.train.items():
        assert all(text.startswith(f"{task.first[a]} {task.second[b]} ") for text in texts)
    assert task.notes["copies_dropped"] == 2 and task.notes["conflicting_dropped"] == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("film_or_restaurant", "did you mean film_or_restaurant_by_sentiment"),
        ("news_topic", "known: film_or_restaurant_by_sentiment"),
        ("./mine.csv", "no such file or folder"),
    ],
)
def test_unknown_task(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_crossed_tasks(name, 16, 16, 1, no_skip)
