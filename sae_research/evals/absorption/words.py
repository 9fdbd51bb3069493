"""Words, their split, and the prompts that ask for their first letter.

Words are the tokenizer's alphabetic tokens, as in SAE Bench 0.6.0 (sae_bench/evals/absorption/vocab.py). Its draws (the
sample, the split, the examples in a prompt) are random and unseeded; here they follow from `random_seed`. Two further
choices: "cat", " Cat" and " cat" fall on one side of the split, so no test word is known from training; and words share
a few lists of examples where SAE Bench draws one for every word, so a list runs through the model once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_research.errors import UserError
from sae_research.lm import LanguageModel, Openings
from sae_research.params import Absorption
from sae_research.store import fingerprint

LETTERS = "abcdefghijklmnopqrstuvwxyz"
TEST_FRACTION = 0.2
_ALPHABETIC = re.compile(r" ?[a-zA-Z]+")
_SHIFTED = "tokens merge across the word's edges in the template"
_REPEATED = "the word stands in every list of examples"


class Words(NamedTuple):
    """Words in their prompts. A prompt is an opening (separator and examples) and the word's own tokens (a tail)."""

    texts: list[str]
    letters: np.ndarray
    """Number of each word's first letter [words]."""
    test: np.ndarray
    """bool [words]"""
    openings: Openings
    tails: list[Tensor]
    positions: np.ndarray
    """Where in its tail a word's last token stands [words]."""
    examples: list[list[str]]
    """The words of each opening."""
    notes: dict[str, Any]

    def fingerprint(self) -> str:
        return fingerprint([self.texts, self.test.tolist(), [t.tolist() for t in self.openings.tokens],
                            list(self.openings.of), [t.tolist() for t in self.tails], self.positions.tolist()])


class _Split(NamedTuple):
    words: list[str]
    examples: list[list[str]]


def load_words(lm: LanguageModel, config: Absorption, seed: int) -> Words:
    """The words of `lm`'s tokenizer in their prompts. Raises `UserError` when none can be used."""
    vocabulary = alphabetic_words(lm.tokenizer)
    kept = vocabulary
    if config.max_words is not None and len(vocabulary) > config.max_words:
        chosen = np.random.default_rng([seed, 0]).permutation(len(vocabulary))[:config.max_words]
        kept = [vocabulary[i] for i in sorted(chosen)]
    words = in_prompts(lm, kept, config, seed)
    words.notes["alphabetic_tokens"] = len(vocabulary)
    return words


def in_prompts(lm: LanguageModel, vocabulary: list[str], config: Absorption, seed: int) -> Words:
    """Words of a sorted vocabulary, split and in their prompts. Raises `UserError` when none can be used."""
    splits = [_split([w for w in vocabulary if _is_test(w, seed) == test], config, seed, test) for test in (False, True)]
    placed, dropped = _place(splits)
    words = _tokenise(lm, config, placed, [e for split in splits for e in split.examples], dropped)
    if not words.texts:
        raise UserError(f"absorption: no word of {lm.name} can be used ({len(vocabulary)} alphabetic; "
                        f"{_reasons(dropped) or 'none dropped'}); change absorption.prompt_template")
    shortest = min(map(len, words.tails))
    words.notes.update(
        words=len(words.texts), test_words=int(words.test.sum()),
        words_of_several_tokens=sum(len(tail) > shortest for tail in words.tails),
        dropped_words=dict(dropped))
    return words


def alphabetic_words(tokenizer: Any) -> list[str]:
    """Distinct texts of tokens made of letters a-z and A-Z, with or without one space in front, in order."""
    found = set()
    for token in tokenizer.get_vocab():
        text = tokenizer.convert_tokens_to_string([token])
        if token.startswith("▁") and not text.startswith(" "):  # some tokenizers lose the space of a lone token
            text = f" {text}"
        if _ALPHABETIC.fullmatch(text):
            found.add(text)
    return sorted(found)


