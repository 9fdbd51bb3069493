"""The 113 binary tasks of the package `sae_probes`: their texts, stock's split, and the split without leaks.

Stock's split draws rows at random, so that copies of a text land on either side (28 % of all rows have a copy). Ours
puts every distinct text where the project's one split puts it, drops texts whose copies disagree on the label and near
copies that would stand on either side (`text.near_copies`), and takes as many of either class.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sae_research.errors import UserError
from sae_research.params import SparseProbingSaeProbes
from sae_research.text.near_copies import out_of_place
from sae_research.text.packaged import packaged_folder, packaged_version
from sae_research.text.split import split_of_hash, text_hash
from sae_research.text.tasks import TEST, TRAIN, TaskUnavailable

STOCK_MAX_TEXTS, STOCK_MAX_TRAIN, STOCK_TEST = 5000, 1024, 100
MIN_TRAIN, MIN_TEST = 16, 8
"""Texts of either class below which a task is skipped."""


class Split(NamedTuple):
    """Which texts a probe is fitted on and scored on, as indices into `ProbeTask.texts`, and their classes (0 or 1)."""

    train: np.ndarray
    train_labels: np.ndarray
    test: np.ndarray
    test_labels: np.ndarray


class ProbeTask(NamedTuple):
    name: str
    texts: list[str]
    """Distinct texts of both splits, as they stand in the package."""
    sae_bench: Split
    lab: Split
    notes: dict[str, Any]
    """JSON-able: sizes, what was dropped, and how much of stock's test set has its copy in train."""


@cache
def task_names() -> tuple[str, ...]:
    """The names of all tasks in the package's order, `5_hist_fig_ismale` first."""
    master = pd.read_csv(packaged_folder().parent / "probing_datasets_MASTER.csv.zst", compression="zstd",
                         usecols=["Data type", "Dataset save name"])
    files = master.loc[master["Data type"] == "Binary Classification", "Dataset save name"]
    return tuple(file.rpartition("/")[2].partition(".")[0] for file in files)


def chosen_names(config: SparseProbingSaeProbes) -> list[str]:
    """The tasks that `dataset_names` asks for. Raises `UserError` for a name the package does not carry."""
    known = task_names()
    if config.dataset_names == "all":
        return list(known)
    for name in config.dataset_names:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=2)
            hint = f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
            raise UserError(f"sparse_probing_sae_probes.dataset_names: sae-probes {packaged_version()} has no binary task "
                            f"{name!r}; {hint}")
    return list(dict.fromkeys(config.dataset_names))


def load_probe_task(name: str, config: SparseProbingSaeProbes, seed: int) -> ProbeTask:
    """A packaged task. Raises `TaskUnavailable` where it has one class or too few texts."""
    frame = read_rows(name)
    return make_task(name, frame["prompt"].tolist(), frame["target"].tolist(), config, seed)


def read_rows(name: str) -> pd.DataFrame:
    """Columns `prompt` and `target` of a packaged task, texts exactly as they stand there: the last token is what counts."""
    return pd.read_csv(packaged_folder() / f"{name}.csv.zst", compression="zstd", usecols=["prompt", "target"],
                       dtype={"prompt": str}).dropna()


def make_task(name: str, texts: Sequence[str], targets: Sequence[Any], config: SparseProbingSaeProbes,
              seed: int) -> ProbeTask:
    """Both splits of labelled texts. The class that sorts last is the positive one, as in stock.

    Raises `TaskUnavailable` for one class, more than two, or too few texts.
    """
    classes, labels = np.unique(np.asarray(targets[:STOCK_MAX_TEXTS]), return_inverse=True)
    if len(classes) != 2:
        raise TaskUnavailable(f"a binary task needs two classes, found {', '.join(map(str, classes[:5])) or 'none'}")
    rows = TaskRows(list(texts[:STOCK_MAX_TEXTS]), labels, seed)
    train, test = stock_split(labels, kept := rows.of_stock(config.max_texts), seed)
    lab_train, lab_test = (rows.of_lab(part, size, least) for part, size, least in (
        (TRAIN, config.probe_train_set_size, MIN_TRAIN), (TEST, config.probe_test_set_size, MIN_TEST)))
    index_of: dict[str, int] = {}
    numbers = [np.array([index_of.setdefault(rows.texts[row], len(index_of)) for row in part])
               for part in (train, test, lab_train, lab_test)]
    in_train = {rows.hashes[row] for row in train}
    notes = {
        "positive_class": str(classes[1]), "rows": len(labels), "rows_in_sae_bench_split": len(kept),
        "texts": len(index_of), "conflicting_dropped": len(rows.conflicting), "near_copies_dropped": len(rows.crossing),
        "sae_bench_test_texts_with_copy_in_train": sum(rows.hashes[row] in in_train for row in test),
        "sizes": {"sae_bench": [len(train), len(test)], "lab_v1": [len(lab_train), len(lab_test)]}}
    return ProbeTask(name, list(index_of), Split(numbers[0], labels[train], numbers[1], labels[test]),
                     Split(numbers[2], labels[lab_train], numbers[3], labels[lab_test]), notes)


