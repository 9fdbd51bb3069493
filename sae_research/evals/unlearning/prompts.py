"""Questions as prompts, and which of them the model knows.

A prompt ends where the answer begins: the answer is the option whose token is the most probable next one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from sae_research.lm import LanguageModel
from sae_research.runtime.errors import UserError
from sae_research.text.questions import LETTERS, Question, distractors, load_question_set, science_questions

PACKAGED_QUESTIONS = {"packaged_biomedical": "biomedical", "packaged_other_science": "other"}
"""Names of the stand-in's question sets -> topic."""
N_DISTRACTORS = 3
_CHUNK = 64
"""Questions asked at a time: no more are asked once enough are known."""


class Prompt(NamedTuple):
    """One wording of one question."""

    tokens: Tensor
    """Ids [seq]"""
    options: tuple[tuple[int, ...], ...]
    """Per option the ids that stand for it; the most probable of them counts."""
    answer: int
    """Index of the right option."""


Wordings = Callable[[], Iterator[Prompt]]
"""All wordings of one question, one at a time: a model that errs on one is not asked the next."""


class Known(NamedTuple):
    """The questions of one set that the model knows."""

    name: str
    prompts: list[Prompt]
    """The first wording of each: what is asked again after an intervention."""
    asked: int
    known: list[int]
    """Numbers of the known questions within the set."""


def wordings(lm: LanguageModel, name: str, prompt_format: str) -> list[Wordings]:
    """Every question of a set. A packaged set gives one wording each, any other all orders of its choices.

    Raises `UserError` for a set that cannot be read, a chat format the tokenizer lacks, or letters that are no tokens.
    """
    if name in PACKAGED_QUESTIONS:
        return _word_questions(lm, PACKAGED_QUESTIONS[name])
    questions = load_question_set(name)
    word = _wording(lm, prompt_format)
    letters = [_single_tokens(lm, letter, f" {letter}") for letter in LETTERS]
    if not all(letters):
        raise UserError(f"unlearning: the tokenizer of {lm.name} has no single token for each of {', '.join(LETTERS)}")

    def orders(question: Question) -> Wordings:
        return lambda: _letter_prompts(question, questions.subject, word, letters)

    return [orders(question) for question in questions.questions]


def find_known(lm: LanguageModel, name: str, questions: Sequence[Wordings], limit: int | None, batch_size: int) -> Known:
    """Ask until `limit` questions are known, or all: known is a question answered rightly in every wording."""
    known: list[int] = []
    prompts: list[Prompt] = []
    asked = 0
    with tqdm(total=len(questions), desc=f"ask {name}", unit="question", dynamic_ncols=True) as bar:
        for start in range(0, len(questions), _CHUNK):
            chunk = range(start, min(start + _CHUNK, len(questions)))
            asked = chunk.stop
            for number, first in sorted(_right_throughout(lm, {i: questions[i]() for i in chunk}, batch_size).items()):
                if limit is None or len(known) < limit:
                    known.append(number)
                    prompts.append(first)
            bar.update(len(chunk))
            if limit is not None and len(known) >= limit:
                break
    return Known(name, prompts, asked, known)


def answers(last_logits: Tensor, prompts: Sequence[Prompt]) -> list[int]:
    """The option chosen in each row. last_logits: [batch, vocab] at the prompts' last tokens."""
    return [
        int(torch.stack([row[list(ids)].max() for ids in prompt.options]).argmax())
        for row, prompt in zip(last_logits.float().cpu(), prompts, strict=True)
    ]


