"""One latent before the judge: the windows it is shown, the two questions, how the answers are read, and the scores.

Wording and rules are SAE Bench 0.6.0's (MIT licence), to the byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_research.config.evaluation_params import Autointerp
from sae_research.evals.autointerp.client import Answer, Budget, ChatClient, Messages, NoAnswer, estimate_tokens
from sae_research.evals.autointerp.windows import Windows, n_top, n_weighted
from sae_research.lm import LanguageModel

_EXPLAIN = (
    "We're studying neurons in a neural network. Each neuron activates on some particular word/words/substring/concept in "
    "a short document. The activating words in each document are indicated with << ... >>. We will give you a list of "
    "documents on which the neuron activates, in order from most strongly activating to least strongly activating. Look at "
    "the parts of the document the neuron activates for and summarize in a single sentence what the neuron is activating "
    "on. Try not to be overly specific in your explanation. Note that some neurons will activate only on specific words or "
    "substrings, but others will activate on most/all words in a sentence provided that sentence contains some particular "
    "concept. Your explanation should cover most or all activating words (for example, don't give an explanation which is "
    "specific to a single word if all words in a sentence cause the neuron to activate). Pay attention to things like the "
    "capitalization and punctuation of the activating words or concepts, if that seems relevant. Keep the explanation as "
    "short and simple as possible, limited to 20 words or less. Omit punctuation and formatting. You should avoid giving "
    "long lists of words."
)
_DEMONSTRATIONS = (
    ' Some examples: "This neuron activates on the word \'knows\' in rhetorical questions", and "This neuron activates on '
    "verbs related to decision-making and preferences\", and \"This neuron activates on the substring 'Ent' at the start of "
    'words", and "This neuron activates on text about government economic policy".'
)
_FORM = 'Your response should be in the form "This neuron activates on...".'
_SCORE = (
    "We're studying neurons in a neural network. Each neuron activates on some particular word/words/substring/concept in "
    "a short document. You will be given a short explanation of what this neuron activates for, and then be shown {n} "
    "example sequences in random order. You will have to return a comma-separated list of the examples where you think the "
    "neuron should activate at least once, on ANY of the words or substrings in the document. For example, your response "
    'might look like "{example}". Try not to be overly specific in your interpretation of the explanation. If you think '
    'there are no examples where the neuron will activate, you should just respond with "None". You should include '
    'nothing else in your response other than comma-separated numbers or the word "None" - this is important.'
)


class Example(NamedTuple):
    """One window of text, its tokens as strings."""

    tokens: list[str]
    acts: list[float]
    """The latent's activation at each token; of a signed code, its absolute value."""
    threshold: float
    """A token counts as active above it."""

    @property
    def active(self) -> bool:
        return any(act > self.threshold for act in self.acts)

    def text(self, mark: bool) -> str:
        """The window in one line; with `mark`, active tokens stand in << >>."""
        parts = (
            f"<<{token}>>" if mark and act > self.threshold else token
            for token, act in zip(self.tokens, self.acts, strict=True)
        )
        return "".join(parts).replace("\N{REPLACEMENT CHARACTER}", "").replace("\n", "↵")


