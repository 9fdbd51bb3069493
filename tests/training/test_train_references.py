"""Losses and gradients of one step against dictionary_learning and SAELens (tests/fixtures/make_recipes.py)."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from sae_research.saes import SAEConfig
from sae_research.training.recipes import RECIPES, Recipe, StepOutput
from tests.fixtures import make_recipes as fixture
from tests.helpers.training import recipe_of

REFERENCE = json.loads(fixture.FIXTURE.read_text())
L1 = {"l1_coefficient": fixture.L1}
K = {"k": fixture.K, "aux_k_coefficient": fixture.AUX}
CONFIG: dict[str, dict[str, Any]] = {
    "standard": L1,
    "standard_new": L1,
    "gated_rajamanoharan": L1,
    "p_anneal": L1,
    "top_k": K,
    "batch_top_k": K,
    "matryoshka_batch_top_k": {**K, "group_fractions": fixture.GROUPS},
    "abs_top_k": {"k": fixture.K, "aux_k_coefficient": 0.0},
    "tanh_jump_relu": {},
    "jump_relu": {"target_l0": fixture.TARGET_L0, "bandwidth": fixture.BANDWIDTH},
}


def one_step(name: str, **config: Any) -> tuple[Recipe, dict[str, float]]:
    """Our recipe with the fixture's weights on its batch, halfway through a run."""
    recipe = recipe_of(RECIPES[name], fixture.D, fixture.batch(), recipe=name, d_sae=fixture.F, **CONFIG[name], **config)
    with torch.no_grad():
        for key, value in fixture.weights().items():
            if hasattr(recipe, key):
                getattr(recipe, key).copy_(value)
    recipe.last_fired_F.fill_(0.5)
    recipe.last_fired_F[list(fixture.DEAD)] = 0.0
    if name.endswith("top_k"):  # the references count latents that fire on this batch as alive; we look before a batch
        with torch.no_grad():
            recipe.last_fired_F[recipe.reconstruct(fixture.batch()).fired] = 0.5
    output = recipe.compute(fixture.batch(), 0.5)
    output.loss.backward()
    gradients = {key: parameter.grad for key, parameter in recipe.named_parameters() if parameter.grad is not None}
    return recipe, fixture.summary(output.loss, gradients)


def assert_equal(ours: dict[str, float], theirs: dict[str, float]) -> None:
    for key, value in theirs.items():
        assert ours[key] == pytest.approx(value, rel=2e-5, abs=2e-6), key


@pytest.mark.parametrize("name", ["standard", "standard_new", "gated_rajamanoharan", "top_k", "batch_top_k"])
def test_loss_and_gradients_equal_dictionary_learning(name: str) -> None:
    _, ours = one_step(name)
    theirs = dict(REFERENCE["dictionary_learning"][name])
    if "top_k" in name:  # our auxiliary loss leaves b_dec alone; without dead latents it is compared with SAELens below
        theirs.pop("b_dec")
    assert_equal(ours, theirs)


def test_p_anneal_equals_dictionary_learning_at_the_same_p(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RECIPES["p_anneal"], "p_after", lambda self, updates: fixture.P)
    _, ours = one_step("p_anneal", anneal_start=0.9, anneal_end=1.0)
    assert_equal(ours, REFERENCE["dictionary_learning"]["p_anneal"])


def test_matryoshka_without_auxiliary_loss_is_n_times_dictionary_learning() -> None:
    """Its mean of already weighted losses is n times smaller; the auxiliary part, computed apart, is the same."""
    recipe, ours = one_step("matryoshka_batch_top_k")
    theirs = REFERENCE["dictionary_learning"]["matryoshka_batch_top_k"]
    code = recipe.reconstruct(fixture.batch())
    aux = fixture.AUX * recipe.dead.auxiliary_loss(code.centred, (fixture.batch() - code.x_hat).detach()).item()
    n = len(fixture.GROUPS)
    assert ours["loss"] - aux == pytest.approx(n * (theirs["loss"] - aux), rel=1e-5)


