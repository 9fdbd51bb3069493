"""What one more SAE costs in every evaluation, beside its arithmetic floor; how core and probing grow.

    python -m benchmarks growth    # prints
    python -m benchmarks.growth    # writes docs/growth.json and the tables of docs/speed.md

SAEs are random TopK dictionaries. One more costs the difference of two runs' times, with few SAEs and with more, in turns
and the least of each. Times are CPU seconds of one thread, which a busy machine changes little. The floor is the count of
FLOPs of `sae_research.planning` (encoding, patched and backward passes, the geometry of dictionaries, a meta-SAE's steps)
over the rate of this machine's float32 products, measured beside each run. Memory, decoding of a few latents, probes on a
few latents and all else that the host does count as nothing in it. It is counted from parameters alone, every text as
long as it may be and every question as one that the model knows: a run on shorter or fewer texts can stay below it.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from benchmarks.pages import write_between
from benchmarks.scale_measure import SIZES as SMALL
from benchmarks.scale_measure import clock, random_sae
from sae_research.config.evaluations import EVALUATIONS
from sae_research.config.params import Params, check_params
from sae_research.evals.run import evaluation_function
from sae_research.lm import LanguageModel
from sae_research.lm.shape import ModelShape, shape_of
from sae_research.planning.costs import PlannedCosts, sae_seconds, shared_seconds
from sae_research.planning.devices import Device, measured_device
from sae_research.planning.saes import described
from sae_research.planning.work import phases
from sae_research.runtime.cache import NO_CACHE
from sae_research.runtime.errors import UserError, run_main
from sae_research.runtime.files import project_root, round_significant, write_json
from sae_research.runtime.formatting import markdown_table
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SparseAutoencoder

RECORD, PAGE = Path("docs/growth.json"), Path("docs/speed.md")
BEGIN, END = "<!-- growth -->", "<!-- end of growth -->"
WIDTH, FEW, MORE = 2_304, 1, 3
"""Latents of an SAE where the width is not what grows; SAEs of the two runs whose difference is taken."""
REPEATS = 2
SIZES: dict[str, dict[str, Any]] = {
    **{name: SMALL[name] for name in ("scr", "tpp", "absorption", "unlearning", "ravel")},
    # batches in the proportion of a default run
    "core": {"batch_size_prompts": 4, "n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 8},
    "sparse_probing": {"dataset_names": ["news_topic"], "context_length": 32, "train_draws": 10},
    "sparse_probing_sae_probes": {"dataset_names": ["105_click_bait"]},
    "meta_sae": {"train_steps": 40},
}
"""Settings of each evaluation; the rest is as in `params.yaml`."""
UNTIMED = {"autointerp": "a judge at an endpoint takes its own time"}
"""Evaluations of SAEs of the comparison that cannot be timed here, and why."""
OTHER = "gives other than one result for each SAE of the comparison"
WIDTHS = (2_304, 16_384, 65_536)
NUMBERS = (1, 4, 16, 64)
TOKENS = (1, 2, 4)
"""Times the tokens of the smallest run."""


class Cost(NamedTuple):
    """Seconds, and the least that arithmetic allows."""

    seconds: float
    floor: float


class Bench:
    """One model and the parameters that everything here varies."""

    def __init__(self, lm: LanguageModel, params: Params) -> None:
        self.lm, self.params, self.hook = lm, params, params.train.hook_name
        self.shape: ModelShape = shape_of(lm.name, lm.model)
        self.rates: list[float] = []
        """FLOP/s of float32 products, as they were measured."""
        self._made = 0

    def settings(self, evaluation: str, **changes: Any) -> Params:
        section = EVALUATIONS[evaluation].section_name
        values = self.params.model_dump()
        values[section] |= SIZES[evaluation] | changes
        return check_params(values, "benchmarks.growth")

    def saes(self, count: int, width: int = WIDTH) -> dict[str, SparseAutoencoder]:
        """SAEs that nothing has been computed of."""
        first, self._made = self._made, self._made + count
        return {
            f"sae_{i}": random_sae(i, width, self.lm.d_in(self.hook), self.lm.name, self.hook)
            for i in range(first, first + count)
        }

    def one_more(
        self, evaluation: str, params: Params, width: int = WIDTH, repeats: int = REPEATS, more: int = MORE
    ) -> Cost:
        """Of one SAE more. What the model alone gives is computed beforehand, as far as the caches keep it."""
        self._seconds(evaluation, self.saes(FEW), params)
        rates, short, long = [self._rate()], [], []
        for _ in range(repeats):
            short.append(self._seconds(evaluation, self.saes(FEW, width), params))
            long.append(self._seconds(evaluation, self.saes(more, width), params))
            rates.append(self._rate())
        each, _ = self._floors(evaluation, params, self.saes(1, width), statistics.median(rates))
        return Cost((min(long) - min(short)) / (more - FEW), each)

    def whole(self, evaluation: str, params: Params, count: int) -> Cost:
        """Of a whole run of so many SAEs, what they share included."""
        saes, rates = self.saes(count), [self._rate()]
        with mock.patch.dict(os.environ, {NO_CACHE: "1"}):
            seconds = self._seconds(evaluation, saes, params)
        rates.append(self._rate())
        each, shared = self._floors(evaluation, params, saes, statistics.median(rates))
        return Cost(seconds, shared + count * each)

    def _rate(self) -> float:
        self.rates.append(measured_device(self.lm.device, has_bfloat16=False, clock=clock).float32)
        return self.rates[-1]

    def _seconds(self, evaluation: str, saes: dict[str, SparseAutoencoder], params: Params) -> float:
        evaluate = evaluation_function(evaluation)
        with tempfile.TemporaryDirectory() as folder:
            stage = StageFolder(Path(folder) / "out")
            began = clock()
            results = list(evaluate(saes, self.lm, params, stage))
            seconds = clock() - began
        if len(results) < len(saes):
            raise UserError("; ".join(f"{what}: {why}" for what, why in stage.skipped.items()))
        return seconds

    def _floors(
        self, evaluation: str, params: Params, saes: dict[str, SparseAutoencoder], rate: float
    ) -> tuple[float, float]:
        """Least seconds for each SAE, and for what they share."""
        name, sae = next(iter(saes.items()))
        machine = Device("products alone", math.inf, None, rate, math.inf, "measured beside the run", self.lm.device.type)
        costs = PlannedCosts(
            self.shape, self.hook, params, machine, [described(name, sae.info())], measured=False, least=True
        )
        stage = phases(evaluation, params) or []
        each = sum(phase.parts * sae_seconds(phase.kind, phase.work, name, costs) for phase in stage)
        shared = sum(
            phase.parts * shared_seconds(phase.work, costs) + shared_seconds(phase.driver, costs) for phase in stage
        )
        return each, shared


def compare(saes: object, lm: LanguageModel, model: object, params: Params) -> dict[str, tuple[float, float]]:
    """Prints the tables; there is no other side. Nothing is needed of the SAEs and of `model`."""
    print(tables(measured(lm, params)))
    return {}


def measured(lm: LanguageModel, params: Params, say: Callable[[str], None] = print) -> dict[str, Any]:
    """The record: `one_more` by evaluation, of SAEs of `width` latents at `sizes`; `untimed` with reasons; `growth` of core
    and probing. Caches are empty at first."""
    values, threads = params.model_dump(), torch.get_num_threads()
    values["activation_caching"]["enabled"] = True
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as project, mock.patch.dict(os.environ, {"DVC_ROOT": project, NO_CACHE: ""}):
            return _measured(Bench(lm, check_params(values, "benchmarks.growth")), say)
    finally:
        torch.set_num_threads(threads)


def _measured(bench: Bench, say: Callable[[str], None]) -> dict[str, Any]:
    one_more, untimed = {}, {}
    for name, evaluation in EVALUATIONS.items():
        reason = OTHER if evaluation.evaluate is None else UNTIMED.get(name)
        if reason is not None:
            untimed[name] = reason
            continue
        one_more[name] = bench.one_more(name, bench.settings(name))._asdict()
        say(f"{name}: {one_more[name]['seconds']:.3f} s for one more SAE, floor {one_more[name]['floor']:.3f} s")
    growth = _growth(bench, say)
    machine = {
        "float32_gflops": statistics.median(bench.rates) / 1e9,
        "slowest_gflops": min(bench.rates) / 1e9,
        "fastest_gflops": max(bench.rates) / 1e9,
    }
    found = {"machine": machine, "one_more": one_more, "untimed": untimed, "growth": growth}
    return {**round_significant(found, 3), "width": WIDTH, "sizes": SIZES}


GROWN = ("core", "sparse_probing")


def _small(bench: Bench, evaluation: str, times: int = 1) -> Params:
    """Settings of a run that can be repeated often, `times` its least size."""
    if evaluation == "core":
        batches = {"n_eval_reconstruction_batches": times, "n_eval_sparsity_variance_batches": 2 * times}
        return bench.settings(evaluation, batch_size_prompts=1, **batches)
    texts = {"probe_train_set_size": 40 * times, "probe_test_set_size": 20 * times}
    return bench.settings(evaluation, context_length=32, train_draws=5, **texts)


def _tokens(evaluation: str, params: Params) -> int:
    """That an SAE encodes."""
    return sum(phase.tokens for phase in phases(evaluation, params) or [])


def _by_width(bench: Bench, evaluation: str, width: int) -> tuple[int, Cost]:
    return width, bench.one_more(evaluation, _small(bench, evaluation), width, repeats=1, more=2)


def _by_tokens(bench: Bench, evaluation: str, times: int) -> tuple[int, Cost]:
    params = _small(bench, evaluation, times)
    return _tokens(evaluation, params), bench.one_more(evaluation, params)


def _by_number(bench: Bench, evaluation: str, count: int) -> tuple[int, Cost]:
    return count, bench.whole(evaluation, _small(bench, evaluation), count)


GROWTH: dict[str, tuple[str, Callable[[Bench, str, int], tuple[int, Cost]], Sequence[int]]] = {
    "width": ("one more SAE of so many latents", _by_width, WIDTHS),
    "tokens": ("one more SAE on so many tokens", _by_tokens, TOKENS),
    "number": ("so many SAEs, all together", _by_number, NUMBERS),
}
"""What grows: how the table says it, the measurement, sizes."""


def _growth(bench: Bench, say: Callable[[str], None]) -> dict[str, dict[str, dict[str, Any]]]:
    """Costs by what grows, evaluation and size."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for what, (title, measure, sizes) in GROWTH.items():
        for name in GROWN:
            rows = found.setdefault(what, {}).setdefault(name, {})
            for size in sizes:
                shown, cost = measure(bench, name, size)
                rows[str(shown)] = cost._asdict()
                say(f"{name}, {title}, {shown:,}: {cost.seconds:.2f} s, floor {cost.floor:.2f} s")
    return found


