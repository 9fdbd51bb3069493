"""Documents: packaged text, a user's files, and what is said when something is wrong with them."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pandas as pd
import pytest

from sae_research.config.params import Text
from sae_research.runtime.errors import UserError
from sae_research.text import corpus
from sae_research.text.corpus import (
    MAX_CHARACTERS,
    MIN_CHARACTERS,
    PACKAGED_SOURCES,
    Document,
    documents,
    text_fingerprint,
)
from sae_research.text.split import SPLITS, NearIndex, shingle_sets, split_of, text_hash

ROWS = [f"Document number {number}, about {'rain' if number % 2 else 'sun'}." for number in range(60)]


@pytest.fixture(scope="module")
def packaged() -> dict[str, list[Document]]:
    """Every packaged document by split; each text is read and hashed once for all four."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "source_texts", functools.cache(corpus.source_texts))
        patch.setattr(corpus, "text_hash", functools.cache(corpus.text_hash))
        return {split: list(documents(Text(), split)) for split in SPLITS}


def write_rows(folder: Path, kind: str, rows: list[str], column: str = "text") -> Path:
    folder.mkdir(exist_ok=True)
    frame = pd.DataFrame({"id": range(len(rows)), column: rows})
    if kind == "txt":
        for number, row in enumerate(rows):
            (folder / f"{number:03}.txt").write_text(row)
    elif kind == "jsonl":
        frame.to_json(folder / "rows.jsonl", orient="records", lines=True)
    elif kind == "csv":
        frame.to_csv(folder / "rows.csv", index=False)
    else:
        frame.to_parquet(folder / "rows.parquet")
    return folder


def everything(text: Text) -> list[Document]:
    return [document for split in SPLITS for document in documents(text, split)]


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


# --- packaged --------------------------------------------------------------------------------


def test_packaged_splits_are_disjoint_and_without_copies(packaged: dict[str, list[Document]]) -> None:
    ids = [document.doc_id for split in SPLITS for document in packaged[split]]
    assert len(ids) == len(set(ids)) > 40_000


def test_packaged_documents_are_uncut_texts_of_their_split(packaged: dict[str, list[Document]]) -> None:
    for split, found in packaged.items():
        for document in islice(found, 300):
            assert MIN_CHARACTERS <= len(document.text) <= MAX_CHARACTERS
            if len(document.text) < MAX_CHARACTERS:
                assert split_of(document.text) == split
                assert text_hash(document.text).startswith(document.doc_id)


def test_packaged_order_is_fixed_mixed_and_starts_within_seconds(packaged: dict[str, list[Document]]) -> None:
    start = time.perf_counter()
    first = list(islice(documents(Text(), "sae_train"), 1_800))  # 400,000 tokens of SmolLM2
    assert time.perf_counter() - start < 20  # 2 s on an idle machine
    assert first == packaged["sae_train"][:1_800]
    assert {document.source for document in first[:200]} == {source.name for source in PACKAGED_SOURCES}


def test_packaged_code_stays_modest(packaged: dict[str, list[Document]]) -> None:
    for found in (packaged["sae_train"], packaged["sae_train"][:1500], packaged["core_eval"]):
        code = sum(len(document.text) for document in found if document.source == "code")
        assert 0.02 < code / sum(len(document.text) for document in found) < 0.12


def test_default_training_text_has_no_near_copies_of_core_text(packaged: dict[str, list[Document]]) -> None:
    near = NearIndex(shingle_sets(document.text for document in packaged["core_eval"]))
    assert not near.near([document.text for document in packaged["sae_train"][:1_800]]).any()  # 3 % of them had one
    assert len(packaged["core_eval"]) > 5_000, "all of the packaged part can be read"


def test_corpus_needs_neither_torch_nor_hub_libraries() -> None:
    code = (
        "import sys; from sae_research.text import corpus, tasks; "
        "heavy = {'torch', 'datasets', 'transformers', 'sae_probes'} & set(sys.modules); "
        "sys.exit(', '.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""


def test_unknown_split_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="sae_train"):
        next(documents(Text(), "validation"))


# --- local -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["txt", "jsonl", "csv", "parquet"])
def test_local_files(tmp_path: Path, kind: str) -> None:
    copies = [*ROWS, ROWS[3].upper(), "   "]  # neither a near-copy nor an empty text makes a document
    folder = write_rows(tmp_path / "mine", kind, copies)
    text = Text(dataset=str(folder))
    found = everything(text)
    assert sorted(document.text for document in found) == sorted(ROWS)
    assert {document.source for document in found} <= {file.name for file in folder.iterdir()}
    for split in SPLITS:
        assert all(split_of(document.text) == split for document in documents(text, split))