def token_strings(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token by itself; the part of a character that one token cannot show becomes U+FFFD."""
    return tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)


def _numbered(examples: Sequence[Example], mark: bool) -> str:
    return "\n".join(f"{number}. {example.text(mark)}" for number, example in enumerate(examples, start=1))


def explanation_messages(examples: Sequence[Example], demonstrations: bool) -> Messages:
    """Asks for an explanation of the windows, which are shown strongest first, active tokens marked."""
    ordered = sorted(examples, key=lambda example: max(example.acts), reverse=True)
    return [
        {"role": "system", "content": _EXPLAIN + (_DEMONSTRATIONS if demonstrations else _FORM)},
        {"role": "user", "content": f"The activating documents are given below:\n\n{_numbered(ordered, mark=True)}"},
    ]


def scoring_messages(explanation: str, examples: Sequence[Example], sample_answer: Sequence[int]) -> Messages:
    """Asks which windows activate, given the explanation. sample_answer: the numbers named as an example of the form."""
    sample = ", ".join(str(number) for number in sample_answer)
    return [
        {"role": "system", "content": _SCORE.format(n=len(examples), example=sample)},
        {
            "role": "user",
            "content": f"Here is the explanation: this neuron fires on {explanation}.\n\n"
            f"Here are the examples:\n\n{_numbered(examples, mark=False)}",
        },
    ]


def parse_explanation(answer: str) -> str:
    """What follows "activates on", without the full stop."""
    return answer.split("activates on")[-1].rstrip(".").strip()


def parse_predictions(answer: str) -> list[int] | None:
    """The numbers named, [] for "None" and for nothing at all, None where anything else stands between them.

    A digit that is no number, such as "²", is read as anything else; SAE Bench stops with an error there.
    """
    parts = answer.strip().rstrip(".").replace("and", ",").replace("None", "").split(",")
    named = [part.strip() for part in parts if part.strip()]
    if not all(part.isdigit() for part in named):
        return None
    try:
        return [int(part) for part in named]
    except ValueError:
        return None


def is_well_formed(answer: str, predictions: Sequence[int] | None, n_examples: int) -> bool:
    """Whether the judge answered the question: it said something, and named only examples that exist."""
    return bool(answer.strip()) and predictions is not None and all(1 <= number <= n_examples for number in predictions)


SCORED, UNPARSABLE, FAILED = "scored", "unparsable", "failed"


class Sheet(NamedTuple):
    """What one latent is judged by."""

    latent: int
    firings: int
    shown: list[Example]
    """Windows that the explanation is drawn from."""
    scored: list[Example]
    """Windows to be judged active or not, in the order shown."""
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
        threshold = config.act_threshold_frac * max(max(row) for row in values[: n_top(config)])
        examples = [
            Example([strings[token] for token in row], acts, threshold)
            for row, acts in zip(ids[number].tolist(), values, strict=True)
        ]
        yield deal(latent, windows.firings[number], examples, config, np.random.default_rng([seed, latent, 1]))


def deal(latent: int, firings: int, examples: list[Example], config: Autointerp, rng: np.random.Generator) -> Sheet:
    """Split windows (strongest, weighted, random, in this order) between explaining and scoring, and shuffle the latter."""
    first, last = n_top(config), n_top(config) + n_weighted(config)
    top, weighted = rng.permutation(first), first + rng.permutation(last - first)
    shown = [*top[: config.n_top_ex_for_generation], *weighted[: config.n_iw_sampled_ex_for_generation]]
    scored = [
        *top[config.n_top_ex_for_generation :],
        *weighted[config.n_iw_sampled_ex_for_generation :],
        *range(last, len(examples)),
    ]
    scored = [scored[i] for i in rng.permutation(len(scored))]
    sample = 1 + rng.choice(len(scored), config.n_top_ex_for_scoring + config.n_iw_sampled_ex_for_scoring, replace=False)
    return Sheet(
        latent,
        firings,
        [examples[i] for i in shown],
        [examples[i] for i in scored],
        [bool(i >= last) for i in scored],
        sorted(sample.tolist()),
    )


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
    record: dict[str, Any] = {
        "latent": sheet.latent,
        "firings": sheet.firings,
        "state": FAILED,
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "cut_off": 0,
    }
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
    """Fractions of windows classified correctly. SAE Bench's: random windows count as inactive, an empty answer as
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
        rates = [
            _agreement([p for p, a in zip(named, active, strict=True) if a == kind], [kind] * active.count(kind))
            for kind in (True, False)
        ]
        found["balanced_score"] = sum(rates) / 2
    return found


def _numbers(flags: list[bool]) -> list[int]:
    return [number for number, flag in enumerate(flags, start=1) if flag]


def _agreement(predicted: list[bool], true: list[bool]) -> float:
    return sum(p == t for p, t in zip(predicted, true, strict=True)) / len(true)
