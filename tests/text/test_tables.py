"""Tables that a user brings: every cell is what stands there, and what cannot be read is one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_research.evals.harness import load_tasks
from sae_research.runtime.errors import UserError
from sae_research.runtime.stages import StageFolder
from sae_research.text.crossed_tasks import load_crossed_tasks
from sae_research.text.local import read_rows
from sae_research.text.questions import load_question_set
from sae_research.text.tasks import TaskUnavailable, load_task


def table(path: Path, labels: list[str], each: int = 200, first: str = "") -> str:
    """A table in which every label has `each` texts."""
    delimiter = "\t" if path.suffix == ".tsv" else ","
    rows = [f"text number {i} of {label}{delimiter}{label}" for label in labels for i in range(each)]
    path.write_text("\n".join([f"text{delimiter}label", *([first] if first else []), *rows]) + "\n")
    return str(path)


def rows_of(path: Path, *columns: str) -> list[tuple[object, ...]]:
    return list(read_rows(path, columns or ("text", "label")))


# --- what a cell says ------------------------------------------------------------------------


def test_one_empty_cell_makes_no_new_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """pandas would read half of a column of 15,000 rows as 0 and 1, the half with the gap as 0.0 and 1.0."""
    lines = [f"text number {i},{i % 2}" for i in range(15_000)]
    lines[12_345] = "this one has no label,"
    (tmp_path / "mine.csv").write_text("text,label\n" + "\n".join(lines) + "\n")
    task = load_task(str(tmp_path / "mine.csv"), 40, 20, seed=0)
    assert list(task.train) == ["0", "1"] and task.notes["rows_with_empty_cells"] == 1
    assert "mine.csv: 1 rows left out, a cell of 'text' or 'label' is empty there: 12346" in capsys.readouterr().err


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_text_is_text(tmp_path: Path, suffix: str) -> None:
    labels = ["007", "7", "1.0", "1", "NA", "null", "None", "nan", "true", "2024-01-31", "1e5", " 1"]
    found = rows_of(Path(table(tmp_path / f"mine{suffix}", labels, 1)))
    assert [label for _, label in found] == labels


def test_typed_tables_keep_their_values(tmp_path: Path) -> None:
    """Of two files of one task, a gap made floats of one column of whole numbers: the classes are the same."""
    texts = [f"text number {i}" for i in range(800)]
    pd.DataFrame({"text": texts[:400], "label": [0, 1] * 200}).to_parquet(tmp_path / "a.parquet")
    pd.DataFrame({"text": texts[400:], "label": [0.0, 1.0] * 199 + [None, 1.0]}).to_parquet(tmp_path / "b.parquet")
    assert list(load_task(str(tmp_path), 40, 20, seed=0).train) == ["0", "1"]
    rows = [{"text": "a", "label": "null"}, {"text": "b", "label": None}, {"text": "c", "label": ""}]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert rows_of(tmp_path / "c.jsonl") == [("a", "null")]
    with pytest.raises(UserError, match="names no class"):
        (tmp_path / "c.jsonl").write_text('{"text": "a", "label": [1, 2]}')
        load_task(str(tmp_path / "c.jsonl"), 4, 4, seed=0)


def test_a_mark_at_the_beginning_is_no_text(tmp_path: Path) -> None:
    for name, content in {
        "a.csv": "text,label\nx,1\n",
        "b.tsv": "text\tlabel\nx\t1\n",
        "c.jsonl": '{"text": "x", "label": "1"}\n',
    }.items():
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + content.encode())
        assert rows_of(tmp_path / name) == [("x", "1")]
    (tmp_path / "d.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert rows_of(tmp_path / "d.txt", "text") == [("hello",)]


def test_a_cell_of_a_million_characters(tmp_path: Path) -> None:
    long = "word, " * 170_000
    (tmp_path / "mine.csv").write_text(f'text,label\n"{long}",long\n"two\nlines","say ""so"""\nshort\n')
    assert rows_of(tmp_path / "mine.csv") == [(long, "long"), ("two\nlines", 'say "so"')]


def test_answers_of_questions_are_numbers_however_written(tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_text('question,choices,answer\nq?,"[""a"", ""b""]",1.0\nr?,"[""a"", ""b""]",\ns?,"[""a"", ""b""]",2\n')
    with pytest.raises(UserError, match="row 3: `answer` is '2'"):  # not row 2: the one left out counts
        load_question_set(str(path))
    (tmp_path / "true.jsonl").write_text('{"question": "q?", "choices": ["a", "b"], "answer": true}')
    with pytest.raises(UserError, match="`answer` is True"):
        load_question_set(str(tmp_path / "true.jsonl"))
    path.write_text('question,choices,answer\nq?,"[""a"", ""b""]",1.0\n')
    assert load_question_set(str(path)).questions[0].answer == 1


# --- what cannot be read ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text,label\nfine,1\ncaf\xe9,2\n", "row 2: not UTF-8"),
        ("a.csv", "text,label\nx,1\n".encode("utf-16"), "header: not UTF-8"),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "caf\xe9", "label": 2}\n', "line 2: not UTF-8"),
        ("a.jsonl", b"[" * 100_000, "line 1: not valid JSON"),
        ("a.jsonl", b'{"text": ' + b"9" * 5_000 + b"}", "line 1: not valid JSON"),
        ("a.csv", b"text,label\na,b,c\n", "row 1: 3 cells, the header names 2 columns"),
        ("a.csv", b"text,label\n" + b'"never closed,1\n' * 3, "not a valid CSV file"),
        ("a.csv", b"text,label,label\na,b,c\n", "2 columns are called 'label'"),
        ("a.csv", b"", "the file is empty"),
        ("a.csv", b"\n\n", "the file is empty"),
        ("a.csv", ",".join(f"column_{i}" for i in range(5_000)).encode(), "no column 'text'; available: column_0"),
        ("a.csv", b"x" * 1_000_000, "no column 'text'; available: xxx"),
        ("a.parquet", b"", "not a valid Parquet file"),
    ],
)
def test_unreadable_tables_are_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        rows_of(tmp_path / name)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value).replace(str(tmp_path), "")) < 1_000


