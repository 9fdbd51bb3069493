"""One run from one file: train what it says into a folder of its own, and write down how it was understood."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from sae_research.config.params import Params, check_params, read_params
from sae_research.config.yaml_files import read_mapping
from sae_research.experiments import sae_interpretability as foreign
from sae_research.experiments.config_files import (
    PARAMS,
    Values,
    flatten,
    names_sections,
    over,
    with_values,
    write_yaml,
)
from sae_research.experiments.devices import Lease, Slot
from sae_research.experiments.sae_interpretability import Changes, Measure, Scale, measure, translate
from sae_research.runtime import processes
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import fingerprint
from sae_research.runtime.stages import writing
from sae_research.training.checkpoints import progress_path

SAES = "trained_saes"


class Understood(NamedTuple):
    """A file as parameters."""

    values: Values
    """All of `params.yaml`, nested."""
    params: Params
    notes: list[str]
    name: str
    """Of the run's folder: equal for equal parameters."""
    save_dir: str | None


def understand(
    path: Path, overrides: Values, changes: Changes, params_yaml: Values, device: str | None, scale_of: Measure
) -> Understood:
    """A file in either format, with `overrides` in its own spelling, over `params.yaml`.

    Raises `UserError` for what the file may not say.
    """
    where, values = str(path), read_mapping(path)
    notes: list[str] = []
    save_dir = None
    if names_sections(values):
        overrides = {{"wandb_project": "tracking.project"}.get(key, key): value for key, value in overrides.items()}
        if changes != Changes():
            raise UserError(
                "--model, --text and --tokens are for SAE-Interpretability's files; write model.name=…, "
                "text.dataset=… or train.tokens=… in their place"
            )
        complete, stem = over(params_yaml, {**flatten(values), **overrides}), path.stem
    else:
        given = {**foreign.canonical(values, where), **foreign.canonical(overrides, "command line")}
        config = foreign.parse(given, where)
        result = translate(config, given, changes, scale_of)
        complete, notes, save_dir = with_values(params_yaml, result.overrides), result.notes, config.save_dir
        stem = config.wandb_run_name or f"{config.saes.sae_type}_lr_{config.lr:g}_sparsity_{config.saes.sparsity_coeff:g}"
    if device is not None:
        complete = with_values(complete, {"model.device": device})
    params = check_params(complete, where)
    if not params.train.saes:
        raise UserError(f"{where}: train.saes names no SAE to train")
    shaped_by = params.model_dump(include={"text", "token_mask", "train", "random_seed"})
    key = fingerprint(shaped_by | {"model": params.model.name})
    stem = re.sub(r"[^a-zA-Z0-9._-]+", "_", stem).strip("._") or "run"
    return Understood(complete, params, notes, f"{stem}_{key[:8]}", save_dir)


def scales_over(params_yaml: Values, device: str | None) -> Measure:
    """`scaling.measure` for overrides of this `params.yaml`, each model and text measured once."""
    known: dict[str, dict[str, Scale]] = {}

    def scale_of(overrides: Values, hooks: Iterable[str]) -> dict[str, Scale]:
        relevant = {key: value for key, value in overrides.items() if key.startswith(("model.", "text.", "train.tokens"))}
        key = fingerprint(relevant)
        missing = [hook for hook in hooks if hook not in known.setdefault(key, {})]
        if missing:
            values = with_values(params_yaml, relevant | ({"model.device": device} if device else {}))
            known[key] |= measure(check_params(values, str(PARAMS)), missing)
        return {hook: known[key][hook] for hook in hooks}

    return scale_of


def run_one(
    path: Path, overrides: Values, changes: Changes, device: str | None, output_dir: str | None, dry_run: bool
) -> int:
    """Train from one file into `<output_dir>/<run>/`: `params.yaml`, `notes.txt`, and `trained_saes/`.

    The same file gives the same folder; an interrupted run goes on where it stopped.
    """
    params_yaml = read_params(PARAMS)
    understood = understand(path, overrides, changes, params_yaml, device, scales_over(params_yaml, device))
    folder = Path(output_dir or understood.save_dir or "output") / understood.name
    for line in understood.notes:
        print(f"note: {line}")
    train = understood.params.train
    print(
        f"{folder}: {', '.join(train.saes)} on {understood.params.model.name}, {train.tokens:,} tokens in steps of "
        f"{train.batch_size:,}",
        flush=True,
    )
    if dry_run:
        return 0
    write_yaml(folder / "params.yaml", understood.values)
    (folder / "notes.txt").write_text("".join(f"{line}\n" for line in understood.notes))
    chosen = understood.params.model.device
    lease = _held(chosen, understood.name)
    processes.record(
        "run",
        understood.name,
        os.getpid(),
        device=chosen,
        log=None,
        saes=list(train.saes),
        progress=str(progress_path(understood.params)),
        folder=str(folder),
    )
    try:
        from sae_research.training.stage import train as train_saes

        with writing(folder / SAES):
            train_saes(understood.params, folder / SAES)
    finally:
        if lease:
            lease.close()
    print(f"trained SAEs: {folder / SAES}")
    return 0


def _held(device: str, name: str) -> Lease | None:
    """A GPU's lease, so that sweeps keep away from it; a run asked for by name starts beside another job all the same."""
    if not device.startswith("cuda"):
        return None
    try:
        return Lease(Slot(device if ":" in device else "cuda:0", 0), f"run {name} (process {os.getpid()})")
    except UserError as busy:
        print(f"note: {busy}")
        return None
