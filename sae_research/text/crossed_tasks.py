"""Tasks with two attributes, for spurious correlation removal: every text has one of two values of each.

A text's *cell* is (value of the first attribute, value of the second), each 0 or 1. In cells (0, 0) and (1, 1) the two
attributes agree; a probe trained on these two alone cannot tell the attributes apart. They hold twice as many texts as
the other two cells, as in SAE Bench: the balanced data sets take half of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from sae_research.runtime.errors import UserError, did_you_mean
from sae_research.runtime.files import find_local, fingerprint
from sae_research.text.hub import hub_errors
from sae_research.text.local import (
    TABLE_SUFFIXES,
    as_label,
    as_text,
    listed,
    local_files,
    looks_local,
    read_rows,
)
from sae_research.text.packaged import read_packaged
from sae_research.text.split import NearIndex, shingle_sets, text_hash
from sae_research.text.tasks import TaskUnavailable, Texts, apart, distinct_texts, pick

Cell = tuple[int, int]
Cells = dict[Cell, list[str]]
CELLS: tuple[Cell, ...] = ((0, 0), (0, 1), (1, 0), (1, 1))
LOCAL_COLUMNS = ("text", "label", "second_label")

_MEND = "name packaged tasks in `scr.dataset_names`"
_SENTIMENT = ("negative", "positive")


class CrossedTask(NamedTuple):
    """Texts by cell. `first` and `second` name the two values of either attribute; `notes` (JSON-able) says where the
    texts came from, what was dropped and what to beware of."""

    name: str
    first: tuple[str, str]
    second: tuple[str, str]
    train: Cells
    test: Cells
    notes: dict[str, Any]


class PackagedCross(NamedTuple):
    """Two packaged sets of reviews with labels of sentiment, crossed.

    Every text is cut at a word's end to at most `characters`, and shorter ones are left out, so that length tells
    nothing of either attribute.
    """

    first: tuple[str, str]
    """Keys of `REVIEWS`."""
    characters: int
    caveat: str = ""


REVIEWS: dict[str, tuple[str, Mapping[Any, int]]] = {
    "film": ("113_movie_sent", {0: 0, 1: 1}),
    "restaurant": ("111_yelp_data", {0: 0, 4: 1}),  # one star against five
    "product": ("157_amazon_5star", {0: 0, 1: 1}),
}
"""Kind of review -> packaged file and its labels as 0 (negative) or 1 (positive)."""

_CUT = "texts are cut to one length, so that some lose the words that give the verdict; "
_FILM = _CUT + "films are lower-cased single sentences, which alone tells them from the others"
CROSSED_TASKS: dict[str, PackagedCross] = {
    "film_or_restaurant_by_sentiment": PackagedCross(("film", "restaurant"), 110, _FILM),
    "film_or_product_by_sentiment": PackagedCross(("film", "product"), 110, _FILM + "; products open with a title"),
    "restaurant_or_product_by_sentiment": PackagedCross(
        ("restaurant", "product"), 400, _CUT + "restaurants include other businesses; products open with the word 'Title'"
    ),
}

HUB_TASKS = ("LabHC/bias_in_bios_class_set1", "canrager/amazon_reviews_mcauley_1and5")
"""SAE Bench's data sets for SCR, by the names it gives them; each holds four pairs of first attributes."""


