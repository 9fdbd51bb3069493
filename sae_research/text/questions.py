"""Multiple-choice questions by name: a local file, or a hub data set in the layout of WMDP and MMLU.

A row holds `question` (text), `choices` (a list of two to four texts; in a .csv file that list as JSON) and `answer`
(the index of the right one, or its letter).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sae_research.errors import UserError
from sae_research.text.hub import hub_errors, named_rows, parse_hub_name
from sae_research.text.local import (
    TABLE_SUFFIXES,
    as_text,
    check_columns,
    find_local,
    listed,
    local_files,
    looks_local,
    numbered_rows,
)

COLUMNS = ("question", "choices", "answer")
LETTERS = "ABCD"
OFFLINE_MEND = "name the packaged stand-in in `unlearning`, or local files"


class Question(NamedTuple):
    """One question; `answer` is the index of the right choice."""

    text: str
    choices: tuple[str, ...]
    answer: int


class QuestionSet(NamedTuple):
    """Questions on one `subject`, as a prompt calls it."""

    name: str
    subject: str
    questions: tuple[Question, ...]


def load_question_set(name: str) -> QuestionSet:
    """The questions of a local .jsonl, .csv or .parquet file (or a folder of them), or of `owner/data:config[:split]`
    on the hub, `cais/wmdp:wmdp-bio` say; the split is `test` where none is named.

    Raises `UserError` for a file or data set that cannot be read, a row that is no question, and an empty set.
    """
    local = find_local(name)
    if local is None and looks_local(name.partition(":")[0]):
        raise UserError(f"unlearning: questions {name}: no such file or folder")
    rows = _hub_rows(name) if local is None else _local_rows(local)
    questions = tuple(_question(row, where) for row, where in rows)
    if not questions:
        raise UserError(f"unlearning: questions {name}: the set is empty")
    return QuestionSet(name, _subject(local.stem if local else parse_hub_name(name, "test").config or name), questions)


def _subject(name: str) -> str:
    """What SAE Bench's prompts call a set: `wmdp-bio` is "biology", `college_computer_science` loses its underscores."""
    known = {"wmdp-bio": "biology", "wmdp-cyber": "cyber security", "wmdp-chem": "chemistry"}
    return known.get(name, name.replace("_", " "))


def _local_rows(path: Path) -> Iterator[tuple[tuple[Any, ...], str]]:
    for file in local_files(path, TABLE_SUFFIXES):
        for number, row in numbered_rows(file, COLUMNS):
            yield row, f"{file}, row {number}"


def _hub_rows(name: str) -> Iterable[tuple[tuple[Any, ...], str]]:
    hub = parse_hub_name(name, "test")
    with hub_errors(name, OFFLINE_MEND):
        for number, row in enumerate(named_rows(hub), 1):
            check_columns(f"hub data set {name!r}", COLUMNS, list(row))
            yield tuple(row[column] for column in COLUMNS), f"hub data set {name!r}, row {number}"


def _question(row: tuple[Any, ...], where: str) -> Question:
    text, choices, answer = row
    if isinstance(choices, str):
        choices = _json_list(choices, where)
    if isinstance(choices, Mapping) or not hasattr(choices, "__len__") or not 2 <= len(choices) <= len(LETTERS):
        raise UserError(f"{where}: `choices` must be a list of 2 to {len(LETTERS)} texts, not {listed([repr(choices)])}")
    texts = tuple(as_text(choice, f"{where}, `choices`") for choice in choices)
    return Question(as_text(text, f"{where}, `question`"), texts, _index(answer, len(texts), where))


def _json_list(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: `choices` must be a list, in a .csv file as JSON: [\"red\", \"blue\"]") from None


def _index(answer: Any, n_choices: int, where: str) -> int:
    letters = LETTERS[:n_choices]
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().upper() in letters:
        return letters.index(answer.strip().upper())
    try:
        number = float(answer)  # a table written from floats says 2.0
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    index = int(number) if number.is_integer() else -1
    if not 0 <= index < n_choices:
        raise UserError(f"{where}: `answer` is {listed([repr(answer)])}; "
                        f"expected 0 to {n_choices - 1} or {letters[0]} to {letters[-1]}")
    return index
