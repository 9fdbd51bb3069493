"""docs/packaged.md: the cards of the packaged dictionaries as a page, with the names that a reader gave to latents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from benchmarks.pages import rendered
from sae_research.reporting.metrics import EVALS, metric_named, sort_keys
from sae_research.runtime.files import read_json, write_text
from sae_research.runtime.formatting import ABSENT, number, percent, with_interval
from sae_research.runtime.packaged import CARD, FOLDER, packaged_names

PAGE = Path("docs/packaged.md")
NAMED = Path(__file__).parent / "packaged_names.json"
TEMPLATE = "packaged.md.j2"

Card = dict[str, Any]


def write_page(root: Path = Path(".")) -> None:
    """Write the page. root: the project's folder."""
    cards = [read_json(FOLDER / name / CARD) for name in packaged_names()]
    write_text(root / PAGE, page(cards, read_json(NAMED)))


def page(cards: Sequence[Card], named: dict[str, dict[str, str | None]]) -> str:
    """The page's text. named: by dictionary, by latent, what a reader called it; null where nothing can be said."""
    return rendered(
        TEMPLATE,
        cards=cards,
        facts=facts(cards),
        metrics=metrics(cards),
        verdict=" ".join(verdict(card, named) for card in cards),
        effects=effects,
        listed=lambda card: latents(card["by_prediction"], named[card["name"]]),
        drawn=lambda card: latents(card["drawn"], named[card["name"]]),
        number=number,
    )


def facts(cards: Sequence[Card]) -> list[list[str]]:
    """What each is."""

    def rates(card: Card) -> str:
        found = card["training"]["hyper_parameters"]
        return ", ".join(f"{key} {found[key]:g}" for key in ("k", "learning_rate", "batch_size") if key in found)

    rows = [
        ["reads", *(f"`{card['reads']}`" for card in cards)],
        ["reconstructs", *(f"`{card['writes']}`" for card in cards)],
        ["model", *(f"`{card['model']}`" for card in cards)],
        ["recipe", *(f"`{card['training']['recipe']}` ({rates(card)})" for card in cards)],
        ["latents", *(f"{card['d_sae']:,}, {card['dtype']}" for card in cards)],
        ["training tokens", *(f"{card['training']['tokens']:,}, text `{card['training']['text']}`" for card in cards)],
        ["seed", *(str(card["training"]["seed"]) for card in cards)],
        ["licence", *(card["licence"] for card in cards)],
    ]
    return [["", *(f"`{card['name']}`" for card in cards)], *rows]


def metrics(cards: Sequence[Card]) -> list[list[str]]:
    """Every metric of the cards with its interval."""
    keys = {name: {key for card in cards for key in card["metrics"].get(name, {})} for name in EVALS}
    rows = []
    for evaluation, key in ((name, key) for name, found in keys.items() for key in sort_keys(found, name)):
        values = [card["metrics"].get(evaluation, {}).get(key) for card in cards]
        rows.append([metric_named(key, evaluation).label, *(ABSENT if v is None else _spelled(*v) for v in values)])
    return [["", *(f"`{card['name']}`" for card in cards)], *rows]


def _spelled(value: float, low: float | None, high: float | None) -> str:
    return with_interval(value, None if low is None or high is None else (low, high))


def effects(card: Card) -> list[list[str]]:
    """The latents found by effect."""
    rows = [["prompt", "next tokens", "latent", "it fires on", "rank", "probability before", "after", "KL"]]
    for one in card["by_effect"].values():
        tokens = " ".join(token.strip() for token in one["targets"])
        for latent in one["latents"]:
            numbers = (number(latent[key]) for key in ("before", "after", "kl"))
            fires_on = escaped(_fires_on(latent))
            rows.append([f"“{one['prompt']}”", tokens, str(latent["latent"]), fires_on, str(latent["rank"]), *numbers])
    return rows


def latents(found: Sequence[Card], named: dict[str, str | None]) -> list[list[str]]:
    """Latents with what tokens say, what a reader says, and two contexts."""
    rows = [["latent", "name given", "held-out AUC", "tokens", "contexts"]]
    for one in found:
        name = named.get(str(one["latent"])) or ABSENT
        tokens = _fires_on(one)
        contexts = " · ".join(one["contexts"][:2])
        rows.append([str(one["latent"]), name, number(one["auc"]), escaped(tokens), escaped(contexts)])
    return rows


def _fires_on(one: Card) -> str:
    return one["words"].partition(";")[0].removeprefix("fires on ")


def escaped(text: str) -> str:
    """Text inside a cell of a table, as it is."""
    return text.translate({ord(character): f"&#{ord(character)};" for character in "\\`|*_[]<>#$~&"})


def verdict(card: Card, named: dict[str, dict[str, str | None]]) -> str:
    """How many of the drawn and of the listed latents a reader could name, with a Wilson interval for the first."""
    given = named[card["name"]]
    drawn = [given[str(one["latent"])] for one in card["drawn"]]
    best = [given[str(one["latent"])] for one in card["by_prediction"]]
    count, n = sum(map(bool, drawn)), len(drawn)
    low, high = binomtest(count, n).proportion_ci(method="wilson")
    return (
        f"Of {n} latents of `{card['name']}` drawn at random one reader could name {count} from their strongest contexts "
        f"({percent(count / n)}, 95 % interval {percent(low)} to {percent(high)}), and of the {len(best)} that tokens tell "
        f"best {sum(map(bool, best))}."
    )