def stock_split(labels: np.ndarray, kept: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The train and test rows that sae-probes draws from the rows `kept`: at most 1024, and all others but one.

    The calls of the generator follow its `get_train_test_indices`. Raises `TaskUnavailable` for too few rows.
    """
    n_train = min(len(kept) - STOCK_TEST, STOCK_MAX_TRAIN)
    n_test = len(kept) - n_train - 1
    rows_of = {label: np.flatnonzero(labels[kept] == label) for label in (1, 0)}
    need = {1: -(-n_train // 2) + -(-n_test // 2), 0: n_train // 2 + n_test // 2}
    if n_train < 2 * MIN_TRAIN or any(len(rows_of[label]) < need[label] for label in need):
        raise TaskUnavailable(f"SAE Bench's split needs {STOCK_TEST + 2 * MIN_TRAIN} texts, half of either class; found "
                              f"{len(rows_of[1])} and {len(rows_of[0])}")
    generator = np.random.RandomState(seed)

    def draw(rows: dict[int, np.ndarray], size: int) -> dict[int, np.ndarray]:
        sizes = {1: -(-size // 2), 0: size // 2}
        return {label: generator.choice(rows[label], size=sizes[label], replace=False) for label in (1, 0)}

    train = draw(rows_of, n_train)
    test = draw({label: np.setdiff1d(rows_of[label], train[label]) for label in (1, 0)}, n_test)
    return tuple(kept[generator.permutation(np.concatenate([part[1], part[0]]))] for part in (train, test))


class TaskRows:
    """The rows of one task, ordered by a hash that the seed changes and in which copies stand together."""

    def __init__(self, texts: list[str], labels: np.ndarray, seed: int) -> None:
        self.texts, self.labels = texts, labels
        self.hashes = [text_hash(text) for text in texts]
        self.splits = [split_of_hash(digest) for digest in self.hashes]
        # texts of the probing splits first: both definitions then read mostly the same, and no SAE was trained on them
        keys = [(split not in (TRAIN, TEST), hashlib.blake2b(f"{seed}:{digest}".encode(), digest_size=16).digest(), row)
                for row, (split, digest) in enumerate(zip(self.splits, self.hashes, strict=True))]
        self.order = [row for *_, row in sorted(keys)]
        label_of: dict[str, int] = {}
        self.conflicting = {digest for digest, label in zip(self.hashes, labels, strict=True)
                            if label_of.setdefault(digest, label) != label}
        probed = {self.hashes[row]: row for row in reversed(range(len(texts)))  # of copies the first, as `of_lab` takes
                  if self.splits[row] in (TRAIN, TEST) and self.hashes[row] not in self.conflicting}
        wrong = out_of_place([texts[row] for row in probed.values()], [self.splits[row] for row in probed.values()])
        self.crossing = {digest for digest, left_out in zip(probed, wrong, strict=True) if left_out}

    def of_stock(self, most: int | None) -> np.ndarray:
        """All rows in the file's order, or the first `most` by hash, half of either class, copies and all."""
        if most is None or most >= len(self.texts):
            return np.arange(len(self.texts))
        taken = [[row for row in self.order if self.labels[row] == label][:most // 2] for label in (0, 1)]
        return np.sort(np.concatenate(taken))

    def of_lab(self, part: str, size: int, least: int) -> np.ndarray:
        """One row for each distinct text of a split, as many of either class, at most `size`, in an order without
        meaning. Raises `TaskUnavailable` where a class has fewer than `least`."""
        rows: dict[int, list[int]] = {0: [], 1: []}
        seen = self.conflicting | self.crossing
        for row in self.order:
            digest = self.hashes[row]
            if self.splits[row] == part and digest not in seen:
                seen.add(digest)
                rows[int(self.labels[row])].append(row)
        each = min(size // 2, *(len(members) for members in rows.values()))
        if each < least:
            raise TaskUnavailable(f"our split needs {least} distinct {part} texts of either class; found "
                                  f"{len(rows[0])} and {len(rows[1])}, sizes asked for {size // 2}")
        place = {row: i for i, row in enumerate(self.order)}
        # interleaved, so that any stretch of it holds both classes alike: validation takes the last ones
        return np.array([row for pair in zip(rows[0][:each], rows[1][:each], strict=True)
                         for row in sorted(pair, key=place.__getitem__)])
