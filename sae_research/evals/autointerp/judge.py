"""One latent before the judge: the windows it is shown, the two questions, and what its answers are worth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_research.evals.autointerp.prompts import (
    Example,
    explanation_messages,
    is_well_formed,
    parse_explanation,
    parse_predictions,
    scoring_messages,
    token_strings,
)
from sae_research.evals.autointerp.windows import Windows, n_top, n_weighted
from sae_research.llm_budget import Budget, Messages, estimate_tokens
from sae_research.llm_client import Answer, ChatClient, NoAnswer
from sae_research.lm import LanguageModel
from sae_research.params import Autointerp

SCORED, UNPARSABLE, FAILED = "scored", "unparsable", "failed"


class Sheet(NamedTuple):
    """What one latent is judged by."""

    latent: int
    firings: int
    shown: list[Example]
    """Windows that the explanation is drawn from."""
    scored: list[Example]
    """Windows to be told apart, in the order shown."""
    drawn_at_random: list[bool]
    """Which of them are random ones: SAE Bench takes these for inactive, whatever they hold."""
    sample_answer: list[int]

    def explanation_question(self, config: Autointerp) -> Messages:
        return explanation_messages(self.shown, config.use_demos_in_explanation)

    def scoring_question(self, explanation: str) -> Messages:
        return scoring_messages(explanation, self.scored, self.sample_answer)

    def active(self) -> list[bool]:
        """Which windows to be scored the latent fires in."""
        return [example.active for example in self.scored]

    def active_for_sae_bench(self) -> list[bool]:
        return [example.active and not random for example, random in zip(self.scored, self.drawn_at_random, strict=True)]


def make_sheets(windows: Windows, tokens: Tensor, lm: LanguageModel, config: Autointerp, seed: int) -> Iterator[Sheet]:
    """A sheet for each chosen latent. tokens: the contexts that the windows are cut from [contexts, context size]."""
    size, offsets = tokens.shape[1], torch.arange(-config.buffer, config.buffer + 1)
    centres = windows.positions[..., None]
    ids = tokens[centres // size, centres % size + offsets]  # [latents, windows, width]
    unique = ids.unique().tolist()
    strings = dict(zip(unique, token_strings(lm.tokenizer, unique), strict=True))
    for number, latent in enumerate(windows.latents):
        values = windows.values[number].float().tolist()
        threshold = config.act_threshold_frac * max(max(row) for row in values[:n_top(config)])
        examples = [Example([strings[token] for token in row], acts, threshold)
                    for row, acts in zip(ids[number].tolist(), values, strict=True)]
        yield deal(latent, windows.firings[number], examples, config, np.random.default_rng([seed, latent, 1]))


def deal(latent: int, firings: int, examples: list[Example], config: Autointerp, rng: np.random.Generator) -> Sheet:
    """Split windows (strongest, weighted, random, in this order) between explaining and scoring, and shuffle the latter."""
    first, last = n_top(config), n_top(config) + n_weighted(config)
    top, weighted = rng.permutation(first), first + rng.permutation(last - first)
    shown = [*top[:config.n_top_ex_for_generation], *weighted[:config.n_iw_sampled_ex_for_generation]]
    scored = [*top[config.n_top_ex_for_generation:], *weighted[config.n_iw_sampled_ex_for_generation:],
              *range(last, len(examples))]
    scored = [scored[i] for i in rng.permutation(len(scored))]
    sample = 1 + rng.choice(len(scored), config.n_top_ex_for_scoring + config.n_iw_sampled_ex_for_scoring, replace=False)
    return Sheet(latent, firings, [examples[i] for i in shown], [examples[i] for i in scored],
                 [bool(i >= last) for i in scored], sorted(sample.tolist()))


def prediction_limit(config: Autointerp) -> int:
    """Tokens that an answer to the second question may have."""
    n = config.n_top_ex_for_scoring + config.n_iw_sampled_ex_for_scoring + config.n_random_ex_for_scoring
    return config.max_tokens_in_prediction or 2 * n + 5


# --- what it will cost -------------------------------------------------------------------------

def budgets(sheet: Sheet, client: ChatClient, config: Autointerp) -> tuple[Budget, Budget]:
    """(all of one latent's questions, those without a kept answer). An explanation not yet written counts with the
    length it may have."""
    question, limit = sheet.explanation_question(config), prediction_limit(config)
    placeholder = "word " * config.max_tokens_in_explanation
    first, second = estimate_tokens(question), estimate_tokens(sheet.scoring_question(placeholder))
    everything = Budget().plus(first, config.max_tokens_in_explanation).plus(second, limit)
    kept = client.kept(question, config.max_tokens_in_explanation)
    if kept is None:
        return everything, everything
    explanation = parse_explanation(kept.text)
    if not explanation or client.kept(sheet.scoring_question(explanation), limit) is not None:
        return everything, Budget()
    return everything, Budget().plus(second, limit)


# --- the two questions -------------------------------------------------------------------------

def judge(sheet: Sheet, client: ChatClient, config: Autointerp) -> dict[str, Any]:
    """What became of one latent, as JSON takes it: its `state` (scored, unparsable, failed), explanation, predictions and
    scores in both definitions, each where there is one."""
    record: dict[str, Any] = {"latent": sheet.latent, "firings": sheet.firings, "state": FAILED,
                              "prompt_tokens": 0, "completion_tokens": 0, "cut_off": 0}
    try:
        answer = client.ask(sheet.explanation_question(config), config.max_tokens_in_explanation)
        _account(record, answer)
        record["explanation"] = explanation = parse_explanation(answer.text)
        if not explanation:
            return {**record, "state": UNPARSABLE, "why": "the explanation is empty"}
        answer = client.ask(sheet.scoring_question(explanation), prediction_limit(config))
        _account(record, answer)
    except NoAnswer as reason:
        return {**record, "why": str(reason)}
    return record | _scores(sheet, answer.text)


def _account(record: dict[str, Any], answer: Answer) -> None:
    record["prompt_tokens"] += answer.prompt_tokens or 0
    record["completion_tokens"] += answer.completion_tokens or 0
    record["cut_off"] += answer.finish_reason == "length"


def _scores(sheet: Sheet, answer: str) -> dict[str, Any]:
    """Fractions of windows told apart correctly. SAE Bench's: random windows count as inactive, an empty answer as
    "None", numbers beyond the last window as nothing. Ours: every window counts as what it is, and such answers are none."""
    predictions, n = parse_predictions(answer), len(sheet.scored)
    active, bench_active = sheet.active(), sheet.active_for_sae_bench()
    found: dict[str, Any] = {"answer": answer, "active": _numbers(active), "active_sae_bench": _numbers(bench_active)}
    if predictions is not None:
        named = [number in predictions for number in range(1, n + 1)]
        found |= {"predictions": predictions, "score_sae_bench": _agreement(named, bench_active)}
    if predictions is None or not is_well_formed(answer, predictions, n):
        return found | {"state": UNPARSABLE, "why": f"the answer {answer[:80]!r} is no list of examples"}
    found |= {"state": SCORED, "score": _agreement(named, active)}
    if any(active) and not all(active):
        rates = [_agreement([p for p, a in zip(named, active, strict=True) if a == kind], [kind] * active.count(kind))
                 for kind in (True, False)]
        found["balanced_score"] = sum(rates) / 2
    return found


def _numbers(flags: list[bool]) -> list[int]:
    return [number for number, flag in enumerate(flags, start=1) if flag]


def _agreement(predicted: list[bool], true: list[bool]) -> float:
    return sum(p == t for p, t in zip(predicted, true, strict=True)) / len(true)
