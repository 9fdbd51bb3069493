"""Labelled texts for the probing evaluations: packaged tasks, a user's own files, SAE Bench's hub data sets.

Packaged and local tasks keep the one split: train texts are `probe_train`, test texts `probe_test`, copies of a text
count once, and no text of one part is a near copy of one of the other (`text.near_copies`). SAE Bench's hub data sets
keep their own train and test parts, less the test texts that have a copy or near copy in train.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_research.runtime.errors import UserError, did_you_mean
from sae_research.runtime.files import find_local, fingerprint
from sae_research.text.hub import OFFLINE_TASKS, hub_errors, one_line
from sae_research.text.local import (
    TABLE_SUFFIXES,
    as_label,
    as_text,
    listed,
    local_files,
    looks_local,
    read_rows,
)
from sae_research.text.packaged import PACKAGED_TASKS, PackagedTask, read_packaged
from sae_research.text.split import NearIndex, out_of_place, shingle_sets, split_of_hash, text_hash

TRAIN, TEST = "probe_train", "probe_test"

SAE_BENCH_TASKS: tuple[str, ...] = (
    "LabHC/bias_in_bios_class_set1",
    "LabHC/bias_in_bios_class_set2",
    "LabHC/bias_in_bios_class_set3",
    "canrager/amazon_reviews_mcauley_1and5",
    "canrager/amazon_reviews_mcauley_1and5_sentiment",
    "fancyzhx/ag_news",
    "codeparrot/github-code",
    "Helsinki-NLP/europarl",
)
"""Hub data sets that SAE Bench probes, by the names it gives them."""

Texts = dict[str, list[str]]
LabelledRow = tuple[str, str]


class TaskUnavailable(UserError):
    """The data cannot give what was asked (too few texts, one class): callers skip the task, saying why."""


class Task(NamedTuple):
    """A classification task: texts by class name, the same classes in the same order in `train` and `test`.

    `notes` (JSON-able) says where it came from, what was dropped and what to beware of.
    """

    name: str
    train: Texts
    test: Texts
    notes: dict[str, Any]


class Pool(NamedTuple):
    """Distinct texts with one label each, by class, in the probing splits, and how many rows fell away."""

    train: Texts
    test: Texts
    copies: int
    conflicting: int
    near_copies: int = 0

    @property
    def dropped(self) -> dict[str, int]:
        """For a task's notes."""
        return {
            "copies_dropped": self.copies,
            "conflicting_dropped": self.conflicting,
            "near_copies_dropped": self.near_copies,
        }


def load_task(name: str, train_size: int, test_size: int, seed: int) -> Task:
    """A packaged task, a local file or folder with columns `text` and `label`, or a SAE Bench hub data set.

    Sizes are those of a *binary* task, as in SAE Bench: every class gets `train_size // 2` and `test_size //
    2` texts. The selection depends on `seed` and the texts alone. Classes of a local table that have fewer are left out, and
    `notes["classes_left_out"]` says which; a packaged task is its classes, all of them at any size.

    Raises `TaskUnavailable` when fewer than two classes have texts enough, or a packaged one has too few, `UserError` for
    an unknown name, unreadable files or a hub out of reach.
    """
    if name in PACKAGED_TASKS:
        task = PACKAGED_TASKS[name]
        notes = {"origin": "packaged", "caveat": task.caveat}
        return _select(name, apart(distinct_texts(_packaged_rows(task))), notes, train_size, test_size, seed)
    if name in SAE_BENCH_TASKS:
        return _sae_bench_task(name, train_size, test_size, seed)
    local = find_local(name)
    if local is not None:
        return _local_task(name, local, train_size, test_size, seed)
    raise UserError(unknown_task(name))


def task_fingerprint(task: Task) -> str:
    """Identifies a task by its classes and texts, in order. [64 hex digits]"""
    return fingerprint([list(task.train.items()), list(task.test.items())])


