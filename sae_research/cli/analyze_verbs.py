"""Tables on the screen and on disk.

What each verb of `analyze` does: opens SAEs, calls the analysis, prints a table, writes files.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import sae_research.analysis.attribute as ablation
import sae_research.analysis.attribute as attribution
import sae_research.analysis.explain as explaining
import sae_research.analysis.steer as steering
import sae_research.analysis.subspace as subspaces
from sae_research.analysis import neuronpedia, plots, prompt
from sae_research.analysis.context import Lab
from sae_research.analysis.dashboard.stage import core_figures, write_dashboard
from sae_research.analysis.neuronpedia import HOME, Neuronpedia
from sae_research.analysis.store import LatentStats, check_latents
from sae_research.config.params import Params, load_params
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import round_significant, write_json, write_text
from sae_research.runtime.formatting import csv_text, text_table


def table(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Rows as aligned text: floats to four digits, tokens quoted where they begin or end in space."""
    rows = list(rows)
    columns = list(columns or (rows[0] if rows else []))
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    return text_table([columns, *cells], left=len(columns))


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return " ".join(_cell(item) for item in value)
    text = str(value)
    return repr(text) if text != text.strip() or "\n" in text or not text else text


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """A long table, floats to six digits."""
    body = [[f"{value:.6g}" if isinstance(value, float) else value for value in row.values()] for row in rows]
    write_text(path, csv_text(list(rows[0]) if rows else [], body))


def say_written(*paths: Path) -> None:
    """Say which files there are now."""
    print("\nwritten: " + ", ".join(str(path) for path in paths))


SUMMARY_QUANTILES = (0.5, 0.99)


# --- what all verbs share ----------------------------------------------------------------------


def open_lab(options: argparse.Namespace) -> Lab:
    """The SAEs and model that the options name."""
    params = load_params() if Path("params.yaml").is_file() else Params()
    if options.model:
        params = params.model_copy(update={"model": params.model.model_copy(update={"name": options.model})})
    if options.tokens is not None:
        if options.tokens < 1:
            raise UserError("--tokens must be at least 1")
        params = params.model_copy(update={"analysis": params.analysis.model_copy(update={"tokens": options.tokens})})
    return Lab.open([options.sae] if isinstance(options.sae, str) else options.sae, params)


# --- verbs -------------------------------------------------------------------------------------


def saes(options: argparse.Namespace) -> None:
    """List, search, describe."""
    if options.describe is not None:
        _describe(options.describe)
        return
    local = neuronpedia.list_local()
    if local:
        print("SAEs of this project\n" + table(local))
    if options.local:
        if not local:
            print("no SAEs here yet: run the train or setup stage (dvc repro setup)")
        return
    rows = neuronpedia.list_releases(options.search or "")
    print(f"\n{len(rows)} releases of SAELens, {sum(row['saes'] for row in rows):,} SAEs\n{table(rows)}")
    print("\n`analyze saes --describe RELEASE` lists a release's SAEs; --sae sae_lens:RELEASE:ID opens one")


def _describe(what: str) -> None:
    local = {Path(row["folder"]).name for row in neuronpedia.list_local()}
    if what in local or Path(what).is_dir() or what.startswith("sae_lens:"):
        print(table([{"field": key, "value": value} for key, value in neuronpedia.describe(what).items()]))
        return
    print(table(neuronpedia.list_saes(what)))


def stats(options: argparse.Namespace) -> None:
    """Collect, summarise, draw."""
    lab = open_lab(options)
    for sae in lab.saes.values():
        check_latents(options.latent, sae.cfg.d_sae)
    for name in lab.saes:
        found = lab.stats(name, progress=True)
        summary = summarise(found)
        print(f"\n{name}: {found.d_sae:,} latents over {found.tokens:,} counted tokens ({found.n_contexts:,} contexts)")
        print(table([{"": key, "value": value} for key, value in summary.items()]))
        rows = latent_rows(found)
        print("\nlatents of largest density\n" + table(sorted(rows, key=lambda row: -row["density"])[:10]))
        out = options.out / name
        write_csv(out / "latents.csv", rows)
        write_json(out / "summary.json", round_significant(summary))
        say_written(
            out / "latents.csv",
            out / "summary.json",
            plots.density_histogram(found, out / "density.png"),
            plots.density_against_cah(found, out / "density_cah.png"),
        )
        print(f"store: {found.folder}")
        for latent in options.latent:
            _show_contexts(found, latent)