def test_jump_relu_equals_dictionary_learning_where_the_threshold_is_not_concerned() -> None:
    """dictionary_learning takes the step's estimate of what the jump left: on the upper half of the window, and on all its
    zeros where the window reaches them. Weights are not touched by it."""
    recipe, _ = one_step("jump_relu")
    recipe.zero_grad()
    with torch.no_grad():
        recipe.threshold.fill_(fixture.THRESHOLD)
    output = recipe.compute(fixture.batch(), 0.5)
    output.loss.backward()
    ours = fixture.summary(output.loss, {key: getattr(recipe, key).grad for key in ("W_enc", "W_dec", "b_enc", "b_dec")})
    assert_equal(ours, REFERENCE["dictionary_learning"]["jump_relu"])


def test_loss_and_gradients_equal_sae_lens_where_it_has_the_same_loss() -> None:
    _, ours = one_step("standard_new")
    assert_equal(ours, REFERENCE["sae_lens"]["standard_new"])
    recipe = recipe_of(RECIPES["top_k"], fixture.D, fixture.batch(), recipe="top_k", d_sae=fixture.F, **K)
    with torch.no_grad():
        for key, value in fixture.weights().items():
            if hasattr(recipe, key):
                getattr(recipe, key).copy_(value)
    recipe.last_fired_F.fill_(0.5)  # nobody is dead: SAELens' auxiliary loss is another
    output = recipe.compute(fixture.batch(), 0.5)
    output.loss.backward()
    assert_equal(
        fixture.summary(output.loss, {k: p.grad for k, p in recipe.named_parameters()}), REFERENCE["sae_lens"]["top_k"]
    )


WINDOWS = pytest.mark.parametrize("threshold", [fixture.THRESHOLD, 0.3 * fixture.BANDWIDTH, 0.0])
"""Windows that lie above zero, that reach below it, and that lie half below."""


def jump_relu_step(threshold: float) -> tuple[Recipe, StepOutput]:
    """The fixture's step with one threshold for all latents, after its backward pass."""
    recipe, _ = one_step("jump_relu")
    recipe.zero_grad()
    with torch.no_grad():
        recipe.threshold.fill_(threshold)
    output = recipe.compute(fixture.batch(), 0.5)
    output.loss.backward()
    return recipe, output


@WINDOWS
def test_jump_relu_has_the_gradients_of_sae_lens(threshold: float) -> None:
    """Theirs charges L0 linearly: its coefficient is the slope of our square at this batch's L0."""
    from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    recipe, output = jump_relu_step(threshold)
    slope = 2 * (float(output.l0) / fixture.TARGET_L0 - 1) / fixture.TARGET_L0
    theirs = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            d_in=fixture.D,
            d_sae=fixture.F,
            jumprelu_init_threshold=threshold,
            jumprelu_bandwidth=fixture.BANDWIDTH,
            apply_b_dec_to_input=False,
        )
    )
    w = fixture.weights()
    theirs.load_state_dict(
        {
            "W_enc": w["W_enc"].T,
            "b_enc": w["b_enc"],
            "W_dec": w["W_dec"],
            "b_dec": w["b_dec"],
            "threshold": theirs.threshold.detach(),
        }
    )
    theirs.training_forward_pass(TrainStepInput(fixture.batch(), {"l0": slope}, None, 500, False)).loss.backward()
    for name, parameter in recipe.named_parameters():
        expected = getattr(theirs, name).grad.T if name == "W_enc" else getattr(theirs, name).grad
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6, msg=name)


