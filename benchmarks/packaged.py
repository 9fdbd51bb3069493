"""The dictionaries that come with the package: rounded into it, evaluated as they are there, and described by a card.

    make repro PRESET=packaged_training         # in one clone: trains them
    python -m benchmarks.packaged take CLONE    # rounds their weights into sae_research/packaged
    make repro PRESET=packaged                  # in another clone: evaluates them as they are there
    python -m benchmarks.packaged card CLONE    # their cards, from that run
    python -m benchmarks.packaged page          # docs/packaged.md, from the cards and the names given to latents

A card is `sae_research/packaged/NAME/card.json`. Names that a reader gave to latents are in `packaged_names.json`, by
hand: no program can tell whether a person can name a latent.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.packaged_page import write_page
from sae_research.analysis.context import AnalysisContext
from sae_research.analysis.effects import search_by_effect
from sae_research.analysis.explain import Explanation, Rule, explain_latents
from sae_research.analysis.store import LatentStats
from sae_research.config.params import load_params
from sae_research.reporting.rows import Row, read_run
from sae_research.runtime.files import file_sha256, round_significant, slugify, write_json
from sae_research.runtime.packaged import CARD, FOLDER, PREFIX
from sae_research.saes import load_sae, save_sae
from sae_research.saes.files import WEIGHTS_FILE

LICENCE = "MIT, as the project; the model it was trained on is Apache 2.0"
NAMES = ("smollm2-135m-l8", "smollm2-135m-l8-mlp")
EVALUATIONS = {
    "core": ("l0", "variance_explained", "loss_recovered", "kl", "fraction_alive"),
    "sparse_probing": ("sae_top_1_accuracy", "sae_top_5_accuracy"),
    "sparse_probing_sae_probes": ("sae_probes_top_1_accuracy", "sae_probes_top_5_accuracy"),
    "absorption": ("absorption_fraction", "full_absorption", "letters"),
}
"""What a card says of each evaluation."""
PROMPTS = {
    "weekdays": ("I will see you on", [" Monday", " Tuesday", " Wednesday", " Thursday", " Friday", " Saturday", " Sunday"]),
    "months": ("The meeting was held in", [" January", " March", " April", " June", " July", " October", " December"]),
    "colours": ("She painted the door", [" red", " blue", " green", " white", " black", " yellow"]),
    "family": ("At dinner he thanked his", [" mother", " father", " wife", " brother", " sister", " son"]),
    "body": ("He hurt his", [" leg", " arm", " foot", " head", " hand", " back"]),
}
"""Prompts and target tokens whose latents are found by effect."""
LISTED, DRAWN = 25, 30
MIN_FIRINGS = 100
"""Of a latent that may be listed: rarer ones predict well by chance."""
CONTEXTS = 4
SPELLED = 4
"""Tokens that say what a latent fires on."""


def take(root: Path) -> None:
    """Round the trained dictionaries of a clone into the package."""
    for name in NAMES:
        sae = load_sae(root / "trained_saes" / slugify(name))
        save_sae(sae, FOLDER / name, torch.bfloat16)
        print(f"{name}: {(FOLDER / name / WEIGHTS_FILE).stat().st_size / 1e6:.1f} MB")


def card(root: Path) -> None:
    """Write the cards from a run of `presets/packaged.txt` in a clone, and from statistics of latents collected here."""
    params = load_params(root / "params.yaml")
    rows = {row.name: row for row in read_run(root).rows}
    for name in NAMES:
        analysis = AnalysisContext.of({slugify(name): f"{PREFIX}{name}"}, params=params)
        write_json(FOLDER / name / CARD, round_significant(card_of(name, rows[slugify(name)], analysis)))


def card_of(name: str, row: Row, analysis: AnalysisContext) -> dict[str, Any]:
    """What there is to say of one dictionary."""
    key, sae = analysis.only
    stats = analysis.stats(key, progress=True)
    provenance = sae.cfg.provenance
    explained = {one.latent: one for one in explain_latents(analysis, key)}
    steers = not sae.cfg.is_transcoder
    return {
        "name": name,
        "licence": LICENCE,
        "model": sae.cfg.model_name,
        "reads": sae.cfg.hook_name,
        "writes": sae.cfg.hook_out or sae.cfg.hook_name,
        "architecture": sae.cfg.architecture,
        "d_in": sae.cfg.d_in,
        "d_sae": sae.cfg.d_sae,
        "dtype": sae.cfg.dtype,
        "sha256": file_sha256(FOLDER / name / WEIGHTS_FILE),
        "training": {key: provenance[key] for key in ("recipe", "tokens", "text", "seed", "hyper_parameters", "recipe_id")},
        "metrics": {
            evaluation: {
                key: [row.value(key, evaluation), *(row.interval(key, evaluation) or (None, None))]
                for key in keys
                if row.value(key, evaluation) is not None
            }
            for evaluation, keys in EVALUATIONS.items()
        },
        "latents": {
            "tokens": stats.tokens,
            **{kind: int((stats.kind == kind).sum()) for kind in ("dead", "rare", "between", "dense")},
            "scored": len(explained),
            "auc": [
                float(q) for q in np.quantile([auc_of(one) for one in explained.values() if one.rules], (0.25, 0.5, 0.75))
            ],
        },
        "by_prediction": [described(stats, explained[latent]) for latent in by_prediction(stats, explained)],
        "by_effect": by_effect(analysis, stats, explained) if steers else {},
        "drawn": [described(stats, explained[latent]) for latent in drawn(explained)],
    }


def auc_of(found: Explanation) -> float:
    """Held-out AUC of the best rule that reads tokens; 0.5, chance, where none was scored."""
    return max((rule.auc for rule in _token_rules(found)), default=0.5)


def precision_of(found: Explanation) -> float:
    """Held-out average precision of the best rule that reads tokens."""
    return max((rule.average_precision for rule in _token_rules(found)), default=0.0)


def _token_rules(found: Explanation) -> list[Rule]:
    return [rule for name, rule in found.rules.items() if name != "position"]


def by_prediction(stats: LatentStats, explained: Mapping[int, Explanation], k: int = LISTED) -> list[int]:
    """The k latents whose firing tokens predict best on held-out text, by average precision; at most one for each token
    that leads what a latent fires on."""
    frequent = [one for one in explained.values() if stats.count[one.latent] >= MIN_FIRINGS]
    chosen: list[int] = []
    leading: set[str] = set()
    for one in sorted(frequent, key=lambda one: (-precision_of(one), one.latent)):
        token = one.by_mean[0].token.strip().lower()
        if token not in leading:
            leading.add(token)
            chosen.append(one.latent)
    return chosen[:k]


def drawn(explained: Mapping[int, Explanation], k: int = DRAWN) -> list[int]:
    """k of the latents that fire often enough to be described, at random."""
    return sorted(np.random.default_rng(0).choice(sorted(explained), size=min(k, len(explained)), replace=False).tolist())


def by_effect(analysis: AnalysisContext, stats: LatentStats, explained: Mapping[int, Explanation]) -> dict[str, Any]:
    """By prompt the latent whose addition raises the targets most, and where that is another one, the first of those that
    fire on a target: `rank` counts latents by their effect. Every latent is run."""
    found = {}
    for subject, (prompt, targets) in PROMPTS.items():
        every = search_by_effect(analysis, prompt, targets, stats.d_sae, candidates=stats.d_sae)
        ranked = [(rank, one) for rank, one in enumerate(every, start=1) if one.latent in explained]
        about = [(rank, one) for rank, one in ranked if _fires_on(explained[one.latent], targets)]
        shown = dict([ranked[0], *about[:1]])
        found[subject] = {
            "prompt": prompt,
            "targets": targets,
            "latents": [
                {"rank": rank, **one._asdict(), **described(stats, explained[one.latent])} for rank, one in shown.items()
            ],
        }
    return found


def _fires_on(found: Explanation, targets: Sequence[str]) -> bool:
    return any(share.token in targets for share in found.by_mean[:SPELLED])


def described(stats: LatentStats, found: Explanation) -> dict[str, Any]:
    """A latent for a reader: what tokens say, and its strongest contexts with the token that fires in brackets."""
    return {
        "latent": found.latent,
        "density": found.density,
        "words": found.words,
        "auc": auc_of(found),
        "average_precision": precision_of(found),
        "contexts": [_spelled(context) for context in stats.top(found.latent)[:CONTEXTS]],
    }


def _spelled(context: Any, around: int = 8) -> str:
    at = context.position
    before = "".join(context.tokens[max(1, at - around) : at])
    after = "".join(context.tokens[at + 1 : at + 1 + around // 2])
    return f"{before}[[{context.tokens[at]}]]{after}".replace("\n", "⏎")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.packaged", description="The packaged dictionaries and cards."
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, text in (("take", "round a clone's trained dictionaries"), ("card", "write cards from a clone's evaluation")):
        verbs.add_parser(verb, help=text).add_argument("root", type=Path)
    verbs.add_parser("page", help="write docs/packaged.md")
    options = parser.parse_args(arguments)
    if options.verb == "take":
        take(options.root)
    elif options.verb == "card":
        card(options.root)
        write_page()
    else:
        write_page()


if __name__ == "__main__":
    main()
