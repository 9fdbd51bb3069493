"""The stage `dashboards` and the site it writes: pages from templates, data as scripts."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from sae_research.analysis.collect import SAMPLE_LEVELS
from sae_research.analysis.context import AnalysisContext
from sae_research.analysis.dashboard.compare import Comparison, compare
from sae_research.analysis.dashboard.latents import (
    LATENTS_PER_FILE,
    QUANTILES,
    Shown,
    density_bars,
    latent_files,
    significant,
)
from sae_research.analysis.dashboard.neuronpedia_batch import write_batches
from sae_research.analysis.dashboard.packing import pack, searched_text, write_script
from sae_research.analysis.neuronpedia import EMBED, neuronpedia_source
from sae_research.config.params import Params
from sae_research.config.reporting import Dashboards
from sae_research.lm import LanguageModel, load_configured
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import SLUG, read_json, replaced_folder, slugify, write_bytes, write_text
from sae_research.runtime.stages import read_manifest, stage_folder
from sae_research.saes import SparseAutoencoder
from sae_research.saes.base import Guard
from sae_research.saes.sources import PREPARED

HERE = Path(__file__).parent
NEURONPEDIA = "neuronpedia"
"""Folder of a site with Neuronpedia's JSON."""
OWN_FOLDERS = ("static", "compare", NEURONPEDIA)
MARK = ".dashboard"
"""Lies in every folder that a site may replace."""
COLUMNS = ("density", "cah", "max", "mean")
FIGURES = {
    "variance_explained": "Variance explained",
    "loss_recovered": "Loss recovered",
    "ce_delta": "Cross-entropy added",
    "kl": "KL divergence",
}
"""Metrics of the core evaluation that the start page shows, where they are known."""


def write_site(folder: Path, shown: Sequence[Shown], comparisons: Sequence[Comparison] = ()) -> Path:
    """Write or refresh a site; returns its first page. Raises `UserError` for names that make no folders, and for a folder
    with a page of somebody else's."""
    wrong = [one.name for one in shown if not SLUG.fullmatch(one.name) or one.name in OWN_FOLDERS]
    if wrong:
        raise UserError(
            f"{', '.join(wrong)}: names become folders of the site, so they are made of a-z, 0-9 and _ and are "
            f"none of {', '.join(OWN_FOLDERS)}"
        )
    if (folder / "index.html").exists() and not (folder / MARK).is_file() and not any(folder.glob(f"*/{MARK}")):
        raise UserError(f"{folder} holds an index.html that is no dashboard's; choose another --out")
    write_text(folder / MARK, "")
    for source in sorted((HERE / "static").iterdir()):
        write_bytes(folder / "static" / source.name, source.read_bytes())
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    pages.filters |= {"number": number, "percent": lambda x: f"{x:.2%}"}
    summaries = [summary(one) for one in shown]
    for one, known in zip(shown, summaries, strict=True):
        with _renewed(folder / one.name) as target:
            _write_sae(target, one, known, pages)
    for one in comparisons:
        with _renewed(folder / "compare" / one.name) as target:
            write_script(target / "data.js", one.name, one.content)
            _page(pages, "compare.html", target / "index.html", root="../../", pair=one)
    _page(pages, "home.html", folder / "index.html", root="", saes=summaries, comparisons=comparisons)
    return folder / "index.html"


def _write_sae(folder: Path, shown: Shown, known: dict[str, Any], pages: jinja2.Environment) -> None:
    for number, content in latent_files(shown):
        write_script(folder / "data" / f"{number:05d}.js", f"{shown.name}/{number:05d}", content)
    write_script(
        folder / "data" / "about.js",
        f"{shown.name}/about",
        {
            "name": shown.name,
            "n": shown.stats.d_sae,
            "per_file": LATENTS_PER_FILE,
            "quantiles": QUANTILES,
            "levels": SAMPLE_LEVELS,
            "tokens": shown.stats.tokens,
            "neuronpedia": known["neuronpedia"],
            "embed": EMBED,
            "no_logits": ""
            if shown.logits
            else f"{shown.sae.cfg.hook_out} is not in the residual stream: its latents promote no tokens directly",
        },
    )
    write_index(
        folder / "data" / "index.js",
        shown.name,
        {name: getattr(shown.stats, name) for name in COLUMNS},
        shown.stats.kind,
        shown.labels,
        shown.promoted,
        density_bars(shown.stats),
    )
    write_script(folder / "data" / "text.js", f"{shown.name}/text", searched_text(shown))
    _page(pages, "sae.html", folder / "index.html", root="../", sae=known)
    _page(pages, "latent.html", folder / "latent.html", root="../", sae=known)


KINDS = ("dead", "rare", "between", "dense")


