"""Seconds of a stage: its `Work` at unit costs, which setup measures and a plan computes from a device's rates.

`evaluation_seconds` is the one sum. A plan's unit costs are FLOPs over the rate of products plus bytes over the bandwidth;
what the host does beside them (fits of probes, reading, bookkeeping) comes from `unit_costs.json`, which
`python -m benchmarks.scale measure` writes from real evaluations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from sae_research.config.evaluation_params import EXACT_WIDTH
from sae_research.config.params import Params
from sae_research.config.recipes import recipe_model
from sae_research.config.training import FLOAT_BYTES
from sae_research.lm.shape import ModelShape
from sae_research.planning.devices import Device
from sae_research.planning.saes import PURSUIT, PlannedSAE
from sae_research.planning.work import Phase, Work, phases, takes
from sae_research.runtime.files import read_json

RECORD = Path(__file__).with_name("unit_costs.json")
LOGIT_READS = 12
"""How often a patched pass's logits are read or written: clean and patched log-probabilities, their divergence."""
LATENT_READS = 10
"""How often a token's latents are: encoding, checks, decoding, statistics of either definition."""
PARAMETER_READS = 7
"""How often an optimiser step reads or writes a parameter, its gradient and its two moments."""
PURSUIT_READS = 1.0
"""Rows of the Gram matrix that a greedy step reads."""
REFIT_SIZE = 10
"""Greedy steps after which refitting an orthogonal pursuit costs as much as choosing."""
OPENED = 2
"""How often an SAE is opened for a part: to look at it, and to score it."""


class UnitCosts(Protocol):
    """Seconds a token at one hook; a pass in the other direction costs twice the pass from the hook on."""

    @property
    def prefix(self) -> float:
        """Up to the hook."""
        ...

    @property
    def above(self) -> float:
        """From the hook to the logits, with what is compared there."""
        ...

    def encode(self, sae: str) -> float:
        """Encoding and decoding."""
        ...

    def start(self, kind: str) -> float:
        """Seconds before the first SAE of a phase is scored, or of a worker's unit: texts are read and cut into tokens."""
        ...

    def host(self, kind: str, sae: str, work: Work) -> float:
        """Seconds of one part of one SAE that are neither encoding nor a pass: opening it, its decoder's geometry, probes,
        a meta-SAE."""
        ...


def shared_seconds(work: Work, costs: UnitCosts) -> float:
    """What a part takes once, however many SAEs."""
    return work.prefix * costs.prefix + work.above * costs.above + work.whole * (costs.prefix + costs.above)


def sae_seconds(kind: str, work: Work, sae: str, costs: UnitCosts) -> float:
    """What a part takes for one SAE more."""
    passes = (work.patched + 2 * work.backward) * costs.above + work.patched_whole * (costs.prefix + costs.above)
    return work.encoded * costs.encode(sae) + passes + costs.host(kind, sae, work)


class Seconds(NamedTuple):
    """Of one evaluation."""

    shared: float
    """Once, for all SAEs."""
    saes: float
    """For all of them together."""

    def on(self, devices: int) -> float:
        """On so many workers: each computes what is shared, SAEs are dealt out."""
        return self.shared + self.saes / max(1, devices)


def evaluation_seconds(
    stage: Sequence[Phase], left: Mapping[str, Sequence[Sequence[str]]], costs: UnitCosts, openings: int = 1
) -> Seconds:
    """left: by kind, and part by part, the SAEs still to be scored (`all_left`). openings: how often SAEs are opened, as
    many at a time as memory holds; what a part shares above the hook is computed anew for each."""
    shared, saes, taken = 0.0, 0.0, dict.fromkeys(left, 0)
    for phase in stage:
        first = taken[phase.kind]
        shared += costs.start(phase.kind) if any(left[phase.kind]) else 0.0
        taken[phase.kind] += phase.parts
        for todo in left[phase.kind][first : taken[phase.kind]]:
            if todo:
                again = phase.work._replace(prefix=0.0)
                shared += shared_seconds(phase.work, costs) + (openings - 1) * shared_seconds(again, costs)
                saes += sum(sae_seconds(phase.kind, phase.work, sae, costs) for sae in todo)
    return Seconds(shared, saes)


def all_left(stage: Sequence[Phase], saes: Sequence[str]) -> dict[str, list[Sequence[str]]]:
    """Every SAE at every part."""
    left: dict[str, list[Sequence[str]]] = {}
    for phase in stage:
        left.setdefault(phase.kind, []).extend([saes] * phase.parts)
    return left


