"""The stage `ground_truth_eval`: whole runs, what is trained, what is refused, and the report of a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_research.config.ground_truth import PURSUITS, GroundTruth
from sae_research.config.params import Params, check_params
from sae_research.config.recipes import recipe_model
from sae_research.config.reporting import Visualization
from sae_research.evals.ground_truth.evaluation import (
    Planned,
    beside,
    evaluate,
    make_worlds,
    run_stage,
    save_worlds,
    train_all,
)
from sae_research.reporting import ground_truth
from sae_research.reporting.ground_truth import FOLDER, extract_ground_truth
from sae_research.reporting.ground_truth_figures import draw_ground_truth
from sae_research.runtime.cache import cache_dir
from sae_research.runtime.errors import UserError
from sae_research.saes import SAEConfig, SparseAutoencoder, save_sae
from sae_research.saes.forms import StandardSAE
from tests.helpers.ground_truth import SMALL
from tests.helpers.training import CONFIGS

QUICK: dict[str, Any] = {
    "data": SMALL,
    "samples": 2048,
    "batch_size": 128,
    "test_samples": 1024,
    "sequence_length": 32,
    "n_seeds": 2,
    "d_sae": 32,
    "recipes": {"top_k": {"recipe": "top_k", "k": [3, 6]}, "standard": {"recipe": "standard", "l1_coefficient": [0.2, 0.4]}},
    "pursuit": {"encoders": ["ihtp", "mpsae"], "sizes": [3, 6]},
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))


def params(**values: Any) -> Params:
    return Params.model_validate({"ground_truth": {**QUICK, **values}})


def test_the_whole_evaluation_twice_and_with_a_class_and_a_folder_of_ones_own(tmp_path: Path) -> None:
    first = evaluate(params())
    assert json.dumps(first, sort_keys=True, allow_nan=False) == json.dumps(evaluate(params()), sort_keys=True)
    methods = {row["method"] for row in first["rows"]}
    assert methods == {
        "top_k",
        "standard",
        *(
            f"{encoder} over {dictionary}"
            for encoder in ("ihtp", "mpsae")
            for dictionary in ("truth", "trained", "untrained")
        ),
    }
    assert len(first["rows"]) == 2 * (4 + 3 * (2 + 1)) and all(len(row["flags"]) < 3 for row in first["rows"])
    assert any("fewer latents than true features (standard" in note for note in first["notes"])
    true = [row for row in first["rows"] if row["dictionary"] == "truth"]
    assert all(row["metrics"]["mcc"] == pytest.approx(1, abs=1e-5) for row in true)
    assert not {name for name in first["follow"]["all"]["methods"] if "over truth" in name}
    grown = params(recipes={**QUICK["recipes"], "jump_relu": {"recipe": "jump_relu", "target_l0": 4}})
    more = evaluate(grown)
    kept = [row for row in more["rows"] if row["method"] != "jump_relu"]
    assert kept == first["rows"]  # what was trained is what it was
    folder = tmp_path / "mine"
    save_sae(coded_standard(), folder)
    both = evaluate(beside(params(), ["custom_saes.example:AbsTopK", str(folder)]))
    assert {"abs_topk", "mine"} <= {row["method"] for row in both["rows"]}
    save_worlds(params(), tmp_path / "worlds")
    assert (tmp_path / "worlds/seed_1/synthetic_model.safetensors").is_file()


def coded_standard(d_in: int = 24) -> SparseAutoencoder:
    rows = torch.nn.functional.normalize(torch.randn(16, d_in, generator=torch.Generator().manual_seed(0)), dim=1)
    return StandardSAE(
        SAEConfig("standard", d_in, 16),
        W_enc=rows.T.contiguous(),
        W_dec=rows,
        b_enc=torch.zeros(16),
        b_dec=torch.zeros(d_in),
    )


def test_training_alone_and_beside_others_gives_one_sae() -> None:
    settings = GroundTruth.model_validate(QUICK)
    worlds, points = make_worlds(settings, 42), settings.grid({})
    alone = train_all([Planned(1, points[0])], worlds, settings, 42)[Planned(1, points[0])]
    shutil.rmtree(cache_dir("ground_truth"))
    many = train_all([Planned(seed, point) for seed in worlds for point in points], worlds, settings, 42)
    assert torch.allclose(many[Planned(1, points[0])].W_dec, alone.W_dec, atol=1e-5)
    assert not torch.allclose(many[Planned(0, points[0])].W_dec, alone.W_dec, atol=1e-2)


def test_every_recipe_can_be_trained_on_known_features() -> None:
    """Those whose settings hold lists (matryoshka's groups, Adam's betas) too, alone or as a grid."""
    recipes = {
        name: {**CONFIGS[name], "d_sae": 32}
        for name in CONFIGS
        if not recipe_model(name).crosscoders or name in ("standard_new", "batch_top_k")
    }
    recipes["matryoshka_batch_top_k"]["k"] = [3, 6]
    recipes["standard"]["betas"] = [0.0, 0.999]
    found = evaluate(params(recipes=recipes, samples=1024, n_seeds=1, pursuit={"over": []}))
    assert {row["method"] for row in found["rows"]} == set(recipes)


def test_recipes_of_the_train_section_and_one_world_for_all_seeds() -> None:
    values = {
        "train": {"saes": {"mine": {"recipe": "top_k", "d_sae": 2304, "k": 4}}},
        "ground_truth": {**QUICK, "recipes": None, "data": {**SMALL, "world_seed": 7}, "pursuit": {"over": []}},
    }
    found = evaluate(Params.model_validate(values))
    assert {row["method"] for row in found["rows"]} == {"mine"} and len(found["rows"]) == 2
    assert any(note.startswith("one sparsity alone: mine") for note in found["notes"])
    assert "methods reach one L0" in found["follow"]["all"]["note"]
    worlds = make_worlds(Params.model_validate(values).ground_truth, 42)
    assert torch.equal(worlds[0].features, worlds[1].features)
    assert not torch.equal(worlds[0].activations(64, "test"), worlds[1].activations(64, "test"))


@pytest.mark.slow
def test_every_pursuit_encoder_over_every_dictionary() -> None:
    found = evaluate(params(pursuit={"sizes": [3, 6]}))
    assert len(found["rows"]) == 2 * (4 + 3 * (5 * 2 + 1))
    assert {row["encoder"] for row in found["rows"]} == {"own encoder", *PURSUITS}
    assert all(np.isfinite(list(row["metrics"].values())).all() for row in found["rows"])


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"recipes": {"a": {"recipe": "top_k", "k": [64]}}}, "recipes.a: k = 64 exceeds d_sae = 32"),
        ({"recipes": {"a": {"recipe": "topk", "k": 3}}}, "recipes.a: unknown recipe 'topk'"),
        ({"recipes": {"a": {"recipe": "top_k", "k": []}}}, "recipes.a: an empty list"),
        ({"recipes": {"a": {"recipe": "top_k", "k": 3, "l1": 2}}}, "recipes.a.l1"),
        ({"test_samples": 1000}, "multiple of sequence_length"),
        ({"data": {"min_probability": 0.5}}, "must be below max_probability"),
        ({"pursuit": {"trained": "other"}}, "pursuit.trained: no recipe 'other'"),
        ({"samples": 1024, "batch_size": 1000}, "no two batches"),
    ],
)
def test_impossible_settings_are_one_line(values: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match="ground_truth") as error:
        check_params({"ground_truth": {**QUICK, **values}}, "params.yaml")
    assert said in str(error.value) and "\n" not in str(error.value)


def test_features_that_cannot_fire_stop_the_stage_or_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rare = {**SMALL, "min_probability": 1e-5, "max_probability": 2e-3}
    with pytest.raises(UserError, match=r"only \d+ of 48 features fire"):
        run_stage(params(data=rare))
    assert json.loads((tmp_path / "eval_results/ground_truth/_status.json").read_text())["status"] == "failed"
    some = evaluate(params(data={**SMALL, "min_probability": 2e-3}, n_seeds=1, pursuit={"over": []}))
    assert any("features fire on fewer than 5 test samples" in note for note in some["notes"])
    assert some["notes"][0].startswith("one seed")


def test_a_folder_of_another_width_is_refused(tmp_path: Path) -> None:
    save_sae(coded_standard(16), tmp_path / "other")
    with pytest.raises(UserError, match="reads 16 dimensions, the synthetic activations have 24"):
        evaluate(beside(params(pursuit={"over": []}), [str(tmp_path / "other")]))


def test_report_metrics_and_pictures_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_stage(params(pursuit={"encoders": ["mpsae", "omp"], "sizes": [3, 6]}))
    text = ground_truth.ground_truth()
    assert "| `top_k, k 3` |" in text and "Which metric follows the truth" in text and "[" in text
    assert ground_truth.beside("variance_explained").startswith("*Variance explained and the truth*")
    extract_ground_truth(FOLDER, Path("metrics/ground_truth.json"))
    metrics = json.loads(Path("metrics/ground_truth.json").read_text())
    assert metrics["_status"] == {"status": "ok", "seeds": 2, "methods": 4 + 12}
    assert metrics["top_k_k_3"]["l0"] == pytest.approx(3, rel=0.5) and "all" in metrics["rank_correlations"]
    drawn = draw_ground_truth(Visualization())
    assert [path.name for path in drawn] == ["follow.png", "pursuit.png", "recipes.png"] and all(p.is_file() for p in drawn)
    off = Params.model_validate({"eval_types": {"ground_truth": False}, "ground_truth": QUICK})
    run_stage(off)
    extract_ground_truth(FOLDER, Path("metrics/ground_truth.json"))
    assert json.loads(Path("metrics/ground_truth.json").read_text()) == {"_status": {"status": "disabled"}}
    assert ground_truth.ground_truth() == "" and draw_ground_truth(Visualization()) == []
    assert ground_truth.beside("variance_explained") == "" and not list(Path("images").rglob("*.png"))