def unknown_task(name: str) -> str:
    """What is said of a name that is neither a task nor a path."""
    if looks_local(name):
        return f"task {name}: no such file or folder"
    return (
        f"unknown task {name!r}{did_you_mean(name, [*PACKAGED_TASKS, *SAE_BENCH_TASKS])}; "
        f"or the path of a {', '.join(TABLE_SUFFIXES)} file with columns text and label"
    )


# --- rows ------------------------------------------------------------------------------------


def _packaged_rows(task: PackagedTask) -> Iterator[LabelledRow]:
    for file, classes in task.files.items():
        frame = read_packaged(file)
        for text, target in zip(frame["prompt"], frame["target"], strict=True):
            if target in classes and len(text) >= task.min_characters:
                yield text, classes[target]


def _local_task(name: str, path: Path, train_size: int, test_size: int, seed: int) -> Task:
    """The classes of a user's table that have texts enough; `notes` says what was left out."""
    empty_cells: list[int] = []
    pool = apart(distinct_texts(_local_rows(path, empty_cells)))
    classes = enough(_available(pool), train_size // 2, test_size // 2)
    rare = {listed([label]): have for label, have in _available(pool).items() if label not in classes}
    notes: dict[str, Any] = {"origin": "local"}
    if empty_cells:
        notes["rows_with_empty_cells"] = len(empty_cells)
    if len(classes) >= 2 and rare:
        notes["classes_left_out"] = rare
        train, test = ({label: part[label] for label in classes} for part in (pool.train, pool.test))
        pool = pool._replace(train=train, test=test)
    return _select(name, pool, notes, train_size, test_size, seed)


def _local_rows(path: Path, empty_cells: list[int]) -> Iterator[LabelledRow]:
    for file in local_files(path, TABLE_SUFFIXES):
        for text, label in read_rows(file, ["text", "label"], empty_cells):
            yield as_text(text, f"{file}, column 'text'"), as_label(label, f"{file}, column 'label'")


def enough(available: dict[str, dict[str, int]], train: int, test: int) -> list[str]:
    """The classes with at least so many texts in either part."""
    return [label for label, have in available.items() if have["train"] >= train and have["test"] >= test]


def _available(pool: Pool) -> dict[str, dict[str, int]]:
    return {label: {"train": len(texts), "test": len(pool.test[label])} for label, texts in pool.train.items()}


def distinct_texts(rows: Iterable[LabelledRow]) -> Pool:
    """Distinct texts of the probing splits by class. Texts whose copies disagree on the label are dropped."""
    first: dict[str, LabelledRow] = {}
    conflicting: set[str] = set()
    total = 0
    for text, label in rows:
        total += 1
        digest = text_hash(text)
        _, known_label = first.setdefault(digest, (text, label))
        if label != known_label:
            conflicting.add(digest)
    classes = sorted({label for _, label in first.values()})
    parts: dict[str, Texts] = {split: {label: [] for label in classes} for split in (TRAIN, TEST)}
    for digest, (text, label) in first.items():
        split = split_of_hash(digest)
        if split in parts and digest not in conflicting:
            parts[split][label].append(text)
    return Pool(parts[TRAIN], parts[TEST], total - len(first), len(conflicting))


def apart(pool: Pool) -> Pool:
    """The pool without texts that have near copies in the other part, as far as `near_copies.out_of_place` says."""
    places = [
        (split, label, text)
        for split, part in ((TRAIN, pool.train), (TEST, pool.test))
        for label, texts in part.items()
        for text in texts
    ]
    wrong = out_of_place([text for *_, text in places], [split for split, *_ in places])
    parts: dict[str, Texts] = {split: {label: [] for label in pool.train} for split in (TRAIN, TEST)}
    for (split, label, text), left_out in zip(places, wrong, strict=True):
        if not left_out:
            parts[split][label].append(text)
    return pool._replace(train=parts[TRAIN], test=parts[TEST], near_copies=int(wrong.sum()))


# --- selection -------------------------------------------------------------------------------


def _select(name: str, pool: Pool, notes: dict[str, Any], train_size: int, test_size: int, seed: int) -> Task:
    """The seed's choice of texts from the pool. Raises `TaskUnavailable` when the pool is too small."""
    available = _available(pool)
    if len(available) < 2:
        raise TaskUnavailable(f"task {name}: a task needs two classes, found {listed(available) or 'none'}")
    fit = enough(available, train_size // 2, test_size // 2)
    near = f" ({pool.near_copies:,} near copies of texts of the other part left out)" if pool.near_copies else ""
    short = [
        f"{listed([label])} has {have['train']} train and {have['test']} test texts"
        for label, have in available.items()
        if label not in fit
    ]
    if short:
        raise TaskUnavailable(
            f"task {name}: each class needs {train_size // 2} train and {test_size // 2} test texts, but "
            f"{_several(short)}{near}: {_mend(available, keep_all=notes['origin'] != 'local')}"
        )
    return Task(
        name,
        pick(pool.train, train_size // 2, seed),
        pick(pool.test, test_size // 2, seed),
        {**notes, "available": available, **pool.dropped},
    )


def _several(short: Sequence[str], most: int = 5) -> str:
    more = f"; and {len(short) - most} classes more" if len(short) > most else ""
    return "; ".join(short[:most]) + more


def _mend(available: dict[str, dict[str, int]], keep_all: bool) -> str:
    """The largest sizes that all classes have texts for; where rare ones may be left out, that the two largest have."""
    fullest = sorted(available.values(), key=lambda have: min(have.values()), reverse=True)
    sizes = [2 * min(have[part] for have in (fullest if keep_all else fullest[:2])) for part in ("train", "test")]
    if not all(sizes):
        return "give more texts"
    return f"set sizes of at most {sizes[0]} and {sizes[1]}"


def pick(texts: Texts, count: int, seed: int) -> Texts:
    """The seed's choice of `count` texts of every class; it depends on seed and texts, not on their order."""

    def key(text: str) -> bytes:
        return hashlib.blake2b(f"{seed}:{text}".encode(), digest_size=16).digest()

    return {label: sorted(members, key=key)[:count] for label, members in texts.items()}


# --- SAE Bench's hub data sets ---------------------------------------------------------------


def _sae_bench_task(name: str, train_size: int, test_size: int, seed: int) -> Task:
    """SAE Bench's own selection, less the test texts that have a copy or near copy in train."""
    train, test = _sae_bench_texts(name, train_size, test_size, seed)
    train_texts = [text for texts in train.values() for text in texts]
    in_train, near_train = {text_hash(text) for text in train_texts}, NearIndex(shingle_sets(train_texts))
    kept: Texts = {}
    copies = near_copies = 0
    for label, texts in test.items():
        new = [text for text in texts if text_hash(text) not in in_train]
        near = near_train.near(new)
        kept[label] = [text for text, left_out in zip(new, near, strict=True) if not left_out]
        copies, near_copies = copies + len(texts) - len(new), near_copies + int(near.sum())
    if not all(kept.values()):
        raise TaskUnavailable(f"task {name}: every test text of a class has a copy or near copy in train")
    return Task(
        name,
        train,
        kept,
        {"origin": "hub", "test_copies_of_train_dropped": copies, "test_near_copies_of_train_dropped": near_copies},
    )


def _sae_bench_texts(name: str, train_size: int, test_size: int, seed: int) -> tuple[Texts, Texts]:
    """Train and test texts of SAE Bench's chosen classes. Raises `UserError` for the hub, `TaskUnavailable`
    where SAE Bench's own loader gives up, which it does by assertions and by pandas' and dicts' errors."""
    with hub_errors(name, OFFLINE_TASKS):
        from sae_bench.sae_bench_utils import dataset_info, dataset_utils

        try:
            train, test = dataset_utils.get_multi_label_train_test_data(name, train_size, test_size, seed)
            chosen = dataset_info.chosen_classes_per_dataset[name]
            return dataset_utils.filter_dataset(train, chosen), dataset_utils.filter_dataset(test, chosen)
        except (ValueError, AssertionError, KeyError) as error:
            raise TaskUnavailable(
                f"task {name}: SAE Bench's loader cannot build it with sizes {train_size} and {test_size} "
                f"({type(error).__name__}: {one_line(error)})"
            ) from error
