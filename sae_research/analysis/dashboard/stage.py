"""The stage `dashboards`: writes `dashboards/`, the site of the SAEs that params.yaml names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sae_research.errors import UserError
from sae_research.params import Params
from sae_research.store import read_json
from sae_research.store_stages import read_manifest, stage_folder

FOLDER = Path("dashboards")
SAES = Path("downloaded_saes")
FIGURES = Path("metrics/core.json")


def run_stage(params: Params, folder: Path = FOLDER) -> None:
    """One run. Raises `UserError` for an SAE that setup did not prepare."""
    with stage_folder(folder, params.eval_types.dashboards) as stage:
        if stage is None:  # torch takes seconds to import
            return
        from sae_research.analysis.dashboard.make import write_dashboard
        from sae_research.analysis.sources import Lab

        names = chosen(params)
        lab = Lab.open([str(SAES / name) for name in names], params)
        page = write_dashboard(lab, folder, figures=core_figures(), skip=stage.skip)
        stage.notes |= {"saes": names, "model": lab.lm.name, "tokens": params.analysis.tokens,
                        "latents": {name: sae.cfg.d_sae for name, sae in lab.saes.items()}}
        print(f"open {page} in a browser", flush=True)


def chosen(params: Params) -> list[str]:
    """Names of the SAEs to show: those asked for, else the baseline. Raises `UserError` for one that is not there."""
    manifest = read_manifest(SAES / "manifest.json")
    if params.dashboards.saes is None:
        return [name for name in manifest["order"] if manifest["saes"][name]["role"] == "baseline"] or manifest["order"][:1]
    missing = [name for name in params.dashboards.saes if name not in manifest["saes"]]
    if missing or not params.dashboards.saes:
        raise UserError(f"dashboards.saes: {', '.join(missing) or 'names no SAE'}; {SAES}/ holds "
                        f"{', '.join(manifest['order'])}")
    return params.dashboards.saes


def core_figures(path: Path = FIGURES) -> dict[str, dict[str, float]]:
    """Figures of the core evaluation, by SAE; empty where it has not run."""
    found: dict[str, Any] = read_json(path) if path.is_file() else {}
    return {name: values for name, values in found.items() if not name.startswith("_")}
