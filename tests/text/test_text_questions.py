"""Question sets and topic corpora: files, the hub, and the packaged stand-in's rules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sae_research.runtime.errors import UserError
from sae_research.text.questions import (
    PACKAGED_TOPICS,
    Question,
    ShortQuestion,
    distractors,
    load_question_set,
    science_questions,
    topic_documents,
    topic_of,
)
from sae_research.text.split import split_of
from tests.helpers.hub_server import hub_env, serve_hub

ROWS = [
    {"question": "what carries oxygen?", "choices": ["bone", "blood", "hair", "nail"], "answer": 1},
    {"question": "how many legs has an ant?", "choices": ["2", "4", "6", "8"], "answer": 2},
]
QUESTIONS = tuple(Question(row["question"], tuple(row["choices"]), row["answer"]) for row in ROWS)  # type: ignore[arg-type]


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    frame = pd.DataFrame(rows)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".csv":
        frame.assign(choices=frame["choices"].map(json.dumps)).to_csv(path, index=False)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_one_set_from_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    found = load_question_set(write(tmp_path / f"human_aging{suffix}", ROWS))
    assert found.questions == QUESTIONS
    assert found.subject == "human aging"


def test_letters_as_answers_and_wmdp_s_subject(tmp_path: Path) -> None:
    found = load_question_set(write(tmp_path / "wmdp-bio.jsonl", [{**ROWS[0], "answer": "b"}]))
    assert found.questions == QUESTIONS[:1]
    assert found.subject == "biology"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": ["only one"]}, "row 1: `choices` must be a list of 2 to 4"),
        ({"choices": "bone, blood"}, "row 1: `choices` must be a list, in a .csv file as JSON"),
        ({"choices": ["bone", 3]}, "row 1, `choices` holds 3"),
        ({"answer": 4}, "row 1: `answer` is 4; expected 0 to 3 or A to D"),
        ({"answer": 1.5}, "`answer` is 1.5"),
        ({"answer": "E"}, "`answer` is 'E'"),
    ],
)
def test_a_row_that_is_no_question(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_question_set(write(tmp_path / "some.jsonl", [{**ROWS[0], **change}]))


def test_a_file_that_is_no_question_set(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="the set is empty"):
        load_question_set(str(tmp_path / "empty.jsonl"))
    with pytest.raises(UserError, match="no column 'choices'"):
        load_question_set(write(tmp_path / "text.jsonl", [{"question": "what?", "answer": 0}]))
    with pytest.raises(UserError, match="no such file"):
        load_question_set(str(tmp_path / "missing.jsonl"))


# --- the stand-in ------------------------------------------------------------------------------


def test_the_topic_follows_from_the_words() -> None:
    assert topic_of(ShortQuestion("What organ pumps it?", "heart")) == "biomedical"
    assert topic_of(ShortQuestion("What force pulls a mass down?", "gravity")) == "other"
    assert topic_of(ShortQuestion("What energy do plants store?", "chemical")) is None  # matter, but of living things
    assert topic_of(ShortQuestion("What is the sum?", "four")) is None


def test_packaged_questions_are_distinct_and_of_one_topic() -> None:
    sets = {topic: science_questions(topic) for topic in ("biomedical", "other")}
    assert not set(sets["biomedical"]) & set(sets["other"])
    for topic, questions in sets.items():
        assert len(set(questions)) == len(questions) > 100
        assert all(topic_of(question) == topic and " " not in question.answer for question in questions)


def test_distractors_are_other_answers() -> None:
    question = ShortQuestion("Which organ filters blood?", "kidneys")
    answers = ["kidneys", "kidney", "Kidneys", "blood", "organ", "liver", "lungs", "skin", "skin", "brain"]
    found = distractors(question, answers, 3)
    assert len(found) == 3 and set(found) <= {"liver", "lungs", "skin", "brain"}
    assert found == distractors(question, answers[::-1], 3)  # whatever the order


# --- corpora -----------------------------------------------------------------------------------


def test_packaged_topic_keeps_to_one_split() -> None:
    found = topic_documents("packaged_biomedical", "text", 10_000, 0)
    assert len(found) > 300 and {document.source for document in found} == set(PACKAGED_TOPICS["packaged_biomedical"])
    assert all(split_of(document.text) == "probe_train" for document in found if len(document.text) < 10_000)
    assert not {*PACKAGED_TOPICS["packaged_biomedical"]} & {*PACKAGED_TOPICS["packaged_general"]}


def test_local_corpus(tmp_path: Path) -> None:
    texts = [f"sentence number {i} of a corpus that is long enough to be kept whole" for i in range(30)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in [*texts, *texts, "short"]))
    found = [topic_documents(str(path), "body", 20, seed) for seed in (0, 1)]
    assert [len(documents) for documents in found] == [30, 30]  # copies and the short one are gone
    assert all(len(document.text) == 20 for document in found[0])
    assert [d.doc_id for d in found[0]] != [d.doc_id for d in found[1]]
    assert topic_documents(str(path), "body", 20, 0) == found[0]
    with pytest.raises(UserError, match="no column 'text'"):
        topic_documents(str(path), "text", 20, 0)


def test_unknown_corpus() -> None:
    with pytest.raises(UserError, match="known names: packaged_biomedical"):
        topic_documents("packaged_biology", "text", 20, 0)


# --- hub ---------------------------------------------------------------------------------------

CLIENT = """
import json
from sae_research.runtime.errors import UserError
from sae_research.text.questions import load_question_set
from sae_research.text.questions import topic_documents

