"""The study of docs/study: its record, collected from finished runs of `presets/study.txt` and `presets/study_rates.txt`.

    make repro PRESET=study             # in one clone
    make repro PRESET=study_rates       # in another
    make repro PRESET=study_seeds       # in a third
    python -m benchmarks.study collect CLONE [--seeds CLONE] [--rates CLONE] [--cost COST.json]
    make repro PRESET=study_further     # in a fourth, at any time
    python -m benchmarks.study further CLONE    # holds the record against it
    python -m benchmarks.study page     # docs/study/index.md and its figures, from the record alone

Every number of the page comes from `docs/study/record.json`; a test makes the page anew and compares.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from scipy.stats import spearmanr

from benchmarks.study_figures import TRAINED_RECIPES, mean_points
from benchmarks.study_page import FOLDER, RECORD, write_page
from sae_research.reporting.comparisons import Comparison, Grid, Points, at, comparisons_at, grids, point
from sae_research.reporting.ground_truth import Line, read_ground_truth
from sae_research.reporting.metrics import Metric, metric_named
from sae_research.reporting.rows import TRAINED, Row, Run, read_run
from sae_research.runtime.files import file_sha256, read_json, round_significant, write_json
from sae_research.saes.files import WEIGHTS_FILE
from sae_research.stats.intervals import holm

READ_AT = 32.0
"""The L0 at which recipes are compared: three training seeds lie on either side of it."""
TRUTH_AT = 7.0
"""The L0 at which they are compared on synthetic activations: within the grid of each."""
METRICS = (
    ("variance_explained", "core"),
    ("loss_recovered", "core"),
    ("kl", "core"),
    ("sae_top_1_accuracy", "sparse_probing"),
    ("sae_top_5_accuracy", "sparse_probing"),
    ("sae_probes_top_1_accuracy", "sparse_probing_sae_probes"),
    ("sae_probes_top_5_accuracy", "sparse_probing_sae_probes"),
)
TRUTHS = ("mcc", "latent_f1", "variance_explained")
KEPT = (
    "dvc.lock",
    "params.yaml",
    "metrics/core.json",
    "metrics/sparse_probing.json",
    "metrics/sparse_probing_sae_probes.json",
    "metrics/ground_truth.json",
    "metrics/results.csv",
    "metrics/differences.csv",
    "trained_saes/training_report.json",
)
"""Files of the run that are committed beside the page."""


def metrics(run: Run) -> list[Metric]:
    """Those of `METRICS` that the run has."""
    wanted = [metric_named(key, name) for key, name in METRICS]
    return [metric for metric in wanted if any(row.value(metric.key, metric.eval) is not None for row in run.rows)]


def row_record(row: Row, found: Sequence[Metric]) -> dict[str, Any]:
    """One SAE: what it is, its L0 and every metric with its interval."""
    values = {
        metric.key: [row.value(metric.key, metric.eval), *(row.interval(metric.key, metric.eval) or (None, None))]
        for metric in found
    }
    return {
        "name": row.name,
        "kind": row.kind,
        "role": row.role,
        "base": row.cfg.get("base"),
        "recipe_id": row.recipe,
        "seed": seed_of(row),
        "l0": row.value("l0"),
        "fraction_alive": row.value("fraction_alive"),
        "interpolating": row.interpolating,
        **values,
    }


def reading(grid: Grid, metric: Metric, l0: float) -> dict[str, Any] | None:
    """A grid at one L0: its mean over seeds and their standard deviation there; None where it does not reach."""
    there = point(grid, l0)
    if there is None:
        return None
    weights = [1.0] if there.upper is None else [1 - there.weight, there.weight]
    values = [member.values(metric) for member in there.members]
    if not all(len(found) == member.seeds for found, member in zip(values, there.members, strict=True)):
        return None
    mean = sum(weight * statistics.fmean(found) for weight, found in zip(weights, values, strict=True))
    seeds = min(len(found) for found in values)
    by_seed = [sum(w * v for w, v in zip(weights, each, strict=True)) for each in zip(*values, strict=False)]
    return {
        "grid": grid.label,
        "kind": grid.members[0].rows[0].kind,
        "base": grid.members[0].rows[0].cfg.get("base"),
        "value": mean,
        "seeds": seeds,
        "seed_sd": statistics.stdev(by_seed) if seeds > 1 else None,
        "between": [member.name for member in there.members],
    }


def compared(item: Comparison) -> dict[str, Any]:
    """A difference at the L0 of reading."""
    assert item.other is not None
    return {
        "one": item.one.grid.label,
        "other": item.other.grid.label,
        "metric": item.metric.key,
        "value": item.found.value,
        "low": item.found.low,
        "high": item.found.high,
        "p": item.found.p,
        "seeds": [item.one.seeds, item.other.seeds],
    }


def corrected(differences: list[dict[str, Any]], trained: Collection[str]) -> list[dict[str, Any]]:
    """With `p_holm`, p after Holm's correction over the `family` of comparisons that ask one question in one metric: the
    pairs of trained recipes, or one other dictionary or encoder against them; the rest is a family too."""
    families: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for one in differences:
        others = [side for side in (one["one"], one["other"]) if side not in trained]
        families.setdefault((one["metric"], *(others if len(others) < 2 else ["others"])), []).append(one)
    for family in families.values():
        for one, adjusted in zip(family, holm([one["p"] for one in family]), strict=True):
            one |= {"p_holm": adjusted, "family": len(family)}
    return differences


def truth_record(root: Path) -> dict[str, Any]:
    """By trained recipe: every measure of `TRUTHS` at `TRUTH_AT`, one value a seed."""
    run = read_ground_truth(root)
    assert run is not None, "the study's run has no ground truth"
    lines = [line for line in run.lines if " over " not in line.method]
    methods = dict.fromkeys(line.method for line in lines)
    return {
        "seeds": run.result["setting"]["n_seeds"],
        "samples": run.result["setting"]["samples"],
        "at": TRUTH_AT,
        "methods": {
            method: {truth: _truth([line for line in lines if line.method == method], truth) for truth in TRUTHS}
            for method in methods
        },
    }


def _truth(lines: Sequence[Line], key: str) -> list[float | None]:
    seeds = len(lines[0].values["l0"])
    return [at(_truth_curve(lines, key, seed), TRUTH_AT) for seed in range(seeds)]


def _truth_curve(lines: Sequence[Line], key: str, seed: int) -> Points:
    return sorted((line.values["l0"][seed], line.values[key][seed]) for line in lines)


def agreement(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Spearman's correlation, over recipes, of every metric at L0 32 on text with every measure of the truth."""
    found = []
    for metric, readings in record["readings"].items():
        on_text = {one["kind"]: one["value"] for one in readings if one["kind"] in TRAINED_RECIPES}
        for truth in TRUTHS:
            pairs = []
            for kind, recipe in TRAINED_RECIPES.items():
                values = record["ground_truth"]["methods"].get(recipe, {}).get(truth, [])
                if kind in on_text and values and None not in values:
                    pairs.append((on_text[kind], statistics.fmean(values)))
            if len(pairs) >= 4:
                result = spearmanr(*zip(*pairs, strict=True))
                found.append({"metric": metric, "truth": truth, "recipes": len(pairs), "spearman": float(result.statistic)})
    return found


