"""Unit costs for plans and simulations: real evaluations of small SAEs on the packaged model, cut into units as workers get
them, and real training steps of every recipe.

Everything runs on one thread and is counted in its CPU seconds (`time.process_time`), so that a busy machine changes little.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch

from sae_research.config.params import Params, check_params
from sae_research.config.training import FLOAT_BYTES, Train
from sae_research.evals.harness import PreparedSAEs, delegated
from sae_research.evals.run import evaluation_function
from sae_research.evals.units import Distribution, evaluation_job
from sae_research.lm import LanguageModel, load_language_model
from sae_research.lm.load import packaged_folder
from sae_research.lm.shape import model_config, model_shape
from sae_research.planning.costs import (
    OPENED,
    PlannedCosts,
    all_left,
    evaluation_seconds,
    sae_seconds,
    shared_seconds,
    training_step,
)
from sae_research.planning.devices import Device, measured_device
from sae_research.planning.saes import PlannedSAE, described
from sae_research.planning.work import phases
from sae_research.runtime.files import read_json, round_significant, write_json
from sae_research.runtime.stages import StageFolder
from sae_research.runtime.workers import Job, Outcome, Unit, by_cost, worker
from sae_research.saes import SAEConfig, SparseAutoencoder, form_class, save_sae
from sae_research.saes.sources import PREPARED
from sae_research.setup.controls import random_rows
from sae_research.setup.stage import make_manifest
from sae_research.training.buffer import StreamBatch
from sae_research.training.recipes import RECIPES
from sae_research.training.training_sae import new_training_sae, start, train_step

MODEL, HOOK, D_IN = "smollm2-135m-instruct", "blocks.8.hook_resid_post", 576
WIDTHS = {"calibration": 4096, "comparison": 2304}
SAES = 2
SIZES: dict[str, dict[str, Any]] = {
    "core": {"batch_size_prompts": 2, "n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 4},
    "sparse_probing": {
        "dataset_names": ["news_topic"],
        "probe_train_set_size": 40,
        "probe_test_set_size": 20,
        "context_length": 32,
        "train_draws": 5,
    },
    "scr": {
        "dataset_names": ["film_or_product_by_sentiment"],
        "train_set_size": 32,
        "test_set_size": 16,
        "context_length": 32,
    },
    "tpp": {"dataset_names": ["news_topic"], "train_set_size": 40, "test_set_size": 20, "context_length": 32},
    "absorption": {"max_words": 400, "icl_prompts": 4, "min_ground_truth_probe_f1": 0.1},
    "unlearning": {
        "dataset_size": 8,
        "seq_len": 64,
        "max_known_questions": 2,
        "min_known_questions": 1,
        "multipliers": [50],
        "n_features_list": [10],
    },
    "ravel": {
        "entity_attribute_selection": {"city": ["Country", "Continent"]},
        "full_dataset_downsample": 60,
        "min_known_entities": 4,
        "num_pairs_per_attribute": 6,
        "num_epochs": 1,
    },
}
"""Settings of each evaluation in `calibration`."""
COMPARED: dict[str, dict[str, Any]] = {
    "core": {"batch_size_prompts": 3, "n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 8},
    "sparse_probing": {
        "dataset_names": ["science_field"],
        "probe_train_set_size": 60,
        "train_draws": 5,
        "context_length": 32,
    },
    "scr": {
        "dataset_names": ["film_or_restaurant_by_sentiment"],
        "train_set_size": 48,
        "test_set_size": 32,
        "context_length": 32,
    },
    "tpp": {"dataset_names": ["code_language"], "train_set_size": 60, "test_set_size": 20, "context_length": 32},
    "absorption": {"max_words": 600, "icl_prompts": 4, "min_ground_truth_probe_f1": 0.1},
}
"""Settings of whole evaluations that computed times are compared with, of SAEs of another width."""
SPARSITY: dict[str, float] = {
    "l1_coefficient": 0.1,
    "l0_coefficient": 0.01,
    "target_l0": 32.0,
    "sparsity_coefficient": 10.0,
    "k": 32,
    "s": 32,
}
"""What decides a recipe's L0."""
BATCH, STEPS, UNTIMED = 256, 4, 1


def clock() -> float:
    return time.process_time()


@cache
def _worker(job: Job) -> Callable[[bytes, bytes], bytes]:
    return worker(job)


class TimedWorkers:
    """Workers that compute one after another here, and write down what each unit took."""

    def __init__(self, params: Params, evaluation: str, size: int) -> None:
        self.size, self.memory = size, 0
        self.units: list[dict[str, Any]] = []
        self._compute = _worker(evaluation_job(evaluation, params))

    def run(self, units: Sequence[Unit], shared: bytes = b"") -> Iterator[Outcome]:
        for unit in by_cost(units):
            began = clock()
            value = self._compute(unit.payload, shared)
            asked = json.loads(unit.payload)
            self.units.append({"kind": asked["kind"], "saes": len(asked["saes"]), "seconds": clock() - began})
            yield Outcome(unit, value)

    def close(self) -> None:
        pass