def ask(function, *arguments):
    try:
        return function(*arguments)
    except UserError as error:
        return str(error)

print("ANSWERS" + json.dumps({
    "wmdp": ask(load_question_set, "cais/wmdp:wmdp-bio"),
    "mmlu": ask(load_question_set, "cais/mmlu:human_aging"),
    "wikitext": ask(topic_documents, "wikitext", "text", 100, 0),
    "bio": ask(topic_documents, "wmdp-bio-forget", "text", 100, 0),
    "missing": ask(load_question_set, "cais/mmlu:no_such_subject"),
    "unknown": ask(load_question_set, "cais/nothing:at-all"),
}))
"""


def hub_data_set(folder: Path, files: dict[str, list[dict[str, Any]]]) -> Path:
    """A data set of parquet files `<config>/<split>.parquet`, its card naming them as the real ones do."""
    lines = ["---", "configs:"]
    for name, rows in files.items():
        (folder / name).parent.mkdir(parents=True)
        pd.DataFrame(rows).to_parquet(folder / name)
        config, split = name.removesuffix(".parquet").split("/")
        lines += [f"- config_name: {config}", "  data_files:", f"  - split: {split}", f"    path: {name}"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


def test_questions_and_corpora_by_hub_name(tmp_path: Path) -> None:
    text = [{"text": f"paragraph {i} " + "of the corpus " * 5} for i in range(4)] + [{"text": ""}]
    repos = {
        "cais/wmdp": {"wmdp-bio/test.parquet": ROWS},
        "cais/mmlu": {"human_aging/test.parquet": ROWS[:1]},
        "Salesforce/wikitext": {"wikitext-2-raw-v1/test.parquet": text},
        "cais/wmdp-bio-forget-corpus": {"default/train.parquet": text[:2]},
    }
    served = {name: hub_data_set(tmp_path / name, files) for name, files in repos.items()}
    with serve_hub({"datasets": served}) as url:
        done = subprocess.run(
            [sys.executable, "-c", CLIENT],
            env=os.environ | hub_env(url, tmp_path / "home"),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.rsplit("ANSWERS", 1)[1])
    as_json = json.loads(json.dumps(QUESTIONS))
    assert found["wmdp"] == ["cais/wmdp:wmdp-bio", "biology", as_json]
    assert found["mmlu"] == ["cais/mmlu:human_aging", "human aging", as_json[:1]]
    assert len(found["wikitext"]) == 4 and len(found["bio"]) == 2
    assert "no_such_subject" in found["missing"]
    assert "cais/nothing" in found["unknown"]
