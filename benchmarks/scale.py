"""How far evaluations and training scale, from measured unit costs: `docs/scale.md`'s tables.

    python -m benchmarks.scale measure [PART ...]   # unit costs of real evaluations and steps, on one thread, minutes
    python -m benchmarks.scale simulate             # 1 to 1,000 workers, with failures; writes docs/scale.json and the page

`measure` writes `sae_research/planning/unit_costs.json`, which `sae-research plan` reads as well.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.scale_simulation import Faults, SimulatedPhase, Stream, simulate, train
from sae_research.config.params import Params, check_params
from sae_research.config.recipes import recipe_model
from sae_research.evals.units import KEPT_OF_A_GPU
from sae_research.lm.shape import ModelShape, model_shape
from sae_research.planning.costs import (
    OPENED,
    RECORD,
    PlannedCosts,
    measured,
    opening_seconds,
    recipe_factor,
    shared_seconds,
    start_seconds,
    training_step,
    unit_seconds,
)
from sae_research.planning.devices import Device, device_by_name
from sae_research.planning.resources import PRECISION_BYTES
from sae_research.planning.saes import PlannedSAE
from sae_research.planning.work import phases
from sae_research.runtime.errors import UserError, run_main
from sae_research.runtime.files import read_json, round_significant, write_json, write_text
from sae_research.runtime.formatting import duration, markdown_table, percent
from sae_research.text.crossed_tasks import HUB_TASKS
from sae_research.text.tasks import SAE_BENCH_TASKS
from sae_research.training.recipes import RECIPES

PAGE, RESULTS = Path("docs/scale.md"), Path("docs/scale.json")
GPU = "H200"
SAES, D_SAE, HOOK = 500, 16_384, "blocks.12.hook_resid_post"
WORKERS = (1, 4, 8, 16, 32, 64, 128, 256, 1000)
NODE = 64
"""Workers of the run that loses a node, which is one worker with its GPU."""
LOSSES = 24
"""Moments, spread over the run, at which it is lost."""
SEEDS = 3
"""Runs with failures, of which the mean is shown."""
DAY = 86_400.0
RESTART = 60.0
"""Seconds until a failed worker is back, before its model is loaded."""
NETWORKS = {"NVLink of one node": 450e9, "400 Gb/s": 50e9, "25 Gb/s": 3.125e9}
"""Bytes/s that a rank receives."""
BATCH, TOKENS, CHECKPOINT = 2048, 500_000_000, 600.0
SUITE: dict[str, dict[str, Any]] = {
    "core": {"batch_size_prompts": 16, "n_eval_reconstruction_batches": 200, "n_eval_sparsity_variance_batches": 2000},
    "sparse_probing": {
        "dataset_names": list(SAE_BENCH_TASKS),
        "probe_train_set_size": 4000,
        "probe_test_set_size": 1000,
        "context_length": 128,
    },
    "scr": {"dataset_names": list(HUB_TASKS), "train_set_size": 4000, "test_set_size": 1000},
    "tpp": {
        "dataset_names": ["LabHC/bias_in_bios_class_set1", "canrager/amazon_reviews_mcauley_1and5"],
        "train_set_size": 4000,
        "test_set_size": 1000,
        "context_length": 128,
    },
    "absorption": {"max_words": None},
    "unlearning": {
        "dataset_size": 1024,
        "seq_len": 1024,
        "forget_questions": ["cais/wmdp:wmdp-bio"],
        "retain_questions": [
            f"cais/mmlu:{name}"
            for name in ("high_school_us_history", "college_computer_science", "high_school_geography", "human_aging")
        ],
        "max_known_questions": None,
        "retain_thresholds": [0.001, 0.01],
        "n_features_list": [10, 20],
        "multipliers": [25, 50, 100, 200],
    },
    "ravel": {
        "entity_attribute_selection": {
            "city": ["Country", "Continent", "Language"],
            "nobel_prize_winner": ["Country of Birth", "Field", "Gender"],
        },
        "num_pairs_per_attribute": 5000,
        "train_test_split": 0.7,
    },
    "autointerp": {"total_tokens": 2_000_000},
}
"""SAE Bench 0.6.0's evaluations at its own sizes."""
RECIPE_SIZES = {"k": {"k": 40}, "s": {"s": 40}}


def suite_params() -> Params:
    sections = {("core_eval" if name == "core" else name): values for name, values in SUITE.items()}
    return check_params({"model": {"torch_dtype": "bfloat16"}, **sections}, "benchmarks.scale")


