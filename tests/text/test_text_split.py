"""The one split: shares, near-duplicates, agreement of the fast path with the definition."""

from __future__ import annotations

from collections import Counter

import pytest

from sae_research.text.split import SHARES, SPLITS, normalise, split_of, split_of_hash, text_hash


def test_normalise_keeps_letters_digits_and_single_spaces() -> None:
    assert normalise("  Hello,\n\tWORLD — it’s “2024”_now!  ") == "hello world it s 2024 now"
    assert normalise("ﬁne Ｃａｆé") == "fine café"
    assert normalise("?!…") == ""


@pytest.mark.parametrize(
    "twin",
    [
        "THE END. NEXT DAY, IT RAINED",
        "the end.Next day it rained",
        "  The  end\n\nNext day; it rained!!! ",
        "Ｔhe end — next day it rained",
        "“The end” next-day_it rained",
    ],
)
def test_near_duplicates_share_hash_and_split(twin: str) -> None:
    original = "The end. Next day it rained."
    assert text_hash(twin) == text_hash(original)
    assert split_of(twin) == split_of(original)


def test_other_words_are_other_texts() -> None:
    assert len({text_hash(text) for text in ("a b", "a c", "1", "é", "e", "")}) == 6


def test_ascii_path_follows_normalise() -> None:
    printable = "".join(map(chr, range(128)))
    # the no-break space takes the same characters through the general path
    assert text_hash(printable) == text_hash(printable + "\u00a0")


def test_shares() -> None:
    assert sum(SHARES.values()) == pytest.approx(1)
    counts = Counter(split_of(f"text number {number}") for number in range(20_000))
    for split in SPLITS:
        assert counts[split] / 20_000 == pytest.approx(SHARES[split], abs=0.012)


def test_split_is_pinned() -> None:
    """Changing the hash moves every text: results before and after would not compare."""
    assert text_hash("The capital of France is Paris.") == "9aff4ddb83eb7d07af880fa849071b7d"
    assert split_of("The capital of France is Paris.") == "probe_train"
    assert split_of_hash("f" * 32) == "probe_test" and split_of_hash("0" * 32) == "sae_train"
