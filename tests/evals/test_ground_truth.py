"""Ground truth: the generator gives what was asked, figures score what they must, and agree with SAELens' own functions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens import StandardSAE as SaeLensStandard
from sae_lens import StandardSAEConfig
from sae_lens.synthetic import (
    compute_classification_metrics,
    eval_sae_on_synthetic_data,
    feature_uniqueness,
    mean_correlation_coefficient,
)
from scipy.stats import binom, multivariate_normal, norm, spearmanr
from torch import Tensor

from sae_research.config.ground_truth import PURSUITS, GroundTruth
from sae_research.config.params import Params, check_params
from sae_research.config.reporting import Visualization
from sae_research.evals.ground_truth import data, measures
from sae_research.evals.ground_truth.data import World
from sae_research.evals.ground_truth.evaluation import (
    Planned,
    beside,
    evaluate,
    make_worlds,
    run_stage,
    save_worlds,
    train_all,
)
from sae_research.evals.ground_truth.measures import Truth, correlations, flags, measure
from sae_research.reporting import ground_truth
from sae_research.reporting.ground_truth import FOLDER, extract_ground_truth
from sae_research.reporting.ground_truth_figures import draw_ground_truth
from sae_research.runtime.cache import cache_dir
from sae_research.runtime.errors import UserError
from sae_research.saes import SAEConfig, SparseAutoencoder, encode_each, save_sae
from sae_research.saes.forms import StandardSAE

SMALL = {"num_features": 48, "hidden_dim": 24, "hierarchy_roots": 6, "max_probability": 0.2, "min_probability": 0.02}
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


def world(seed: int = 0, **values: Any) -> World:
    return World(GroundTruth.model_validate({"data": {**SMALL, **values}}).data.whole(), seed)


def truth(n: int = 2048, **values: Any) -> Truth:
    made = world(**values)
    return Truth(made, made.sample(n, "test"), 32)


class Coded(SparseAutoencoder):
    """An SAE that is told its activations."""

    form = "coded"
    tensor_names = ("W_dec", "b_dec")


def coded(rows: Tensor, bias: Tensor) -> SparseAutoencoder:
    return Coded(SAEConfig("coded", rows.shape[1], len(rows)), W_dec=rows, b_dec=bias)


def figures(known: Truth, rows: Tensor, z: Tensor) -> dict[str, float]:
    return measure(coded(rows, known.world.bias), z.view(-1, 32, z.shape[1]), known)


def true_codes(known: Truth) -> Tensor:
    return torch.from_numpy(known.samples.codes.toarray())


# --- the generator -----------------------------------------------------------------------------


def test_independent_features_fire_as_often_as_asked() -> None:
    made, n = world(hierarchy_roots=0, correlation_rank=0), 20_000
    fired = (made.sample(n, "test").codes != 0).toarray()
    low, high = binom.ppf((1e-6, 1 - 1e-6), n, made.asked[:, None]).T
    count = fired.sum(0)
    assert ((count >= low - 1 - 2e-4 * n) & (count <= high + 1)).all()  # a magnitude may be drawn below zero
    phi = np.corrcoef(fired.T)
    assert np.abs(phi[np.triu_indices(48, 1)]).max() < 6 / n**0.5


def test_correlated_features_fire_together_as_their_copula_says() -> None:
    made, n = world(hierarchy_roots=0, correlation_rank=4, correlation_scale=0.6), 20_000
    fired = (made.sample(n, "test").codes != 0).toarray()
    low_rank = made.model.correlation_matrix
    assert low_rank is not None
    latent = (low_rank.correlation_factor @ low_rank.correlation_factor.T).numpy()
    pairs = [(0, 1), (2, 9), (5, 7), (3, 20)]
    for i, j in pairs:
        limits = norm.ppf(made.asked[[i, j]])
        together = multivariate_normal.cdf(limits, cov=[[1, latent[i, j]], [latent[i, j], 1]])
        assert fired[:, [i, j]].all(1).mean() == pytest.approx(together, abs=5 * (together / n) ** 0.5 + 1e-4)
    strong = data.statistics(made, made.sample(2048, "test"))
    assert strong["firing_correlation_rms"] > 2 * strong["firing_correlation_rms_independent"]


def test_children_fire_below_their_parents_alone_and_siblings_one_at_a_time() -> None:
    known = truth()
    said = data.statistics(known.world, known.samples)
    assert said["children"] == 42 and said["parents"] == 6 + 18 - (24 * 3 - 42) // 3 and said["children_without_parent"] == 0
    codes = known.samples.codes.toarray() > 0
    for parent in np.unique(known.world.edges[:, 0]):
        children = known.world.edges[known.world.edges[:, 0] == parent, 1]
        assert codes[:, children].sum(1).max() <= 1
        assert not codes[~codes[:, parent]][:, children].any()
    assert said["l0"] == pytest.approx(codes.sum(1).mean())


def test_activations_are_the_sums_that_they_are_said_to_be() -> None:
    known = truth()
    assert torch.allclose(true_codes(known) @ known.world.features + known.world.bias, known.samples.x, atol=1e-4)
    noisy = truth(noise=0.5)
    rest = noisy.samples.x - true_codes(noisy) @ noisy.world.features - noisy.world.bias
    assert float(rest.std()) == pytest.approx(0.5, rel=0.02)
    again = known.world.sample(2048, "test")
    assert torch.equal(again.x, known.samples.x) and not torch.equal(known.world.sample(2048, "other").x, again.x)


@pytest.mark.slow
def test_the_published_setting_by_name() -> None:
    settings = GroundTruth.model_validate({"data": {"setting": "synth_sae_bench_16k"}})
    asked = data.config(settings.data.whole(), 42)
    assert (asked.num_features, asked.hidden_dim, settings.width) == (16384, 768, 4096)
    assert asked.hierarchy is not None and asked.hierarchy.total_root_nodes == 128 and asked.hierarchy.max_depth == 3
    assert asked.orthogonalization is not None and asked.orthogonalization.num_steps == 100 and asked.bias == 0.5
    # "about 34 active features a sample", which orthogonalisation has no part in
    values = settings.data.whole() | {"orthogonal_steps": 0}
    made = World(values, 42)
    assert made.sample(256, "test").codes.getnnz() / 256 == pytest.approx(34, abs=2.5)


# --- what figures must be ------------------------------------------------------------------------


def test_true_dictionary_and_true_codes_score_one() -> None:
    known = truth()
    found = figures(known, known.world.features, true_codes(known))
    for key in (
        "mcc",
        "mcc_activations",
        "precision",
        "recall",
        "f1",
        "latent_f1",
        "uniqueness",
        "top_1_probing",
        "variance_explained",
        "split_latents",
        "fraction_alive",
    ):
        assert found[key] == pytest.approx(1, abs=1e-5), key
    assert found["absorption"] == found["fraction_dead"] == found["fraction_duplicate"] == 0
    assert found["l0"] == pytest.approx(data.statistics(known.world, known.samples)["l0"])


@pytest.mark.parametrize("change", ["permuted", "sign_flipped", "scaled"])
def test_names_signs_and_lengths_of_latents_change_nothing(change: str) -> None:
    known = truth()
    rows, z = known.world.features, true_codes(known)
    if change == "permuted":
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
        rows, z = rows[order], z[:, order]
    elif change == "sign_flipped":
        rows, z = -rows, -z
    else:
        rows, z = rows * 3, z / 3
    found = figures(known, rows, z)
    for key in ("mcc", "mcc_activations", "f1", "latent_f1", "uniqueness", "top_1_probing", "variance_explained"):
        assert found[key] == pytest.approx(1, abs=1e-5), key
    assert found["absorption"] == 0


def test_duplicated_dictionary() -> None:
    known = truth()
    rows, z = known.world.features, true_codes(known)
    found = figures(known, torch.cat([rows, rows]), torch.cat([z, z], 1) / 2)
    assert found["mcc"] == pytest.approx(1) and found["f1"] == pytest.approx(1)
    assert found["uniqueness"] == found["fraction_duplicate"] == 0.5 and found["split_latents"] == 2


def test_half_of_the_dictionary_is_flagged_and_scores_half() -> None:
    known = truth()
    rows, z = known.world.features[::2], true_codes(known)[:, ::2]
    found = figures(known, rows, z)
    assert found["mcc"] == pytest.approx(1) and found["latent_f1"] == pytest.approx(1)
    assert found["recall"] == pytest.approx(0.5, abs=0.03)
    assert flags(coded(rows, known.world.bias), found, known)[0].startswith("narrow: 24 latents for 48")


def test_absorbed_parents_are_found() -> None:
    """A parent's latent that is silent wherever a child fires: absorption 1."""
    known = truth(8192, hierarchy_branching=2, hierarchy_depth=1)
    z = true_codes(known)
    for parent in np.unique(known.world.edges[:, 0]):
        children = known.world.edges[known.world.edges[:, 0] == parent, 1]
        z[(z[:, children] > 0).any(1), parent] = 0
    assert figures(known, known.world.features, z)["absorption"] == 1


