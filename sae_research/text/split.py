"""The one split for everything, by hash of the normalised text.

SAE training, core evaluation, probing train and probing test never share a text, whatever file or task it
came from: where a text belongs is a property of the text alone. Splitting by row leaks, because the packaged
sets repeat themselves and each other (28 % of test rows had their copy in train). Texts that are much the same without
being equal are the matter of `text.near_copies`.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from typing import Literal, get_args

Split = Literal["sae_train", "core_eval", "probe_train", "probe_test"]
SPLITS: tuple[str, ...] = get_args(Split)

SHARE_SAE_TRAIN = 0.5
SHARE_CORE_EVAL = 0.1
SHARE_PROBE_TRAIN = 0.25
SHARE_PROBE_TEST = 0.15
SHARES: dict[str, float] = dict(zip(
    SPLITS, (SHARE_SAE_TRAIN, SHARE_CORE_EVAL, SHARE_PROBE_TRAIN, SHARE_PROBE_TEST), strict=True))

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
            return split  # type: ignore[return-value]
    return SPLITS[-1]  # type: ignore[return-value]  # the shares add up to 1 only up to rounding