# --- a plan's unit costs ---------------------------------------------------------------------


class PlannedCosts:
    """On a device, from its rates, for SAEs of one hook."""

    def __init__(
        self,
        shape: ModelShape,
        hook: str,
        params: Params,
        device: Device,
        saes: Iterable[PlannedSAE],
        measured: bool = True,
        least: bool = False,
    ) -> None:
        """measured: whether what `unit_costs.json` holds counts: the host's seconds, and factors. least: whether only what
        no implementation can avoid does (`encoding`; a meta-SAE's steps go the sparse way)."""
        context, rate = params.text.context_size, device.rate(params.model.torch_dtype)
        self._measured, self._least = measured, least
        self._device, self._context, self._saes = device, context, {sae.name: sae for sae in saes}
        self._batch = params.meta_sae.train_batch_size
        self._width_ratio = params.meta_sae.width_ratio
        self.prefix = shape.prefix_flops(hook, context) / rate
        logits = LOGIT_READS * shape.vocab_size * FLOAT_BYTES / device.bandwidth
        self.above = shape.above_flops(hook, context) / rate + logits

    def encode(self, sae: str) -> float:
        flops, read = encoding(self._saes[sae], self._context, self._least)
        return flops / self._device.float32 + read / self._device.bandwidth

    def start(self, kind: str) -> float:
        return start_seconds(kind) if self._measured else 0.0

    def host(self, kind: str, sae: str, work: Work) -> float:
        one = self._saes[sae]
        geometry = work.geometry * 2.0 * one.d_in * min(one.d_sae, EXACT_WIDTH) ** 2
        seconds = geometry / self._device.float32
        if self._measured:
            seconds += host_seconds(kind) * work.texts * one.d_sae + OPENED * one.nbytes * opening_seconds()
        if work.meta_rows and one.own_weights:
            meta = one._replace(form="standard", d_sae=max(1, int(one.d_sae * self._width_ratio)))
            flops, read = training_step(meta, "batch_top_k" if self._least else "standard", self._batch, self._least)
            seconds += work.meta_rows * (flops / self._device.float32 + read / self._device.bandwidth)
        return seconds


def encoding(sae: PlannedSAE, context: int, least: bool = False) -> tuple[float, float]:
    """(FLOPs, bytes read and written) of encoding and decoding a token. least: decoding an encoder's few latents counts as
    nothing; it reads their rows alone."""
    product, latents = 2.0 * sae.d_in * sae.d_sae, LATENT_READS * sae.d_sae * FLOAT_BYTES
    if sae.form not in PURSUIT:
        return (1 if least else 2) * product, latents
    if sae.form in ("ihtp", "topk_refit"):  # least squares on a support, of a sequence or a token
        tokens = context if sae.form == "ihtp" else 1
        support = min(sae.size * tokens, sae.d_sae, sae.d_in)
        fit = (2.0 * sae.d_in * support**2 + support**3 / 3) / tokens
        return (4 if sae.form == "ihtp" else 2) * product + fit, latents
    refits = 1 + (sae.size / REFIT_SIZE if "omp" in sae.form else 0.0)
    return 2 * product, latents + PURSUIT_READS * sae.size * refits * sae.d_sae * FLOAT_BYTES


def training_step(sae: PlannedSAE, recipe: str, batch: int, sparse: bool) -> tuple[float, float]:
    """(FLOPs, bytes) a token of a step: five products of [batch, d_sae] with d_in, one on the sparse path; and Adam.

    sparse: whether the recipe may go the sparse way.
    """
    products = 1 if recipe == "matching_pursuit" or sparse and recipe_model(recipe).few_active else 5
    flops = products * 2.0 * sae.d_in * sae.d_sae
    parameters = 2 * sae.d_in * sae.d_sae * FLOAT_BYTES * PARAMETER_READS / batch
    latents = LATENT_READS * sae.d_sae * FLOAT_BYTES
    if recipe == "matching_pursuit":
        flops += 2.0 * sae.d_in * sae.d_sae**2 / batch  # the Gram matrix, each step anew
        latents += sae.size * sae.d_sae * FLOAT_BYTES
    return flops, parameters + latents


