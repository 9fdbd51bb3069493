"""Words, their split, the prompts that ask for their first letter, and every SAE's latents at the words.

Words are the tokenizer's alphabetic tokens, as in SAE Bench 0.6.0 (sae_bench/evals/absorption/vocab.py). Its draws (the
sample, the split, the examples in a prompt) are random and unseeded; here they follow from `random_seed`. Two further
choices: "cat", " Cat" and " cat" fall on one side of the split, so no test word is known from training; and words share
a few lists of examples where SAE Bench draws one for every word, so a list runs through the model once.

Latents come from one encode per word and SAE. An encoder that works token by token reads the word's token alone. One that
works on sequences reads the whole prompt under `token_mask` (no separator, no first position, no sinks), and its latents at
the word are taken. The word itself always counts, whatever its norm, since the question is about it. SAE Bench 0.6.0 hands
every encoder the bare vector of the word, so it has no definition for encoders of sequences.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from tqdm import tqdm

from sae_research.config.evaluation_params import Absorption
from sae_research.config.params import Params
from sae_research.lm import ActivationPool, Batch, LanguageModel, SharedPrefixes, collect, token_mask
from sae_research.lm.activations import HookActivations
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import fingerprint
from sae_research.saes import SparseAutoencoder, encode_each

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
    openings: SharedPrefixes
    tails: list[Tensor]
    positions: np.ndarray
    """Where in its tail a word's last token stands [words]."""
    examples: list[list[str]]
    """The words of each opening."""
    notes: dict[str, Any]

    def fingerprint(self) -> str:
        return fingerprint(
            [
                self.texts,
                self.test.tolist(),
                [t.tolist() for t in self.openings.tokens],
                list(self.openings.of),
                [t.tolist() for t in self.tails],
                self.positions.tolist(),
            ]
        )


class _Split(NamedTuple):
    words: list[str]
    examples: list[list[str]]


def load_words(lm: LanguageModel, config: Absorption, seed: int) -> Words:
    """The words of `lm`'s tokenizer in their prompts. Raises `UserError` when none can be used."""
    vocabulary = alphabetic_words(lm.tokenizer)
    kept = vocabulary
    if config.max_words is not None and len(vocabulary) > config.max_words:
        chosen = np.random.default_rng([seed, 0]).permutation(len(vocabulary))[: config.max_words]
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
        raise UserError(
            f"absorption: no word of {lm.name} can be used ({len(vocabulary)} alphabetic; "
            f"{_reasons(dropped) or 'none dropped'}); change absorption.prompt_template"
        )
    shortest = min(map(len, words.tails))
    words.notes.update(
        words=len(words.texts),
        test_words=int(words.test.sum()),
        words_of_several_tokens=sum(len(tail) > shortest for tail in words.tails),
        dropped_words=dict(dropped),
    )
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
    examples = [
        [words[i] for i in generator.choice(len(words), size, replace=False)] if words else []
        for _ in range(config.icl_prompts)
    ]
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


def _tokenise(
    lm: LanguageModel,
    config: Absorption,
    placed: list[tuple[str, int, bool]],
    examples: list[list[str]],
    dropped: Counter[str],
) -> Words:
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
        tail = whole[len(head) :]
        if whole[: len(head)] != head or len(tail) <= len(after_ids) or tail[len(tail) - len(after_ids) :] != after_ids:
            dropped[_SHIFTED] += 1
            continue
        kept.append((word, opening, test))
        tails.append(torch.tensor(tail))
    return Words(
        [word for word, _, _ in kept],
        np.array([LETTERS.index(_stem(word)[0]) for word, _, _ in kept], dtype=np.int64),
        np.array([test for _, _, test in kept], dtype=bool),
        SharedPrefixes([torch.tensor([lm.separator_id, *head]) for head in opening_ids], [o for _, o, _ in kept]),
        tails,
        np.array([len(tail) - len(after_ids) - 1 for tail in tails], dtype=np.int64),
        examples,
        {},
    )


def _reasons(dropped: Counter[str]) -> str:
    return "; ".join(f"{count}: {why}" for why, count in dropped.items())


_BATCH_ELEMENTS = 16_000_000
"""Largest [words, seq, d_sae] block of latents held at a time (64 MB in float32)."""
_TAILS = 4
"""Prompts without their openings are short: this many times the model's batch run together."""