def _stem(word: str) -> str:
    return word.strip().lower()


def _is_test(word: str, seed: int) -> bool:
    """By hash of the word without case and space."""
    return int(fingerprint(["absorption", seed, _stem(word)])[:8], 16) / 16**8 < TEST_FRACTION


def _split(words: list[str], config: Absorption, seed: int, test: bool) -> _Split:
    generator = np.random.default_rng([seed, 1, int(test)])
    size = min(config.icl_examples, max(len(words) - 1, 0))
    examples = [[words[i] for i in generator.choice(len(words), size, replace=False)] if words else []
                for _ in range(config.icl_prompts)]
    return _Split([words[i] for i in generator.permutation(len(words))], examples)


def _place(splits: Sequence[_Split]) -> tuple[list[tuple[str, int, bool]], Counter[str]]:
    """(word, which list of examples, is it a test word), lists in turn and never one that holds the word."""
    placed, dropped, first = [], Counter[str](), 0
    for test, split in enumerate(splits):
        stems = [{_stem(word) for word in examples} for examples in split.examples]
        for turn, word in enumerate(split.words):
            order = [(turn + i) % len(stems) for i in range(len(stems))]
            free = next((i for i in order if _stem(word) not in stems[i]), None)
            if free is None:
                dropped[_REPEATED] += 1
            else:
                placed.append((word, first + free, bool(test)))
        first += len(stems)
    return placed, dropped


def whole_prompts(words: Words, config: Absorption) -> list[str]:
    """The text of every word's prompt."""
    openings, asked = prompt_texts(config, words.texts, words.examples)
    return [openings[opening] + text for opening, text in zip(words.openings.of, asked, strict=True)]


def prompt_texts(config: Absorption, words: Sequence[str], examples: Sequence[Sequence[str]]) -> tuple[list[str], list[str]]:
    """(openings, each with its solved examples; words in the template). A prompt is one of each, joined."""
    def ask(word: str) -> str:
        return config.prompt_template.replace("{word}", word)

    openings = ["".join(f"\n{ask(e)} {_stem(e)[0].upper()}" for e in group) + "\n" for group in examples]
    return openings, [ask(word) for word in words]


def _tokenise(lm: LanguageModel, config: Absorption, placed: list[tuple[str, int, bool]],
              examples: list[list[str]], dropped: Counter[str]) -> Words:
    """Prompts as ids. The position is counted from the end: what follows the word must tokenise to the same ids always."""
    def ids(texts: list[str]) -> list[list[int]]:
        return lm.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []

    openings, asked = prompt_texts(config, [word for word, _, _ in placed], examples)
    opening_ids = ids(openings)
    after = config.prompt_template.split("{word}")[1]
    after_ids = ids([after])[0] if after else []
    prompts = ids([openings[opening] + ask for (_, opening, _), ask in zip(placed, asked, strict=True)])
    kept, tails = [], []
    for (word, opening, test), whole in zip(placed, prompts, strict=True):
        head = opening_ids[opening]
        tail = whole[len(head):]
        if whole[:len(head)] != head or len(tail) <= len(after_ids) or tail[len(tail) - len(after_ids):] != after_ids:
            dropped[_SHIFTED] += 1
            continue
        kept.append((word, opening, test))
        tails.append(torch.tensor(tail))
    return Words([word for word, _, _ in kept],
                 np.array([LETTERS.index(_stem(word)[0]) for word, _, _ in kept], dtype=np.int64),
                 np.array([test for _, _, test in kept], dtype=bool),
                 Openings([torch.tensor([lm.separator_id, *head]) for head in opening_ids], [o for _, o, _ in kept]),
                 tails, np.array([len(tail) - len(after_ids) - 1 for tail in tails], dtype=np.int64), examples, {})


def _reasons(dropped: Counter[str]) -> str:
    return "; ".join(f"{count}: {why}" for why, count in dropped.items())