def test_tanh_jump_relu_has_the_gradients_of_sae_lens() -> None:
    """Theirs computes in the source's units: activations, biases and thresholds are sqrt(d_in) times ours, its loss d_in
    times. All latents count as dead there, so that its last term looks at each."""
    from sae_lens import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    unit, threshold, w = fixture.D**0.5, 0.3, fixture.weights()
    settings = {"sparsity_coefficient": 0.8, "pre_activation_coefficient": 0.02, "bandwidth": 2.0, "tanh_scale": 0.7}
    recipe, _ = one_step("tanh_jump_relu", initial_threshold=threshold, **settings)
    theirs = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            d_in=fixture.D,
            d_sae=fixture.F,
            jumprelu_init_threshold=threshold,
            jumprelu_bandwidth=settings["bandwidth"],
            jumprelu_sparsity_loss_mode="tanh",
            jumprelu_tanh_scale=settings["tanh_scale"],
            jumprelu_ste_to_input=True,
            pre_act_loss_coefficient=settings["pre_activation_coefficient"],
            apply_b_dec_to_input=False,
        )
    )
    given = {"W_enc": w["W_enc"].T, "b_enc": w["b_enc"] * unit, "W_dec": w["W_dec"], "b_dec": w["b_dec"] * unit}
    theirs.load_state_dict(given | {"threshold": theirs.threshold.detach()})
    dead, half = torch.ones(fixture.F, dtype=torch.bool), settings["sparsity_coefficient"] / 2
    step = TrainStepInput(fixture.batch() * unit, {"l0": half}, dead, 500, False)
    theirs.training_forward_pass(step).loss.backward()
    recipe.project_gradient()
    projected = theirs.W_dec.grad - (theirs.W_dec.grad * w["W_dec"]).sum(1, keepdim=True) * w["W_dec"]
    expected = {
        "W_enc": theirs.W_enc.grad.T / fixture.D,
        "b_enc": theirs.b_enc.grad / unit,
        "W_dec": projected / fixture.D,
        "b_dec": theirs.b_dec.grad / unit,
        "log_threshold": theirs.threshold.grad * threshold / fixture.D,
    }
    for name, parameter in recipe.named_parameters():
        assert expected[name].abs().max() > 1e-6, name
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_abs_top_k_is_the_plain_loss_of_the_k_largest_of_either_sign() -> None:
    recipe, _ = one_step("abs_top_k")
    w = {name: value.clone().requires_grad_() for name, value in fixture.weights().items()}
    x = fixture.batch()
    pre = (x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]
    kept = torch.zeros_like(pre, dtype=torch.bool)
    for row, values in enumerate(pre.detach()):
        for place in sorted(range(fixture.F), key=lambda i: -abs(float(values[i])))[: fixture.K]:
            kept[row, place] = True
    z = pre * kept
    assert (z < 0).any() and (z > 0).any()
    (x - z @ w["W_dec"] - w["b_dec"]).square().sum().div(len(x)).backward()
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(recipe, name).grad, w[name].grad, rtol=1e-4, atol=1e-6, msg=name)
    sae = recipe.export(1.0, SAEConfig(recipe.form, fixture.D, fixture.F))
    torch.testing.assert_close(sae.encode(x[None])[0], z.detach(), rtol=1e-4, atol=1e-6)


@WINDOWS
def test_threshold_gradients_follow_the_paper(threshold: float) -> None:
    """Equations 11 and 12 of arXiv 2407.14435, written out."""
    recipe, output = jump_relu_step(threshold)
    with torch.no_grad():
        x, epsilon = fixture.batch(), fixture.BANDWIDTH
        pre = x @ recipe.W_enc.T + recipe.b_enc
        window = ((pre - threshold).abs() < epsilon / 2).float()
        d_reconstruction = -2 * output.residual @ recipe.W_dec.T / len(x)
        l0 = (pre > threshold).sum() / len(x)
        d_l0 = 2 * (l0 / fixture.TARGET_L0 - 1) / fixture.TARGET_L0 / len(x)
        want = (-(threshold / epsilon) * d_reconstruction * window - d_l0 / epsilon * window).sum(0)
    assert torch.allclose(recipe.threshold.grad, want, rtol=1e-4, atol=1e-6)


def test_pre_activations_far_below_zero_leave_thresholds_alone() -> None:
    """However wide the window is: they are no zeros inside it."""
    recipe, _ = one_step("jump_relu")
    recipe.zero_grad()
    with torch.no_grad():
        recipe.threshold.fill_(0.1 * fixture.BANDWIDTH)
        recipe.b_enc.fill_(-100.0)
    output = recipe.compute(fixture.batch(), 0.5)
    output.loss.backward()
    assert float(output.l0) == 0 and output.loss > 0
    assert not recipe.threshold.grad.any()
