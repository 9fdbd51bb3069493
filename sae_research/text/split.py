"""The one split for everything, by hash of the normalised text, and near copies of a text.

SAE training, core evaluation, probing train and probing test never share a text, whatever file or task it came from: where a
text belongs is a property of the text alone. Splitting by row leaks, because the packaged sets repeat themselves and each
other (28 % of test rows had their copy in train).

Two texts are near copies where the sets of their five-word shingles have a Jaccard similarity of at least one half. Shingles
come from the first 120 words, about what a context of 128 tokens holds; words are what white space separates, lower-cased. A
text of fewer than five words is one shingle.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np

Split = Literal["sae_train", "core_eval", "probe_train", "probe_test"]
SPLITS: tuple[Split, ...] = get_args(Split)

SHARE_SAE_TRAIN = 0.5
SHARE_CORE_EVAL = 0.1
SHARE_PROBE_TRAIN = 0.25
SHARE_PROBE_TEST = 0.15
SHARES: dict[Split, float] = dict(
    zip(SPLITS, (SHARE_SAE_TRAIN, SHARE_CORE_EVAL, SHARE_PROBE_TRAIN, SHARE_PROBE_TEST), strict=True)
)

HASH_BYTES = 16
_NEITHER_LETTER_NOR_DIGIT = re.compile(r"[\W_]+")
_ASCII_NOISE = bytes(code for code in range(128) if not chr(code).isalnum())


def normalise(text: str) -> str:
    """Lower-case NFKC text with only letters and digits, words parted by single spaces."""
    folded = unicodedata.normalize("NFKC", text).lower()
    return _NEITHER_LETTER_NOR_DIGIT.sub(" ", folded).strip()


def text_hash(text: str) -> str:
    """Identity of a text up to case, punctuation and spacing. [32 hex digits]

    The spaces of `normalise` do not count either: "end.Next", "end. Next" and "End next" are one text.
    """
    return hashlib.blake2b(_letters_and_digits(text), digest_size=HASH_BYTES).hexdigest()


def _letters_and_digits(text: str) -> bytes:
    """`normalise(text)` without its spaces, as UTF-8; ASCII text takes a faster path."""
    if text.isascii():
        return text.lower().encode("ascii").translate(None, _ASCII_NOISE)
    return normalise(text).replace(" ", "").encode()


def split_of(text: str) -> Split:
    """The part of the project that may see this text, by the shares above."""
    return split_of_hash(text_hash(text))


def split_of_hash(digest: str) -> Split:
    """As `split_of`, for a text whose `text_hash` is known."""
    # The last half of the hash: the defaults of params.yaml were tuned on a core_eval split made from the first.
    position, upper = int(digest[-16:], 16) / 2**64, 0.0
    for split, share in SHARES.items():
        upper += share
        if position < upper:
            return split
    return SPLITS[-1]  # the shares add up to 1 only up to rounding


WORDS = 120
SHINGLE_WORDS = 5
NEAR = 0.5
"""Jaccard similarity from which on two texts are near copies; the index below relies on its being one half."""
DEFINITION = WORDS, SHINGLE_WORDS, NEAR
"""For cache keys."""

_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_CANDIDATES = 2**22
"""Pairs looked at together at most: about 100 MB."""
_VERIFIED = 2**14
"""Pairs whose similarity is computed together."""


@lru_cache(maxsize=2**16)
def _code(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def shingles(text: str) -> np.ndarray:
    """Distinct codes of the text's shingles, uint64 [n] in rising order; none for a text without words."""
    codes = np.array([_code(word.lower()) for word in text.split(None, WORDS)[:WORDS]], np.uint64)
    found = np.zeros(max(len(codes) - SHINGLE_WORDS + 1, min(len(codes), 1)), np.uint64)
    for place in range(min(SHINGLE_WORDS, len(codes))):
        found = found * _FACTOR + codes[place : place + len(found)]
    return np.unique(found)


class ShingleSets(NamedTuple):
    """The shingles of several texts: those of text i are `codes[bounds[i]:bounds[i + 1]]`."""

    codes: np.ndarray
    """uint64 [n]"""
    bounds: np.ndarray
    """int64 [texts + 1]"""

    @property
    def sizes(self) -> np.ndarray:
        return np.diff(self.bounds)


