"""Multiple-choice questions, and running text on one topic, for evaluations that set one subject against another.

Questions come from a local file or a hub data set in the layout of WMDP and MMLU. A row holds `question` (text), `choices`
(two to four texts; in a .csv file that list as JSON) and `answer` (the index of the right one, or its letter).

The packaged questions are the true rows of `36_sciq_tf`, which hardly ever holds a true and a false answer to one question;
their false answers are other questions' answers. *Biomedical* names something of BODY; *other* names something of MATTER and
nothing of BODY or LIFE; what is neither, or both, is left out.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_research.runtime.errors import UserError
from sae_research.runtime.files import find_local
from sae_research.text.corpus import DOC_ID_DIGITS, PACKAGED_SOURCES, Document, source_texts
from sae_research.text.hub import hub_errors, named_rows, parse_hub_name
from sae_research.text.local import (
    TABLE_SUFFIXES,
    as_text,
    check_columns,
    listed,
    local_files,
    looks_local,
    numbered_rows,
    read_rows,
)
from sae_research.text.packaged import read_packaged
from sae_research.text.split import split_of_hash, text_hash

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
        raise UserError(f'{where}: `choices` must be a list, in a .csv file as JSON: ["red", "blue"]') from None


def _index(answer: Any, n_choices: int, where: str) -> int:
    letters = LETTERS[:n_choices]
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip().upper() in letters:
        return letters.index(answer.strip().upper())
    try:
        number = -1.0 if isinstance(answer, bool) else float(answer)  # a table written from floats says 2.0
    except (TypeError, ValueError, OverflowError):
        number = -1.0
    index = int(number) if number.is_integer() else -1
    if not 0 <= index < n_choices:
        raise UserError(
            f"{where}: `answer` is {listed([repr(answer)])}; expected 0 to {n_choices - 1} or {letters[0]} to {letters[-1]}"
        )
    return index


FILE = "36_sciq_tf"
MAX_CHARACTERS = 80
"""Longer questions are left out: every one is asked again after every edit, and costs by its tokens."""
BODY = frozenset(
    """
    bacteria blood bone bones brain cancer cartilage cell cells chromosome chromosomes digestion digestive disease
    diseases dna enzyme enzymes gene genes genetic gland glands heart hormone hormones immune infection infections
    intestine kidney kidneys liver lung lungs lymph lymphatic meiosis membrane mitosis muscle muscles nerve nerves
    nervous neurons organ organs pathogens protein proteins reproductive respiratory rna skeletal skin sperm spinal
    stomach tissue tissues vertebrae virus viruses vitamin
""".split()
)
LIFE = frozenset(
    """
    algae amphibians animal animals baby biodiversity biological biology biomes biosphere birds body breathing
    carbohydrates crops diet dinosaurs drug ear eat ecosystem ecosystems egg eggs embryo evolution eye fat fish flower
    flowers food fossils fungi fungus glucose growth habitat health host hosts human humans inherited insects
    invertebrates leaf leaves life lipid lipids living mammals medical metabolism offspring organic organism organisms
    parasite parasites patients people person photosynthesis plankton plant plants population predator pregnancy prey
    primates protists reproduction reptiles roots seeds sexual species sponge sugar sugars traits trees vertebrates
    worms
""".split()
)
MATTER = frozenset(
    """
    acceleration acid acids alloy astronomers atmosphere atom atomic atoms boiling charge charged chemical chemistry
    circuit climate clouds compound compounds conductor crust current density earthquake earthquakes electric
    electrical electricity electron electrons element elements energy erosion evaporation force forces frequency
    friction galaxy gas gases glacier glaciers gravity heat hydrogen ion ions isotopes kinetic lava liquid liquids
    magma magnet magnetic mantle mass matter metal metals mineral minerals moon motion mountain newton nuclear ocean
    oceans orbit orbits periodic physics planet planets plate plates precipitation pressure radiation radioactive
    reaction reactions rock rocks salt sediment solar solid solids solution sound speed star stars substance
    substances sun temperature thermal velocity volcano volcanoes wave wavelength waves weather wind