def load_crossed_tasks(
    name: str, train_size: int, test_size: int, seed: int, skip: Callable[[str, str], None]
) -> list[CrossedTask]:
    """A packaged task, a local file or folder with columns `text`, `label` and `second_label`, or one of SAE Bench's
    hub data sets, which gives a task for each of its pairs.

    Sizes are those of a balanced data set, as in SAE Bench: a quarter of it per cell, twice that where the attributes
    agree. A task with too few texts is left out: `skip(name, reason)` is called. Raises `UserError` for an unknown
    name, unreadable files or a hub out of reach. A third value of an attribute in a local table, too rare to fill its cells,
    is left out, and the task's notes say so.
    """
    if name in CROSSED_TASKS:
        parts: Iterator[_Parts] = iter([_packaged(name)])
    elif name in HUB_TASKS:
        parts = _hub(name)
    elif (local := find_local(name)) is not None:
        # a value meets both values of the other attribute: one cell of it, and two where they agree
        parts = _local(name, local, 3 * (train_size // 4 + test_size // 4), skip)
    else:
        raise UserError(unknown_crossed_task(name))
    tasks = []
    for part in parts:
        try:
            tasks.append(_select(part, train_size, test_size, seed))
        except TaskUnavailable as error:
            skip(part.name, str(error))
    return tasks


def crossed_fingerprint(task: CrossedTask) -> str:
    """Identifies a task by its texts and their cells, in order. [64 hex digits]"""
    return fingerprint([[str(cell), texts] for part in (task.train, task.test) for cell, texts in part.items()])


class _Parts(NamedTuple):
    """All texts a task could use; `seed_picks` says whether the seed chooses among them, or their order does and test texts
    near those chosen for training are passed over."""

    name: str
    first: tuple[str, str]
    second: tuple[str, str]
    train: Cells
    test: Cells
    notes: dict[str, Any]
    seed_picks: bool = True


def _select(parts: _Parts, train_size: int, test_size: int, seed: int) -> CrossedTask:
    """Raises `TaskUnavailable` when a cell has too few texts."""

    def most(cells: Cells) -> int:
        return 4 * min(len(texts) // _share(cell) for cell, texts in cells.items())

    largest = most(parts.train), most(parts.test)
    if largest[0] < train_size or largest[1] < test_size:
        raise TaskUnavailable(
            f"task {parts.name}: sizes {train_size} and {test_size} ask for {train_size // 4} train and "
            f"{test_size // 4} test texts in each cell and twice that where the attributes agree: "
            f"set sizes of at most {largest[0]} and {largest[1]}"
        )

    def choose(cells: Cells, size: int) -> Cells:
        return {
            cell: (pick({"": texts}, len(texts), seed)[""] if parts.seed_picks else texts)[: size // 4 * _share(cell)]
            for cell, texts in cells.items()
        }

    train = choose(parts.train, train_size)
    test = choose(parts.test if parts.seed_picks else _far(parts, train, test_size), test_size)
    available = {
        f"{parts.first[a]}, {parts.second[b]}": {"train": len(parts.train[a, b]), "test": len(parts.test[a, b])}
        for a, b in CELLS
    }
    return CrossedTask(parts.name, parts.first, parts.second, train, test, {**parts.notes, "available": available})


def _far(parts: _Parts, train: Cells, test_size: int) -> Cells:
    """The first test texts of every cell that are no near copies of `train`, as many as are needed."""
    index = NearIndex(shingle_sets(text for texts in train.values() for text in texts))
    far: Cells = {cell: [] for cell in CELLS}
    for cell, texts in parts.test.items():
        wanted, rest = test_size // 4 * _share(cell), iter(texts)
        while len(far[cell]) < wanted and (batch := list(islice(rest, wanted))):
            far[cell] += [text for text, near in zip(batch, index.near(batch), strict=True) if not near]
        if len(far[cell]) < wanted:
            raise TaskUnavailable(
                f"task {parts.name}: only {len(far[cell])} test texts of {parts.first[cell[0]]}, "
                f"{parts.second[cell[1]]} are no near copies of its train texts, {wanted} are needed"
            )
    return far


def _share(cell: Cell) -> int:
    return 2 if cell[0] == cell[1] else 1


def unknown_crossed_task(name: str) -> str:
    """What is said of a name that is neither a task nor a path."""
    if looks_local(name):
        return f"two-attribute task {name}: no such file or folder"
    return (
        f"unknown two-attribute task {name!r}{did_you_mean(name, [*CROSSED_TASKS, *HUB_TASKS])}; or the path of a "
        f"{', '.join(TABLE_SUFFIXES)} file with columns {', '.join(LOCAL_COLUMNS)}"
    )


# --- packaged and local rows -----------------------------------------------------------------


def _packaged(name: str) -> _Parts:
    task = CROSSED_TASKS[name]
    rows = []
    for a, kind in enumerate(task.first):
        file, sentiment = REVIEWS[kind]
        frame = read_packaged(file)
        rows += [
            (text, (a, sentiment[target]))
            for text, target in zip(frame["prompt"], frame["target"], strict=True)
            if target in sentiment
        ]
    return _one_split(name, task.first, _SENTIMENT, rows, {"origin": "packaged", "caveat": task.caveat}, task.characters)


def _local(name: str, path: Path, needed: int, skip: Callable[[str, str], None]) -> Iterator[_Parts]:
    """needed: texts below which a value of an attribute cannot fill its cells; such values are left out."""
    rows: list[tuple[str, ...]] = []
    empty_cells: list[int] = []
    for file in local_files(path, TABLE_SUFFIXES):
        for text, *labels in read_rows(file, LOCAL_COLUMNS, empty_cells):
            rows.append(
                (
                    as_text(text, f"{file}, column 'text'"),
                    *(
                        as_label(label, f"{file}, column {column!r}")
                        for column, label in zip(LOCAL_COLUMNS[1:], labels, strict=True)
                    ),
                )
            )
    notes: dict[str, Any] = {"origin": "local", **({"rows_with_empty_cells": len(empty_cells)} if empty_cells else {})}
    values: list[list[str]] = []
    for place, column in enumerate(LOCAL_COLUMNS[1:], 1):
        counts = Counter(row[place] for row in rows)
        found = sorted(counts)
        rare = {value: counts[value] for value in found if counts[value] < needed} if len(found) > 2 else {}
        if len(found) - len(rare) == 2:
            notes |= {f"values_left_out_of_{column}": rare} if rare else {}
            found = [value for value in found if value not in rare]
        if len(found) != 2:
            skip(name, f"task {name}: column {column!r} needs two values, found {listed(found) or 'none'}")
            return
        values.append(found)
    first, second = values
    cells = [
        (text, (first.index(label), second.index(other)))
        for text, label, other in rows
        if label in first and other in second
    ]
    yield _one_split(name, (first[0], first[1]), (second[0], second[1]), cells, notes)


def _one_split(
    name: str,
    first: tuple[str, str],
    second: tuple[str, str],
    rows: list[tuple[str, Cell]],
    notes: dict[str, Any],
    characters: int | None = None,
) -> _Parts:
    """Distinct texts of the probing splits by cell, cut to `characters` if given, no test text near a train text.

    Where a text belongs is decided before it is cut; texts that are equal after it count once, train first.
    """
    pool = distinct_texts((text, f"{a}{b}") for text, (a, b) in rows)
    seen: set[str] = set()
    short, parts = 0, []
    for part in (pool.train, pool.test):
        kept: Texts = {f"{a}{b}": [] for a, b in CELLS}
        for cell, texts in part.items():
            for text in texts:
                if characters is not None and len(text) < characters:
                    short += 1
                    continue
                cut = text if characters is None else _cut(text, characters)
                if text_hash(cut) not in seen:
                    seen.add(text_hash(cut))
                    kept[cell].append(cut)
        parts.append(kept)
    pool = apart(pool._replace(train=parts[0], test=parts[1]))
    cutting = {} if characters is None else {"characters": characters, "shorter_dropped": short}
    train, test = ({(a, b): part[f"{a}{b}"] for a, b in CELLS} for part in (pool.train, pool.test))
    return _Parts(name, first, second, train, test, {**notes, **pool.dropped, **cutting})


def _cut(text: str, characters: int) -> str:
    """The first words of `text`, at most `characters` long; a word that would cost more than a tenth is cut inside."""
    if len(text) <= characters:
        return text
    whole = text[: characters + 1].rsplit(None, 1)[0].rstrip()
    return whole if 0.9 * characters <= len(whole) <= characters else text[:characters].rstrip()


# --- SAE Bench's hub data sets ---------------------------------------------------------------


def _hub(name: str) -> Iterator[_Parts]:
    """SAE Bench's pairs, its texts in its order, less copies and the test texts that have a copy in train (near copies are
    passed over when texts are chosen)."""
    with hub_errors(name, _MEND):
        from datasets import load_dataset
        from sae_bench.evals.scr_and_tpp.eval_config import ScrAndTppEvalConfig
        from sae_bench.sae_bench_utils.dataset_info import dataset_metadata

        repository = name.split("_class_set")[0]
        frames: Any = load_dataset(repository)
        about: Any = dataset_metadata[repository]
        columns = [about["text_column_name"], about["column1_name"], about["column2_name"]]
        rows = {split: list(zip(*(frames[split][column] for column in columns), strict=True)) for split in ("train", "test")}
    second = tuple(about["column2_mapping"])
    for first in ScrAndTppEvalConfig().column1_vals_lookup[name]:
        codes = {(about["column1_mapping"][first[a]], about["column2_mapping"][second[b]]): (a, b) for a, b in CELLS}
        seen: set[str] = set()
        parts, dropped = [], 0
        for split in ("train", "test"):
            cells: Cells = {cell: [] for cell in CELLS}
            for text, *values in rows[split]:
                cell = codes.get(tuple(values))
                if cell is None:
                    continue
                if (digest := text_hash(text)) in seen:
                    dropped += 1
                    continue
                seen.add(digest)
                cells[cell].append(text)
            parts.append(cells)
        yield _Parts(
            f"{name}_scr_{first[0]}_{first[1]}",
            tuple(first),
            (str(second[0]), str(second[1])),
            parts[0],
            parts[1],
            {"origin": "hub", "copies_dropped": dropped},
            seed_picks=False,
        )