def summarise(found: LatentStats) -> dict[str, Any]:
    """How many latents are dead, rare, in between and dense, and what a typical one is like."""
    kind = found.kind
    alive = found.count > 0
    return {
        **{f"{name} latents": int((kind == name).sum()) for name in ("dead", "rare", "between", "dense")},
        "L0": float(found.count.sum() / max(1, found.tokens)),
        "median density of those alive": float(np.median(found.density[alive])) if alive.any() else None,
        "median consistent activation heuristic": float(np.median(found.cah[alive])) if alive.any() else None,
        "activations stored": int(found.about["entries"]),
    }


def latent_rows(found: LatentStats) -> list[dict[str, Any]]:
    """One row a latent: what `latents.csv` holds."""
    quantiles = {f"q{q * 100:g}": found.quantile(q) for q in SUMMARY_QUANTILES}
    columns = {
        "latent": np.arange(found.d_sae),
        "kind": found.kind,
        "density": found.density,
        "cah": found.cah,
        "mean": found.mean,
        **quantiles,
        "max": found.max,
        "min": found.min,
    }
    return [dict(zip(columns, (v.item() for v in values), strict=True)) for values in zip(*columns.values(), strict=True)]


def _show_contexts(found: LatentStats, latent: int, buffer: int = 8) -> None:
    print(f"\nlatent {latent}: density {found.density[latent]:.4g}, max {found.max[latent]:.4g}")
    for context in found.top(latent, 10):
        before = "".join(context.tokens[max(0, context.position - buffer) : context.position])
        after = "".join(context.tokens[context.position + 1 : context.position + 1 + buffer])
        line = f"{before}[[{context.tokens[context.position]}]]{after}".replace("\n", "\\n")
        print(f"  {context.value:8.3f}  {line}")


def run(options: argparse.Namespace) -> None:
    """A prompt with and without SAEs; or a search for latents."""
    if not (options.prompt is not None or options.search_prompt is not None or options.search_promoted):
        raise UserError("give --prompt, --search-prompt or --search-promoted")
    lab = open_lab(options)
    if options.search_prompt is not None:
        lab.stats(lab.only[0], progress=True)
        print(
            "latents that the text activates most, relative to their largest activation\n"
            + table(row._asdict() for row in prompt.search_by_prompt(lab, options.search_prompt))
        )
    if options.search_promoted:
        print(
            f"latents that raise {', '.join(map(repr, options.search_promoted))} most (standard deviations)\n"
            + table(row._asdict() for row in prompt.search_by_promoted(lab, options.search_promoted))
        )
    if options.prompt is None:
        return
    found = prompt.run_prompt(lab, options.prompt, options.answer)
    runs = list(found.kl)
    print("next token: probability and (rank) plain, with SAEs and error terms, with reconstructions alone")
    listed = found.next_tokens + ([found.answer] if found.answer else [])
    print(table({"token": row.token, **{r: f"{row.probability[r]:.4f} ({row.rank[r]})" for r in runs}} for row in listed))
    print("\n" + table({"run": r, "KL from plain": found.kl[r], "cross-entropy": found.cross_entropy[r]} for r in runs))
    written = [options.out / "run.json"]
    inside: dict[str, Any] = {}
    for name, seen in found.saes.items():
        active = prompt.top_latents(lab, name, seen, found.tokens, options.top)
        kept = seen.mask[0]
        inside[name] = {
            "L0": [int(n) for n in (seen.post[0] != 0).sum(-1)],
            "error_norm": seen.error[0].norm(dim=-1).tolist(),
            "input_norm": seen.input[0].norm(dim=-1).tolist(),
            "counts": kept.tolist(),
            "active": [row._asdict() for row in active],
        }
        print(f"\n{name}: strongest latents of each token (share of the largest activation in the statistics)")
        print(
            table(
                {
                    "position": at,
                    "token": token,
                    "latents": "  ".join(
                        f"{row.latent}: {row.activation:.3g}"
                        + (f" ({row.share_of_max:.0%})" if row.share_of_max is not None else "")
                        for row in active
                        if row.position == at
                    )
                    or ("does not count" if not kept[at] else "none"),
                }
                for at, token in enumerate(found.tokens)
            )
        )
        written.append(
            plots.final_token(
                name, seen.post[0, -1].cpu().numpy(), found.tokens[-1], options.out / f"{name}_final_token.png"
            )
        )
    write_json(
        written[0],
        round_significant(
            {
                "prompt": options.prompt,
                "tokens": found.tokens,
                "next_tokens": [row._asdict() for row in found.next_tokens],
                "answer": found.answer._asdict() if found.answer else None,
                "kl": found.kl,
                "cross_entropy": found.cross_entropy,
                "saes": inside,
            }
        ),
    )
    say_written(*written)