""".split()
)


class ShortQuestion(NamedTuple):
    """A question and its true answer."""

    text: str
    answer: str


def science_questions(topic: str) -> list[ShortQuestion]:
    """All questions on `biomedical` or `other` with a one-word answer, each once, in an order that never changes."""
    found = dict.fromkeys(_true_rows())
    chosen = [
        question
        for question in found
        if len(question.text) <= MAX_CHARACTERS and " " not in question.answer and topic_of(question) == topic
    ]
    return sorted(chosen, key=lambda question: _order("", question.text))


def topic_of(question: ShortQuestion) -> str | None:
    """`biomedical`, `other`, or None where the words do not say."""
    words = set(re.findall(r"[a-z]+", f"{question.text} {question.answer}".lower()))
    if words & BODY:
        return "biomedical"
    return "other" if words & MATTER and not words & LIFE else None


def distractors(question: ShortQuestion, answers: Sequence[str], count: int) -> list[str]:
    """`count` of `answers` as false ones, of a hash's choice: none that stands in the question or is a form of the true
    one."""
    truth, text = question.answer.lower(), question.text.lower()

    def usable(answer: str) -> bool:
        word = answer.lower()
        return word not in text and word not in truth and truth not in word and word[:5] != truth[:5]

    return sorted({answer for answer in answers if usable(answer)}, key=lambda a: _order(question.text, a))[:count]


def _true_rows() -> list[ShortQuestion]:
    frame = read_packaged(FILE)
    rows = frame["prompt"][frame["target"] == 1]
    parts = (row.removeprefix("Q: ").split("\nA: ", 1) for row in rows)
    return [ShortQuestion(part[0].strip(), part[1].strip()) for part in parts if len(part) == 2]


def _order(first: str, second: str) -> bytes:
    return hashlib.blake2b(f"{first}|{second}".encode(), digest_size=16).digest()


PACKAGED_TOPICS: dict[str, tuple[str, ...]] = {
    "packaged_biomedical": ("medical_abstracts", "cancer_papers"),
    "packaged_general": ("news_articles", "news_wire", "encyclopedia", "biographies", "stories_and_answers"),
}
"""Topic -> sources of `corpus.PACKAGED_SOURCES`. Only their `probe_train` part is read: no SAE was trained on it."""

HUB_NAMES = {
    "wikitext": "Salesforce/wikitext:wikitext-2-raw-v1:test",
    "wmdp-bio-forget": "cais/wmdp-bio-forget-corpus:default:train",
}
"""Short names of what SAE Bench reads."""

MIN_CHARACTERS = 50
"""Shorter texts are left out, as in SAE Bench."""


def topic_documents(name: str, column: str, max_characters: int, seed: int) -> list[Document]:
    """Distinct documents of a corpus in an order of the seed's choice, each cut to `max_characters`.

    name: a key of `PACKAGED_TOPICS` or `HUB_NAMES`, a local file or folder, or `owner/data[:config[:split]]`. The cut
    keeps a few long papers from filling the corpus. Raises `UserError` for an unknown name, unreadable files, a missing
    column, a hub out of reach or a corpus without text.
    """
    found: dict[str, Document] = {}
    for text, source in _texts(name, column):
        if len(text) > MIN_CHARACTERS:
            digest = text_hash(text)
            if name not in PACKAGED_TOPICS or split_of_hash(digest) == "probe_train":
                found.setdefault(digest, Document(text[:max_characters], digest[:DOC_ID_DIGITS], source))
    if not found:
        raise UserError(f"unlearning: corpus {name}: no text of more than {MIN_CHARACTERS} characters in column {column!r}")
    order = sorted(found, key=lambda digest: hashlib.blake2b(f"{seed}:{digest}".encode(), digest_size=16).digest())
    return [found[digest] for digest in order]


def _texts(name: str, column: str) -> Iterator[tuple[str, str]]:
    """(text, source)"""
    local = find_local(name)
    if name in PACKAGED_TOPICS:
        wanted = PACKAGED_TOPICS[name]
        yield from (
            (text, source.name) for source in PACKAGED_SOURCES if source.name in wanted for text in source_texts(source)
        )
    elif local is not None:
        for file in local_files(local):
            yield from ((as_text(value, f"{file}, column {column!r}"), file.name) for (value,) in read_rows(file, [column]))
    elif name not in HUB_NAMES and "/" not in name or looks_local(name.partition(":")[0]):
        raise UserError(
            f"unlearning: corpus {name}: no such file; known names: "
            f"{', '.join([*PACKAGED_TOPICS, *HUB_NAMES])}, or owner/data[:config[:split]] on the hub"
        )
    else:
        yield from _hub_texts(HUB_NAMES.get(name, name), column)


def _hub_texts(name: str, column: str) -> Iterator[tuple[str, str]]:
    where = f"hub data set {name!r}"
    with hub_errors(name, "name the packaged stand-in in `unlearning`, or a local file"):
        for row in named_rows(parse_hub_name(name, "train")):
            check_columns(where, [column], list(row))
            if row[column]:
                yield as_text(row[column], f"{where}, column {column!r}"), name