def test_cut_and_changed_parquet_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.parquet"
    pq.write_table(
        pa.table({"text": [f"text number {i}" for i in range(3_000)], "label": ["a"] * 3_000}), path, row_group_size=500
    )
    whole = path.read_bytes()
    assert [row[0] for row in rows_of(path)] == [f"text number {i}" for i in range(3_000)]
    for size in range(0, len(whole), len(whole) // 20):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="not a valid Parquet file"):
            rows_of(path)
    for place in range(4, len(whole) - 8, len(whole) // 60):
        path.write_bytes(whole[:place] + bytes(byte ^ 255 for byte in whole[place : place + 8]) + whole[place + 8 :])
        try:
            rows_of(path)
        except UserError as error:
            assert "\n" not in str(error)
    bad = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\4\0\0\0"), pa.py_buffer(b"caf\xe9"))
    pq.write_table(pa.table({"text": bad, "label": ["a"]}), path)
    with pytest.raises(UserError, match="not UTF-8 text in row 1"):
        rows_of(path)


def test_a_changed_page_of_a_parquet_file_is_seen_by_its_checksum(tmp_path: Path) -> None:
    """One letter of a dictionary page stands for many rows; some writers give pages a checksum."""
    path = tmp_path / "mine.parquet"
    pq.write_table(
        pa.table({"text": ["one old text", "another"] * 50, "label": ["a", "b"] * 50}),
        path,
        compression="none",
        write_page_checksum=True,
        write_statistics=False,
    )
    path.write_bytes(path.read_bytes().replace(b"one old text", b"one odd text", 1))
    with pytest.raises(UserError, match="not a valid Parquet file"):
        rows_of(path)


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.table([pa.array(["one"]), pa.array(["a"]), pa.array(["b"])], names=["text", "label", "label"]), path)
    with pytest.raises(UserError, match="2 columns are called 'label'"):
        rows_of(path)
    assert list(read_rows(path, ["text"])) == [("one",)]


def test_a_column_name_that_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.parquet"
    pq.write_table(pa.table({"text": ["one"], "label": ["a"]}), path, store_schema=False)
    path.write_bytes(path.read_bytes().replace(b"label", b"\xe6abel"))
    with pytest.raises(UserError, match="not a valid Parquet file"):
        rows_of(path)


def test_a_pipe_is_no_table(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "mine.csv")
    for name in (str(tmp_path / "mine.csv"), str(tmp_path)):
        with pytest.raises(UserError, match="no readable file"):
            load_task(name, 4, 4, seed=0)


# --- rare classes ----------------------------------------------------------------------------


def test_a_rare_class_is_left_out_and_named(tmp_path: Path) -> None:
    stage = StageFolder(tmp_path)
    name = table(tmp_path / "mine.csv", ["cat", "dog"], first="the only one,bird")
    (task,) = load_tasks([name], 40, 20, 0, stage)
    alone = load_task(table(tmp_path / "two.csv", ["cat", "dog"]), 40, 20, 0)
    assert task.train == alone.train and task.test == alone.test
    assert list(task.notes["classes_left_out"]) == ["bird"]
    assert stage.skipped == {f"{name}: 1 of 3 classes": "fewer than 20 train and 10 test texts in bird"}


def test_three_hundred_labels_are_a_short_message(tmp_path: Path) -> None:
    name = table(tmp_path / "mine.csv", [f"a label of some length, number {i}".replace(",", "") for i in range(300)], 2)
    with pytest.raises(TaskUnavailable) as error:
        load_task(name, 40, 20, 0)
    assert len(str(error.value)) - len(name) < 700 and "at most 0" not in str(error.value)
    both = table(tmp_path / "both.csv", ["cat", "dog", *(f"rare {i}" for i in range(300))], 1)
    with (tmp_path / "both.csv").open("a") as file:
        file.writelines(f"another text {i} of {label},{label}\n" for label in ("cat", "dog") for i in range(200))
    stage = StageFolder(tmp_path)
    assert list(load_tasks([both], 40, 20, 0, stage)[0].train) == ["cat", "dog"]
    assert len(json.dumps(stage.skipped)) < 600


def test_sizes_that_are_offered_fit(tmp_path: Path) -> None:
    name = table(tmp_path / "mine.csv", ["cat", "dog"], first="the only one,bird")
    with pytest.raises(TaskUnavailable) as error:
        load_task(name, 2_000, 2_000, 0)
    train, test = str(error.value).rsplit("at most ", 1)[1].split(" and ")
    assert int(train) > 0 and list(load_task(name, int(train), int(test), 0).train) == ["cat", "dog"]


def test_a_rare_third_value_of_an_attribute(tmp_path: Path) -> None:
    rows = [(f"{a} {b} number {i}", a, b) for a in ("cat", "dog") for b in ("old", "new") for i in range(120)]
    path = tmp_path / "mine.csv"
    pd.DataFrame([*rows, ("a slip", "cta", "old")], columns=["text", "label", "second_label"]).to_csv(path, index=False)
    said: list[str] = []
    (task,) = load_crossed_tasks(str(path), 32, 16, 1, lambda *reason: said.extend(reason))
    assert not said and task.first == ("cat", "dog") and task.notes["values_left_out_of_label"] == {"cta": 1}
