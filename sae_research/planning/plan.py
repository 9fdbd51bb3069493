"""The plan of a run: FLOPs, time, memory and disk by stage, what does not fit, and what was assumed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from sae_research.config.params import Params
from sae_research.config.recipes import PLUS
from sae_research.lm.shape import ModelShape
from sae_research.planning.costs import (
    PlannedCosts,
    all_left,
    evaluation_seconds,
    sae_seconds,
    shared_seconds,
    training_seconds,
    within,
)
from sae_research.planning.devices import Device
from sae_research.planning.resources import (
    PRECISION_BYTES,
    Need,
    activation_cache_bytes,
    evaluation_memory,
    training_memory,
    what_fits,
)
from sae_research.planning.saes import PlannedSAE, deepest, place_in, trained_sae
from sae_research.planning.work import Phase, Work, phases, sample_size, takes
from sae_research.runtime.formatting import duration, gigabytes, text_table
from sae_research.saes.base import OPEN_BYTES

COUNTING = Device("FLOPs", 0.0, 1.0, 1.0, math.inf, "")
"""On which a second is a FLOP."""
Left = Callable[[str, Sequence[Phase], Sequence[str]], Mapping[str, Sequence[Sequence[str]]]]
"""(evaluation, its phases, SAEs) -> by kind and part, the SAEs whose results are not in the cache."""


class Row(NamedTuple):
    """One stage."""

    stage: str
    flops: float | None
    """Of dense products; None where it cannot be foretold."""
    seconds: float
    memory: list[Need]
    """Of each device."""
    disk: float
    """Bytes that it leaves."""
    note: str = ""


class Plan(NamedTuple):
    """Of a run."""

    rows: list[Row]
    cache: float
    """Bytes of activations that are kept in `.cache`."""
    problems: list[str]
    """What does not fit, and what would."""
    assumptions: list[str]


def make_plan(
    params: Params,
    shape: ModelShape,
    saes: Sequence[PlannedSAE],
    device: Device,
    devices: int = 1,
    in_place: Mapping[str, bool] | None = None,
    left: Left | None = None,
) -> Plan:
    """saes: of the comparison. in_place: by stage, whether the last run's outputs are there and its parameters equal these.
    left: what the result cache lacks; everything where None."""
    done = in_place or {}
    rows, stages = [], []
    if params.train.enabled and params.train.saes:
        rows.append(_training(params, shape, device, devices, done.get("train", False)))
    rows.append(_setup(params, shape, saes, device, done.get("setup", False)))
    for name, on in params.eval_types.model_dump().items():
        if not on:
            continue
        stage = phases(name, params)
        if stage is None:
            rows.append(Row(name, None, 0.0, [], 0.0, "cannot be foretold"))
            continue
        stages.append(stage)
        row = _evaluation(name, params, shape, [sae for sae in saes if takes(name, sae.at)], device, devices, left)
        rows.append(row._replace(flops=0.0, seconds=0.0, note="in place") if done.get(name) else row)
    itemsize = PRECISION_BYTES[params.model.torch_dtype]
    widths = {hook: sae.d_in // len(sae.at.read) for sae in saes for hook in sae.at.read}
    for written in {sae.written for sae in saes} - {""}:  # core evaluation keeps the stream that holds it too
        hooks = written.split(PLUS)
        stream = [f"{written} in the stream"] if len(hooks) == 1 else []
        widths |= dict.fromkeys((*hooks, *stream), shape.width(hooks[0]))
    cache = (
        activation_cache_bytes(params, stages, widths, itemsize, saes[0].d_sae) if params.activation_caching.enabled else 0.0
    )
    problems = [
        f"{row.stage}: needs {gigabytes(total)} of {device.name}'s {gigabytes(device.memory)}: {mend}"
        for row in rows
        if (mend := what_fits(row.memory, device.memory, devices)) and (total := sum(need.nbytes for need in row.memory))
    ]
    return Plan(rows, cache, problems, [sae.assumed for sae in saes if sae.assumed])


def _training(params: Params, shape: ModelShape, device: Device, devices: int, done: bool) -> Row:
    train = params.train
    widths = {hook: shape.width(hook) for hook in train.hooks}
    saes = [
        trained_sae(name, config, train.hook_of(name), train.width_of(name, widths)) for name, config in train.saes.items()
    ]
    seconds = training_seconds(shape, params, device, saes).on(devices)
    counted = training_seconds(shape, params, COUNTING, saes, measured_factors=False)
    disk = train.output_bytes(widths) + train.checkpoint_bytes(widths, PRECISION_BYTES[train.llm_dtype])
    row = Row(
        "train",
        counted.model + sum(counted.by_sae.values()),
        seconds,
        training_memory(shape, params, saes, devices),
        float(disk),
        f"{len(saes)} SAEs on {train.tokens:,} tokens",
    )
    return row._replace(flops=0.0, seconds=0.0, note="in place") if done else row


def _setup(params: Params, shape: ModelShape, saes: Sequence[PlannedSAE], device: Device, done: bool) -> Row:
    baseline = saes[0]
    tokens = params.preflight.tokens
    work = Work(prefix=tokens + (sample_size(baseline.d_sae) if params.controls.names else 0), encoded=tokens)

    def on(device: Device) -> float:
        costs = PlannedCosts(shape, baseline.hook, params, device, saes, measured=False)
        return shared_seconds(work, costs) + sum(sae_seconds("setup", work, sae.name, costs) for sae in saes)

    disk = float(sum(sae.nbytes for sae in saes if sae.own_weights))
    if done:
        return Row("setup", 0.0, 0.0, [], disk, "in place")
    return Row("setup", on(COUNTING), on(device), [], disk, f"{len(saes)} SAEs")


def _evaluation(
    name: str,
    params: Params,
    shape: ModelShape,
    saes: Sequence[PlannedSAE],
    device: Device,
    devices: int,
    left: Left | None,
) -> Row:
    """saes: those that it takes."""
    flops = seconds = 0.0
    lacking = 0
    for at in dict.fromkeys(place_in(name, sae) for sae in saes):
        group = [sae for sae in saes if place_in(name, sae) == at]
        hook, names = deepest(at.written.split(PLUS)) if at.written else group[0].hook, [sae.name for sae in group]
        stage = phases(name, params, at) or []
        todo = all_left(stage, names) if left is None else left(name, stage, names)
        openings = max(1, math.ceil(sum(sae.nbytes for sae in group) / OPEN_BYTES))
        costs = PlannedCosts(shape, hook, params, device, group)
        counting = PlannedCosts(shape, hook, params, COUNTING, group, measured=False)
        seconds += evaluation_seconds(stage, todo, costs, openings).on(devices)
        flops += evaluation_seconds(stage, todo, counting, openings).on(1)
        lacking += len({one for parts in todo.values() for part in parts for one in part})
    note = f"{lacking} of {len(saes)} SAEs" + ("" if lacking or not saes else ": all in the cache")
    return Row(name, flops, seconds, evaluation_memory(name, shape, params, saes), 0.0, note)


# --- in words --------------------------------------------------------------------------------


def plan_text(plan: Plan, device: Device) -> str:
    """The table of a plan, and what is sure of it."""
    table = [("stage", "what", "PFLOP", "time", "memory", "disk")]
    for row in plan.rows:
        memory = sum(need.nbytes for need in row.memory)
        table.append(
            (
                row.stage,
                row.note,
                "" if row.flops is None else f"{row.flops / 1e15:.3g}",
                "" if row.flops is None else duration(row.seconds),
                gigabytes(memory) if memory else "",
                gigabytes(row.disk) if row.disk else "",
            )
        )
    known = [row for row in plan.rows if row.flops is not None]
    total = sum(row.flops or 0.0 for row in known)
    disk = gigabytes(sum(row.disk for row in plan.rows))
    table.append(("all", "", f"{total / 1e15:.3g}", duration(sum(row.seconds for row in known)), "", disk))
    return "\n".join(
        [text_table(table, left=2), "", *(f"does not fit: {line}" for line in plan.problems), *sure(plan, device)]
    )


def sure(plan: Plan, device: Device) -> list[str]:
    """What the figures rest on, a line each."""
    lines = [f"rates: {device.name}: {device.source}", *(f"assumed: {line}" for line in plan.assumptions)]
    factor = within()
    if factor is None:
        return [*lines, "how sure: never compared with a run"]
    compared = f"computed times of whole evaluations were within a factor of {factor:.2g} of measured ones on a CPU"
    if device.kind != "cpu":
        return [*lines, f"how sure: {compared}; on a GPU nothing has been compared yet"]
    return [*lines, f"how sure: {compared} (`python -m benchmarks.scale measure`)"]