def shingle_sets(texts: Iterable[str]) -> ShingleSets:
    sets = [shingles(text) for text in texts]
    return ShingleSets(np.concatenate([np.empty(0, np.uint64), *sets]), np.cumsum([0, *map(len, sets)]))


class NearIndex:
    """Texts among which near copies of others are looked up."""

    def __init__(self, sets: ShingleSets) -> None:
        from scipy.sparse import csr_array

        self.sizes = sets.sizes
        self._known, columns = np.unique(sets.codes, return_inverse=True)
        shape = len(self.sizes), len(self._known)
        self._sets = csr_array((np.ones(len(columns), np.int32), columns, sets.bounds), shape=shape)
        # A near copy has at least half of a text's shingles, so that it has one of any `size // 2 + 1` of them. The rarest
        # of them bring the fewest others along: a template that all texts share is never looked up.
        of = np.repeat(np.arange(len(self.sizes)), self.sizes)
        order = np.lexsort((columns, np.bincount(columns, minlength=shape[1])[columns], of))
        chosen = order[np.arange(len(of)) - sets.bounds[of] < self.sizes[of] // 2 + 1]
        self._rarest = csr_array((np.ones(len(chosen), np.int32), (columns[chosen], of[chosen])), shape=shape[::-1])

    def pairs(self, sets: ShingleSets) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Every pair of near copies, in portions: indices into `sets` [n] and into the indexed texts [n]."""
        from scipy.sparse import csr_array

        if not len(self._known):
            return
        place = np.searchsorted(self._known, sets.codes).clip(max=len(self._known) - 1)
        known = self._known[place] == sets.codes
        bounds = np.concatenate([[0], np.cumsum(known)])[sets.bounds]
        asked = csr_array((np.ones(bounds[-1], np.int32), place[known], bounds), shape=(len(sets.sizes), len(self._known)))
        step = max(1, _CANDIDATES // len(self.sizes))
        for start in range(0, asked.shape[0], step):
            found = (asked[start : start + step] @ self._rarest).tocoo()
            for first in range(0, found.nnz, _VERIFIED):
                portion = slice(first, first + _VERIFIED)
                rows, others = found.row[portion] + start, found.col[portion]
                common = asked[rows].multiply(self._sets[others]).sum(axis=1)
                near = common >= NEAR * (sets.sizes[rows] + self.sizes[others] - common)
                if near.any():
                    yield rows[near], others[near]

    def near(self, texts: Sequence[str]) -> np.ndarray:
        """Which of the texts have a near copy among those indexed, bool [texts]."""
        found = np.zeros(len(texts), bool)
        for rows, _ in self.pairs(shingle_sets(texts)):
            found[rows] = True
        return found


def out_of_place(texts: Sequence[str], splits: Sequence[str]) -> np.ndarray:
    """Which texts stand in another split than the representative of their group, bool [texts].

    What remains of a group lies in one split. Texts are left out and not moved: elsewhere their own split holds, so that a
    text moved here would be one that an SAE was trained on, or that another task trains a probe on. The representative is
    the text with the smallest hash, whatever the order.
    """
    group, hashes = groups(texts), [text_hash(text) for text in texts]
    order = sorted(range(len(texts)), key=hashes.__getitem__, reverse=True)
    split_of_group = {group[i]: splits[i] for i in order}  # the smallest comes last and stays
    return np.array([split_of_group[number] != split for number, split in zip(group, splits, strict=True)], bool)


def groups(texts: Sequence[str]) -> np.ndarray:
    """The number of each text's group [texts]: near copies are in one group, and near copies of these."""
    sets = shingle_sets(texts)
    group, edges, waiting = np.arange(len(texts)), [], 0
    for rows, others in NearIndex(sets).pairs(sets):
        new = group[rows] < group[others]
        edges.append((group[rows][new], group[others][new]))
        waiting += new.sum()
        if waiting > _CANDIDATES:
            group, edges, waiting = _joined(group, edges), [], 0
    return _joined(group, edges)


def _joined(group: np.ndarray, edges: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not edges:
        return group
    ends = np.concatenate([np.stack(portion) for portion in edges], axis=1)
    joined = connected_components(coo_array((np.ones(ends.shape[1], bool), ends), shape=[len(group)] * 2), directed=False)[1]
    return joined[group]