def write_index(
    path: Path,
    name: str,
    columns: dict[str, np.ndarray],
    kind: np.ndarray,
    labels: Sequence[str],
    promoted: Sequence[str],
    bars: dict[str, Any],
) -> None:
    """The table of latents: numbers as base64 of little-endian arrays, strings joined by line breaks."""
    packed = {column: pack(values.astype("<f4")) for column, values in columns.items()}
    codes = np.select([kind == one for one in KINDS], range(len(KINDS))).astype(np.uint8)
    write_script(
        path,
        f"{name}/index",
        {
            "n": len(labels),
            "columns": packed,
            "kind": pack(codes),
            "kinds": KINDS,
            "labels": "\n".join(labels),
            "promoted": "\n".join(promoted),
            "bars": bars,
        },
    )


def summary(shown: Shown) -> dict[str, Any]:
    """What the pages say about an SAE as a whole."""
    stats, cfg, about = shown.stats, shown.sae.cfg, shown.stats.about
    kind = stats.kind
    share = {one: float((kind == one).mean()) for one in KINDS}
    figures = [
        ("L0", number(stats.count.sum() / max(stats.tokens, 1)), "latents that fire on a token, mean"),
        ("Dead", f"{share['dead']:.1%}", "never fired on this text"),
        (
            "Dense",
            f"{share['dense']:.1%}",
            f"fire on {percent(stats.dense_from)} of tokens or more; were all alike, each would on "
            f"{percent(stats.expected_density)} (L0 / latents)",
        ),
        ("Median density", number(float(np.median(stats.density))), "fraction of tokens on which a latent fires"),
        *((label, number(shown.figures[key]), "core evaluation") for key, label in FIGURES.items() if key in shown.figures),
    ]
    text, mask = about["text"], about["mask"]
    sources = [
        ("SAE", f"{cfg.architecture or cfg.form}, {cfg.d_in:,} dimensions, {cfg.d_sae:,} latents"),
        ("Weights", about["sae"]["fingerprint"]),
        ("Model", f"{about['model']['name']} ({about['model']['dtype']})"),
        ("Model's weights", about["model"]["fingerprint"]),
        ("Hook", about["hook"]),
        ("Text", f"{text['dataset']}, {text['split']}, {about['contexts']:,} contexts of {about['context_size']} tokens"),
        ("Text's fingerprint", text["fingerprint"]),
        ("Tokens that count", f"{stats.tokens:,} of {about['tokens']:,}"),
        (
            "Left out",
            f"special tokens{', the first of every context' if mask['drop_first_position'] else ''}"
            + (f", norms above {mask['outlier_norm_multiple']:g} times the median" if mask["outlier_norm_multiple"] else ""),
        ),
        ("Seed", str(about["seed"])),
        *((f"Provenance: {key}", _plain(value)) for key, value in sorted(cfg.provenance.items())),
    ]
    return {
        "name": shown.name,
        "d_sae": cfg.d_sae,
        "hook": cfg.hooks,
        "model": about["model"]["name"],
        "architecture": cfg.architecture or cfg.form,
        "figures": figures,
        "sources": sources,
        "tokens": stats.tokens,
        "neuronpedia": _hosted(shown),
        "unexplained": shown.unexplained,
    }


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(item)}" for key, item in sorted(value.items()))
    return number(value) if isinstance(value, float) else str(value)


def _hosted(shown: Shown) -> str:
    """`MODEL/SOURCE` where Neuronpedia shows this SAE, else nothing."""
    known = shown.sae.cfg.provenance
    if not known.get("release") or not known.get("sae_id"):
        return ""
    try:
        return neuronpedia_source(known["release"], known["sae_id"])
    except UserError:  # a release that Neuronpedia does not have
        return ""


def percent(value: float) -> str:
    """A fraction as a percentage of two significant digits."""
    return f"{100 * value:.2g} %"


def number(value: float) -> str:
    """Four significant digits at most, as on every page."""
    return f"{significant(float(value)):.4g}"


def _page(pages: jinja2.Environment, template: str, path: Path, **values: Any) -> None:
    write_text(path, pages.get_template(template).render(**values))


@contextmanager
def _renewed(folder: Path) -> Generator[Path]:
    """A new folder in place of an earlier site's, whose files, of more latents perhaps, must not stay. Raises `UserError`
    for a folder that is not of a site."""
    if folder.exists() and not (folder / MARK).is_file():
        raise UserError(f"{folder} is there already and is no part of a dashboard; choose another --out")
    with replaced_folder(folder) as temporary:
        write_text(temporary / MARK, "")
        yield temporary


