"""The hub path with the real client libraries, against a loopback server and against no server at all.

HF_ENDPOINT is read at import, so each case runs in a process of its own; one process answers several
questions, because importing `datasets` and `sae_bench` is what takes the time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.hub_server import hub_env, serve_hub

CLIENT = """
import json, sys, time
time.sleep = lambda seconds: None  # the client's pauses between retries
from sae_research.runtime.errors import UserError
from sae_research.config.params import Text
from sae_research.text.corpus import documents, text_fingerprint
from sae_research.text.crossed_tasks import load_crossed_tasks
from sae_research.text.split import SPLITS
from sae_research.text.tasks import load_task

def texts(name, column="text"):
    text = Text(dataset=name, column_name=column)
    return sorted(document.text for split in SPLITS for document in documents(text, split))

def task(name, train, test):
    found = load_task(name, train, test, 1)
    return {"train": found.train, "test": found.test, "notes": found.notes}

def crossed(name, train, test):
    skipped = {}
    tasks = load_crossed_tasks(name, train, test, 1, skipped.__setitem__)
    cells = {task.name: [[list(texts) for texts in part.values()] for part in (task.train, task.test)] for task in tasks}
    return {"cells": cells, "skipped": skipped, "notes": [task.notes for task in tasks]}

def loaded(name):
    return list(__import__("datasets").load_dataset(name, split="train")["text"])

answers = {}
for question in json.loads(sys.argv[1]):
    try:
        answers[question] = eval(question)
    except UserError as error:
        answers[question] = f"{type(error).__name__}: {error}"
