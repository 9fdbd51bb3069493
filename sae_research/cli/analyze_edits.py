"""The verbs of `analyze` that edit activations: generation, steering, ablation, attribution."""

from __future__ import annotations

import argparse

import sae_research.analysis.attribute as ablation
import sae_research.analysis.attribute as attribution
import sae_research.analysis.steer as steering
from sae_research.analysis import effects, neuronpedia, plots
from sae_research.analysis import generate as generating
from sae_research.analysis.context import AnalysisContext
from sae_research.analysis.neuronpedia import HOME, Neuronpedia
from sae_research.analysis.store import check_latents
from sae_research.cli.analyze_verbs import open_analysis, say_written, table, write_csv
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import round_significant, write_json


def generate(options: argparse.Namespace) -> None:
    """Sample texts."""
    analysis = open_analysis(options)
    seeds = range(options.seed, options.seed + options.texts)
    settings = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
    found = generating.generate(analysis, options.prompt, options.length, seeds, **settings)
    for one in found:
        print(f"\nseed {one.seed}\n  plain: {one.plain!r}")
        if one.with_saes is not None:
            print(f"  with {', '.join(analysis.saes)}: {one.with_saes!r} (equal for {one.agree} tokens)")
    write_json(
        options.out / "generation.json",
        {
            "prompt": options.prompt,
            "model": analysis.lm.name,
            "saes": list(analysis.saes),
            **settings,
            "length": options.length,
            "texts": [one._asdict() for one in found],
        },
    )
    say_written(options.out / "generation.json")


def steer(options: argparse.Namespace) -> None:
    """Steer here, or at Neuronpedia."""
    if options.engine == "neuronpedia":
        _steer_there(options)
        return
    if options.sae is None:
        raise UserError("--engine local needs --sae")
    steering.check_method(options.method)
    if options.latent is None and not options.targets:
        raise UserError("give --latent, or --targets, for which the latent of largest measured effect is chosen")
    analysis = open_analysis(options)
    name, sae = analysis.only
    steering.check_steerable(name, sae)
    if options.latent is not None:
        check_latents([options.latent], sae.cfg.d_sae)
    if options.maximum is None:
        analysis.stats(name, progress=True)
    latent = _most_effective(analysis, options) if options.latent is None else options.latent
    found = steering.steer(
        analysis,
        options.prompt,
        latent,
        options.strengths,
        options.method,
        range(options.seeds),
        options.length,
        options.targets,
        options.temperature,
        options.top_p,
        options.neutral_tokens,
        options.maximum,
    )
    print(f"latent {found.latent} by {found.method} ({steering.METHODS[found.method]}); max = {found.maximum:.4g}")
    print(f"targets: {' '.join(map(repr, found.targets))}; cost on {found.neutral_tokens:,} neutral tokens\n")
    print(
        table(
            [
                {**row, "strength": "unsteered" if row["strength"] is None else row["strength"]}
                for row in steering.as_rows(found)
            ]
        )
    )
    for row in found.strengths:
        print(f"\n--- {'unsteered' if row.strength is None else f'strength {row.strength:g}'}")
        for one in row.samples:
            print(f"seed {one.seed}: {one.text!r}")
    out = options.out
    write_json(
        out / "steering.json",
        round_significant(
            {
                **found._asdict(),
                "prompt": options.prompt,
                "strengths": [
                    {**row._asdict(), "samples": [one._asdict() for one in row.samples]} for row in found.strengths
                ],
            }
        ),
    )
    say_written(out / "steering.json", plots.steering_sweep(found, out / "steering.png"))


def _most_effective(analysis: AnalysisContext, options: argparse.Namespace) -> int:
    """The latent that measurably raises the targets most; the best five are printed."""
    found = effects.search_by_effect(analysis, options.prompt, options.targets, k=5)
    if not found:
        raise UserError("no latent fired on the text of the statistics: there is none to steer by; raise analysis.tokens")
    print(f"latents by measured effect on {' '.join(map(repr, options.targets))} after the prompt (nats)")
    print(table(row._asdict() for row in found) + "\n")
    return found[0].latent


def _steer_there(options: argparse.Namespace) -> None:
    if options.latent is None:
        raise UserError("--engine neuronpedia needs --latent")
    if options.source is None:
        raise UserError("--engine neuronpedia needs --source MODEL/SOURCE, e.g. gpt2-small/7-res-jb")
    if options.method != "add":
        raise UserError("Neuronpedia's interface is used for --method add only; the others run with --engine local")
    there = Neuronpedia(options.source, options.base_url or HOME)
    feature = there.feature(options.latent)
    maximum = feature.maximum if options.maximum is None else options.maximum
    explained = "; ".join(feature.explanations) or "no explanation"
    print(
        f"{options.source}/{options.latent}: {explained}; max = {maximum:.4g}; raises {' '.join(map(repr, feature.raised))}"
    )
    print(neuronpedia.neuronpedia_page(options.source, options.latent))
    found = [
        there.steer(options.prompt, options.latent, strength, maximum, seed, options.length, options.temperature)
        for strength in options.strengths
        for seed in range(options.seeds)
    ]
    for one in found:
        print(f"\nstrength {one.strength:g}, seed {one.seed}\n  default: {one.default!r}\n  steered: {one.steered!r}")
    write_json(
        options.out / "neuronpedia.json",
        round_significant(
            {
                "source": options.source,
                "latent": options.latent,
                "prompt": options.prompt,
                "feature": feature._asdict(),
                "maximum": maximum,
                "texts": [one._asdict() for one in found],
            }
        ),
    )
    say_written(options.out / "neuronpedia.json")