def test_latents_that_say_nothing() -> None:
    known = truth()
    silent = figures(known, known.world.features, torch.zeros(2048, 48))
    assert silent["f1"] == silent["mcc_activations"] == silent["l0"] == 0 and silent["top_1_probing"] == 0.5
    assert "no latent fires" in flags(coded(known.world.features, known.world.bias), silent, known)
    noise = (torch.rand(2048, 48, generator=torch.Generator().manual_seed(1)) < 0.1).float()
    found = figures(known, known.world.features, noise)
    assert found["top_1_probing"] == pytest.approx(0.5, abs=0.05) and found["f1"] < 0.2
    dense = figures(known, known.world.features, torch.ones(2048, 48))
    assert any(
        flag.startswith("interpolating") for flag in flags(coded(known.world.features, known.world.bias), dense, known)
    )


def test_figures_agree_with_sae_lens() -> None:
    known = truth(4096)
    generator = torch.Generator().manual_seed(3)
    rows = torch.nn.functional.normalize(known.world.features[:40] + 0.1 * torch.randn(40, 24, generator=generator), dim=1)
    sae = StandardSAE(
        SAEConfig("standard", 24, 40, apply_b_dec_to_input=True),
        W_enc=rows.T.contiguous(),
        W_dec=rows,
        b_enc=torch.full((40,), -2.0),
        b_dec=known.world.bias,
    )
    z = next(encode_each({"one": sae}, known.samples.x.view(-1, 32, 24), None))[1]
    found, true = measure(sae, z, known), known.world.features
    assert found["mcc"] == pytest.approx(mean_correlation_coefficient(rows, true), abs=1e-5)
    assert found["uniqueness"] == feature_uniqueness(rows, true)
    theirs = compute_classification_metrics(z.view(4096, 40), true_codes(known), rows, true)
    assert found["latent_precision"] == pytest.approx(theirs.precision, abs=1e-5)
    assert found["latent_recall"] == pytest.approx(theirs.recall, abs=1e-5)
    assert found["latent_f1"] == pytest.approx(theirs.f1_score, abs=1e-5)
    assert np.allclose(
        correlations(known.samples.codes, known.samples.codes)[:5, :5],
        np.corrcoef(known.samples.codes.toarray().T)[:5, :5],
        atol=1e-5,
    )

    cfg = StandardSAEConfig(d_in=24, d_sae=40, apply_b_dec_to_input=True, metadata=None)  # type: ignore[arg-type]
    stock = SaeLensStandard(cfg)
    stock.load_state_dict({"W_enc": rows.T.contiguous(), "b_enc": sae.b_enc, "W_dec": rows, "b_dec": sae.b_dec})
    with torch.random.fork_rng():
        torch.manual_seed(5)
        whole = eval_sae_on_synthetic_data(
            stock, known.world.model.feature_dict, known.world.model.activation_generator, num_samples=4096
        )
    assert whole.sae_l0 == pytest.approx(found["l0"], rel=0.05) and whole.mcc == pytest.approx(found["mcc"], abs=1e-5)
    assert whole.explained_variance == pytest.approx(found["variance_explained"], abs=0.02)
    assert whole.classification.f1_score == pytest.approx(found["latent_f1"], abs=0.03)