def gemma() -> ModelShape:
    """Gemma-2-2B: the defaults of transformers' configuration of its family."""
    from transformers import Gemma2Config

    return model_shape("gemma-2-2b", Gemma2Config())


def suite(shape: ModelShape, device: Device) -> list[SimulatedPhase]:
    """Every phase of the suite at one hook, from unit costs on `device`."""
    params = suite_params()
    sae = PlannedSAE("sae", "standard", shape.width(HOOK), D_SAE, HOOK)
    costs = PlannedCosts(shape, HOOK, params, device, [sae])
    return [
        SimulatedPhase(
            phase.kind,
            phase.parts,
            shared_seconds(phase.driver, costs),
            *unit_seconds(phase, sae.name, costs),
            OPENED * sae.nbytes * opening_seconds(),
            name,
        )
        for name in SUITE
        for phase in phases(name, params) or ()
    ]


def stream(shape: ModelShape, device: Device, copies: int) -> Stream:
    """All recipes on one stream, each with so many sparsities."""
    width = shape.width(HOOK)
    steps = []
    for recipe in RECIPES:
        size = RECIPE_SIZES["s"]["s"] if "s" in recipe_model(recipe).model_fields else 0
        flops, read = training_step(PlannedSAE(recipe, recipe, width, D_SAE, HOOK, size), recipe, BATCH, sparse=False)
        steps.append((flops / device.rate("bfloat16") + read / device.bandwidth) * recipe_factor(recipe))
    model = shape.prefix_flops(HOOK, 128) / device.rate("bfloat16")
    return Stream(TOKENS, model, tuple(steps * copies), width * PRECISION_BYTES["bfloat16"], CHECKPOINT)


# --- the record ------------------------------------------------------------------------------


def simulated() -> dict[str, Any]:
    """Everything that the page shows."""
    shape, device = gemma(), device_by_name(GPU)
    load = shape.parameters * PRECISION_BYTES["bfloat16"] * opening_seconds()
    stages = suite(shape, device)
    nbytes = PlannedSAE("sae", "standard", shape.width(HOOK), D_SAE, HOOK).nbytes
    alone, room = one_process(stages) + load, device.memory // KEPT_OF_A_GPU // nbytes
    return round_significant(
        {
            "device": device._asdict(),
            "start_seconds": load,
            "phases": [phase._asdict() for phase in stages],
            "opening_seconds": OPENED * nbytes * opening_seconds(),
            "kept_open": room,
            "one_process_seconds": alone,
            "evaluation": list(evaluation_rows(stages, load, alone, room)),
            "lost_node": lost_node(stages, load, room),
            "training": list(training_rows(shape, device, load)),
        }
    )


def evaluation_rows(stages: Sequence[SimulatedPhase], load: float, one: float, room: float) -> Iterator[dict[str, Any]]:
    """one: seconds of one process without workers; room: SAEs that a worker keeps open."""
    alone = simulate(stages, SAES, 1, start=load, room=room).seconds
    for workers in WORKERS:
        calm = simulate(stages, SAES, workers, start=load, room=room)
        faults = Faults(DAY, RESTART + load)
        stormy = [simulate(stages, SAES, workers, faults, load, seed, room) for seed in range(SEEDS)]
        yield {
            "workers": workers,
            "seconds": calm.seconds,
            "efficiency": alone / (workers * calm.seconds),
            "against_one_process": one / (workers * calm.seconds),
            "idle": calm.idle,
            "tail": calm.tail,
            "units": calm.units,
            "slower_with_failures": statistics.mean(one.seconds for one in stormy) / calm.seconds - 1,
            "failed_units": statistics.mean(one.failed for one in stormy),
        }


def lost_node(stages: Sequence[SimulatedPhase], load: float, room: float) -> dict[str, float]:
    """What a run of `NODE` workers takes longer when it loses one for good, over moments spread evenly over the run."""
    calm = simulate(stages, SAES, NODE, start=load, room=room).seconds
    moments = [(number + 0.5) / LOSSES * calm for number in range(LOSSES)]
    slower = [simulate(stages, SAES, NODE, Faults(lost=(0, at)), load, room=room).seconds / calm - 1 for at in moments]
    return {"mean": statistics.mean(slower), "worst": max(slower), "half_its_share": 0.5 / (NODE - 1)}


