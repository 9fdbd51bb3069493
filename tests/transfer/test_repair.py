"""An SAE trained further on the other model's activations."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_research.transfer.repair import _recipe, repair
from sae_research.transfer.sweep import sweep


@pytest.mark.parametrize("form", ["standard", "topk"])
def test_weights_survive_the_way_in_and_out(make_pair: Any, form: str) -> None:
    pair = make_pair("near", form=form)
    sae = pair.saes["base"]
    again = _recipe(sae, 0.37, 1e-3, 5.0, pair.params.train).export(0.37, sae.cfg)
    x = torch.randn(2, 5, sae.cfg.d_in, generator=torch.Generator().manual_seed(0)) * 4
    assert torch.allclose(again.decode(again.encode(x)), sae.decode(sae.encode(x)), atol=1e-5)


@pytest.mark.parametrize("form", ["standard", "topk"])
def test_gap_closes_with_training(make_pair: Any, form: str) -> None:
    settings = {"tokens": 1920, "held_out_tokens": 480, "batch_size": 32, "learning_rate": 0.005}
    pair = make_pair("near", form=form, repair=settings)
    found = repair(pair, sweep(pair, 300).first.limit)
    curves = found["curves"]
    assert found["status"] == "ok" and curves["finetuned"][0]["tokens"] == 0
    assert [row["tokens"] for row in curves["finetuned"]] == [row["tokens"] for row in curves["base"]]
    for arm, model in (("finetuned", "finetuned"), ("base", "base")):
        key = f"variance_explained_on_{model}"
        assert curves[arm][-1][key] > curves[arm][0][key] + 0.02
    assert form != "topk" or all(row["l0_on_finetuned"] <= 4 for row in curves["finetuned"])


def test_gap_in_figures() -> None:
    from sae_research.transfer.repair import _gap

    rows = [
        {"tokens": t, "variance_explained_on_base": 0.8, "variance_explained_on_finetuned": v}
        for t, v in ((0, 0.6), (100, 0.65), (200, 0.75))
    ]
    found = _gap({"finetuned": rows, "base": rows})
    assert found["gap"] == pytest.approx(0.2) and found["tokens_to_half"] == pytest.approx(150)
    assert found["gap_closed"] == pytest.approx(0.75) and found["gap_after_equal_training"] == pytest.approx(0.05)
    flat = [row | {"variance_explained_on_finetuned": 0.8} for row in rows]
    assert _gap({"finetuned": flat, "base": flat})["tokens_to_half"] is None


@pytest.mark.slow
def test_l0_is_held(make_pair: Any) -> None:
    pair = make_pair(
        "near", form="standard", repair={"tokens": 4800, "held_out_tokens": 480, "batch_size": 64, "learning_rate": 0.001}
    )
    curve = repair(pair, sweep(pair, 300).first.limit)["curves"]["base"]
    assert curve[-1]["l0_on_base"] == pytest.approx(curve[0]["l0_on_base"], rel=0.4)


def test_forms_without_a_recipe(make_pair: Any) -> None:
    pair = make_pair("near")
    pair.saes["base"].__class__ = type("Other", (type(pair.saes["base"]),), {"form": "my_sae"})
    assert repair(pair, sweep(pair, 100).first.limit)["status"] == "not_applicable"
