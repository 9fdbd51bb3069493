"""Adam's betas, the schedule of the learning rate and the decoder's start, against loops that are written out."""

from __future__ import annotations

import math

import pytest
import torch

from sae_research.config.params import Train, check_params
from sae_research.runtime.errors import UserError
from sae_research.training.buffer import StreamBatch
from sae_research.training.recipes import RECIPES
from sae_research.training.schedules import warmup_then_decay
from sae_research.training.stack import Stack
from sae_research.training.training_sae import new_training_sae, start, train_step
from tests.helpers.training import TOP_K, recipe_of

STEPS = 12
NEW = {"recipe": "standard_new", "d_sae": 48, "l1_coefficient": 0.05, "learning_rate": 0.003}


def batches(rows: torch.Tensor) -> list[StreamBatch]:
    generator = torch.Generator().manual_seed(3)
    return [
        StreamBatch(rows[torch.randint(len(rows), (64,), generator=generator)], (step + 0.5) / STEPS)
        for step in range(STEPS)
    ]


def test_a_cosine_is_that_of_torch() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    optimiser = torch.optim.SGD([weight], lr=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=20, eta_min=0.1)
    for step in range(21):
        assert warmup_then_decay(step / 20, 0.0, 1.0, "cosine", 0.1) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        optimiser.step()
        schedule.step()
    assert [warmup_then_decay(p, 0.2, 0.5, "constant") for p in (0.1, 0.2, 1.0)] == [0.5, 1.0, 1.0]
    assert [warmup_then_decay(p, 0.2, 0.5, "linear", 0.2) for p in (0.1, 0.5, 0.75, 1.0)] == pytest.approx(
        [0.5, 1.0, 0.6, 0.2]
    )


def test_betas_and_cosine_give_the_steps_of_a_plain_loop(planted_rows: torch.Tensor) -> None:
    """The loss of `standard_new`, Adam of Kingma and Ba (2015) and the learning rate, each written out."""
    rows = planted_rows.double()
    config = {**NEW, "betas": [0.5, 0.9], "lr_schedule": "cosine", "min_lr_factor": 0.25}
    train = Train(saes={"sae": config}, precision="float32", warmup_fraction=0.25, decay_fraction=0.75)
    sae = new_training_sae("sae", train, rows.shape[1])
    sae.recipe.double()
    start(sae, rows, 0)
    own = {name: tensor.detach().clone().requires_grad_() for name, tensor in sae.recipe.named_parameters()}
    moments = {name: (torch.zeros_like(tensor), torch.zeros_like(tensor)) for name, tensor in own.items()}
    for step, batch in enumerate(batches(rows), start=1):
        train_step(sae, batch)
        done, x = batch.progress, batch.acts
        z = torch.relu((x - own["b_dec"]) @ own["W_enc"].T + own["b_enc"])
        error = (x - z @ own["W_dec"] - own["b_dec"]).square().sum(1).mean()
        penalty = (z * own["W_dec"].norm(dim=1)).sum(1).mean() * 0.05 * min(1.0, done / 0.1)
        gradients = dict(zip(own, torch.autograd.grad(error + penalty, list(own.values())), strict=True))
        norm = sum(gradient.square().sum() for gradient in gradients.values()) ** 0.5
        rate = 0.003 * (done / 0.25 if done < 0.25 else 0.25 + 0.75 * (1 + math.cos(math.pi * (done - 0.25) / 0.75)) / 2)
        for name, tensor in own.items():
            gradient = gradients[name] * min(1.0, 1.0 / (float(norm) + 1e-6))
            first, second = moments[name]
            first.mul_(0.5).add_(0.5 * gradient)
            second.mul_(0.9).add_(0.1 * gradient.square())
            with torch.no_grad():
                tensor -= rate * (first / (1 - 0.5**step)) / ((second / (1 - 0.9**step)).sqrt() + 1e-8)
    for name, parameter in sae.recipe.named_parameters():
        torch.testing.assert_close(parameter.detach(), own[name].detach(), rtol=1e-6, atol=1e-9)


def test_a_stack_keeps_the_betas_and_schedule_of_each(planted_rows: torch.Tensor) -> None:
    rows = planted_rows.double()
    own = [{}, {"betas": [0.0, 0.99]}, {"lr_schedule": "cosine"}, {"lr_schedule": "constant", "betas": [0.5, 0.9]}]
    train = Train(saes={f"s{i}": {**NEW, **one} for i, one in enumerate(own)}, precision="float32", decay_fraction=0.6)

    def fresh() -> list:
        saes = [new_training_sae(name, train, rows.shape[1]) for name in train.saes]
        for i, sae in enumerate(saes):
            sae.recipe.double()
            start(sae, rows, i)
            with torch.no_grad():  # no pre-activation right at the limit that was read off these rows
                sae.recipe.b_enc += 1e-4 * torch.randn(48, generator=torch.Generator().manual_seed(i))
        return saes

    alone, together = fresh(), fresh()
    stack = Stack(together)
    for batch in batches(rows):
        for sae in alone:
            train_step(sae, batch)
        stack.step(batch)
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.recipe.W_dec, other.recipe.W_dec, rtol=1e-7, atol=1e-9)


def test_layers_of_a_cross_layer_transcoder_start_orthogonal(planted_rows: torch.Tensor) -> None:
    hooks = {"hook_names": ["a", "b"], "hook_outs": ["c", "d"]}
    config = {"recipe": "cross_layer", "d_sae": 12, "sparsity_coefficient": 1.0, "init": "orthogonal", **hooks}
    found = recipe_of(RECIPES["cross_layer"], 16, planted_rows.repeat(1, 2), **config)
    for layer in range(2):
        own = found.decoder_of(layer)[found.latents(layer)]
        torch.testing.assert_close(own @ own.T, torch.eye(6), rtol=0, atol=1e-5)


def test_orthogonal_rows_and_their_norm(planted_rows: torch.Tensor) -> None:
    """More latents than dimensions: columns of one length at right angles, up to the rows' unit norm; else the rows are."""
    few = recipe_of(RECIPES["top_k"], 16, planted_rows, **{**TOP_K, "d_sae": 12, "init": "orthogonal"})
    torch.testing.assert_close(few.W_dec @ few.W_dec.T, torch.eye(12), rtol=0, atol=1e-5)
    many = recipe_of(RECIPES["standard_new"], 16, planted_rows, **{**NEW, "init": "orthogonal", "init_norm": 0.1})
    draws = torch.randn(48, 16, generator=torch.Generator().manual_seed(0)).double()
    columns: list[torch.Tensor] = []
    for column in draws.T:  # Gram and Schmidt
        for other in columns:
            column = column - (column @ other) * other
        columns.append(column / column.norm())
    rows = torch.stack(columns, dim=1)
    expected = 0.1 * rows / rows.norm(dim=1, keepdim=True)
    signs = (many.W_dec.double() * expected).sum(0).sign()  # a decomposition leaves each column's sign open
    torch.testing.assert_close(many.W_dec.double(), expected * signs, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"betas": [0.9]}, "betas"),
        ({"betas": [0.9, 1.0]}, "betas"),
        ({"lr_schedule": "step"}, "lr_schedule"),
        ({"lr_schedule": "constant", "min_lr_factor": 0.1}, "learning rate that falls"),
        ({"init_norm": 0.1}, "top_k starts from decoder rows of norm 1"),
    ],
)
def test_wrong_settings_are_one_line(own: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_params({"train": {"saes": {"sae": {**TOP_K, **own}}}}, "params.yaml")