def one_process(stages: Sequence[SimulatedPhase]) -> float:
    """Seconds of a process without workers, which opens an SAE once a phase and reads its texts once."""
    seconds = 0.0
    for one in stages:
        start = start_seconds(one.kind)
        seconds += one.driver + start + one.parts * (one.once - start)
        seconds += SAES * (one.parts * (one.each - one.opening) + one.opening)
    return seconds


def training_rows(shape: ModelShape, device: Device, load: float) -> Iterator[dict[str, Any]]:
    for copies in (1, 6):
        one = stream(shape, device, copies)
        for network, rate in NETWORKS.items():
            for ranks in WORKERS:
                if (ranks > 8) == (network == "NVLink of one node"):
                    continue
                calm = train(one, ranks, rate)
                stormy = [train(one, ranks, rate, Faults(DAY, RESTART + load), seed) for seed in range(SEEDS)]
                yield {
                    "saes": len(one.steps),
                    "network": network,
                    "ranks": ranks,
                    "seconds": calm.seconds,
                    "efficiency": calm.efficiency,
                    "gather": calm.gather,
                    "received_gb_s": calm.received / 1e9,
                    "slower_with_failures": statistics.mean(s.seconds for s in stormy) / calm.seconds - 1,
                }


# --- the page --------------------------------------------------------------------------------


def tables(values: dict[str, Any]) -> dict[str, str]:
    """The page's generated parts by their names."""
    lost = values["lost_node"]
    return {
        "phases": markdown_table(
            ("phase", "parts", "driver alone, s", "a unit once, s", "one SAE more, s"),
            (
                [p["kind"], f"{p['parts']:,}", *(f"{p[key]:.3g}" for key in ("driver", "once", "each"))]
                for p in values["phases"]
            ),
        ),
        "evaluation": markdown_table(
            ("workers", "time", "efficiency", "against one process", "tail", "units", "slower with failures"),
            (
                [
                    f"{row['workers']:,}",
                    duration(row["seconds"]),
                    f"{row['efficiency']:.2f}",
                    f"{row['against_one_process']:.2f}",
                    percent(row["tail"]),
                    f"{row['units']:,}",
                    percent(row["slower_with_failures"]),
                ]
                for row in values["evaluation"]
            ),
            left=0,
        ),
        "lost": f"A run of {NODE} workers that loses one for good takes {percent(lost['mean'])} longer on average, over "
        f"{LOSSES} moments of the run, {percent(lost['worst'])} at worst; the lost capacity alone is "
        f"{percent(lost['half_its_share'])}.",
        "opened": f"A process without workers would take {duration(values['one_process_seconds'])}: it opens an SAE once a "
        f"phase, which takes {values['opening_seconds']:.2g} s. A unit holds one part; a worker keeps up to "
        f"{values['kept_open']:,.0f} SAEs open and goes on with units of the same SAEs while there are any.",
        "training": markdown_table(
            ("SAEs", "network", "ranks", "time", "efficiency", "gather", "GB/s received", "slower with failures"),
            (
                [
                    str(row["saes"]),
                    row["network"],
                    f"{row['ranks']:,}",
                    duration(row["seconds"]),
                    f"{row['efficiency']:.2f}",
                    percent(row["gather"]),
                    f"{row['received_gb_s']:.3g}",
                    percent(row["slower_with_failures"]),
                ]
                for row in values["training"]
            ),
            left=2,
        ),
        "measured": _measured_table(),
    }


def _measured_table() -> str:
    found = measured()
    rows = [
        (name, f"{one['measured']:.3g}", f"{one['computed']:.3g}", f"{one['measured'] / one['computed']:.2f}")
        for name, one in found["compared"].items()
    ]
    return markdown_table(("evaluation", "measured, s", "computed, s", "ratio"), rows)


def with_tables(page: str, parts: dict[str, str]) -> str:
    """The page with every generated part in its place, between `<!-- NAME -->` and `<!-- end -->`."""
    for name, text in parts.items():
        marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        if not marked.search(page):
            raise UserError(f"{PAGE}: lacks the mark <!-- {name} -->")
        page = marked.sub(lambda match, text=text: f"{match[1]}{text}\n{match[2]}", page)
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["measure", "simulate"])
    parser.add_argument("parts", nargs="*", help="of measure: evaluations, recipes, compared; default all")
    options = parser.parse_args()
    if options.what == "measure":
        from benchmarks.scale_measure import record

        record(RECORD, options.parts)
        return
    write_json(RESULTS, simulated())
    write_text(PAGE, with_tables(PAGE.read_text(), tables(read_json(RESULTS))))
    print(PAGE)


if __name__ == "__main__":
    run_main(main)