def rates_record(study: Path, rates: Path) -> list[dict[str, Any]]:
    """SAEs that differ in the learning rate alone: held-out metrics of training, and core's."""
    found = []
    for root in (study, rates):
        rows = {row.name: row for row in read_run(root).rows}
        report = read_json(root / "trained_saes" / "training_report.json")
        for name, one in report["saes"].items():
            base = name.partition("_lr")[0]
            if root == rates or base in RATED:
                row = rows[name]
                found.append(
                    {
                        "name": name,
                        "base": base,
                        "learning_rate": one["hyper_parameters"]["learning_rate"],
                        "l0": row.value("l0"),
                        **{key: [row.value(key), *(row.interval(key) or (None, None))] for key in RATED_METRICS},
                        "silent": one["fraction_silent_at_end"],
                    }
                )
    return sorted(found, key=lambda one: (one["base"], -one["learning_rate"]))


def seed_of(row: Row) -> int | None:
    """The training seed of an SAE that was trained here."""
    return (row.cfg.get("provenance") or {}).get("seed")


def with_seeds(run: Run, further: Run) -> Run:
    """The study with the rows of another run that are of its own recipes and seeds and that it lacks: seeds of sparsities
    which turned out to lie beside `READ_AT`. Both runs evaluate on the same text."""
    known = {(row.recipe, seed_of(row)) for row in run.rows}
    recipes, seeds = ({pair[place] for pair in known} for place in (0, 1))
    lacking = [
        row
        for row in further.rows
        if row.recipe in recipes and seed_of(row) in seeds and (row.recipe, seed_of(row)) not in known
    ]
    return replace(run, rows=[*run.rows, *lacking])


