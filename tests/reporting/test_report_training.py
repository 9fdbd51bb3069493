"""What the training shows, as METRICS.md says it."""

from __future__ import annotations

from sae_research.reporting.report import report
from sae_research.reporting.results import merge
from sae_research.reporting.rows import read_run
from tests.helpers.results import Lab

FINDING = {
    "what": "dead_latents",
    "says": "9.0% of latents did not fire any more at the end",
    "figure": "fraction of latents silent",
    "value": 0.09,
    "limit": 0.05,
    "change": "train.saes.standard.resample_every: 0.1",
}


def test_findings_and_healthy_saes_are_listed(lab: Lab) -> None:
    merge(lab.root)
    assert "What the training shows" not in report(read_run(lab.root))  # an older stage wrote no such section
    trained = lab.read("trained_saes/training_report.json")
    trained["diagnose"] = {"saes": {"standard": [FINDING], "topk": []}, "text": []}
    lab.write("trained_saes/training_report.json", trained)
    text = report(read_run(lab.root))
    assert (
        "| `standard` | 9.0% of latents did not fire any more at the end | fraction of latents silent 0.090 | 0.050 | "
        "`train.saes.standard.resample_every`: 0.1 |"
    ) in text
    assert "No finding for `topk`." in text
    trained["diagnose"] = {"saes": {"standard": [], "topk": []}, "text": []}
    lab.write("trained_saes/training_report.json", trained)
    section = report(read_run(lab.root)).partition("## What the training shows")[2].partition("\n## ")[0]
    assert "|" not in section and "No finding for `standard`, `topk`." in section
