"""The verb plan: what a run takes, before it starts."""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sae_research.runtime.errors import UserError, did_you_mean
from sae_research.runtime.former_names import elsewhere

if TYPE_CHECKING:
    import torch

    from sae_research.config.params import Params
    from sae_research.planning.devices import Device
    from sae_research.planning.plan import Left, Plan

MOST_BYTES = 4e9
"""Prepared SAEs of more than this together are not opened to look up their results."""
LOCK, PARAMS = Path("dvc.lock"), Path("params.yaml")


def add_verb(verbs: argparse._SubParsersAction[argparse.ArgumentParser], overrides_of: Callable[[str], list[str]]) -> None:
    """Register the verb; overrides_of: the overrides of a preset."""
    parser = verbs.add_parser(
        "plan",
        help="FLOPs, time, memory and disk of a run, before it starts",
        description="Example: python -m sae_research plan gemma-2-2b --gpus 8 --gpu H200",
    )
    parser.add_argument("preset", nargs="?", default="", help="a file of presets/; without one, params.yaml as it is")
    parser.add_argument(
        "-S", "--set-param", action="append", default=[], metavar="KEY=VALUE", help="as `dvc exp run` takes it"
    )
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="devices that work is dealt out to (1)")
    parser.add_argument(
        "--gpu", metavar="NAME", help="a GPU of the table, such as H200; without one this machine is measured"
    )
    parser.set_defaults(run=lambda options: _run(options, overrides_of))


def _run(options: argparse.Namespace, overrides_of: Callable[[str], list[str]]) -> int:
    if options.gpus < 1:
        raise UserError("--gpus must be above 0")
    overrides = [*(overrides_of(options.preset) if options.preset else []), *options.set_param]
    print(planned(*read_with(overrides), options.gpu, options.gpus))
    return 0


def read_with(overrides: Sequence[str]) -> tuple[Params, dict[str, Any]]:
    """params.yaml under overrides in the spelling of `dvc exp run -S`: checked, and as plain values. The file stays as it
    is."""
    from sae_research.config.params import check_params, read_params

    if not overrides:
        values = read_params(PARAMS)
        return check_params(values, str(PARAMS)), values
    from dvc.exceptions import DvcException

    try:
        values = _overridden(overrides)
    except DvcException as error:
        raise UserError(_unknown(overrides) or " ".join(str(error).split())) from None
    return check_params(values, f"{PARAMS} with the overrides"), values


def _overridden(overrides: Sequence[str]) -> dict[str, Any]:
    """The values of params.yaml, changed as `dvc exp run -S` would. Raises DVC's exception for a key that is not there."""
    from dvc.utils.hydra import apply_overrides

    from sae_research.config.params import read_params

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / PARAMS.name
        shutil.copyfile(PARAMS, path)
        apply_overrides(path, list(overrides))
        return read_params(path)


def _may_be_added(override: str) -> bool:
    """Whether it sets a parameter that there is, and that params.yaml leaves out: an option of one SAE, say."""
    from dvc.exceptions import DvcException

    from sae_research.config.params import check_params

    try:
        check_params(_overridden([f"+{override}"]), "")
    except (DvcException, UserError):
        return False
    return True


def _unknown(overrides: Sequence[str]) -> str:
    """The first override of a key that params.yaml lacks, with what it may mean; empty where none is. DVC says that a
    value is invalid."""
    from sae_research.config.params import read_params
    from sae_research.experiments.config_files import flatten

    known = flatten(read_params(PARAMS))
    for override in overrides:
        key = override.partition("=")[0].lstrip("~")
        if not (key.startswith("+") or any(f"{one}.".startswith(f"{key}.") for one in known)):
            if _may_be_added(override):
                return f"-S {override}: params.yaml does not list {key}; a plus sign adds it: -S +{override}"
            former = elsewhere(key, "parameter") or elsewhere(key.rpartition(".")[2], "parameter", "value")
            return f"-S {override}: no parameter {key}{former or did_you_mean(key, sorted(known), otherwise='')}"
    return ""


def stage_of(evaluation: str) -> str:
    """The stage of `dvc.yaml` that computes an evaluation."""
    return f"{evaluation}_eval"


class Planned(NamedTuple):
    """A plan, and what it is of."""

    plan: Plan
    device: Device
    notes: list[str]
    head: str