# --- the page --------------------------------------------------------------------------------


def tables(record: dict[str, Any]) -> str:
    """The page's tables of a record."""
    machine = record["machine"]
    costs = [
        [one.title, *_shown(record["one_more"][name])] for name, one in EVALUATIONS.items() if name in record["one_more"]
    ]
    parts = [
        f"CPU seconds of one thread; float32 products at {machine['float32_gflops']:.0f} GFLOP/s (from "
        f"{machine['slowest_gflops']:.0f} to {machine['fastest_gflops']:.0f} during the run). One more SAE of {WIDTH:,} "
        "latents:",
        markdown_table(["evaluation", "one more SAE", "floor", "times the floor"], costs),
        "Not timed: " + "; ".join(f"{EVALUATIONS[name].title} ({why})" for name, why in record["untimed"].items()) + ".",
    ]
    for what, (title, _, _) in GROWTH.items():
        rows = [
            [EVALUATIONS[name].title, f"{int(size):,}", *_shown(one)]
            for name, by_size in record["growth"][what].items()
            for size, one in sorted(by_size.items(), key=lambda item: int(item[0]))
        ]
        parts.append(markdown_table(["evaluation", title, "time", "floor", "times the floor"], rows))
    return "\n\n".join(parts)


def _shown(cost: dict[str, float]) -> list[str]:
    seconds, floor = cost["seconds"], cost["floor"]
    return [f"{seconds:.3g} s", f"{floor:.3g} s", f"{seconds / floor:.2f}"]


def table(record: Path) -> str:
    """`tables` of a file."""
    return tables(json.loads(record.read_text()))


def main() -> None:
    """Measure, and write the record and the page."""
    from sae_research.config.params import load_params
    from sae_research.lm import load_language_model

    root, params = project_root(), load_params()
    write_json(root / RECORD, measured(load_language_model(params.model.name, "cpu"), params))
    write_between(root / PAGE, BEGIN, END, table(root / RECORD))


if __name__ == "__main__":
    run_main(main)
