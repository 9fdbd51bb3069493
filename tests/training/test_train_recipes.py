"""Recipes by themselves: gradients, initialisation, unit rows, dead latents, folding."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from sae_research.config.params import Train
from sae_research.saes import SAEConfig
from sae_research.saes.pursuit.kernels_numba import largest
from sae_research.training import products
from sae_research.training.recipes import RECIPES, Recipe, base
from sae_research.training.schedules import warmup, warmup_then_decay
from tests.helpers.training import CONFIGS, STANDARD, TOP_K, recipe_of, trained

SPARSE = ("relu", "standard", "standard_new", "p_anneal", "top_k", "abs_top_k", "batch_top_k", "matryoshka_batch_top_k")
"""Recipes that work on active latents only where those are few."""
DETERMINISTIC = (
    "relu",
    "standard",
    "standard_new",
    "p_anneal",
    "gated",
    "gated_rajamanoharan",
    "jump_relu",
    "tanh_jump_relu",
    "abs_top_k",
    "matching_pursuit",
)
"""Recipes whose inference form does just what training did."""


def test_every_recipe_has_its_settings():
    assert set(CONFIGS) == set(RECIPES)


def gradients(recipe: Recipe, x: torch.Tensor) -> dict[str, torch.Tensor]:
    recipe.zero_grad()
    recipe.compute(x, 0.5).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in recipe.named_parameters()}


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_path_has_the_gradients_of_dense_autograd(name, planted_rows, monkeypatch):
    rows = planted_rows.double()
    # no schedule may move between the two steps that are compared
    config = {**CONFIGS[name], **({"anneal_start": 0.9} if name == "p_anneal" else {})}
    recipe = recipe_of(RECIPES[name], 16, planted_rows, **config).double()
    recipe.W_enc.data += 1e-6 * torch.randn(64, 16, generator=torch.Generator().manual_seed(0))  # no two latents alike
    if hasattr(recipe, "dead"):  # the auxiliary loss takes part where there is one
        recipe.dead.index_N, recipe.plain_state["refreshed"] = torch.arange(5), 1.0
    chosen = []
    monkeypatch.setattr(base, "decode_at", lambda *args: chosen.append(True) or products.decode_at(*args))
    monkeypatch.setattr(base, "MAX_DENSITY", 1.0)
    by_support = gradients(recipe, rows[:100])
    calls = len(chosen)
    assert calls
    monkeypatch.setattr(base, "MAX_DENSITY", -1.0)
    dense = gradients(recipe, rows[:100])
    assert len(chosen) == calls
    for key, expected in dense.items():
        torch.testing.assert_close(by_support[key], expected, rtol=1e-9, atol=1e-12, msg=key)


def test_sparse_functions_pass_gradcheck():
    generator = torch.Generator().manual_seed(0)
    support = products.fixed_support(torch.stack([torch.randperm(6, generator=generator)[:2] for _ in range(5)]), 6)
    values = torch.randn(10, dtype=torch.float64, generator=generator, requires_grad=True)
    W_dec = torch.randn(6, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, w: products.decode_at(support, v, w), (values, W_dec))


@pytest.mark.parametrize("k", [1, 7, 64, 300])
def test_the_largest_of_a_row_are_those_of_torch(k):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 300, generator=generator)
    for values in (rows, rows.bfloat16().float(), torch.relu(rows - 2), -rows.abs().double()):  # ties, zeros, no positive
        found = largest(values, k)
        assert (found.sort(1).values.diff(dim=1) > 0).all()
        assert torch.equal(values.gather(1, found).sort(1).values, values.topk(k, 1).values.sort(1).values)
    assert largest(torch.full((3, 300), torch.nan), k).shape == (3, k)


def test_a_support_is_torchs_and_so_are_its_products():
    generator = torch.Generator().manual_seed(0)
    values = torch.relu(torch.randn(9, 20, generator=generator) - 1)
    matrix, support = values.to_sparse_csr(), products.support_of(values > 0)
    assert torch.equal(support.crow, matrix.crow_indices()) and torch.equal(support.col, matrix.col_indices())
    other = torch.randn(9, 5, generator=generator)
    torch.testing.assert_close(support.transposed(matrix.values()) @ other, values.T @ other)


def test_the_encoders_product_has_the_gradients_of_plain_autograd():
    generator = torch.Generator().manual_seed(0)
    x, W, b, c = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((7, 3), (5, 3), (5,), (3,)))
    ways = (
        lambda W, b, c: (x - c) @ W.T + b,
        lambda W, b, c: products.encode(x, W, b, c, False),
        lambda W, b, c: products.encode(x, W, b, c, False, known_BF=((x - c) @ W.T + b).detach()),
    )
    found = []
    for way in ways:
        parameters = [tensor.clone().requires_grad_() for tensor in (W, b, c)]
        out = way(*parameters)
        found.append([out, *torch.autograd.grad(out.sin().sum(), parameters)])
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", RECIPES)
def test_bfloat16_products_lose_little(name, planted_rows):
    """One loss in both precisions; sparse recipes compute their active latents in float32 either way."""
    losses = []
    for precision in ("float32", "bfloat16"):
        recipe = recipe_of(RECIPES[name], 16, planted_rows, **CONFIGS[name])
        recipe.train_config = Train(precision=precision)
        output = recipe.compute(planted_rows[:256], 0.5)
        output.loss.backward()
        assert recipe.W_dec.grad.dtype == torch.float32
        losses.append(float(output.loss.detach()))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


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
def test_every_recipe_learns_the_planted_directions(name, planted_rows):
    recipe = trained(recipe_of(RECIPES[name], 16, planted_rows, **CONFIGS[name]), planted_rows)
    sae = recipe.export(1.0, SAEConfig(form=recipe.form, d_in=16, d_sae=64))
    x = planted_rows[None]
    z = sae.encode(x)
    explained = 1 - (x - sae.decode(z)).square().sum() / (x - x.mean((0, 1))).square().sum()
    assert explained > 0.5
    assert 1 < (z != 0).sum(-1).float().mean() < 24


@pytest.mark.parametrize("name", RECIPES)
def test_the_scale_of_training_is_folded_exactly_and_rows_are_unit(name, planted_rows):
    recipe = trained(recipe_of(RECIPES[name], 16, planted_rows, **CONFIGS[name]), planted_rows, steps=20)
    scale = 1 / 137.0
    cfg = SAEConfig(form=recipe.form, d_in=16, d_sae=64)
    ours, scaled = recipe.export(1.0, cfg), recipe.export(scale, cfg)
    z, z_scaled = ours.encode(planted_rows[None]), scaled.encode(planted_rows[None] / scale)
    assert z.any()
    torch.testing.assert_close(z_scaled * scale, z, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(scaled.decode(z_scaled) * scale, ours.decode(z), rtol=1e-3, atol=1e-5)
    assert torch.allclose(scaled.W_dec.norm(dim=1), torch.ones(64), atol=1e-5)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_inference_reconstructs_as_training_did(name, planted_rows):
    recipe = trained(recipe_of(RECIPES[name], 16, planted_rows, **CONFIGS[name]), planted_rows, steps=20)
    output = recipe.compute(planted_rows, 0.9)
    sae = recipe.export(1.0, SAEConfig(form=recipe.form, d_in=16, d_sae=64))
    z = sae.encode(planted_rows[None])
    torch.testing.assert_close(planted_rows - sae.decode(z)[0], output.residual, rtol=1e-3, atol=1e-4)
    if name != "matching_pursuit":  # whose L0 is read off the first tokens
        assert float((z != 0).sum(-1).float().mean()) == pytest.approx(float(output.l0), rel=1e-3)


def test_top_k_at_inference_by_threshold_or_by_rank(planted_rows):
    recipe = trained(recipe_of(RECIPES["top_k"], 16, planted_rows, **TOP_K), planted_rows)
    cfg = SAEConfig(form=recipe.form, d_in=16, d_sae=64)
    by_threshold = recipe.export(1.0, cfg)
    ranked_recipe = recipe_of(RECIPES["top_k"], 16, planted_rows, **TOP_K, inference="top_k")
    ranked_recipe.load_state_dict(recipe.state_dict())
    by_rank = ranked_recipe.export(1.0, cfg)
    assert (by_threshold.cfg.form, by_rank.cfg.form) == ("jumprelu", "topk")
    assert by_threshold.cfg.architecture == by_rank.cfg.architecture == "topk"
    x = planted_rows[None]
    assert ((by_rank.encode(x) != 0).sum(-1) <= 4).all()
    assert float((by_threshold.encode(x) != 0).sum(-1).float().mean()) == pytest.approx(4, rel=0.3)
    # each latent answers for itself: half of the dictionary gives half of the code
    half = type(by_threshold)(
        cfg=cfg.replace(form="jumprelu", d_sae=32),
        W_enc=by_threshold.W_enc[:, :32].clone(),
        b_enc=by_threshold.b_enc[:32],
        W_dec=by_threshold.W_dec[:32],
        b_dec=by_threshold.b_dec,
        threshold=by_threshold.threshold[:32],
    )
    torch.testing.assert_close(half.encode(x), by_threshold.encode(x)[..., :32], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["top_k", "batch_top_k"])
def test_the_threshold_is_what_k_latents_a_token_exceed(name, planted_rows):
    recipe = recipe_of(RECIPES[name], 16, planted_rows, **CONFIGS[name])
    recipe.compute(planted_rows[:64], 0.5)
    with torch.no_grad():
        pre = (planted_rows[:64] - recipe.b_dec) @ recipe.W_enc.T + recipe.b_enc
    assert float(recipe.threshold) == pytest.approx(float(pre.flatten().topk(4 * 64).values.min()), rel=1e-5)
    assert int((pre >= recipe.threshold * (1 - 1e-6)).sum()) == 4 * 64


def test_batch_top_k_keeps_k_a_token_on_average(planted_rows):
    recipe = recipe_of(RECIPES["batch_top_k"], 16, planted_rows, **CONFIGS["batch_top_k"])
    code = recipe.reconstruct(planted_rows[:100])
    assert float(code.l0) == pytest.approx(4)
    counts = recipe.active((planted_rows[:100] - recipe.b_dec) @ recipe.W_enc.T + recipe.b_enc).sum(1)
    assert counts.min() < 4 < counts.max()


def test_pursuit_gradient_is_that_of_the_unrolled_steps():
    from sae_research.training.recipes.matching_pursuit import _Pursue

    generator = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(7, 5, generator=generator, dtype=torch.float64), dim=1)
    x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    atoms = torch.randint(7, (6, 3), generator=generator)
    assert torch.autograd.gradcheck(lambda x, W: _Pursue.apply(x, W, atoms), (x.requires_grad_(), W.requires_grad_()))


def test_hard_concrete_gates(planted_rows):
    """The expected L0 is the mean of sampled ones, and the median gate is open where a random one mostly is."""
    recipe = recipe_of(RECIPES["hard_concrete"], 16, planted_rows, **CONFIGS["hard_concrete"], initial_beta=0.7)
    x = planted_rows[:64]
    with torch.no_grad():
        log_alpha = recipe.log_alpha(x)
        samples = torch.stack([recipe.sample(log_alpha, recipe.draw_noise(len(x))) > 0 for _ in range(400)]).float().mean(0)
        assert float(recipe.expected_l0(log_alpha)) == pytest.approx(float(samples.sum(1).mean()), rel=0.03)
        sae = recipe.export(1.0, SAEConfig(form="hard_concrete", d_in=16, d_sae=64))
        gate_open = sae.encode(x[None])[0] > 0
    magnitude = recipe.magnitudes(x) > 0
    clear = (samples - 0.5).abs() > 0.1
    assert torch.equal(gate_open[clear & magnitude], (samples > 0.5)[clear & magnitude])


def test_gates_that_ignore_the_input_are_the_same_for_every_token(planted_rows):
    config = {**CONFIGS["hard_concrete"], "input_dependent_gates": False}
    recipe = trained(recipe_of(RECIPES["hard_concrete"], 16, planted_rows, **config), planted_rows, steps=20)
    sae = recipe.export(0.5, SAEConfig(form="hard_concrete", d_in=16, d_sae=64))
    assert not sae.W_gate.any() and sae.b_gate.unique().numel() > 1


def test_gates_of_dead_latents_are_drawn_open_and_no_others(planted_rows):
    config = {**CONFIGS["hard_concrete"], "l0_coefficient": 0.3}
    recipe = recipe_of(RECIPES["hard_concrete"], 16, planted_rows, **config)
    with torch.no_grad():
        recipe.b_gate[:5] -= 100 / recipe.log_sharpness.exp()  # closed for good, where a sigmoid has no gradient
        recipe.last_fired_F.fill_(0.5)
    recipe.compute(planted_rows[:128], 0.52).loss.backward()
    assert not recipe.b_gate.grad[:5].any() and float(recipe.last_fired_F[:5].max()) == 0.5
    recipe.zero_grad()
    recipe.compute(planted_rows[:128], 0.56).loss.backward()
    torch.testing.assert_close(recipe.b_gate.grad[:5], -0.3 * recipe.log_sharpness.exp().detach().expand(5))


def test_beta_is_annealed_geometrically_after_the_warm_up(planted_rows):
    config = {**CONFIGS["gated_hard_concrete"], "beta_annealing": True, "initial_beta": 1.0, "final_beta": 0.25}
    recipe = recipe_of(RECIPES["gated_hard_concrete"], 16, planted_rows, **config)
    start = recipe.train_config.warmup_fraction
    for progress, beta in ((0.0, 1.0), (start, 1.0), ((1 + start) / 2, 0.5), (1.0, 0.25)):
        recipe.prepare(progress)
        assert float(recipe.beta) == pytest.approx(beta, rel=1e-5)


def test_p_falls_and_the_penalty_stays_where_it_was(planted_rows):
    config = {**CONFIGS["p_anneal"], "anneal_start": 0.5, "anneal_end": 1.0, "sparsity_updates": 5, "p_end": 0.5}
    recipe = recipe_of(RECIPES["p_anneal"], 16, planted_rows, **config)
    x = planted_rows[:128]
    code = recipe.reconstruct(x)
    for progress in (0.4, 0.45):
        recipe.compute(x, progress)
    assert recipe.plain_state["updates"] == 0 and float(recipe.scale) == 1
    recipe.compute(x, 0.51)
    assert recipe.plain_state["updates"] == 1 and recipe.p_after(1) == pytest.approx(0.9)
    z = code.activations.detach()
    z = z[z > 0]
    assert float(recipe.scale) == pytest.approx(float(z.sum() / z.pow(0.9).sum()), rel=1e-4)


def test_resampling_points_dead_latents_at_badly_reconstructed_tokens(planted_rows):
    config = {**STANDARD, "resample_every": 0.1, "resample_window": 0.05}
    recipe = recipe_of(RECIPES["standard"], 16, planted_rows, **config)
    optimiser = torch.optim.Adam(recipe.parameters(), lr=1e-3)
    output = recipe.compute(planted_rows[:256], 0.05)
    output.loss.backward()
    optimiser.step()
    with torch.no_grad():
        recipe.b_enc[:8] = -100.0
    recipe.last_fired_F.fill_(0.1)
    recipe.last_fired_F[:8] = 0.0
    assert recipe.resampling_due(0.09, 0.1) and not recipe.resampling_due(0.1, 0.12)
    assert not recipe.resampling_due(0.59, 0.61)
    assert recipe.resample(optimiser, planted_rows[:256], output.residual, 0.1) == 8
    assert not recipe.b_enc[:8].any() and not optimiser.state[recipe.W_dec]["exp_avg"][:8].any()
    assert optimiser.state[recipe.W_dec]["exp_avg"][8:].any()
    directions = torch.nn.functional.normalize(planted_rows[:256] - recipe.b_dec, dim=1)
    assert torch.allclose((recipe.W_dec[:8] @ directions.T).amax(1), torch.ones(8), atol=1e-5)
    alive = recipe.W_enc[8:].norm(dim=1).mean()
    assert torch.allclose(recipe.W_enc[:8].norm(dim=1), 0.2 * alive.expand(8), rtol=1e-4)


def test_projected_gradient_is_orthogonal_to_the_rows(planted_rows):
    recipe = recipe_of(RECIPES["top_k"], 16, planted_rows, **TOP_K)
    recipe.compute(planted_rows[:64], 0.5).loss.backward()
    recipe.project_gradient()
    assert (recipe.W_dec.grad * recipe.W_dec).sum(1).abs().max() < 1e-6


def test_auxiliary_loss_revives_dead_latents(planted_rows):
    def alive_after(coefficient: float) -> int:
        recipe = recipe_of(RECIPES["top_k"], 16, planted_rows, **{**TOP_K, "aux_k_coefficient": coefficient})
        with torch.no_grad():
            recipe.W_enc[:32] *= 0.05  # half the latents still respond, but too little to enter a token's top k
        optimiser = torch.optim.Adam(recipe.parameters(), lr=3e-3)
        for step in range(150):
            x = planted_rows[torch.randint(len(planted_rows), (128,), generator=torch.Generator().manual_seed(step))]
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
    recipe.dead.refresh(0.5)
    assert recipe.dead.index_N.tolist() == [3]


def test_schedules_are_fractions_of_the_run():
    assert [warmup(p, 0.1) for p in (0.0, 0.05, 0.1, 0.9)] == [0.0, 0.5, 1.0, 1.0]
    assert warmup(0.0, 0.0) == 1.0
    assert [warmup_then_decay(p, 0.2, 0.5) for p in (0.1, 0.2, 0.5, 0.75, 1.0)] == [0.5, 1.0, 1.0, 0.5, 0.0]
    assert warmup_then_decay(0.5, 1.0, 1.0) == 0.5


def test_jump_relu_starts_with_twice_its_target_active(planted_rows):
    """However far the encoder's scale is from 1: few directions for many latents, whose rows add up."""
    for target in (2.0, 6.0):
        recipe = recipe_of(RECIPES["jump_relu"], 16, planted_rows, recipe="jump_relu", d_sae=256, target_l0=target)
        with torch.no_grad():
            z = recipe._encode(planted_rows)[1]
        assert recipe.W_enc.norm(dim=1).max() < 0.8
        assert float((z > 0).float().sum(1).mean()) == pytest.approx(2 * target, rel=0.25)


def test_jump_relu_recovers_known_directions_as_batch_top_k_does():
    """At the same L0: both spend latents on tokens as they need them."""
    generator = torch.Generator().manual_seed(11)
    truth = torch.nn.functional.normalize(torch.randn(48, 20, generator=generator), dim=1)
    active = torch.rand(4096, 48, generator=generator) < 3 / 48
    rows = ((1 + 0.3 * torch.randn(4096, 48, generator=generator)) * active) @ truth
    rows /= rows.square().sum(1).mean().sqrt()
    found = {}
    for name, sparsity in (("jump_relu", {"target_l0": 3}), ("batch_top_k", {"k": 3})):
        config = {"recipe": name, "d_sae": 48, "learning_rate": 0.006, **sparsity}
        recipe = trained(recipe_of(RECIPES[name], 20, rows, **config), rows, steps=250)
        cosine = (truth @ recipe.W_dec.detach().T).numpy()
        found[name] = cosine[linear_sum_assignment(-cosine)].mean()
        assert float(recipe.compute(rows, 1.0).l0) == pytest.approx(3, rel=0.2)
    assert found["jump_relu"] > 0.75 and found["jump_relu"] > found["batch_top_k"] - 0.05, found
