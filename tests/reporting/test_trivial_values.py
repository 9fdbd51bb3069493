"""Where no SAE beats a value that is reached without any SAE, the report says so."""

from __future__ import annotations

import pytest

from sae_research.reporting.report import report
from tests.helpers.results import Lab, build, core_result, section


def ravel(lab: Lab, scores: dict[str, tuple[float, list[float]]]) -> str:
    lab.status("ravel", "ok")
    for name, (score, bounds) in scores.items():
        lab.result(
            "ravel",
            name,
            core_result(name)
            | {
                "eval_result_metrics": {},
                "eval_result_unstructured": {
                    "lab_v1": {"metrics": {"disentanglement": score}, "intervals": {"disentanglement": bounds}}
                },
            },
        )
    return section(report(build(lab)), "RAVEL")


def test_no_sae_above_the_mask_that_changes_nothing(lab: Lab) -> None:
    text = ravel(lab, {"topk": (0.5, [0.4, 0.6]), "standard": (0.41, [0.3, 0.5]), "control_random": (0.61, [0.55, 0.7])})
    assert "RAVEL disentanglement: **no SAE lies above 0.500**, which a mask that changes nothing has" in text


@pytest.mark.parametrize(
    ("low", "sure"), [(0.45, "0 with their whole interval."), (0.51, "1 with their whole interval (`topk`).")]
)
def test_saes_above_it_are_counted(lab: Lab, low: float, sure: str) -> None:
    text = ravel(lab, {"topk": (0.6, [low, 0.7]), "standard": (0.41, [0.3, 0.5])})
    assert f"1 of 2 SAEs lie above it, {sure}" in text
