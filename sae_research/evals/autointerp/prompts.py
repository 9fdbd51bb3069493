"""What the judge is asked and how its answers are read: SAE Bench 0.6.0's wording (MIT licence) and rules, to the byte."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from sae_research.llm_budget import Messages

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
    "long lists of words.")
_DEMONSTRATIONS = (
    " Some examples: \"This neuron activates on the word 'knows' in rhetorical questions\", and \"This neuron activates on "
    "verbs related to decision-making and preferences\", and \"This neuron activates on the substring 'Ent' at the start of "
    "words\", and \"This neuron activates on text about government economic policy\".")
_FORM = "Your response should be in the form \"This neuron activates on...\"."
_SCORE = (
    "We're studying neurons in a neural network. Each neuron activates on some particular word/words/substring/concept in "
    "a short document. You will be given a short explanation of what this neuron activates for, and then be shown {n} "
    "example sequences in random order. You will have to return a comma-separated list of the examples where you think the "
    "neuron should activate at least once, on ANY of the words or substrings in the document. For example, your response "
    "might look like \"{example}\". Try not to be overly specific in your interpretation of the explanation. If you think "
    "there are no examples where the neuron will activate, you should just respond with \"None\". You should include "
    "nothing else in your response other than comma-separated numbers or the word \"None\" - this is important.")


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
        parts = (f"<<{token}>>" if mark and act > self.threshold else token
                 for token, act in zip(self.tokens, self.acts, strict=True))
        return "".join(parts).replace("\N{REPLACEMENT CHARACTER}", "").replace("\n", "↵")


def token_strings(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token by itself; the part of a character that one token cannot show becomes U+FFFD."""
    return tokenizer.batch_decode([[token] for token in ids], clean_up_tokenization_spaces=False)


def _numbered(examples: Sequence[Example], mark: bool) -> str:
    return "\n".join(f"{number}. {example.text(mark)}" for number, example in enumerate(examples, start=1))


def explanation_messages(examples: Sequence[Example], demonstrations: bool) -> Messages:
    """Asks for an explanation of the windows, which are shown strongest first, active tokens marked."""
    ordered = sorted(examples, key=lambda example: max(example.acts), reverse=True)
    return [{"role": "system", "content": _EXPLAIN + (_DEMONSTRATIONS if demonstrations else _FORM)},
            {"role": "user", "content": f"The activating documents are given below:\n\n{_numbered(ordered, mark=True)}"}]


def scoring_messages(explanation: str, examples: Sequence[Example], sample_answer: Sequence[int]) -> Messages:
    """Asks which windows activate, given the explanation. sample_answer: the numbers named as an example of the form."""
    sample = ", ".join(str(number) for number in sample_answer)
    return [{"role": "system", "content": _SCORE.format(n=len(examples), example=sample)},
            {"role": "user", "content": f"Here is the explanation: this neuron fires on {explanation}.\n\n"
                                        f"Here are the examples:\n\n{_numbered(examples, mark=False)}"}]


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
