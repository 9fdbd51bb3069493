"""METRICS.md and results.csv: what is said follows from the numbers."""

from __future__ import annotations

import csv
import re

import pytest

from sae_research.reporting.metrics import headline
from sae_research.reporting.report import report
from sae_research.reporting.report_results import control_findings, stricter
from sae_research.reporting.results import Row, Run, merge, read_run
from sae_research.reporting.tables import cells, count, number, write_results_csv
from tests.reporting.conftest import SAES, Lab


def build(lab: Lab) -> Run:
    merge(lab.root)
    return read_run(lab.root)


def row(name: str, role: str = "comparison", interpolating: bool = False, **figures: float) -> Row:
    core = {"status": "ok", "metrics": figures, "interpolating": interpolating}
    return Row(name, {"architecture": name, "role": role}, {"core": core})


def test_nothing_is_marked_as_best_over_saes_of_different_l0():
    rows = [row("a", kl=0.2, l0=10.0), row("b", kl=0.1, l0=20.0), row("c", l0=5.0)]
    assert cells(rows, headline("kl")) == ["0.200", "0.100", "–"]
    assert cells(rows, headline("l0")) == ["10.0", "20.0", "5.000"]


def test_a_control_with_the_more_favourable_value_is_named_with_both_numbers():
    rows = [
        row("a", variance_explained=0.7, l0=40.0),
        row("b", role="control", variance_explained=0.84, l0=32.0),
    ]
    assert (
        "- Variance explained: `b` (0.840 at L0 32.0) has a higher value than `a` (0.700 at L0 40.0)."
        in control_findings(Run(rows, {}, {}, []))
    )
    rows[1] = row("b", role="control", variance_explained=0.5)
    none = ["No control has a more favourable value than an SAE of the same or a higher L0 in any column above."]
    assert control_findings(Run(rows, {}, {}, [])) == none
    rows[1] = row("b", role="control", variance_explained=0.84, l0=80.0)
    assert control_findings(Run(rows, {}, {}, [])) == none, "a denser control that explains more is no surprise"


def test_stricter_references_stand_beside_what_they_correct():
    rows = [row("a", variance_explained=0.7, variance_explained_per_dim=0.5), row("b", variance_explained=0.6)]
    lines = stricter(Run(rows, {}, {}, [])).splitlines()
    assert lines[-2:] == ["| `a` | 0.700 | 0.500 |", "| `b` | 0.600 | – |"]
    assert stricter(Run(rows[1:], {}, {}, [])) == "", "nothing stricter was measured"


def test_tokens_behind_losses_are_told_from_those_behind_variance(lab: Lab):
    assert "tokens counted for L0 and variance, " in report(build(lab))


def test_a_transfer_stage_has_its_row(lab: Lab):
    run = build(lab)
    assert "Transfer" not in report(run, root=lab.root)
    lab.status("transfer", "disabled", "switched off")
    assert "| Transfer to a finetuned model | disabled | – | switched off |" in report(run, root=lab.root)


def test_report_opens_with_what_ran_and_calls_a_short_run_a_smoke_run(lab: Lab):
    text = report(build(lab))
    start = text.index("## What ran")
    assert start < text.index("smoke run") < text.index("## Results")
    assert "0.3M training tokens" in text
    assert "`smollm2-135m-instruct`" in text and "`blocks.8.hook_resid_post`" in text
    assert "contexts of 128 tokens" in text


def test_a_long_run_is_no_smoke_run(lab: Lab):
    lab.train(tokens=60_000_000)
    assert "smoke" not in report(build(lab))


def test_nothing_trained_here(lab: Lab):
    (lab.root / "trained_saes/training_report.json").unlink()
    text = report(build(lab))
    assert "no SAE was trained in this run" in text and "smoke" not in text


def test_no_claim_without_a_test_and_nothing_that_changes_from_run_to_run(lab: Lab):
    text = report(build(lab))
    assert not re.search(r"\bbetter\b|\bworse\b|\boutperform", text)
    assert not re.search(r"20\d\d-\d\d-\d\d|\bseconds\b|\d:\d\d", text)
    assert text == report(read_run(lab.root))


def test_every_sae_has_a_row_under_its_group(lab: Lab):
    text = report(build(lab))
    table = text[text.index("## Results") : text.index("## Controls")]
    order = [
        table.index(f"*{title}*")
        for title in ("Baseline", "Variants of the baseline's dictionary", "Comparison", "Controls")
    ]
    assert order == sorted(order)
    assert all(f"| `{name}` |" in table for name in SAES)
    line = next(line for line in table.splitlines() if "`standard_ihtp_k10`" in line)
    assert "interpolating, not causal, signed" in line and "**" not in line


def test_residual_baseline_stands_in_the_task_table_and_in_words(lab: Lab):
    text = report(build(lab))
    assert "*residual stream top-1*" in text
    assert "the raw residual stream reaches 0.684; 0 of 9 SAEs stay at or below it" in text


@pytest.mark.parametrize("name", ["core", "sparse_probing"])
def test_report_copes_with_a_disabled_evaluation(lab: Lab, name: str):
    lab.disable(name)
    text = report(build(lab))
    assert "disabled | 0 | switched off in params.yaml" in text
    assert "–" in text


def test_failures_and_skips_are_reported_with_reasons(lab: Lab):
    lab.status("core", "failed", "out of memory\nat batch 3", skipped={"topk": "a | b"})
    text = report(build(lab))
    assert "| Core | failed | 12 | out of memory at batch 3 |" in text
    assert "Core, skipped `topk`: a \\| b" in text


def test_no_results_at_all(lab: Lab):
    for name in ("core", "sparse_probing"):
        lab.disable(name)
    assert "No SAE has a result" in report(build(lab))


def test_optional_evaluation_gets_its_own_table(lab: Lab):
    lab.evaluate("scr")
    text = report(build(lab))
    assert "## Spurious correlation removal" in text and "SCR, 2 latents ↑" in text


def test_images_are_linked_where_they_are_written(lab: Lab):
    links = re.findall(r"!\[.*?\]\((.*?)\)", report(build(lab)))
    assert "images/overview.png" in links and "images/l0_vs_kl.png" in links


def test_csv_is_tidy_and_tells_definitions_apart(lab: Lab):
    write_results_csv(build(lab), lab.root)
    with (lab.root / "metrics/results.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    keys = [(r["sae"], r["eval"], r["metric"], r["definition_version"]) for r in rows]
    assert len(keys) == len(set(keys))
    found = {
        r["definition_version"]: float(r["value"]) for r in rows if (r["sae"], r["metric"]) == ("standard", "loss_recovered")
    }
    assert found == {"lab_v1": 0.931, "sae_bench_0.6.0": 0.9299}
    assert {r["better"] for r in rows} == {"higher", "lower", ""}


def test_numbers_read_well():
    assert [number(value) for value in (0.7071, 12.34, 331.2, 0.00041, -0.02, 0.0, None)] == [
        "0.707",
        "12.3",
        "331",
        "0.00041",
        "-0.020",
        "0",
        "–",
    ]
    assert [count(value) for value in (8128, 300_000, 5e7, 2e9)] == ["8,128", "0.3M", "50M", "2B"]