def plan_of(params: Params, values: Mapping[str, Any], gpu: str | None = None, devices: int = 1) -> Planned:
    """The plan of a run. Raises `UserError` where the model's configuration or the device cannot be had."""
    from sae_research.lm.shape import shape_by_name
    from sae_research.planning.plan import make_plan
    from sae_research.planning.saes import planned_saes
    from sae_research.runtime.formatting import amount

    shape, config = shape_by_name(params.model.name)
    device, notes = _device(params, gpu)
    if config is None:
        notes.append(f"note: the hub does not give {shape.name}'s configuration: sizes are those that TransformerLens lists")
    saes = planned_saes(params, shape.width(f"blocks.{params.baseline_sae.hook_layer}.hook_resid_post"))
    done = in_place(values)
    left = _lookup(params, config, device) if done["train"] else None  # SAEs that are trained anew have no results yet
    plan = make_plan(params, shape, saes, device, devices, done, left)
    hooks = ", ".join(dict.fromkeys(sae.hook for sae in saes))
    head = (
        f"{shape.name} ({amount(shape.parameters)} parameters, {shape.n_layers} layers), {len(saes)} SAEs at {hooks}, on "
        f"{devices} x {device.name}"
    )
    return Planned(plan, device, notes, head)


def planned(params: Params, values: Mapping[str, Any], gpu: str | None, devices: int) -> str:
    """The plan as text."""
    from sae_research.planning.plan import plan_text
    from sae_research.planning.resources import cache_lines

    plan, device, notes, head = plan_of(params, values, gpu, devices)
    cached = cache_lines(plan.cache, params) if plan.cache else []
    return "\n".join([head, "", plan_text(plan, device), *cached, *notes])


def _device(params: Params, gpu: str | None) -> tuple[Device, list[str]]:
    from sae_research.lm import pick_device
    from sae_research.planning.devices import device_by_name, measured_device
    from sae_research.training.products import has_bfloat16

    if gpu is not None:
        return device_by_name(gpu), []
    try:
        here, notes = pick_device(params.model.device), []
    except UserError:
        here = pick_device("cpu")
        notes = [f"note: {params.model.device} is not there: times are this machine's CPU's; --gpu names a GPU"]
    return measured_device(here, has_bfloat16(here)), notes


def in_place(values: Mapping[str, Any]) -> dict[str, bool]:
    """Stage, by the name of its evaluation where it is one -> whether the last run had these parameters and its outputs are
    there. Code is not looked at: DVC runs a stage again whose code has changed."""
    from sae_research.config.evaluations import OF_SAES
    from sae_research.config.yaml_files import read_mapping

    stages = read_mapping(LOCK).get("stages", {}) if LOCK.is_file() else {}
    names = {"train": "train", "setup": "setup", **{name: stage_of(name) for name in OF_SAES}}
    same = {name: _same(stages.get(stage), values) for name, stage in names.items()}
    for name in names:
        if name != "train":  # what comes before it would run again
            same[name] = same[name] and same["train"] and same["setup"]
    return same


def _same(stage: Mapping[str, Any] | None, values: Mapping[str, Any]) -> bool:
    if stage is None or not all(Path(out["path"]).exists() for out in stage.get("outs", [])):
        return False

    def value(key: str) -> Any:
        found: Any = values
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found

    return all(value(key) == wanted for key, wanted in stage.get("params", {}).get(PARAMS.name, {}).items())


class _Identity(NamedTuple):
    """A model that is not loaded."""

    fingerprint: str
    dtype: torch.dtype
    device: torch.device


def _lookup(params: Params, config: Any, device: Device) -> Left | None:
    """What the result cache lacks of the prepared SAEs; None where there are none, or too large ones to open, or the model's
    fingerprint cannot be told from its configuration."""
    import torch

    from sae_research.lm.shape import known_fingerprint
    from sae_research.saes import load_sae
    from sae_research.saes.sources import PREPARED
    from sae_research.setup.checks import left_to_score

    fingerprint = known_fingerprint(params.model.name, config)
    folders = {path.parent.name: path.parent for path in PREPARED.glob("*/cfg.json")}
    size = sum(file.stat().st_size for file in PREPARED.glob("*/*.safetensors"))
    if not (fingerprint and folders) or size > MOST_BYTES:
        return None
    infos = {name: load_sae(folder).info() for name, folder in folders.items()}
    identity = _Identity(fingerprint, getattr(torch, params.model.torch_dtype), torch.device(device.kind))

    def left(name: str, stage: Any, saes: Sequence[str]) -> Mapping[str, Sequence[Sequence[str]]]:
        there = {sae: infos[sae] for sae in saes if sae in infos}
        found = left_to_score(name, stage, there, identity, params)
        absent = [sae for sae in saes if sae not in infos]
        return {kind: [[*todo, *absent] for todo in parts] for kind, parts in found.items()}

    return left
