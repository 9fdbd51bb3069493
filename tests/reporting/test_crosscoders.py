"""Figures of crosscoders at each of their hooks, from a result file to tables."""

from __future__ import annotations

import csv
import json
from typing import Any

from sae_research.reporting.metrics import headline, metric_named, sort_keys
from sae_research.reporting.report import report
from sae_research.reporting.results import extract
from sae_research.reporting.tables import write_results_csv
from tests.helpers.results import Lab, build, core_evidence, core_result, section

HOOKS = ("blocks.2.hook_resid_post", "blocks.10.hook_resid_post")


def crosscoder() -> dict[str, Any]:
    result = core_result("topk")
    result["sae_cfg_dict"]["hook_name"] = " + ".join(HOOKS)
    lab = result["eval_result_unstructured"]["lab_v1"]
    evidence = core_evidence("topk", lab["metrics"])
    for number, hook in enumerate(HOOKS):
        for key, value in (("variance_explained", 0.5 + number / 10), ("kl", 0.25), ("ce_patched", 4.0)):
            lab["metrics"][f"{key}@{hook}"] = value
            if key in evidence["intervals"]:
                lab["intervals"][f"{key}@{hook}"] = [value - 0.125, value + 0.125]
                lab["cluster_sums"][f"{key}@{hook}"] = lab["cluster_sums"][key]
    return result


def test_from_the_result_to_the_tables(lab: Lab) -> None:
    plain = report(build(lab))
    assert "hook by hook" not in plain and "METRIC@HOOK" not in plain
    lab.result("core", "topk", crosscoder())
    run = build(lab)
    text = report(run)
    lines = [line for line in section(text, "Crosscoders, hook by hook").splitlines() if line.startswith("| `topk`")]
    assert [line.split(" | ")[1] for line in lines] == [f"`{hook}`" for hook in HOOKS]
    assert "0.500 [0.375, 0.625] | 0.250 [0.125, 0.375]" in lines[0] and "0.600 [0.475, 0.725]" in lines[1]
    assert "CE patched" not in section(text, "Crosscoders, hook by hook") and "`METRIC@HOOK` is the metric" in text
    assert section(text, "Intervals") == section(plain, "Intervals")
    write_results_csv(run, lab.root)
    rows = list(csv.DictReader((lab.root / "metrics/results.csv").open()))
    found = {row["metric"]: (row["value"], row["low"]) for row in rows if row["sae"] == "topk" and "@" in row["metric"]}
    assert found[f"kl@{HOOKS[1]}"] == ("0.25", "0.125") and len(found) == 6
    extract("core", lab.root / "eval_results/core", lab.root / "core.json")
    metrics = json.loads((lab.root / "core.json").read_text())["topk"]
    assert metrics[f"variance_explained@{HOOKS[1]}"] == 0.6


def test_a_metric_at_a_hook_has_the_metrics_record() -> None:
    whole, at = headline("kl"), metric_named(f"kl@{HOOKS[0]}", "core")
    assert (at.better, at.eval, at.label) == (whole.better, "core", f"KL at {HOOKS[0]}")
    assert at.definition.startswith(whole.definition) and whole.table and not at.table and not at.plot
    keys = [f"kl@{HOOKS[1]}", f"kl@{HOOKS[0]}", f"l0@{HOOKS[0]}", "kl", "l0"]
    assert sort_keys(keys, "core") == ["l0", "kl", f"l0@{HOOKS[0]}", f"kl@{HOOKS[0]}", f"kl@{HOOKS[1]}"]
