"""The verbs of `analyze` that read: what each opens, which analysis it calls, the tables it prints, the files it writes."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import sae_research.analysis.explain as explaining
import sae_research.analysis.subspace as subspaces
from sae_research.analysis import effects, plots, prompt
from sae_research.analysis import neuronpedia as hosted
from sae_research.analysis.context import AnalysisContext
from sae_research.analysis.dashboard.site import core_figures, write_dashboard
from sae_research.analysis.store import LatentStats, check_latents
from sae_research.config.params import Params, load_params
from sae_research.lm import load_configured
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


def open_analysis(options: argparse.Namespace) -> AnalysisContext:
    """The SAEs and model that the options name; the model alone where a verb needs no SAE."""
    params = load_params() if Path("params.yaml").is_file() else Params()
    if options.model:
        params = params.model_copy(update={"model": params.model.model_copy(update={"name": options.model})})
    if options.tokens is not None:
        if options.tokens < 1:
            raise UserError("--tokens must be at least 1")
        params = params.model_copy(update={"analysis": params.analysis.model_copy(update={"tokens": options.tokens})})
    if options.sae is None:
        return AnalysisContext(load_configured(params.model), {}, params)
    return AnalysisContext.open([options.sae] if isinstance(options.sae, str) else options.sae, params)


# --- verbs -------------------------------------------------------------------------------------


def saes(options: argparse.Namespace) -> None:
    """List, search, describe."""
    if options.describe is not None:
        _describe(options.describe)
        return
    local = hosted.list_local()
    if local:
        print("SAEs of this project\n" + table(local))
    if options.local:
        if not local:
            print("no SAEs here yet: run the train or setup stage (dvc repro setup)")
        return
    rows = hosted.list_releases(options.search or "")
    print(f"\n{len(rows)} releases of SAELens, {sum(row['saes'] for row in rows):,} SAEs\n{table(rows)}")
    print("\n`analyze saes --describe RELEASE` lists a release's SAEs; --sae sae_lens:RELEASE:ID opens one")


def _describe(what: str) -> None:
    local = {Path(row["folder"]).name for row in hosted.list_local()}
    if what in local or Path(what).is_dir() or what.startswith("sae_lens:"):
        print(table([{"field": key, "value": value} for key, value in hosted.describe(what).items()]))
        return
    fields = hosted.describe_release(what)
    print(table([{"field": key, "value": value} for key, value in fields.items()]) + "\n")
    print(table(hosted.list_saes(what)))


def stats(options: argparse.Namespace) -> None:
    """Collect, summarise, draw."""
    analysis = open_analysis(options)
    for sae in analysis.saes.values():
        check_latents(options.latent, sae.cfg.d_sae)
    for name in analysis.saes:
        found = analysis.stats(name, progress=True)
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


def _print_next_tokens(found: prompt.PromptRuns) -> None:
    """The next token in all three runs: logits, log-probabilities and probabilities beside each other."""
    listed = found.next_tokens + ([found.answer] if found.answer else [])
    runs = list(found.kl)
    print(
        "next token plain, with SAEs and error terms, with reconstructions alone: logit, log-probability, probability (rank)"
    )
    print(
        table(
            {
                "token": row.token,
                **{
                    r: f"{row.logit[r]:6.2f} {row.log_probability[r]:6.2f} {row.probability[r]:.4f} ({row.rank[r]})"
                    for r in runs
                },
            }
            for row in listed
        )
    )
    print("\n" + table({"run": r, "KL from plain": found.kl[r], "cross-entropy": found.cross_entropy[r]} for r in runs))


def run(options: argparse.Namespace) -> None:
    """A prompt with and without SAEs; or a search for latents."""
    if not (options.prompt is not None or options.search_prompt is not None or options.search_promoted):
        raise UserError("give --prompt, --search-prompt or --search-promoted")
    analysis = open_analysis(options)
    if options.search_prompt is not None:
        analysis.stats(analysis.only[0], progress=True)
        print(
            "latents that the text activates most, relative to their largest activation\n"
            + table(row._asdict() for row in prompt.search_by_prompt(analysis, options.search_prompt))
        )
    if options.search_promoted:
        print(
            f"latents that raise {', '.join(map(repr, options.search_promoted))} most (standard deviations)\n"
            + table(row._asdict() for row in prompt.search_by_promoted(analysis, options.search_promoted))
        )
        if options.prompt is not None:
            found = effects.search_by_effect(analysis, options.prompt, options.search_promoted)
            print(
                "\nmeasured: added at their maximum after the prompt (nats)\n" + table(row._asdict() for row in found) + "\n"
            )
    if options.prompt is None:
        return
    shown = prompt.run_prompt(analysis, options.prompt, options.answer)
    _print_next_tokens(shown)
    written = [options.out / "run.json"]
    inside: dict[str, Any] = {}
    for name, seen in shown.saes.items():
        active = prompt.top_latents(analysis, name, seen, shown.tokens, options.top)
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
                for at, token in enumerate(shown.tokens)
            )
        )
        written.append(
            plots.final_token(
                name, seen.post[0, -1].cpu().numpy(), shown.tokens[-1], options.out / f"{name}_final_token.png"
            )
        )
    write_json(
        written[0],
        round_significant(
            {
                "prompt": options.prompt,
                "tokens": shown.tokens,
                "next_tokens": [row._asdict() for row in shown.next_tokens],
                "answer": shown.answer._asdict() if shown.answer else None,
                "kl": shown.kl,
                "cross_entropy": shown.cross_entropy,
                "saes": inside,
            }
        ),
    )
    say_written(*written)


def subspace(options: argparse.Namespace) -> None:
    """Principal components of what latents reconstruct."""
    analysis = open_analysis(options)
    name, sae = analysis.only
    grouping = None if options.groups is None else subspaces.by_word(options.groups)
    found = subspaces.subspace(analysis.stats(name, progress=True), sae, options.latents, grouping, options.components)
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
    analysis = open_analysis(options)
    name, sae = analysis.only
    found = explaining.explain_latents(analysis, name, options.latents, progress=True)
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


def neuronpedia(options: argparse.Namespace) -> None:
    """Search there, and say where pages are."""
    if (options.source is None) == (options.sae is None):
        raise UserError("give --source MODEL/SOURCE or --sae sae_lens:RELEASE:ID")
    if options.search is None and not options.latents:
        raise UserError("give --search TEXT or --latents")
    source = options.source
    if source is None:
        kind, _, rest = options.sae.partition(":")
        release, _, sae_id = rest.partition(":")
        if kind != "sae_lens" or not sae_id:
            raise UserError(f"--sae {options.sae}: Neuronpedia's pages are of releases; write sae_lens:RELEASE:ID")
        source = hosted.neuronpedia_source(release, sae_id)
    if options.search is not None:
        there = hosted.Neuronpedia(source, options.base_url or hosted.HOME)
        found = there.search(options.search, options.limit, options.whole_model)
        rows = [{**one._asdict(), "page": hosted.neuronpedia_page(one.source, one.latent)} for one in found]
        print(table(rows) if rows else f"no explanation of {source} is near {options.search!r}")
    for latent in options.latents:
        print(f"{latent}: {hosted.neuronpedia_page(source, latent)}")
    if options.latents:
        print(f"list: {hosted.quick_list(source, options.latents)}")


def dashboard(options: argparse.Namespace) -> None:
    """Write the site."""
    analysis = open_analysis(options)
    chosen: dict[str, Any] = {"compare": options.compare or []}
    if options.other_model is not None:
        chosen["other_model"] = options.other_model
    if options.neuronpedia:
        chosen["neuronpedia"] = True
    page = write_dashboard(
        analysis, options.out, analysis.params.dashboards.model_copy(update=chosen), figures=core_figures(), progress=True
    )
    print(f"open {page} in a browser")
