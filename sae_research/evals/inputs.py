"""What every evaluation stage starts from: the SAEs that setup prepared, grouped by the hook they read."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from sae_research.errors import UserError
from sae_research.lm import LanguageModel
from sae_research.params import Params
from sae_research.saes import SparseAutoencoder, load_sae
from sae_research.saes.registry import code_fingerprint
from sae_research.store import fingerprint
from sae_research.store_stages import read_manifest

SAE_FOLDER = Path("downloaded_saes")


def load_saes(folder: Path, lm: LanguageModel) -> dict[str, SparseAutoencoder]:
    """Every SAE of the manifest, in its order, on the model's device.

    Raises `UserError` when setup has not run, a file is damaged, or an SAE does not fit the model.
    """
    manifest = folder / "manifest.json"
    if not manifest.is_file():
        raise UserError(f"{manifest}: no such file; run the setup stage first (dvc repro setup)")
    saes = {name: load_sae(folder / name, str(lm.device)) for name in read_manifest(manifest)["order"]}
    if not saes:
        raise UserError(f"{manifest} lists no SAE; give params.yaml a baseline_sae")
    for name, sae in saes.items():
        width = lm.d_in(sae.cfg.hook_name)
        if sae.cfg.d_in != width:
            raise UserError(f"SAE {name} reads {sae.cfg.d_in} dimensions, {lm.name} has {width} at {sae.cfg.hook_name}")
    return saes


def by_hook(saes: dict[str, SparseAutoencoder]) -> dict[str, dict[str, SparseAutoencoder]]:
    """SAEs grouped by hook: one model pass serves a group."""
    groups: dict[str, dict[str, SparseAutoencoder]] = {}
    for name, sae in saes.items():
        groups.setdefault(sae.cfg.hook_name, {})[name] = sae
    return groups


def result_key(sae: SparseAutoencoder, lm: LanguageModel, inputs: Any, *modules: str) -> str:
    """Key of one SAE's result: weights, configuration, inputs, model, precision, device kind, and the code and libraries
    that `modules` (names, `__name__` of whoever computes it) and the SAE's class reach."""
    return fingerprint({
        "sae": sae.weights_fingerprint(), "inputs": inputs, "model": lm.fingerprint, "dtype": str(lm.dtype),
        "device": lm.device.type, "code": code_fingerprint(*modules, classes=[type(sae)])})[:40]


def model_key(lm: LanguageModel, inputs: Any, *modules: str) -> str:
    """Key of what the model alone gives, for every SAE: inputs, model, precision, device kind, code and libraries."""
    return fingerprint({"inputs": inputs, "model": lm.fingerprint, "dtype": str(lm.dtype), "device": lm.device.type,
                        "code": code_fingerprint(*modules)})[:40]


def announce(params: Params, lm: LanguageModel, saes: dict[str, SparseAutoencoder]) -> None:
    """One line that says what is about to be evaluated."""
    print(f"{len(saes)} SAEs on {lm.name} ({params.model.torch_dtype}, {lm.device}) at "
          f"{', '.join(by_hook(saes))}", flush=True, file=sys.stderr)
