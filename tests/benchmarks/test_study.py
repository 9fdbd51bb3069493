"""The study's page: every number in it is the record's, and its sentences follow from the record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import study_findings, study_page
from benchmarks.study_figures import drawings
from sae_research.runtime.files import read_json

ROOT = Path(__file__).parents[2]

KINDS = {"topk": 0.80, "batchtopk": 0.82, "standard": 0.70}


def row(name: str, kind: str, l0: float, value: float, **more: Any) -> dict[str, Any]:
    known = {"role": "comparison", "base": None, "recipe_id": name, "fraction_alive": 0.9, "interpolating": False}
    metrics = {"variance_explained": [value, value - 0.01, value + 0.01], "sae_top_1_accuracy": [0.7, 0.6, 0.8]}
    return {"name": name, "kind": kind, "l0": l0, **known, **metrics, **more}


def reading(kind: str, value: float, base: str | None = None) -> dict[str, Any]:
    return {"grid": kind, "kind": kind, "base": base, "value": value, "seeds": 3, "seed_sd": 0.002, "between": []}


def difference(one: str, other: str, value: float, p: float, metric: str = "variance_explained") -> dict[str, Any]:
    found = {"low": value - 0.01, "high": value + 0.01, "p": p, "p_holm": p, "family": 15}
    return {"one": one, "other": other, "metric": metric, "value": value, **found, "seeds": [3, 3]}


@pytest.fixture
def record() -> dict[str, Any]:
    values = {**KINDS, "control_data_rows": 0.75, "mpsae": 0.85}
    bases = {"mpsae": "topk_28"}
    rows = [row(f"{kind}_{l0}", kind, l0, value, base=bases.get(kind)) for kind, value in values.items() for l0 in (28, 40)]
    return {
        "read_at": 32.0,
        "tokens": 2_000_000,
        "rows": rows,
        "labels": {
            "variance_explained": ["Variance explained", "higher"],
            "sae_top_1_accuracy": ["Probing top-1", "higher"],
        },
        "readings": {
            "variance_explained": [reading(kind, value, bases.get(kind)) for kind, value in values.items()],
            "sae_top_1_accuracy": [reading(kind, 0.7, bases.get(kind)) for kind in values],
        },
        "differences": [
            difference("topk", "batchtopk", -0.02, 0.2),
            difference("topk", "standard", 0.10, 0.001),
            difference("batchtopk", "standard", 0.12, 0.001),
            difference("topk", "control_data_rows", 0.05, 0.001),
            difference("control_data_rows", "standard", 0.05, 0.001),
            difference("mpsae", "topk", 0.05, 0.001),
            difference("topk", "standard", 0.01, 0.9, "sae_top_1_accuracy"),
        ],
        "agreement": [{"metric": "variance_explained", "truth": "mcc", "recipes": 6, "spearman": 0.6}],
        "ground_truth": {
            "at": 8.0,
            "seeds": 2,
            "samples": 1000,
            "methods": {"top_k": {"mcc": [0.6, 0.7], "latent_f1": [0.5, 0.5], "variance_explained": [0.7, 0.7]}},
        },
        "rates": [
            {"base": "topk_28", "learning_rate": rate, "l0": 28.0, "variance_explained": [0.8, 0.79, 0.81]}
            for rate in (0.003, 0.0003)
        ],
    }


def test_findings_follow_from_the_record(record: dict[str, Any]) -> None:
    found = [said for said, _ in study_findings.findings(record)]
    assert len(found) <= 10
    text = " ".join(found)
    assert "2 of 3 differences between two recipes exceed noise (3 training seeds each)" in text
    assert "`batch_top_k` 0.820, `top_k` 0.800, `standard` 0.700" in text
    assert "`batch_top_k` minus `standard` +0.120 [+0.110, +0.130]" in text
    assert "In probing top-1 at L0 32 none of the 1 differences between two recipes exceeds noise" in text
    assert "deviation of at most 0.0020 (`top_k`); the smallest difference that exceeds noise is 0.1000" in text
    assert "reach at L0 32 0.750 in variance explained (nearest: `untrained` minus `top_k` -0.050 [-0.060, -0.040])" in text
    assert "beyond noise above `standard` and below `top_k` of 2" in text
    assert (
        "dictionary of `topk_28`, against the recipe's own encoder at L0 32: variance explained +0.050 [+0.040, +0.060]."
        in text
    )
    assert "`top_k` over `standard` in variance explained (+0.100 [+0.090, +0.110])" in text
    assert "1 within noise: `batch_top_k` over `top_k` in variance explained (+0.020 [+0.010, +0.030])" in text
    assert "variance explained with MCC +0.60" in text and "`topk` at L0 28.0 0.800 [0.790, 0.810] at 0.003, 0.800" in text


def test_the_page_and_its_figures_are_made(record: dict[str, Any], tmp_path: Path) -> None:
    page = study_page.page(record)
    assert "| `top_k` | 3 | 0.800 ± 0.002 |" in page and "| Variance explained | `batch_top_k` − `standard` |" in page
    for name, draw in drawings(record).items():
        assert draw().axes, name
        assert f"({name}.png)" in page


def test_the_page_is_held_against_further_seeds(record: dict[str, Any]) -> None:
    same, turned = {"topk": [0.79, 0.81], "standard": [0.7, 0.7]}, {"topk": [0.69, 0.67], "standard": [0.7, 0.7]}
    record["further"] = {"seeds": [3, 4], "values": {"variance_explained": same}}
    record["equal_bytes"] = {"topk_28": True}
    assert study_page.held_lines(record) == [
        "No finding turns over. Of 5 differences that exceed noise 5 keep their sign; 5 of them stay inside their interval.",
        "Of 1 that do not exceed noise 1 stay inside their interval.",
    ]
    assert "trained again in another clone: 1 of 1 came out in equal bytes" in study_page.page(record)
    record["further"]["values"] = {"variance_explained": turned}
    lines = study_page.held_lines(record)
    assert "Of 1 that do not exceed noise 0 stay inside" in lines[1]
    assert (
        "Does not hold: `top_k` minus `standard` in variance explained, +0.100 [+0.090, +0.110] in the study, -0.020 with "
        "the further seeds."
    ) in lines


def test_the_committed_page_follows_from_its_record() -> None:
    record = read_json(ROOT / study_page.RECORD)
    assert (ROOT / study_page.FOLDER / "index.md").read_text() == study_page.page(record)
    assert len(list(study_findings.findings(record))) <= 10