def steer(options: argparse.Namespace) -> None:
    """Steer here, or at Neuronpedia."""
    if options.engine == "neuronpedia":
        _steer_there(options)
        return
    if options.sae is None:
        raise UserError("--engine local needs --sae")
    steering.check_method(options.method)
    lab = open_lab(options)
    name, sae = lab.only
    steering.check_steerable(name, sae)
    check_latents([options.latent], sae.cfg.d_sae)
    if options.maximum is None:
        lab.stats(name, progress=True)
    found = steering.steer(
        lab,
        options.prompt,
        options.latent,
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


def _steer_there(options: argparse.Namespace) -> None:
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
    lab = open_lab(options)
    rows = ablation.ablate(lab, options.prompt, options.latents, options.answer, options.positions)
    shown = [{key: value for key, value in row._asdict().items() if key not in ("error_term", "latents")} for row in rows]
    print(table(shown))
    write_json(
        options.out / "ablation.json",
        round_significant(
            {"prompt": options.prompt, "positions": options.positions, "rows": [row._asdict() for row in rows]}
        ),
    )
    say_written(options.out / "ablation.json")


def attribute(options: argparse.Namespace) -> None:
    """Attribute a metric, check it, tabulate it."""
    if options.steps < 0 or options.check < 0:
        raise UserError("--steps and --check cannot be negative")
    lab = open_lab(options)
    tokens = lab.tokens(options.prompt)
    metric = attribution.prompt_metric(lab, options.answer, options.against, tokens)
    found = attribution.attribute(lab, options.prompt, metric, options.hooks, options.steps)
    print(f"metric {found.metric:.4g}; shares by {'integrated gradients' if found.steps else 'gradient'}")
    print(
        table(
            {
                "SAE": name,
                "latents": float(s.reconstruction.sum()),
                "error": float(s.error.sum()),
                "bias and masked": float(s.bias.sum()),
                "sum": float((s.reconstruction + s.error + s.bias).sum()),
                "whole": s.total,
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
                lab, name, options.prompt, found, metric, options.check, lab.params.random_seed
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


def subspace(options: argparse.Namespace) -> None:
    """Principal components of what latents reconstruct."""
    lab = open_lab(options)
    name, sae = lab.only
    grouping = None if options.groups is None else subspaces.by_word(options.groups)
    found = subspaces.subspace(lab.stats(name, progress=True), sae, options.latents, grouping, options.components)
    print(f"{len(found.group):,} tokens on which at least one of {len(options.latents)} latents fires")
    print("variance: " + ", ".join(f"component {i + 1} {share:.1%}" for i, share in enumerate(found.variance_ratio)))
    rows = [
        {
            "context": int(c),
            "position": int(p),
            "token": token,
            "group": group,
            **{f"component_{i + 1}": float(v) for i, v in enumerate(values)},
            "text": text,
        }
        for (c, p), token, group, values, text in zip(
            found.place, found.token, found.group, found.coordinates, found.context, strict=True
        )
    ]
    write_csv(options.out / "subspace.csv", rows)
    say_written(options.out / "subspace.csv", plots.subspace_scatter(found, options.out / "subspace.png"))


def explain(options: argparse.Namespace) -> None:
    """Describe latents and score the descriptions."""
    lab = open_lab(options)
    name, sae = lab.only
    found = explaining.explain_latents(lab, name, options.latents, progress=True)
    print(
        f"{name}: {len(found)} latents fire often enough to describe "
        f"({explaining.MIN_TRAIN_FIRINGS} firings in three quarters of the documents)"
    )
    ranked = sorted(found, key=lambda e: (-max((r.auc for r in e.rules.values()), default=0.0), e.latent))
    print(
        table(
            {
                "latent": e.latent,
                "density": e.density,
                "purity": e.purity,
                "AUC": e.rules[e.best].auc if e.rules else None,
                "AP": e.rules[e.best].average_precision if e.rules else None,
                "words": e.words,
                "promotes": " ".join(map(repr, e.promoted[:3])),
            }
            for e in ranked[: options.top]
        )
    )
    scored = [e for e in found if e.rules]
    if scored:
        print(
            "\nmean held-out AUC: "
            + ", ".join(f"{rule} {np.mean([e.rules[rule].auc for e in scored]):.3f}" for rule in scored[0].rules)
            + f" ({len(scored)} latents)"
        )
    write_json(options.out / f"{name}.json", round_significant([explaining.as_json(e) for e in found]))
    say_written(options.out / f"{name}.json")


def dashboard(options: argparse.Namespace) -> None:
    """Write the site."""
    lab = open_lab(options)
    chosen: dict[str, Any] = {"compare": options.compare or []}
    if options.other_model is not None:
        chosen["other_model"] = options.other_model
    if options.neuronpedia:
        chosen["neuronpedia"] = True
    page = write_dashboard(
        lab, options.out, lab.params.dashboards.model_copy(update=chosen), figures=core_figures(), progress=True
    )
    print(f"open {page} in a browser")