def ablate(options: argparse.Namespace) -> None:
    """Ablate latents on a prompt."""
    analysis = open_analysis(options)
    latents = options.latents or _carriers(analysis, options)
    rows = ablation.ablate(analysis, options.prompt, latents, options.answer, options.positions)
    shown = [{key: value for key, value in row._asdict().items() if key not in ("error_term", "latents")} for row in rows]
    print(table(shown))
    write_json(
        options.out / "ablation.json",
        round_significant(
            {"prompt": options.prompt, "positions": options.positions, "rows": [row._asdict() for row in rows]}
        ),
    )
    say_written(options.out / "ablation.json")


def _carriers(analysis: AnalysisContext, options: argparse.Namespace) -> list[int]:
    """The latents whose removal lowers the answer most, which are printed."""
    found = effects.carriers(analysis, options.prompt, options.answer)
    if not found:
        raise UserError("no latent's removal lowers the answer on this prompt: choose --latents, or another prompt")
    print("latents by the fall of the answer's log-probability without them (nats)")
    print(table(row._asdict() for row in found) + "\n")
    return [row.latent for row in found]


def attribute(options: argparse.Namespace) -> None:
    """Attribute a metric, check it, tabulate it."""
    if options.steps < 0 or options.check < 0:
        raise UserError("--steps and --check cannot be negative")
    analysis = open_analysis(options)
    tokens = analysis.tokens(options.prompt)
    metric = attribution.prompt_metric(analysis, options.answer, options.against, tokens)
    found = attribution.attribute(analysis, options.prompt, metric, options.hooks, options.steps)
    print(f"metric {found.metric:.4g}; shares by {'integrated gradients' if found.steps else 'gradient'}")
    print(
        table(
            {
                "SAE": name,
                "latents": float(s.reconstruction.sum()),
                "error": float(s.error.sum()),
                "bias and masked": float(s.bias.sum()),
                "explained": s.explained,
                "whole": s.total,
                "metric": found.metric,
            }
            for name, s in found.saes.items()
        )
    )
    for hook, values in found.hooks.items():
        print(f"{hook}: {float(values.sum()):.4g} over all tokens")
    checks = {}
    for name, shares in found.saes.items():
        summed = shares.latents.sum(0)
        best = summed.abs().topk(min(options.top, len(summed))).indices.tolist()
        print(
            f"\n{name}: latents of largest share, over all positions\n"
            + table(
                {
                    "latent": i,
                    "share": float(summed[i]),
                    "strongest at": found.tokens[int(shares.latents[:, i].abs().argmax())],
                }
                for i in best
                if summed[i]
            )
        )
        if options.check:
            checks[name] = check = attribution.check_by_ablation(
                analysis, name, options.prompt, found, metric, options.check, analysis.params.random_seed
            )
            said = "undefined" if check.correlation is None else f"{check.correlation:.3f}"
            print(
                f"{len(check.latents)} latents really ablated: correlation {said}, signs agree for "
                f"{check.sign_agreement:.0%}"
            )
    out = options.out
    write_csv(out / "attribution.csv", attribution.long_table(found))
    write_json(
        out / "attribution.json",
        round_significant(
            {
                "prompt": options.prompt,
                "answer": options.answer,
                "against": options.against,
                "metric": found.metric,
                "steps": found.steps,
                "tokens": found.tokens,
                "hooks": {hook: v.tolist() for hook, v in found.hooks.items()},
                "saes": {
                    name: {
                        "latents": s.reconstruction.tolist(),
                        "error": s.error.tolist(),
                        "bias": s.bias.tolist(),
                        "explained": s.explained,
                        "whole": s.total,
                    }
                    for name, s in found.saes.items()
                },
                "checks": {
                    name: {
                        "latents": c.latents.tolist(),
                        "attributed": c.attributed.tolist(),
                        "measured": c.measured.tolist(),
                        "correlation": c.correlation,
                        "sign_agreement": c.sign_agreement,
                    }
                    for name, c in checks.items()
                },
            }
        ),
    )
    say_written(out / "attribution.csv", out / "attribution.json", plots.attribution_bars(found, out / "attribution.png"))