# --- which metric follows the truth --------------------------------------------------------------


def made_rows(seeds: int, methods: int = 6, sparsities: int = 2) -> list[dict[str, Any]]:
    """Methods whose MCC falls with their variance explained at equal L0, though both rise with L0."""
    return [
        {
            "method": f"method_{m}",
            "seed": seed,
            "metrics": {
                "l0": 4.0 * 3**step * (1 + 0.1 * m),
                "variance_explained": 0.5 + 0.1 * step + 0.02 * m,
                "mcc": 0.9 + 0.05 * step - 0.03 * m,
                "latent_f1": 0.8 + 0.01 * m,
                "cosine_similarity": 0.9,
                "top_1_probing": 0.7 + 0.01 * m + 0.001 * seed,
                "fraction_alive": 1.0,
            },
        }
        for seed in range(seeds)
        for m in range(methods)
        for step in range(sparsities)
    ]


def test_ranks_are_compared_at_equal_l0() -> None:
    found = measures.follow(made_rows(3), near=7.0, seed=0)
    assert len(found["methods"]) == 6 and 6 <= found["l0"] <= 12 and found["note"] == ""
    follows = found["correlations"]
    assert follows["variance_explained"]["mcc"]["spearman"] == -1
    assert follows["variance_explained"]["mcc"]["interval"] == [-1, -1]
    assert follows["top_1_probing"]["latent_f1"]["spearman"] == 1
    assert follows["fraction_alive"]["mcc"] == {"note": "constant over methods"}
    one, other = np.random.default_rng(0).normal(size=(2, 4, 7)).round(1)
    theirs = np.mean([spearmanr(a, b)[0] for a, b in zip(one, other, strict=True)])
    assert measures._mean_spearman(one, other) == pytest.approx(theirs)


def test_one_seed_one_sparsity_and_few_methods_are_said() -> None:
    single = measures.follow(made_rows(1), near=7.0, seed=0)
    assert single["note"] == "one seed: no interval"
    assert all("interval" not in values for truths in single["correlations"].values() for values in truths.values())
    points = measures.follow(made_rows(3, sparsities=1), near=7.0, seed=0)
    assert points["correlations"] == {} and "4 are needed" in points["note"] and len(points["left_out"]) >= 4
    assert measures.follow(made_rows(3, methods=3), near=7.0, seed=0)["correlations"] == {}
    assert measures.follow([], near=7.0, seed=0)["l0"] is None


# --- the stage -----------------------------------------------------------------------------------


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