def random_sae(number: int, width: int, d_in: int = D_IN, model: str = MODEL, hook: str = HOOK) -> SparseAutoencoder:
    """A TopK SAE over a random dictionary, the same for the same number."""
    rows = random_rows(width, d_in, number)
    tensors = {
        "W_enc": rows.T.contiguous(),
        "W_dec": rows,
        "b_enc": torch.zeros(width),
        "b_dec": torch.zeros(d_in),
    }
    return form_class("topk")(SAEConfig("topk", d_in, width, model, hook, options={"k": 32}), **tensors, k=32)


def parameters(evaluation: str, settings: dict[str, Any]) -> Params:
    section = "core_eval" if evaluation == "core" else evaluation
    values = {
        "model": {"name": MODEL, "device": "cpu"},
        "activation_caching": {"enabled": False},
        "text": {"held_out_characters": 2_000_000, "context_size": 32},
        section: settings,
    }
    return check_params(values, "benchmarks.scale")


@contextmanager
def prepared_project(width: int, n_saes: int = SAES) -> Generator[None]:
    """A project of its own with random TopK SAEs of `width` latents prepared, and the packaged model."""
    models, before = packaged_folder(MODEL).parent.resolve(), Path.cwd()
    kept = {key: os.environ.get(key) for key in ("DVC_ROOT", "SAE_RESEARCH_NO_CACHE")}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        os.environ |= {"DVC_ROOT": folder, "SAE_RESEARCH_NO_CACHE": "1"}
        Path(".cache").mkdir()
        Path(".cache/models").symlink_to(models)
        try:
            described = {}
            for number in range(n_saes):
                name, sae = f"sae_{number}", random_sae(number, width)
                save_sae(sae, PREPARED / name)
                described |= make_manifest({name: sae})["saes"]
            write_json(PREPARED / "manifest.json", {"order": list(described), "saes": described})
            yield
        finally:
            os.chdir(before)
            for key, value in kept.items():
                os.environ.pop(key, None) if value is None else os.environ.__setitem__(key, value)


def run_whole(evaluation: str, params: Params, lm: LanguageModel, workers: TimedWorkers | None = None) -> float:
    """CPU seconds of an evaluation of the prepared SAEs; its units go to `workers` where there are any."""
    evaluate = evaluation_function(evaluation)
    began = clock()
    with delegated(None if workers is None else Distribution(workers, "cpu")):
        stage = StageFolder(Path(os.devnull))
        saes = PreparedSAEs(PREPARED, lm)
        scored = [name for name, _ in evaluate(saes, lm, params, stage)]
    if len(scored) < len(saes):
        raise RuntimeError(f"{evaluation}: {len(scored)} of {len(saes)} SAEs were scored: {stage.skipped}")
    return clock() - began


def units_of(evaluation: str, lm: LanguageModel) -> list[dict[str, Any]]:
    """What units of all SAEs together took, and units of one."""
    params = parameters(evaluation, SIZES[evaluation])
    found = []
    for size in (1, 64):  # one group of SAEs, and one for each SAE
        workers = TimedWorkers(params, evaluation, size)
        run_whole(evaluation, params, lm, workers)
        found += workers.units
    return found


def planned_small(lm: LanguageModel) -> list[PlannedSAE]:
    return [described(name, info) for name, info in PreparedSAEs(PREPARED, lm).infos.items()]


def calibrate(evaluation: str, units: list[dict[str, Any]], device: Device, saes: list[PlannedSAE]) -> dict[str, Any]:
    """By kind: measured seconds once a unit and for one SAE more, and what computing gives for both."""
    params = parameters(evaluation, SIZES[evaluation])
    shape = model_shape(MODEL, model_config(MODEL))
    costs = PlannedCosts(shape, HOOK, params, device, saes, measured=False)
    found = {}
    for phase in phases(evaluation, params) or ():
        mine = [unit for unit in units if unit["kind"] == phase.kind]
        by_size = {n: statistics.mean(u["seconds"] for u in mine if u["saes"] == n) for n in {u["saes"] for u in mine}}
        few, many = min(by_size), max(by_size)
        each = (by_size[many] - by_size[few]) / (many - few)
        found[phase.kind] = {
            "units": {str(n): seconds for n, seconds in sorted(by_size.items())},
            "each_sae": each,
            "each_sae_computed": sae_seconds(phase.kind, phase.work, saes[0].name, costs),
            "once": by_size[few] - few * each,
            "once_computed": shared_seconds(phase.work, costs),
            "texts_latents": phase.work.texts * saes[0].d_sae,
            "tokens": phase.work.prefix,
        }
    return found


