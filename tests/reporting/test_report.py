"""METRICS.md and results.csv: what is said follows from the numbers."""

from __future__ import annotations

import csv
import re

import pytest
from jinja2 import UndefinedError

from sae_research.reporting.metrics import headline
from sae_research.reporting.report import report
from sae_research.reporting.results import merge
from sae_research.reporting.rows import Row, Run, read_run
from sae_research.reporting.sections import better_controls, controls, stricter
from sae_research.reporting.tables import cells, render, write_results_csv
from tests.helpers.results import SAES, Lab


def build(lab: Lab) -> Run:
    merge(lab.root)
    return read_run(lab.root)


def row(name: str, role: str = "comparison", interpolating: bool = False, **figures: float) -> Row:
    core = {"status": "ok", "metrics": figures, "interpolating": interpolating}
    return Row(name, {"architecture": name, "role": role}, {"core": core})


def test_nothing_is_marked_as_best_over_saes_of_different_l0():
    rows = [row("a", kl=0.2, l0=10.0), row("b", kl=0.1, l0=20.0), row("c", l0=5.0)]
    shown = [cells(each, [headline("kl"), headline("l0")]) for each in rows]
    assert shown == [["0.200", "10.0"], ["0.100", "20.0"], ["–", "5.000"]]


def test_a_control_with_the_more_favourable_value_is_named_with_both_numbers():
    rows = [
        row("a", variance_explained=0.7, l0=40.0),
        row("b", role="control", variance_explained=0.84, l0=32.0),
    ]
    assert "- Variance explained: `b` (0.840 at L0 32.0) has a higher value than `a` (0.700 at L0 40.0)." in controls(
        Run(rows, {}, {}, [])
    )
    rows[1] = row("b", role="control", variance_explained=0.5)
    assert better_controls(Run(rows, {}, {}, [])) == []
    assert "No control has a more favourable value than an SAE" in controls(Run(rows, {}, {}, []))
    rows[1] = row("b", role="control", variance_explained=0.84, l0=80.0)
    assert better_controls(Run(rows, {}, {}, [])) == [], "a denser control that explains more is no surprise"


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


def test_report_opens_with_its_findings_and_calls_a_short_run_a_smoke_run(lab: Lab):
    text = report(build(lab))
    places = [text.index(part) for part in ("smoke run", "## In short", "## Results", "## What ran", "## Intervals")]
    assert places == sorted(places), "findings and the headline table come first"
    assert "300k training tokens" in text
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
        for title in ("Baseline", "Pursuit encoders over trained dictionaries", "Comparison", "Controls")
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


def test_a_template_gets_all_its_values_and_its_paragraphs_are_one_line_each():
    with pytest.raises(UndefinedError, match="table"):
        render("stricter")
    title, text, header, row = (line for line in render("stricter", table="| a |\n| b |").splitlines() if line)
    assert title.startswith("## ") and len(text) > 300 and (header, row) == ("| a |", "| b |")


def test_controls_are_set_against_what_reconstructs_the_same():
    stream, mlp = "blocks.8.hook_resid_post", "blocks.8.hook_mlp_out"
    rows = [row("a", variance_explained=0.4, l0=30.0), row("b", role="control", variance_explained=0.5, l0=30.0)]
    for one in rows:
        one.cfg.update(hook_name=stream, hook_out=stream)
    assert [found["rows"] for found in better_controls(Run(rows, {}, {}, []))] == [[rows[0]]]
    rows[0].cfg.update(hook_name="blocks.8.mlp.hook_in", hook_out=mlp)
    assert better_controls(Run(rows, {}, {}, [])) == []
    rows[1].cfg.update(hook_name="blocks.8.mlp.hook_in", hook_out=mlp)
    assert [found["rows"] for found in better_controls(Run(rows, {}, {}, []))] == [[rows[0]]]


def test_what_reconstructs_something_else_is_flagged():
    read, written = "blocks.8.mlp.hook_in", "blocks.8.hook_mlp_out"
    kinds = {
        "transcoder": {"hook_name": read, "hook_out": written},
        "crosscoder": {"hook_name": f"{read} + {written}", "hook_out": f"{read} + {written}"},
        "cross-layer transcoder": {
            "hook_name": f"blocks.7.mlp.hook_in + {read}",
            "hook_out": f"blocks.7.hook_mlp_out + {written}",
        },
    }
    for kind, hooks in kinds.items():
        assert Row("a", hooks, {}).flags == [kind]
    assert Row("a", {"hook_name": read, "hook_out": read}, {}).flags == []
    assert Row("a", kinds["cross-layer transcoder"], {}).crosscoder_hooks == ["blocks.7.hook_mlp_out", written]
    assert Row("a", kinds["crosscoder"], {}).crosscoder_hooks == [read, written]
