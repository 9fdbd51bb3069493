"""Findings on made curves, one fault at a time, and on a run that has them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from pydantic import TypeAdapter

from sae_research.config.recipes import TrainedSAE
from sae_research.training import stage
from sae_research.training.diagnose import (
    LIMITS,
    CurvePoint,
    TrainingSummary,
    curve_shape,
    diagnose,
    diagnose_text,
    lines,
    needs_comparison,
)
from tests.helpers.training import CONFIGS, STANDARD, TOP_K

D_IN = 64


def made_curve(late_fall: float = 0.02, decay_drop: float = 0.05) -> list[CurvePoint]:
    """60 rows: a quick start, `late_fall` of the loss lost evenly from 20 % on until the decay at 70 %, `decay_drop` in
    the decay."""
    points = []
    for row in range(60):
        progress = (row + 1) / 60
        loss = 1.0 + 0.6 * math.exp(-progress / 0.05)
        loss *= 1 - late_fall / 0.25 * max(0.0, min(progress, 0.7) - 0.2)
        loss *= 1 - decay_drop / 0.3 * max(0.0, progress - 0.7)
        points.append(CurvePoint(progress, loss, 1 - loss / 2))
    return points


def seen(recipe: dict[str, Any] = STANDARD, curve: list[CurvePoint] | None = None, **figures: Any) -> TrainingSummary:
    """A healthy SAE but for what is given."""
    return TrainingSummary(
        **{
            "config": TypeAdapter(TrainedSAE).validate_python({**recipe, "d_sae": 256}),
            "curve": made_curve() if curve is None else curve,
            "d_in": D_IN,
            "l0": 8.0,
            "variance_explained": 0.8,
            "fraction_silent": 0.01,
            "dense_share": 0.1,
            "pca": {4: 0.4, 16: 0.6},
            "decay_fraction": 0.3,
            "sparsity_warmup_fraction": 0.1,
            **figures,
        }
    )


def found(name: str = "sae", **given: Any) -> list[tuple[str, str]]:
    return [(finding.what, finding.change) for finding in diagnose(name, seen(**given))]


def test_a_healthy_run_is_left_alone() -> None:
    assert found() == []
    assert found(recipe={**TOP_K, "k": 8}) == []
    shape = curve_shape(made_curve(), 0.3)
    assert shape is not None and shape.fall == pytest.approx(0.02, abs=0.005) and shape.spike < 1.1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"l0": 17.0}, ("l0_too_high", "train.saes.sae.l1_coefficient: raise (now 0.1)")),
        ({"l0": 0.2}, ("l0_too_low", "train.saes.sae.l1_coefficient: lower (now 0.1)")),
        ({"recipe": {**CONFIGS["matching_pursuit"]}, "l0": 17.0}, ("l0_too_high", "train.saes.sae.s: lower (now 4)")),
        (
            {"recipe": CONFIGS["hard_concrete"], "l0": 17.0},
            ("l0_too_high", "train.saes.sae.l0_coefficient: raise (now 0.003)"),
        ),
        ({"recipe": {**TOP_K, "k": 4}}, ("l0_off_target", "train.tokens: raise, so that the threshold settles")),
        (
            {"recipe": {**CONFIGS["jump_relu"], "target_l0": 4}},
            ("l0_off_target", "train.saes.sae.sparsity_coefficient: raise, or train.tokens"),
        ),
        (
            {"recipe": {**CONFIGS["jump_relu"], "target_l0": 8}, "l0": 0.0},
            ("l0_off_target", "train.saes.sae.learning_rate: lower (now 0.003), so that thresholds do not overshoot"),
        ),
        ({"l0": 17.0, "dense_share": 0.9}, ("l0_too_high", "train.saes.sae.l1_coefficient: raise (now 0.1)")),
        ({"fraction_silent": 0.2}, ("dead_latents", "train.saes.sae.resample_every: 0.1")),
        (
            {"fraction_silent": 0.2, "recipe": {**TOP_K, "k": 8}},
            ("dead_latents", "train.saes.sae.aux_k_coefficient: raise (now 0.03125), or learning_rate: lower"),
        ),
        (
            {"fraction_silent": 0.2, "recipe": {**CONFIGS["jump_relu"], "target_l0": 8}},
            ("dead_latents", "train.saes.sae.learning_rate: lower (now 0.003), or d_sae"),
        ),
        ({"dense_share": 0.7}, ("dense_latents", "train.saes.sae.l1_coefficient: raise (now 0.1)")),
        (
            {"curve": made_curve(late_fall=0.1)},
            ("learning_rate_too_low", "train.saes.sae.learning_rate: raise (now 0.003), or train.tokens"),
        ),
        (
            {"variance_explained": 0.3},
            ("learning_rate_too_low", "train.saes.sae.learning_rate: raise (now 0.003), or train.tokens"),
        ),
        ({"curve": made_curve(0.005, 0.15)}, ("learning_rate_too_high", "train.saes.sae.learning_rate: lower (now 0.003)")),
        ({"variance_explained": 0.5, "l0": 12.0}, ("too_narrow", "train.saes.sae.d_sae: raise (now 256)")),
    ],
)
def test_each_fault_alone(given: dict[str, Any], expected: tuple[str, str]) -> None:
    assert found(**given) == [expected]


def test_jumps_and_rises() -> None:
    spiky = made_curve()
    spiky[40] = spiky[40]._replace(loss=2.0)
    rising = [point._replace(loss=point.loss * (1 + max(0.0, point.progress - 0.3))) for point in made_curve()]
    blown = made_curve()
    blown[6] = blown[6]._replace(variance_explained=-0.7)
    for curve in (spiky, rising, blown):
        assert found(curve=curve) == [("learning_rate_too_high", "train.saes.sae.learning_rate: lower (now 0.003)")]
    warming = [point._replace(loss=point.loss * (1 + min(point.progress / 0.1, 1.0))) for point in made_curve()]
    assert found(curve=warming) == []  # a penalty that comes in raises the loss, and is no fault


def test_wide_dictionaries_and_short_curves_are_not_judged() -> None:
    wide = {**STANDARD, "d_sae": 2048}
    narrow = seen(variance_explained=0.5, l0=12.0)
    config = TypeAdapter(TrainedSAE).validate_python(wide)
    assert diagnose("sae", narrow._replace(config=config)) == []
    assert curve_shape(made_curve()[:8], 0.3) is None
    assert curve_shape(made_curve(), 0.6) is None  # hardly a stretch at full rate
    assert curve_shape(made_curve(), 0.3, 0.5) is None  # nor at full penalty
    assert curve_shape([point._replace(loss=-1.0) for point in made_curve()], 0.3) is None


def test_limits_are_inclusive_where_they_say_so() -> None:
    assert found(l0=LIMITS.l0_high * D_IN) == [] and found(fraction_silent=LIMITS.dead) == []
    (finding,) = diagnose("sae", seen(l0=20.0))
    (of_a,) = diagnose("a", seen(l0=20.0))
    assert (finding.value, finding.limit) == (20 / D_IN, 0.25)
    assert lines({"a": [of_a], "b": diagnose("b", seen(l0=32.0)), "c": []}) == [
        "l0 too high (L0 / d_in, limit 0.25): a 0.312, b 0.5; train.saes.*.l1_coefficient: raise"
    ]
    assert lines({"sae": [finding]})[0].startswith("sae: 20 latents a token, 31% of d_in: hardly sparse (L0 / d_in 0.312")


def test_text_the_model_does_not_know() -> None:
    uniform = math.log(1000)
    assert diagnose_text(3.0, None, 1000, "mine") == [] and diagnose_text(3.0, 2.5, 1000, "mine") == []
    (chance,) = diagnose_text(0.9 * uniform, None, 1000, "mine")
    assert chance.what == "wrong_text" and "barely better than chance" in chance.says and chance.value == pytest.approx(0.9)
    (gap,) = diagnose_text(4.0, 2.5, 1000, "mine")
    assert "4.00 against 2.50" in gap.says and gap.value == pytest.approx(1.5)
    assert needs_comparison(0.5 * uniform, 1000)
    assert not needs_comparison(0.2 * uniform, 1000) and not needs_comparison(0.9 * uniform, 1000)


def test_a_run_says_what_is_wrong_with_it(make_params, tmp_path, capsys):
    saes = {"crawling": {**TOP_K, "learning_rate": 1e-6, "k": 20}, "dense": {**STANDARD, "l1_coefficient": 0.001}}
    report = stage.train(make_params(saes=saes), tmp_path / "out")
    written = json.loads((tmp_path / "out" / "training_report.json").read_text())["diagnose"]
    assert written["saes"].keys() == saes.keys() and report["diagnose"]["saes"].keys() == saes.keys()
    whats = {name: [finding["what"] for finding in findings] for name, findings in written["saes"].items()}
    assert "l0_too_high" in whats["crawling"] and "l0_too_high" in whats["dense"]
    assert "learning_rate_too_low" in whats["crawling"]  # 20 latents explain less than 16 principal components
    assert [finding["what"] for finding in written["text"]] == ["wrong_text"]  # a random model knows no text
    out = capsys.readouterr().out
    assert "  dense: " in out and "train.saes.dense.l1_coefficient: raise (now 0.001)" in out