def last_positions(prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
    """The distinct positions [n] of last tokens, and which of them is each prompt's [batch]."""
    return torch.tensor([len(prompt.tokens) - 1 for prompt in prompts]).unique(return_inverse=True)


def _right_throughout(lm: LanguageModel, pending: dict[int, Iterator[Prompt]], batch_size: int) -> dict[int, Prompt]:
    """Question number -> first wording, of the questions answered rightly in every wording."""
    first: dict[int, Prompt] = {}
    done: dict[int, Prompt] = {}
    while pending:
        current = {number: prompt for number, words in pending.items() if (prompt := next(words, None)) is not None}
        done |= {number: first[number] for number in pending if number not in current}
        first |= {number: prompt for number, prompt in current.items() if number not in first}
        right = _right(lm, list(current.values()), batch_size)
        pending = {number: pending[number] for number, ok in zip(current, right, strict=True) if ok}
    return done


def _right(lm: LanguageModel, prompts: list[Prompt], batch_size: int) -> list[bool]:
    right = [False] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].tokens))
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = [prompts[i] for i in rows]
        positions, own = last_positions(batch)
        tokens = torch.nn.utils.rnn.pad_sequence([p.tokens for p in batch], batch_first=True, padding_value=lm.separator_id)
        logits = lm.logits(tokens, positions)[torch.arange(len(batch)), own.to(lm.device)]
        for i, prompt, chosen in zip(rows, batch, answers(logits, batch), strict=True):
            right[i] = chosen == prompt.answer
    return right


# --- letters ---------------------------------------------------------------------------------


def question_text(question: Question, order: Sequence[int], subject: str) -> str:
    """SAE Bench's wording of a question with its choices in `order`, lettered."""
    choices = "".join(f"\n{letter}. {question.choices[i]}" for letter, i in zip(LETTERS, order, strict=False))
    return f"The following are multiple choice questions (with answers) about {subject}.\n{question.text}{choices}"


def _letter_prompts(
    question: Question, subject: str, word: Callable[[str], Tensor], letters: Sequence[tuple[int, ...]]
) -> Iterator[Prompt]:
    """A prompt per order of the choices, the given order first."""
    for order in permutations(range(len(question.choices))):
        yield Prompt(
            word(question_text(question, order, subject)), tuple(letters[: len(order)]), order.index(question.answer)
        )


def _wording(lm: LanguageModel, prompt_format: str) -> Callable[[str], Tensor]:
    """Ids of a question's text with what leads to the letter, as SAE Bench has it with and without a chat format."""
    if prompt_format == "chat" and not lm.tokenizer.chat_template:
        raise UserError(f"unlearning.prompt_format: {lm.name} has no chat template; use auto or plain")
    chat = prompt_format == "chat" or (prompt_format == "auto" and bool(lm.tokenizer.chat_template))

    def word(text: str) -> Tensor:
        if not chat:
            return _ids(lm, f"{text}\nAnswer:", [lm.separator_id])
        turns = [{"role": "user", "content": text}]
        opening: Any = lm.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return _ids(lm, f"{opening}Answer: (", [])

    return word


def _ids(lm: LanguageModel, text: str, before: list[int]) -> Tensor:
    return torch.tensor([*before, *lm.tokenizer(text, add_special_tokens=False)["input_ids"]])


def _single_tokens(lm: LanguageModel, *texts: str) -> tuple[int, ...]:
    """Ids of those texts that are one token each."""
    encoded = [lm.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return tuple(dict.fromkeys(ids[0] for ids in encoded if len(ids) == 1))


# --- the stand-in's one-word answers ----------------------------------------------------------


def _word_questions(lm: LanguageModel, topic: str) -> list[Wordings]:
    """The packaged questions on a topic whose true answer is one token, against answers of others of them.

    The options share the question, so the most probable option makes the most probable statement; and as each is one
    token, one pass over the question compares them all.
    """
    token = {question: _single_tokens(lm, f" {question.answer}") for question in science_questions(topic)}
    questions = [question for question, ids in token.items() if ids]
    id_of = {question.answer: token[question] for question in questions}
    result: list[Wordings] = []
    for question in questions:
        false = distractors(question, list(id_of), N_DISTRACTORS)
        if len(false) == N_DISTRACTORS:
            prompt = Prompt(
                _ids(lm, f"Question: {question.text}\nAnswer (one word):", [lm.separator_id]),
                tuple(id_of[word] for word in (question.answer, *false)),
                0,
            )
            result.append(lambda prompt=prompt: iter([prompt]))
    return result
