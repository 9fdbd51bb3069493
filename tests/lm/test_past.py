"""Passes that go on from kept keys and values are those of whole texts, in every family."""

from __future__ import annotations

import pytest
import torch

from sae_research.lm import past as module
from sae_research.lm.past import Beginnings
from tests.lm.test_lm_model import FAMILIES, make

HOOK, ENDS = "blocks.1.hook_resid_post", 3
TEXTS = [[5, 9, 14, 3, 8, 7], [5, 9, 14, 22, 3, 60, 41, 11], [4, 30, 31, 32]]


def _tails() -> torch.Tensor:
    return torch.tensor([text[-ENDS:] for text in TEXTS])


@pytest.mark.parametrize("family", FAMILIES)
def test_what_follows_a_beginning_is_what_follows_in_the_whole_text(family: str) -> None:
    lm, lengths = make(family), [len(text) - ENDS for text in TEXTS]
    beginnings = Beginnings(lm, TEXTS, lengths)
    assert beginnings.usable
    rows = range(len(TEXTS))
    acts = torch.stack([lm.activations(torch.tensor([text]), HOOK)[0, -ENDS:] for text in TEXTS]) + 0.1
    resumed = lm.resume(HOOK, acts, _tails(), past=beginnings.past(rows, lengths))
    answers = lm.generate(_tails(), 4, HOOK, lambda _: acts, beginnings.past(rows, lengths))
    for row, text in enumerate(TEXTS):
        whole = torch.tensor([text])
        patched = lm.activations(whole, HOOK).clone()
        patched[0, -ENDS:] = acts[row]
        torch.testing.assert_close(resumed[row], lm.resume(HOOK, patched, whole)[0, -ENDS:], atol=1e-5, rtol=1e-4)
        assert answers[row].tolist() == lm.generate(whole, 4, HOOK, lambda _, p=patched: p)[0].tolist()


def test_what_is_kept_is_bounded_and_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = make("llama")
    beginnings = Beginnings(lm, TEXTS, [2, 2, 1])
    passes: list[int] = []
    edited = lm.edited_logits
    monkeypatch.setattr(lm, "edited_logits", lambda tokens, *rest: (passes.append(len(tokens)), edited(tokens, *rest))[1])
    beginnings.past([0, 1, 2], [2, 1, 1])
    beginnings.past([2, 0], [1, 2])
    assert passes == [2], "texts that begin alike share what is kept"
    monkeypatch.setattr(module, "MAX_BYTES", 0)
    Beginnings(lm, TEXTS, [3, 4, 2]).past([0], [3])
    beginnings.past([0], [2])
    assert passes == [2, 1], "nothing is dropped while nothing is missing"


def test_texts_beyond_a_sliding_window_are_run_whole() -> None:
    lm = make("llama")
    lm.model.config.sliding_window = max(map(len, TEXTS))
    assert not Beginnings(lm, TEXTS, [1, 1, 1]).usable
    lm.model.config.sliding_window += 1
    assert Beginnings(lm, TEXTS, [1, 1, 1]).usable
