"""Recipes by themselves: gradients, initialisation, unit rows, dead latents, folding."""

from __future__ import annotations

import pytest
import torch
from training_helpers import STANDARD, TOP_K, recipe_of

from sae_research.saes import SAEConfig
from sae_research.training import sparse
from sae_research.training.recipes import RECIPES, Recipe, base
from sae_research.training.schedules import warmup, warmup_then_decay

CONFIGS = {"standard": STANDARD, "top_k": TOP_K}


def gradients(recipe: Recipe, x: torch.Tensor) -> dict[str, torch.Tensor]:
    recipe.zero_grad()
    recipe.compute(x, 0.5).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in recipe.named_parameters()}


@pytest.mark.parametrize("name", RECIPES)
def test_sparse_path_has_the_gradients_of_dense_autograd(name, planted_rows, monkeypatch):
    rows = planted_rows.double()
    recipe = recipe_of(RECIPES[name], 16, planted_rows, **CONFIGS[name]).double()
    recipe.dead_N = torch.arange(5)  # the auxiliary loss takes part where there is one
    recipe._refreshed = 1.0
    chosen = []
    monkeypatch.setattr(base, "decode_at", lambda *args: chosen.append(True) or sparse.decode_at(*args))
    monkeypatch.setattr(base, "MAX_DENSITY", 1.0)
    by_support = gradients(recipe, rows[:100])
    assert chosen
    monkeypatch.setattr(base, "MAX_DENSITY", -1.0)
    dense = gradients(recipe, rows[:100])
    assert len(chosen) == 1
    for key, expected in dense.items():
        torch.testing.assert_close(by_support[key], expected, rtol=1e-9, atol=1e-12, msg=key)


def test_sparse_functions_pass_gradcheck():
    generator = torch.Generator().manual_seed(0)
    support = sparse.fixed_support(
        torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(5)]), 6
    )
    values = torch.randn(10, dtype=torch.float64, generator=generator, requires_grad=True)
    W_dec = torch.randn(6, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, w: sparse.decode_at(support, v, w), (values, W_dec))


def test_initial_decoder_rows_are_unit_data_rows_and_the_encoder_fits(planted_rows):
    recipe = recipe_of(RECIPES["top_k"], 16, planted_rows, **TOP_K)
    centred = torch.nn.functional.normalize(planted_rows - planted_rows.mean(0), dim=1)
    assert torch.allclose((recipe.W_dec @ centred.T).amax(1), torch.ones(64), atol=1e-5)
    code = recipe.reconstruct(planted_rows)
    shape = (code.x_hat - recipe.b_dec).detach()
    assert float((code.centred * shape).sum() / shape.square().sum()) == pytest.approx(1, abs=1e-4)


def test_more_latents_than_rows_start_apart(planted_rows):
    recipe = recipe_of(RECIPES["top_k"], 16, planted_rows[:40], **{**TOP_K, "d_sae": 100})
    similarity = recipe.W_dec @ recipe.W_dec.T - torch.eye(100)
    assert similarity.max() < 0.9999


@pytest.mark.parametrize("name", RECIPES)
def test_folding_is_exact_and_rows_are_unit(name, planted_rows):
    scale = 1 / 137.0
    recipe = recipe_of(RECIPES[name], 16, planted_rows, **CONFIGS[name])
    torch.nn.init.normal_(recipe.b_enc, std=0.05)
    cfg = SAEConfig(form=recipe.form, d_in=16, d_sae=64, options=recipe.options())
    sae = recipe.export(scale, cfg)
    x = planted_rows[None] / scale
    z = sae.encode(x)
    torch.testing.assert_close(
        sae.decode(z)[0] * scale, recipe.reconstruct(planted_rows).x_hat, rtol=1e-4, atol=1e-5
    )
    assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-6)


def test_projected_gradient_is_orthogonal_to_the_rows(planted_rows):
    recipe = recipe_of(RECIPES["top_k"], 16, planted_rows, **TOP_K)
    recipe.compute(planted_rows[:64], 0.5).loss.backward()
    recipe.project_gradient()
    assert (recipe.W_dec.grad * recipe.W_dec).sum(1).abs().max() < 1e-6


def test_auxiliary_loss_revives_dead_latents(planted_rows):
    def alive_after(coefficient: float) -> int:
        recipe = recipe_of(RECIPES["top_k"], 16, planted_rows, **{**TOP_K, "aux_k_coefficient": coefficient})
        with torch.no_grad():
            recipe.W_enc[:32] *= (
                0.05  # half the latents still respond, but too little to enter a token's top k
            )
        optimiser = torch.optim.Adam(recipe.parameters(), lr=3e-3)
        for step in range(150):
            x = planted_rows[
                torch.randint(len(planted_rows), (128,), generator=torch.Generator().manual_seed(step))
            ]
            optimiser.zero_grad()
            recipe.compute(x, (step + 0.5) / 150).loss.backward()
            recipe.project_gradient()
            optimiser.step()
            recipe.normalise_rows()
        return int((recipe.last_fired_F[:32] > 0.9).sum())

    assert alive_after(0.0) < alive_after(0.5)


def test_a_latent_is_dead_once_silent_for_the_window(planted_rows):
    recipe = recipe_of(RECIPES["top_k"], 16, planted_rows, **TOP_K)
    recipe.last_fired_F.fill_(0.5)
    recipe.last_fired_F[3] = 0.35
    recipe.refresh_dead(0.5)
    assert recipe.dead_N.tolist() == [3]


def test_schedules_are_fractions_of_the_run():
    assert [warmup(p, 0.1) for p in (0.0, 0.05, 0.1, 0.9)] == [0.0, 0.5, 1.0, 1.0]
    assert warmup(0.0, 0.0) == 1.0
    assert [warmup_then_decay(p, 0.2, 0.5) for p in (0.1, 0.2, 0.5, 0.75, 1.0)] == [0.5, 1.0, 1.0, 0.5, 0.0]
    assert warmup_then_decay(0.5, 1.0, 1.0) == 0.5