class TrainingSeconds(NamedTuple):
    """Of one run."""

    model: float
    """Passes up to the last hook."""
    by_sae: dict[str, float]
    """Steps."""

    def on(self, devices: int) -> float:
        """Seconds on so many devices: the model's pass is shared out, an SAE stays whole, the dearest are dealt first."""
        loads = [0.0] * max(1, devices)
        for seconds in sorted(self.by_sae.values(), reverse=True):
            loads[loads.index(min(loads))] += seconds
        return self.model / max(1, devices) + max(loads)


def training_seconds(
    shape: ModelShape, params: Params, device: Device, saes: Sequence[PlannedSAE], measured_factors: bool = True
) -> TrainingSeconds:
    """The stage `train` on one device, measurement on held-out text included. measured_factors: whether steps take what
    `recipe_factor` says."""
    train = params.train
    rate, precise = device.rate(train.llm_dtype), device.rate(train.precision)
    depth = max(train.hooks, key=shape.depth)
    prefix = shape.prefix_flops(depth, params.text.context_size) / rate
    above = shape.above_flops(depth, params.text.context_size) / rate
    model = (train.tokens + train.held_out_tokens) * prefix + train.evaluate_tokens * above
    by_sae = {}
    for sae in saes:
        recipe = train.saes[sae.name].recipe
        flops, read = training_step(sae, recipe, train.batch_size // train.accumulation_steps, sparse=device.kind == "cpu")
        if train.saes[sae.name].whiten:
            flops += 2.0 * sae.d_in**2
        encode, latents = encoding(sae._replace(form="standard"), params.text.context_size)
        by_sae[sae.name] = (
            train.tokens * (flops / precise + read / device.bandwidth) * (recipe_factor(recipe) if measured_factors else 1.0)
            + train.held_out_tokens * (encode / device.float32 + latents / device.bandwidth)
            + train.evaluate_tokens * above
        )
    return TrainingSeconds(model, by_sae)


# --- units of workers ------------------------------------------------------------------------


def unit_seconds(phase: Phase, sae: str, costs: UnitCosts) -> tuple[float, float]:
    """(what a worker's unit of one part takes once, and for one SAE more)."""
    once = costs.start(phase.kind) + shared_seconds(phase.work, costs)
    return once, sae_seconds(phase.kind, phase.work, sae, costs)


class UnitShares(NamedTuple):
    """What a unit takes, in what scoring one SAE takes that is open."""

    once: float = 0.0
    """However many SAEs it holds."""
    opening: float = 0.0
    """To open one."""


def unit_shares(
    evaluation: str, params: Params, shape: ModelShape, saes: Sequence[PlannedSAE], device: Device
) -> dict[str, UnitShares]:
    """By kind, of the SAE of median size among those that it takes. Empty for an evaluation that cannot be foretold."""
    taken = [sae for sae in saes if takes(evaluation, sae.at)] or saes
    middle = sorted(taken, key=lambda sae: sae.nbytes)[len(taken) // 2]
    costs, found = PlannedCosts(shape, middle.hook, params, device, [middle]), {}
    for phase in phases(evaluation, params, middle.at) or ():
        once, each = unit_seconds(phase, middle.name, costs)
        opening = min(OPENED * middle.nbytes * opening_seconds(), each)
        scoring = each - opening
        found[phase.kind] = UnitShares(once / scoring, opening / scoring) if scoring else UnitShares()
    return found


# --- what was measured -----------------------------------------------------------------------


@cache
def measured() -> dict[str, Any]:
    """The record of unit costs."""
    empty: dict[str, Any] = {"kinds": {}, "host": {}, "recipes": {}, "opening_gb_s": None, "within": None}
    return empty | (read_json(RECORD) if RECORD.is_file() else {})


def host_seconds(kind: str) -> float:
    """Seconds that the host spends for each text and latent of an SAE."""
    return measured()["host"].get(kind, 0.0)


def start_seconds(kind: str) -> float:
    """Measured seconds that a unit takes once beside the model's pass, its texts not in the cache."""
    one = measured()["kinds"].get(kind)
    return 0.0 if one is None else max(0.0, one["once"] - one["once_computed"])


def opening_seconds() -> float:
    """Measured seconds for each byte of an SAE that is opened, checksums and fingerprints included."""
    rate = measured()["opening_gb_s"]
    return 0.0 if rate is None else 1e-9 / rate


def recipe_factor(recipe: str) -> float:
    """Measured over computed seconds of a step; 1 for a recipe that was not measured."""
    return measured()["recipes"].get(recipe, {}).get("factor", 1.0)


def within() -> float | None:
    """The factor by which measured seconds of whole evaluations differed from the computed ones at most."""
    return measured()["within"]