def recipe_steps(name: str, device: Device) -> dict[str, float]:
    """CPU seconds a token of one recipe's steps, and what computing gives."""
    from sae_research.config.recipes import recipe_model

    width, key = WIDTHS["comparison"], recipe_model(name).sparsity[0]
    train = Train(
        saes={"sae": {"recipe": name, "d_sae": width, key: SPARSITY[key]}},
        batch_size=BATCH,
        precision="float32",
        dead_fraction=1,  # no latent counts as dead in so short a run
        warmup_fraction=0,
        sparsity_warmup_fraction=0,
    )
    x = torch.randn(4 * BATCH, D_IN, generator=torch.Generator().manual_seed(0)) / D_IN**0.5
    sae = new_training_sae("sae", train, D_IN)
    start(sae, x, 0)
    times = []
    for i in range(STEPS + UNTIMED):
        batch = StreamBatch(x[i * BATCH % len(x) :][:BATCH], 0.5)
        began = clock()
        train_step(sae, batch)
        times.append(clock() - began)
    planned = PlannedSAE("sae", name, D_IN, width, HOOK, SPARSITY["s"] if key == "s" else 0)
    flops, read = training_step(planned, name, BATCH, sparse=True)
    seconds = statistics.median(times[UNTIMED:]) / BATCH
    computed = flops / device.float32 + read / device.bandwidth
    return {"seconds_per_token": seconds, "computed": computed, "factor": seconds / computed}


def opening_rate(lm: LanguageModel) -> float:
    """Bytes/s at which a worker opens SAEs, checksums and fingerprints included."""
    began = clock()
    saes = PreparedSAEs(PREPARED, lm)
    return sum(info.nbytes for info in saes.infos.values()) / (clock() - began)


def record(path: Path, only: Sequence[str] = (), say: Callable[[str], None] = print) -> None:
    """Measure, and write the record of unit costs. only: some evaluations, recipes, or `compared`; the rest stays."""
    torch.set_num_threads(1)
    values: dict[str, Any] = read_json(path) if path.is_file() else {"kinds": {}, "recipes": {}, "compared": {}}
    device = measured_device(torch.device("cpu"), False, clock)
    values["machine"] = {"threads": 1, "float32_gflops": device.float32 / 1e9, "bandwidth_gb_s": device.bandwidth / 1e9}
    if not only or set(only) & {*SIZES, "compared"}:
        _record_evaluations(values, path, device, only, say)
    for name in RECIPES:
        if not only or name in only:
            values["recipes"][name] = recipe_steps(name, device)
            write_json(path, round_significant(values))
            say(f"{name}: measured")


def _record_evaluations(
    values: dict[str, Any], path: Path, device: Device, only: Sequence[str], say: Callable[[str], None]
) -> None:
    lm = load_language_model(MODEL, "cpu")
    with prepared_project(WIDTHS["calibration"]):
        values["opening_gb_s"] = opening_rate(lm) / 1e9
        saes = planned_small(lm)
        for name in SIZES:
            if not only or name in only:
                values["kinds"] |= calibrate(name, units_of(name, lm), device, saes)
                write_json(path, round_significant(values))
                say(f"{name}: measured")
    _derive(values)
    write_json(path, round_significant(values))
    if not only or "compared" in only:
        for name in COMPARED:
            values["compared"][name] = compared(name, device, lm)
            _derive(values)
            write_json(path, round_significant(values))


def _derive(values: dict[str, Any]) -> None:
    """What plans read: the host's seconds for each text and latent, and how far computed times were off at most. What an SAE
    of a kind without probes takes beyond what is computed stays in the record: at sizes as small as these it is not known
    what of it would grow with tokens."""
    opening = OPENED / values["opening_gb_s"] * 1e-9 * 2 * D_IN * WIDTHS["calibration"] * FLOAT_BYTES
    values["host"] = {
        kind: max(0.0, one["each_sae"] - one["each_sae_computed"] - opening) / one["texts_latents"]
        for kind, one in values["kinds"].items()
        if one["texts_latents"]
    }
    ratios = [one["measured"] / one["computed"] for one in values["compared"].values()]
    values["within"] = max([max(ratio, 1 / ratio) for ratio in ratios], default=None)


def compared(evaluation: str, device: Device, lm: LanguageModel) -> dict[str, float]:
    """A whole evaluation at another size than measured: what it took, and what a plan computes."""
    from sae_research.planning.costs import measured

    measured.cache_clear()
    params = parameters(evaluation, COMPARED[evaluation])
    shape, stage = model_shape(MODEL, model_config(MODEL)), phases(evaluation, params) or []
    with prepared_project(WIDTHS["comparison"]):
        saes = planned_small(lm)
        left = all_left(stage, [sae.name for sae in saes])
        computed = evaluation_seconds(stage, left, PlannedCosts(shape, HOOK, params, device, saes))
        return {"measured": run_whole(evaluation, params, lm), "computed": computed.on(1)}
