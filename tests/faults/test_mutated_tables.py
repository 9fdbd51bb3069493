"""Tables and texts that a user brings, changed at random: one line, or the rows that stand in the file.

Such a file carries no checksum, but for the pages of some Parquet files: a letter changed in a text is another text. What
may not happen is that a change touches more rows than it lies in, that one row's label is read with the text of another, or
that a new class comes to be scored.
"""

from __future__ import annotations

import collections
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sae_research.runtime.errors import UserError
from sae_research.text.crossed_tasks import load_crossed_tasks
from sae_research.text.local import read_rows
from sae_research.text.questions import load_question_set
from sae_research.text.tasks import TaskUnavailable, load_task
from tests.helpers.mutations import VALUES, changed_bytes

COLUMNS = ["text", "label", "second_label"]
ROWS = [(f"text number {i} of {a}, which is {b}", a, b) for a in ("cat", "dog") for b in ("old", "new") for i in range(60)]
SIZES = (24, 12)
TASK_OF = {text: (a, b) for text, a, b in ROWS}


def delimited(path: Path, delimiter: str) -> None:
    pd.DataFrame(ROWS, columns=COLUMNS).to_csv(path, sep=delimiter, index=False)


def json_lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


RECORDS = [dict(zip(COLUMNS, row, strict=True)) for row in ROWS]
QUESTIONS = [{"question": f"question {i}?", "choices": [f"answer {i}", "none", "some"], "answer": i % 3} for i in range(60)]
FORMATS: dict[str, Callable[[Path], object]] = {
    "csv": lambda path: delimited(path, ","),
    "tsv": lambda path: delimited(path, "\t"),
    "jsonl": lambda path: path.write_text(json_lines(RECORDS)),
    "parquet": lambda path: pd.DataFrame(ROWS, columns=COLUMNS).to_parquet(path, write_page_checksum=True),
    "txt": lambda path: path.write_text("\n\n".join(text for text, _, _ in ROWS)),
}


def read(path: Path) -> list[tuple[Any, ...]]:
    return list(read_rows(path, ["text"] if path.suffix == ".txt" else COLUMNS))


def changed(path: Path, original: bytes, rng: random.Random) -> str:
    """Bytes of any file, or values of a JSON one."""
    if path.suffix == ".jsonl" and rng.random() < 0.5:
        rows = [json.loads(line) for line in original.decode().splitlines()]
        row, value = rng.choice(rows), rng.choice(VALUES)
        row[rng.choice(sorted(row))] = value
        path.write_text(json_lines(rows))
        return f"a cell {str(value)[:30]}"
    data, kind = changed_bytes(original, rng)
    path.write_bytes(data)
    return kind


def check_line(error: UserError, change: str) -> None:
    assert "\n" not in str(error) and len(str(error)) < 1000, (change, str(error))


def check_rows(rows: list[tuple[Any, ...]], want: list[tuple[Any, ...]], change: str, parquet: bool) -> str:
    """What is left of a table: its rows, in their order, but for those at the place that changed."""
    if rows == want:
        return "same"
    lost = collections.Counter(map(repr, want)) - collections.Counter(map(repr, rows))
    new = collections.Counter(map(repr, rows)) - collections.Counter(map(repr, want))
    assert not parquet or not new, (change, new)  # its pages carry checksums
    torn = ("cut", "emptied", "zeroed", "doubled", "noise", "part gone", "hole")
    assert new.total() <= 2 or change in torn[2:5], (change, new)
    assert lost.total() <= (len(want) if change in torn else 2), (change, lost)
    return "others"


def check_task(path: Path) -> None:
    """Whatever a task is made of, its classes are those of the table, and every whole text has its own label."""
    task = load_task(str(path), *SIZES, seed=0)
    assert set(task.train) == {"cat", "dog"}
    for part in (task.train, task.test):
        for label, texts in part.items():
            wrong = [text for text in texts if TASK_OF.get(text, (label,))[0] != label]
            assert len(wrong) <= 1, wrong  # the cell that changed
    for crossed in load_crossed_tasks(str(path), *SIZES, 1, lambda *_: None):
        assert crossed.first == ("cat", "dog") and crossed.second == ("new", "old")


def campaign(folder: Path, count: int, seed: int) -> dict[str, collections.Counter[str]]:
    rng, seen = random.Random(seed), {suffix: collections.Counter[str]() for suffix in FORMATS}
    for suffix, write in FORMATS.items():
        path = folder / f"mine.{suffix}"
        write(path)
        original, want = path.read_bytes(), read(path)
        for number in range(count):
            change = changed(path, original, rng)
            try:
                rows = read(path)
                seen[suffix][check_rows(rows, want, change, suffix == "parquet") if suffix != "txt" else "others"] += 1
                if suffix != "txt" and number % 4 == 0:
                    check_task(path)
            except TaskUnavailable as error:
                check_line(error, change)
            except UserError as error:
                check_line(error, change)
                seen[suffix]["refused"] += 1
    return seen


@pytest.mark.parametrize("count", [12, pytest.param(400, marks=pytest.mark.slow)])
def test_a_table_is_refused_or_read_as_it_stands(tmp_path: Path, count: int, capsys: pytest.CaptureFixture[str]) -> None:
    seen = campaign(tmp_path, count, seed=count)
    assert all(kinds["refused"] for kinds in seen.values()), seen
    capsys.readouterr()
    print({suffix: dict(kinds) for suffix, kinds in seen.items()})


@pytest.mark.parametrize("count", [40, pytest.param(600, marks=pytest.mark.slow)])
def test_questions_are_refused_or_asked_as_they_stand(tmp_path: Path, count: int) -> None:
    rng, path = random.Random(count), tmp_path / "some.jsonl"
    original = json_lines(QUESTIONS).encode()
    path.write_bytes(original)
    want = {question.text: question for question in load_question_set(str(path)).questions}
    for _ in range(count):
        change = changed(path, original, rng)
        try:
            found = load_question_set(str(path)).questions
        except UserError as error:
            check_line(error, change)
            continue
        assert sum(want.get(question.text) != question for question in found) <= 2, change