print("ANSWERS" + json.dumps(answers))
"""

FINGERPRINT = "text_fingerprint(Text(dataset='someone/tiny'), 'sae_train')"


def ask(questions: list[str], env: dict[str, str]) -> dict[str, Any]:
    """What `CLIENT` answers to each question (an expression): its value, or its `UserError` as text."""
    done = subprocess.run(
        [sys.executable, "-c", CLIENT, json.dumps(questions)],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.rsplit("ANSWERS", 1)[1])


def csv_of(rows: list[tuple[str, int]]) -> str:
    return "text,label\n" + "".join(f"{text},{label}\n" for text, label in rows)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("hub")
    for name in ("tiny", "news", "empty", "testonly"):
        (root / name).mkdir()
    rows = "".join(json.dumps({"text": f"row {number}"}) + "\n" for number in range(6))
    (root / "tiny" / "train.jsonl").write_text(rows)
    (root / "testonly" / "test.jsonl").write_text('{"text": "only a test split"}\n')
    (root / "empty" / "notes.md").write_text("no data")
    train = [(f"train {label} {number}", label) for label in range(4) for number in range(20)]
    test = [(f"test {label} {number}", label) for label in range(4) for number in range(9)]
    copies = [(f"Train {label} 0", label) for label in range(4)]  # of train rows, all selected below
    (root / "news" / "train.csv").write_text(csv_of(train))
    (root / "news" / "test.csv").write_text(csv_of(test + copies))
    (root / "bios").mkdir()
    jobs = {"professor": 21, "nurse": 13}  # of SAE Bench's four pairs of jobs only this one is here
    for part, each in (("train", 16), ("test", 10)):
        rows = "".join(
            f"{part} {job} {gender} {number},{code},{gender}\n"
            for job, code in jobs.items()
            for gender in (0, 1)
            for number in range(each)
        )
        copy = "train professor 0 0,21,0\n" if part == "test" else ""
        (root / "bios" / f"{part}.csv").write_text("hard_text,profession,gender\n" + copy + rows)
    repos = {
        "datasets": {
            "someone/tiny": root / "tiny",
            "fancyzhx/ag_news": root / "news",
            "LabHC/bias_in_bios": root / "bios",
            "someone/empty": root / "empty",
            "someone/testonly": root / "testonly",
        }
    }
    questions = [
        "texts('someone/tiny')",
        "loaded('someone/tiny')",
        FINGERPRINT,
        "texts('someone/tiny', 'body')",
        "texts('someone/none')",
        "texts('someone/empty')",
        "texts('someone/testonly')",
        "task('fancyzhx/ag_news', 40, 20)",
        "task('fancyzhx/ag_news', 400, 20)",
        "task('Helsinki-NLP/europarl', 4, 4)",
        "crossed('LabHC/bias_in_bios_class_set1', 32, 16)",
        "crossed('canrager/amazon_reviews_mcauley_1and5', 32, 16)",
    ]
    with serve_hub(repos) as url:
        return ask(questions, hub_env(url, root / "home"))


def test_rows_from_the_hub_streamed_and_not(answers: dict[str, Any]) -> None:
    assert answers["texts('someone/tiny')"] == [f"row {number}" for number in range(6)]
    assert answers["loaded('someone/tiny')"] == answers["texts('someone/tiny')"]


def test_fingerprint_of_a_hub_data_set(answers: dict[str, Any]) -> None:
    assert len(answers[FINGERPRINT]) == 64


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ("texts('someone/tiny', 'body')", "no column 'body'; available: text"),
        ("texts('someone/none')", "'someone/none' doesn't exist on the Hub or cannot be accessed"),
        ("texts('someone/empty')", "someone/empty"),
        ("texts('someone/testonly')", "Bad split: train"),
        ("task('Helsinki-NLP/europarl', 4, 4)", "'Helsinki-NLP/europarl' doesn't exist on the Hub"),
        ("crossed('canrager/amazon_reviews_mcauley_1and5', 32, 16)", "scr.dataset_names"),
    ],
)
def test_hub_mistakes_are_one_line(answers: dict[str, Any], question: str, message: str) -> None:
    assert answers[question].startswith("UserError: ") and message in answers[question]
    assert "\n" not in answers[question]


def test_sae_bench_task_from_the_hub(answers: dict[str, Any]) -> None:
    task = answers["task('fancyzhx/ag_news', 40, 20)"]
    assert list(task["train"]) == ["0", "1", "2", "3"]
    assert {len(texts) for texts in task["train"].values()} == {20}
    assert task["notes"]["test_copies_of_train_dropped"] == 4
    assert all(text.startswith(f"test {label}") for label, texts in task["test"].items() for text in texts)
    assert sum(len(texts) for texts in task["test"].values()) == 36


def test_two_attribute_task_from_the_hub(answers: dict[str, Any]) -> None:
    """SAE Bench's pairs and quadrants, its texts in its order, less the test text that has a copy in train."""
    answer = answers["crossed('LabHC/bias_in_bios_class_set1', 32, 16)"]
    assert list(answer["cells"]) == ["LabHC/bias_in_bios_class_set1_scr_professor_nurse"]
    assert len(answer["skipped"]) == 3 and all("set sizes of at most 0 and 0" in why for why in answer["skipped"].values())
    train, test = answer["cells"]["LabHC/bias_in_bios_class_set1_scr_professor_nurse"]
    assert [len(texts) for texts in train] == [16, 8, 8, 16] and [len(texts) for texts in test] == [8, 4, 4, 8]
    assert train[1] == [f"train professor 1 {number}" for number in range(8)]
    assert test[2] == [f"test nurse 0 {number}" for number in range(4)]
    assert answer["notes"][0]["copies_dropped"] == 1


def test_sae_bench_task_too_small(answers: dict[str, Any]) -> None:
    assert answers["task('fancyzhx/ag_news', 400, 20)"].startswith("TaskUnavailable: ")


@pytest.mark.parametrize(
    ("env", "reason"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "the hub cannot be reached"),
        ({"HF_HUB_OFFLINE": "1"}, "the hub is switched off (HF_HUB_OFFLINE)"),
    ],
)
def test_no_hub(tmp_path: Path, env: dict[str, str], reason: str) -> None:
    no_hub = hub_env("http://127.0.0.1:9", tmp_path) | env
    for answer in ask(["texts('someone/tiny')", FINGERPRINT], no_hub).values():
        assert answer.startswith("UserError: hub data set 'someone/tiny': ") and reason in answer
        assert "to run offline" in answer and "\n" not in answer