class _Prompts(NamedTuple):
    """Whole prompts of one opening."""

    index: Tensor
    tokens: Tensor
    real: Tensor
    acts: Tensor
    at: Tensor
    """Position of each word [batch]."""


class WordActivations:
    """Activations at `hook` of the words in their prompts."""

    def __init__(self, lm: LanguageModel, hook: str, words: Words, params: Params) -> None:
        self.lm, self.hook, self.words, self.params = lm, hook, words, params

    @cached_property
    def vectors(self) -> Tensor:
        """Activation of every word's last token [words, d_in], float32 on the CPU. What follows it does not run."""
        up_to = [tail[: at + 1] for tail, at in zip(self.words.tails, self.words.positions, strict=True)]
        found = self._run(up_to)
        return found.flat[found.offsets[1:] - 1].float()

    @cached_property
    def openings(self) -> HookActivations:
        return HookActivations(self.lm, self.hook, self.words.openings.tokens, self.params)

    @cached_property
    def tails(self) -> ActivationPool:
        """Activations of what follows the openings, whole."""
        return self._run(self.words.tails)

    def _run(self, tails: Sequence[Tensor]) -> ActivationPool:
        return collect(
            self.lm,
            self.hook,
            tails,
            self.params.model.llm_batch_size * _TAILS,
            self.params.activation_caching,
            "words",
            self.words.openings,
        )

    def latents(self, saes: dict[str, SparseAutoencoder]) -> dict[str, sparse.csr_matrix]:
        """Latents at the words, float32 [words, d_sae], of SAEs of one family, which encode together."""
        size = max(1, _BATCH_ELEMENTS // max(sae.cfg.d_sae for sae in saes.values()))
        encoded = self._token_level(saes, size) if all(s.per_token for s in saes.values()) else self._whole(saes, size)
        parts: dict[str, list[Any]] = {name: [] for name in saes}
        order = []
        for index, latents in tqdm(encoded, "encode", unit="batch", leave=False, disable=None, dynamic_ncols=True):
            order.append(index)
            for name, z in latents:
                parts[name].append(sparse.csr_matrix(z.float().cpu().numpy()))
        back = np.argsort(np.concatenate(order))
        return {name: sparse.vstack(rows, format="csr")[back] for name, rows in parts.items()}

    def _token_level(
        self, saes: dict[str, SparseAutoencoder], size: int
    ) -> Iterator[tuple[np.ndarray, Iterator[tuple[str, Tensor]]]]:
        for index in torch.arange(len(self.vectors)).split(size):
            x = self.vectors[index][:, None].to(self.lm.device)
            yield index.numpy(), ((name, z[:, 0]) for name, z in encode_each(saes, x, None))

    def _whole(
        self, saes: dict[str, SparseAutoencoder], size: int
    ) -> Iterator[tuple[np.ndarray, Iterator[tuple[str, Tensor]]]]:
        longest = max(map(len, self.words.openings.tokens)) + max(map(len, self.words.tails))
        for batch in self._prompts(max(1, min(size // longest, self.params.model.llm_batch_size * _TAILS))):
            mask = batch.real & token_mask(
                self.lm, batch.tokens, batch.acts, self.params.token_mask, self.openings.median_norm
            )
            rows = torch.arange(len(batch.at), device=mask.device)
            mask[rows, batch.at] = True
            yield batch.index.numpy(), ((name, z[rows, batch.at]) for name, z in encode_each(saes, batch.acts, mask))

    def _prompts(self, batch_size: int) -> Iterator[_Prompts]:
        of = np.asarray(self.words.openings.of)
        for number in range(len(self.openings)):
            head = self.openings.pool.batch([number])
            for tail in self.tails.batches(batch_size, np.flatnonzero(of == number).tolist()):
                yield _joined(head, tail, torch.from_numpy(self.words.positions))


def _joined(head: Batch, tail: Batch, positions: Tensor) -> _Prompts:
    """One opening in front of every tail."""

    def join(one: Tensor, many: Tensor) -> Tensor:
        return torch.cat([one.expand(len(many), *one.shape[1:]), many], dim=1)

    at = head.tokens.shape[1] + positions[tail.index].to(tail.tokens.device)
    return _Prompts(tail.index, join(head.tokens, tail.tokens), join(head.real, tail.real), join(head.acts, tail.acts), at)