def test_training_reads_its_split_as_often_as_it_is_told(tmp_path: Path) -> None:
    folder = str(write_rows(tmp_path / "mine", "txt", ROWS))
    once, twice = Text(dataset=folder), Text(dataset=folder, training_passes=2)
    assert list(documents(twice, "sae_train")) == 2 * list(documents(once, "sae_train"))
    assert list(documents(twice, "core_eval")) == list(documents(once, "core_eval"))
    same = {split: text_fingerprint(once, split) == text_fingerprint(twice, split) for split in SPLITS}
    assert same == {split: split != "sae_train" for split in SPLITS}


def test_local_file_column_and_subfolders(tmp_path: Path) -> None:
    write_rows(tmp_path / "deep", "csv", ROWS, column="body")
    write_rows(tmp_path / ".hidden", "csv", ["never read"], column="body")
    assert len(everything(Text(dataset=str(tmp_path), column_name="body"))) == len(ROWS)
    assert len(everything(Text(dataset=str(tmp_path / "deep" / "rows.csv"), column_name="body"))) == len(ROWS)


def test_local_text_that_looks_like_a_number_stays_text(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('text\n1984\nNA\n""\n0012\n')
    assert {document.text for document in everything(Text(dataset=str(tmp_path)))} == {"1984", "NA", "0012"}


def test_relative_folder_is_found_from_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_rows(tmp_path / "mine", "txt", ROWS)
    (tmp_path / "queued").mkdir()
    monkeypatch.chdir(tmp_path / "queued")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    assert len(everything(Text(dataset="mine"))) == len(ROWS)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", "id,body\n1,hello\n", "no column 'text'; available: id, body"),
        ("rows.csv", "", "the file is empty"),
        ("rows.csv", 'text\n"unclosed\n', "not a valid CSV file"),
        ("rows.csv", "text\n", "the data set is empty"),
        ("rows.jsonl", '{"body": "hello"}\n', "line 1: no column 'text'; available: body"),
        ("rows.jsonl", '{"text": "fine"}\n{broken\n', "line 2: not valid JSON"),
        ("rows.jsonl", '["hello"]\n', "line 1: expected an object"),
        ("rows.jsonl", '{"text": 7}\n', "holds 7, which is no text"),
        ("rows.jsonl", '{"text": "half \\ud83d"}\n', "holds half a character"),
        ("rows.jsonl", "\n", "the data set is empty"),
        ("rows.parquet", "no parquet", "not a valid Parquet file"),
        ("notes.md", "hello", "no readable file; known are .txt, .jsonl, .csv, .parquet"),
        ("empty.txt", " \n", "the data set is empty"),
    ],
)
def test_bad_local_files(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        everything(Text(dataset=str(tmp_path)))
    assert message in one_line(error)


def test_bad_encoding(tmp_path: Path) -> None:
    files = {"a.txt": b"caf\xe9", "b.csv": b"text\ncaf\xe9\n", "c.jsonl": b'{"text": "caf\xe9"}'}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as error:
            everything(Text(dataset=str(tmp_path / name)))
        assert "not UTF-8" in one_line(error) and name in one_line(error)


def test_parquet_without_the_column(tmp_path: Path) -> None:
    folder = write_rows(tmp_path / "mine", "parquet", ROWS, column="body")
    with pytest.raises(UserError, match="no column 'text'; available: id, body"):
        everything(Text(dataset=str(folder)))


@pytest.mark.parametrize("name", ["/no/such/folder", "./missing", "~/missing", "data/my/texts", "texts.csv"])
def test_missing_path(name: str) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        next(documents(Text(dataset=name), "sae_train"))


# --- fingerprints ----------------------------------------------------------------------------


def test_fingerprint_follows_the_data(tmp_path: Path) -> None:
    text = Text(dataset=str(write_rows(tmp_path / "mine", "jsonl", ROWS)))
    before = text_fingerprint(text, "sae_train")
    assert before == text_fingerprint(text, "sae_train")
    assert before != text_fingerprint(text, "core_eval")
    assert before != text_fingerprint(Text(), "sae_train")
    with (tmp_path / "mine" / "rows.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    assert before != text_fingerprint(text, "sae_train")


def test_fingerprint_does_not_depend_on_the_context_size() -> None:
    assert text_fingerprint(Text(context_size=64), "sae_train") == text_fingerprint(Text(), "sae_train")
