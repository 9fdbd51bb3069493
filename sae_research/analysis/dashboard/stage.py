"""The stage `dashboards`: statistics collected or reused, then written as a site of the SAEs that `params.yaml` names."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_research.analysis.context import Lab
from sae_research.analysis.dashboard.latents import Shown
from sae_research.analysis.dashboard.neuronpedia_batch import write_batches
from sae_research.analysis.dashboard.site import NEURONPEDIA, compare, write_site
from sae_research.config.params import Params
from sae_research.config.reporting import Dashboards
from sae_research.lm import LanguageModel, load_language_model
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import read_json, slugify
from sae_research.runtime.stages import read_manifest, stage_folder
from sae_research.saes import SparseAutoencoder
from sae_research.saes.base import Guard
from sae_research.saes.sources import PREPARED


def write_dashboard(
    lab: Lab,
    folder: str | Path,
    settings: Dashboards | None = None,
    pairs: Iterable[Sequence[str]] | None = None,
    figures: Mapping[str, Mapping[str, float]] | None = None,
    progress: bool = False,
    skip: Callable[[str, str], None] | None = None,
) -> Path:
    """Write the site of all SAEs in `lab`; returns its first page, to be opened in a browser from disk.

    settings, pairs: by default those of the parameters' section `dashboards`. figures: of an evaluation, by SAE, for the
    start pages. skip: is told the name and reason of an SAE that fails, which is left out; without it its error is raised.
    Raises `UserError` for a pair of unknown names, SAEs that cannot be compared, and where none can be shown.
    """
    guard = Guard(skip)
    settings = settings or lab.params.dashboards
    wanted = [tuple(pair) for pair in (settings.compare if pairs is None else pairs)]
    folder = Path(folder)
    if settings.other_model is None:
        _check_pairs(wanted, lab.saes)  # before statistics, which take minutes
    shown: dict[str, Shown] = {}
    for name, sae in lab.saes.items():
        with guard.on(name):
            shown[name] = Shown(name, sae, lab.lm, lab.stats(name, progress), settings, dict((figures or {}).get(name, {})))
    if not shown:
        raise UserError(f"dashboards: none of {', '.join(lab.saes)} can be shown")
    wanted = [pair for pair in wanted if not guard.failed.intersection(pair)]
    if settings.other_model is not None:
        for name, beside in _on_other_model(Lab(lab.lm, guard.left(lab.saes), lab.params), settings, progress).items():
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


def _on_other_model(lab: Lab, settings: Dashboards, progress: bool) -> dict[str, Shown]:
    """Every SAE of `lab` on the second model, by its name on the first."""
    assert settings.other_model is not None
    lm = load_language_model(settings.other_model, lab.params.model.device, lab.params.model.torch_dtype)
    moved = {f"{name}_on_{slugify(Path(lm.name).name)}": _moved(sae, lm) for name, sae in lab.saes.items()}
    there = Lab.of(moved, lm, lab.params)
    return {
        name: Shown(other, sae, lm, there.stats(other, progress), settings)
        for name, (other, sae) in zip(lab.saes, moved.items(), strict=True)
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
    with stage_folder(folder, params.eval_types.dashboards) as stage:
        if stage is None:  # torch takes seconds to import
            return
        from sae_research.analysis.context import Lab

        names = chosen(params)
        lab = Lab.open([str(PREPARED / name) for name in names], params)
        page = write_dashboard(lab, folder, figures=core_figures(), skip=stage.skip)
        stage.notes |= {
            "saes": names,
            "model": lab.lm.name,
            "tokens": params.analysis.tokens,
            "latents": {name: sae.cfg.d_sae for name, sae in lab.saes.items()},
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
    """Figures of the core evaluation, by SAE; empty where it has not run."""
    found: dict[str, Any] = read_json(path) if path.is_file() else {}
    return {name: values for name, values in found.items() if not name.startswith("_")}