def write_dashboard(
    analysis: AnalysisContext,
    folder: str | Path,
    settings: Dashboards | None = None,
    pairs: Iterable[Sequence[str]] | None = None,
    figures: Mapping[str, Mapping[str, float]] | None = None,
    progress: bool = False,
    skip: Callable[[str, str], None] | None = None,
) -> Path:
    """Write the site of all SAEs in `analysis`; returns its first page, to be opened in a browser from disk.

    settings, pairs: by default those of the parameters' section `dashboards`. figures: of an evaluation, by SAE, for the
    start pages. skip: is told the name and reason of an SAE that fails, which is left out; without it its error is raised.
    Raises `UserError` for a pair of unknown names, SAEs that cannot be compared, and where none can be shown.
    """
    guard = Guard(skip)
    settings = settings or analysis.params.dashboards
    wanted = [tuple(pair) for pair in (settings.compare if pairs is None else pairs)]
    folder = Path(folder)
    if settings.other_model is None:
        _check_pairs(wanted, analysis.saes)  # before statistics, which take minutes
    shown: dict[str, Shown] = {}
    for name, sae in analysis.saes.items():
        with guard.on(name):
            shown[name] = Shown(
                name, sae, analysis.lm, analysis.stats(name, progress), settings, dict((figures or {}).get(name, {}))
            )
    if not shown:
        raise UserError(f"dashboards: none of {', '.join(analysis.saes)} can be shown")
    wanted = [pair for pair in wanted if not guard.failed.intersection(pair)]
    if settings.other_model is not None:
        for name, beside in _on_other_model(
            AnalysisContext(analysis.lm, guard.left(analysis.saes), analysis.params), settings, progress
        ).items():
            wanted.append((name, beside.name))
            shown[beside.name] = beside
    _check_pairs(wanted, shown)
    comparisons = [compare(shown[one], shown[other]) for one, other in wanted]
    page = write_site(folder, list(shown.values()), comparisons)
    if settings.neuronpedia:
        for name, one in shown.items():
            write_batches(one, folder / NEURONPEDIA / name)
    return page


def _check_pairs(wanted: Iterable[Sequence[str]], known: Iterable[str]) -> None:
    names = list(known)
    unknown = sorted({name for pair in wanted for name in pair} - set(names))
    if unknown:
        raise UserError(f"cannot compare {', '.join(unknown)}: not among {', '.join(names)}")


def _on_other_model(analysis: AnalysisContext, settings: Dashboards, progress: bool) -> dict[str, Shown]:
    """Every SAE of `analysis` on the second model, by its name on the first."""
    assert settings.other_model is not None
    lm = load_configured(analysis.params.model, settings.other_model)
    moved = {f"{name}_on_{slugify(Path(lm.name).name)}": _moved(sae, lm) for name, sae in analysis.saes.items()}
    there = AnalysisContext.of(moved, lm, analysis.params)
    return {
        name: Shown(other, sae, lm, there.stats(other, progress), settings)
        for name, (other, sae) in zip(analysis.saes, moved.items(), strict=True)
    }


def _moved(sae: SparseAutoencoder, lm: LanguageModel) -> SparseAutoencoder:
    """The same weights, said to belong to another model."""
    twin = copy.copy(sae)
    twin.cfg = sae.cfg.replace(model_name=lm.name)
    return twin


FOLDER = Path("dashboards")
CORE_METRICS = Path("metrics/core.json")


def run_stage(params: Params, folder: Path = FOLDER) -> None:
    """One run. Raises `UserError` for an SAE that setup did not prepare."""
    with stage_folder(folder) as stage:
        assert stage is not None  # it is where a stage may be disabled
        names = chosen(params)
        analysis = AnalysisContext.open([str(PREPARED / name) for name in names], params)
        page = write_dashboard(analysis, folder, figures=core_figures(), skip=stage.skip)
        stage.notes |= {
            "saes": names,
            "model": analysis.lm.name,
            "tokens": params.analysis.tokens,
            "latents": {name: sae.cfg.d_sae for name, sae in analysis.saes.items()},
        }
        print(f"open {page} in a browser", flush=True)


def chosen(params: Params) -> list[str]:
    """Names of the SAEs to show: those asked for, else the baseline. Raises `UserError` for one that is not there."""
    manifest = read_manifest(PREPARED / "manifest.json")
    if params.dashboards.saes is None:
        return [name for name in manifest["order"] if manifest["saes"][name]["role"] == "baseline"] or manifest["order"][:1]
    missing = [name for name in params.dashboards.saes if name not in manifest["saes"]]
    if missing or not params.dashboards.saes:
        raise UserError(
            f"dashboards.saes: {', '.join(missing) or 'names no SAE'}; {PREPARED}/ holds {', '.join(manifest['order'])}"
        )
    return params.dashboards.saes


def core_figures(path: Path = CORE_METRICS) -> dict[str, dict[str, float]]:
    """Metrics of the core evaluation, by SAE; empty where it has not run."""
    found: dict[str, Any] = read_json(path) if path.is_file() else {}
    return {name: values for name, values in found.items() if not name.startswith("_")}