def equal_bytes(study: Path, again: Path) -> dict[str, bool]:
    """By name of the SAEs that both clones trained, whether their weights are the same bytes."""
    names = sorted({path.parent.name for path in (again / TRAINED).glob(f"*/{WEIGHTS_FILE}")})
    return {name: weights_of(study, name) == weights_of(again, name) for name in names if (study / TRAINED / name).is_dir()}


def weights_of(root: Path, name: str) -> str:
    """SHA-256 of a trained SAE's weights."""
    return file_sha256(root / TRAINED / name / WEIGHTS_FILE)


def further_record(record: dict[str, Any], rows: Sequence[Row]) -> dict[str, Any]:
    """Further training seeds of every recipe, held beside the study: by metric and recipe their values, moved along the
    study's own curve from their L0 to `READ_AT`."""
    known = {row["seed"] for row in record["rows"]}
    new = [row for row in rows if row.kind in TRAINED_RECIPES and seed_of(row) not in known]
    labels = {one["kind"]: one["grid"] for found in record["readings"].values() for one in found}
    return {
        "seeds": sorted({seed for row in new if (seed := seed_of(row)) is not None}),
        "values": {
            key: {
                labels[kind]: [moved(record, metric_named(key, eval_name), row) for row in new if row.kind == kind]
                for kind in TRAINED_RECIPES
            }
            for key, eval_name in METRICS
            if key in record["readings"]
        },
    }


def moved(record: dict[str, Any], metric: Metric, row: Row) -> float | None:
    """A row's value, moved along the record's curve of its kind to `READ_AT`; None where the curve does not reach."""
    l0, value = row.value("l0"), row.value(metric.key, metric.eval)
    if l0 is None or value is None:
        return None
    alike = [one for one in record["rows"] if one["kind"] == row.kind]
    curve = [(x, y) for x, y, *_ in mean_points(alike, metric.key)]
    there, here = at(curve, READ_AT), at(curve, l0)
    return None if there is None or here is None else value + there - here


RATED = ("top_k_28", "standard_0055", "standard_011")
RATED_METRICS = ("variance_explained", "loss_recovered", "fraction_alive")


def collect(root: Path, seeds: Path | None, rates: Path | None, cost: Path | None) -> dict[str, Any]:
    """The record of a finished run in `root`, and its files into docs/study."""
    run = read_run(root) if seeds is None else with_seeds(read_run(root), read_run(seeds))
    found = metrics(run)
    grid_list = grids(run, controls=True)
    record: dict[str, Any] = {
        "read_at": READ_AT,
        "tokens": run.training["tokens"],
        "core": {key: run.evals["core"]["notes"][key] for key in ("random_seed",) if key in run.evals["core"]["notes"]},
        "rows": [row_record(row, found) for row in run.rows],
        "readings": {
            metric.key: [one for grid in grid_list if (one := reading(grid, metric, READ_AT)) is not None]
            for metric in found
        },
        "differences": corrected(
            [compared(item) for item in comparisons_at(run, READ_AT, found)],
            {grid.label for grid in grid_list if grid.members[0].rows[0].kind in TRAINED_RECIPES},
        ),
        "ground_truth": truth_record(root),
        "labels": {metric.key: [metric.label, metric.better] for metric in found},
    }
    record["agreement"] = agreement(record)
    if rates is not None:
        record["rates"] = rates_record(root, rates)
    if seeds is not None:
        record["equal_bytes"] = equal_bytes(root, seeds)
    if cost is not None:
        record["cost"] = read_json(cost)
    for name in KEPT:
        target = FOLDER / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / name, target)
    return round_significant(record)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study", description="The record and the page of docs/study.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("collect", help="write the record from a finished run")
    verb.add_argument("root", type=Path, help="the clone where `make repro PRESET=study` ran")
    verb.add_argument("--rates", type=Path, help="the clone where `make repro PRESET=study_rates` ran")
    verb.add_argument("--seeds", type=Path, help="the clone where `make repro PRESET=study_seeds` ran")
    verb.add_argument("--cost", type=Path, help="CPU seconds and peak memory by stage")
    verb = verbs.add_parser("further", help="hold the record against further training seeds")
    verb.add_argument("root", type=Path, help="the clone where `make repro PRESET=study_further` ran")
    verbs.add_parser("page", help="make the page and its figures from the record")
    options = parser.parse_args(arguments)
    if options.verb == "collect":
        write_json(RECORD, collect(options.root, options.seeds, options.rates, options.cost))
    elif options.verb == "further":
        record = read_json(RECORD)
        write_json(RECORD, {**record, "further": round_significant(further_record(record, read_run(options.root).rows))})
    write_page()


if __name__ == "__main__":
    main()
