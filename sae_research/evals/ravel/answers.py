"""When an answer is right.

`right_sae_bench` is SAE Bench's own function. It lets the answer be any beginning of the label ("S" for Spain) and any
continuation of it ("Nigeria" for Niger). Ours (`right`) compares whole words.
"""

from __future__ import annotations

_ALIASES = {
    "united states": ("usa", "us", "u.s", "america"),
    "united kingdom": ("uk", "u.k", "great britain", "britain", "england"),
    "south korea": ("korea",),
    "czech republic": ("czechia",),
    "chinese": ("mandarin",),
    "mandarin": ("chinese",),
    "persian": ("farsi",),
    "north america": ("america",),
}
"""Other names of a value that models answer with."""


def names(label: str) -> frozenset[str]:
    """All names of a value, in lower case: its alternatives (`Hindi,English`) and their aliases."""
    own = [part.strip() for part in label.lower().split(",")]
    return frozenset(name for part in own for name in (part, *_ALIASES.get(part, ())) if name)


def right(label: str, answer: str) -> bool:
    """Whether the answer opens with one of the label's names as whole words."""
    said = answer.strip(' "\n').split('"')[0].strip().lower().removeprefix("the ")
    return any(said.startswith(name) and not said[len(name):len(name) + 1].isalnum() for name in names(label))


def right_sae_bench(prompt: str, label: str, answer: str) -> bool:
    """SAE Bench's `evaluate_completion`."""
    from sae_bench.evals.ravel.validation import evaluate_completion

    return bool(evaluate_completion(prompt, label, answer))
