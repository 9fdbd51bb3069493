"""Seconds for unlearning of several SAEs: ours against SAE Bench 0.6.0.

Run `python -m benchmarks unlearning`.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import stock_unlearning
from benchmarks.open_book import open_book_rows
from sae_research.config.params import Params
from sae_research.evals.harness import by_hook
from sae_research.evals.unlearning.evaluation import Clamping, Material, Record
from sae_research.evals.unlearning.prompts import Known, Prompt, find_known, question_text
from sae_research.lm import LanguageModel
from sae_research.saes import SparseAutoencoder
from sae_research.saes.base import Guard
from sae_research.text.questions import Question, topic_documents
from sae_research.text.tokens import pack_documents

PROMPT_FORMAT = "<|endoftext|>{prompt}\n"
SETS = {stock_unlearning.FORGET_SET: "biology", "other_science": "other science"}


def compare(
    saes: dict[str, SparseAutoencoder],
    lm: LanguageModel,
    model: object,
    params: Params,
    questions: int = 4,
    contexts: int = 16,
) -> dict[str, tuple[float, float]]:
    """(our seconds, SAE Bench's) for all `saes` together, from densities to every configuration's answers, nothing cached
    beforehand.

    Counted: densities on both corpora (`contexts` each), the choice of latents, and `questions` four-choice questions of
    each of two sets under every configuration of `params`. Both sides are told which questions to ask (the model knows
    none under all orders; these it answers rightly in the order given). Finding known questions and loading the model
    count on neither side. Ours scores both definitions.
    """
    config = params.unlearning
    params = params.model_copy(
        update={"activation_caching": params.activation_caching.model_copy(update={"enabled": False})}
    )
    os.environ["SAE_RESEARCH_NO_CACHE"] = "1"
    corpora = {
        side: _contexts(lm, name, params, contexts)
        for side, name in (("forget", config.forget_corpus), ("retain", config.retain_corpus))
    }
    asked, material = _questions(lm, questions, params, corpora)
    known = {name: list(range(questions)) for name in asked}
    start = time.perf_counter()
    ours = {
        name: record
        for members in by_hook(saes)
        for name, record in Guard(None).each(
            {name: saes[name] for name in members.infos}, Clamping(lm, members.hook, params, material).score
        )
    }
    our_time, start = time.perf_counter() - start, time.perf_counter()
    theirs = {}
    for name, sae in saes.items():
        with tempfile.TemporaryDirectory() as artifacts:
            theirs[name] = stock_unlearning.unlearning(
                sae, model, corpora, asked, PROMPT_FORMAT, config, params.model.llm_batch_size, Path(artifacts), known
            )
    their_time = time.perf_counter() - start
    for name in saes:
        print(f"unlearning, {name}: {_agreement(ours[name], theirs[name], list(asked))}")
    return {f"unlearning, {len(saes)} SAEs, {2 * questions} questions": (our_time, their_time)}


def _questions(
    lm: LanguageModel, n: int, params: Params, corpora: dict[str, torch.Tensor]
) -> tuple[dict[str, list[dict[str, Any]]], Material]:
    """`n` questions a set that the model answers rightly in the order given, as rows and as prompts."""
    asked: dict[str, list[dict[str, Any]]] = {}
    found: list[Known] = []
    rows = open_book_rows(40 * n)
    for name, subject in SETS.items():
        prompts = [_prompt(lm, row, subject) for row in rows]
        known = find_known(
            lm, name, [lambda prompt=prompt: iter([prompt]) for prompt in prompts], n, params.model.llm_batch_size
        )
        found.append(known)
        asked[name] = [rows[number] for number in known.known]
        rows = [row for number, row in enumerate(rows) if number not in known.known]
    return asked, Material(corpora, found[:1], found[1:])


def _contexts(lm: LanguageModel, name: str, params: Params, contexts: int) -> torch.Tensor:
    size = params.unlearning.seq_len
    documents = topic_documents(name, params.unlearning.corpus_column, 5 * size, params.random_seed)
    return pack_documents(lm.tokenizer, lm.separator_id, iter(documents), size, contexts).tokens


def _prompt(lm: LanguageModel, row: dict[str, Any], subject: str) -> Prompt:
    """SAE Bench's prompt for a question with its choices in the given order."""
    question = Question(str(row["question"]), tuple(row["choices"]), int(row["answer"]))
    text = PROMPT_FORMAT.format(prompt=question_text(question, range(4), subject)) + "Answer: ("
    letters = tuple(
        (lm.tokenizer.convert_tokens_to_ids(letter), lm.tokenizer(f" {letter}")["input_ids"][0]) for letter in "ABCD"
    )
    return Prompt(torch.tensor(lm.tokenizer(text)["input_ids"]), letters, question.answer)


def _agreement(ours: Record, theirs: dict[str, Any], sets: list[str]) -> str:
    """How many answers, over all configurations in SAE Bench's definition, both sides judge alike."""
    same = total = 0
    for entry in theirs["configurations"]:
        own = next(
            c
            for c in ours["sae_bench"]
            if (c["retain_threshold"], len(c["latents"]), c["multiplier"])
            == (entry["retain_threshold"], entry["n_features"], entry["multiplier"])
        )
        correct = [value for name in sets for value in entry["sets"][name]["correct"]]
        judged = [int(digit) for digit in own["forget"] + own["retain"]]
        same += sum(a == b for a, b in zip(judged, correct, strict=True))
        total += len(correct)
    return f"{same} of {total} answers judged alike"
