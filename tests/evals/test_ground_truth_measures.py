"""Measures of known features: values that can be worked out, agreement with SAELens, ranks at equal L0."""

from __future__ import annotations

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
from scipy.stats import spearmanr

from sae_research.evals.ground_truth import data, measures
from sae_research.evals.ground_truth.measures import correlations, flags, measure
from sae_research.saes import SAEConfig, encode_each
from sae_research.saes.forms import StandardSAE
from tests.helpers.ground_truth import coded, measured, true_codes, truth


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))


def test_true_dictionary_and_true_codes_score_one() -> None:
    known = truth()
    found = measured(known, known.world.features, true_codes(known))
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
    found = measured(known, rows, z)
    for key in ("mcc", "mcc_activations", "f1", "latent_f1", "uniqueness", "top_1_probing", "variance_explained"):
        assert found[key] == pytest.approx(1, abs=1e-5), key
    assert found["absorption"] == 0


def test_duplicated_dictionary() -> None:
    known = truth()
    rows, z = known.world.features, true_codes(known)
    found = measured(known, torch.cat([rows, rows]), torch.cat([z, z], 1) / 2)
    assert found["mcc"] == pytest.approx(1) and found["f1"] == pytest.approx(1)
    assert found["uniqueness"] == found["fraction_duplicate"] == 0.5 and found["split_latents"] == 2


def test_half_of_the_dictionary_is_flagged_and_scores_half() -> None:
    known = truth()
    rows, z = known.world.features[::2], true_codes(known)[:, ::2]
    found = measured(known, rows, z)
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
    assert measured(known, known.world.features, z)["absorption"] == 1


def test_latents_that_say_nothing() -> None:
    known = truth()
    silent = measured(known, known.world.features, torch.zeros(2048, 48))
    assert silent["f1"] == silent["mcc_activations"] == silent["l0"] == 0 and silent["top_1_probing"] == 0.5
    assert "no latent fires" in flags(coded(known.world.features, known.world.bias), silent, known)
    noise = (torch.rand(2048, 48, generator=torch.Generator().manual_seed(1)) < 0.1).float()
    found = measured(known, known.world.features, noise)
    assert found["top_1_probing"] == pytest.approx(0.5, abs=0.05) and found["f1"] < 0.2
    dense = measured(known, known.world.features, torch.ones(2048, 48))
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
