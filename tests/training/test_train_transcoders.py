"""Transcoders in training: losses and gradients against SAEs' and plain autograd, export to the model's units, stacks, a run
beside SAEs, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from sae_research.config.params import Params, Train
from sae_research.config.recipes import TrainedSAE
from sae_research.lm import load_language_model
from sae_research.runtime.errors import UserError
from sae_research.saes import SAEConfig, load_sae
from sae_research.training import stack, stage
from sae_research.training.buffer import StreamBatch
from sae_research.training.recipes import RECIPES
from sae_research.training.stack import Stack, in_stacks
from sae_research.training.training_sae import new_training_sae, start, train_step
from tests.helpers.training import CONFIGS, STANDARD, TOP_K, recipe_of, train_with_a_stop

READ, WRITTEN = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out"
NAMES = [name for name in CONFIGS if name != "matching_pursuit"]
EXACT = [name for name in NAMES if name not in ("batch_top_k", "matryoshka_batch_top_k")]
"""Recipes whose inference form does what training did, where gates are not random."""


def settings(name: str, **changes: Any) -> dict[str, Any]:
    ranked = {"inference": "top_k"} if name == "top_k" else {}
    return {**CONFIGS[name], **ranked, "hook_name": READ, "hook_out": WRITTEN, **changes}


@pytest.fixture
def pairs(planted_rows: Tensor) -> Tensor:
    """Rows [2048, 32]: what is read, and beside it a nonlinear function of it."""
    g = torch.Generator().manual_seed(3)
    written = torch.relu(planted_rows @ torch.randn(16, 40, generator=g) - 0.2) @ torch.randn(40, 16, generator=g)
    return torch.cat([planted_rows, written / written.square().sum(1).mean().sqrt()], dim=1)


def step(recipe: Any, x: Tensor) -> tuple[Any, dict[str, Tensor]]:
    noise = None if recipe.draw_noise(1) is None else torch.zeros(len(x), recipe.config.d_sae)
    recipe.zero_grad()
    output = recipe.forward(x, 0.5, noise)
    output.loss.backward()
    return output, {name: own.grad for name, own in recipe.named_parameters() if own.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_from_a_hook_to_itself_it_is_the_sae(name: str, planted_rows: Tensor) -> None:
    """With equal halves and parameters every recipe has loss and gradients of its SAE that does not subtract b_dec."""
    plain = recipe_of(RECIPES[name], 16, planted_rows, **CONFIGS[name])
    plain.reads_b_dec = False
    both = recipe_of(RECIPES[name], 16, planted_rows.repeat(1, 2), **settings(name))
    both.load_state_dict(plain.state_dict())
    x = planted_rows[:128]
    expected, gradients = step(plain, x)
    output, found = step(both, x.repeat(1, 2))
    assert torch.equal(output.loss, expected.loss) and torch.equal(output.residual, expected.residual)
    assert found.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(found[key], gradient)


@pytest.mark.parametrize("init", ["data_rows", "random"])
@pytest.mark.parametrize("name", ["standard", "top_k"])
def test_gradients_are_those_of_plain_autograd(name: str, init: str, pairs: Tensor) -> None:
    recipe = recipe_of(RECIPES[name], 16, pairs, **settings(name, skip=True, init=init)).double()
    g = torch.Generator().manual_seed(1)
    recipe.W_skip.data.normal_(generator=g).div_(10)
    recipe.W_enc.data += 1e-6 * torch.randn(64, 16, generator=g)  # no two latents alike
    x = pairs[:100].double()
    output, found = step(recipe, x)
    own = {key: value.detach().clone().requires_grad_() for key, value in recipe.named_parameters()}
    pre = x[:, :16] @ own["W_enc"].T + own["b_enc"]
    z = torch.relu(pre)
    if name == "top_k":
        z = torch.zeros_like(z).scatter(1, z.topk(4).indices, z.topk(4).values)
    residual = x[:, 16:] - (z @ own["W_dec"] + own["b_dec"] + x[:, :16] @ own["W_skip"].T)
    loss = residual.square().sum(1).mean() + (recipe.penalty(0.5) * z.sum(1).mean() if name == "standard" else 0)
    loss.backward()
    assert float(output.loss.detach()) == pytest.approx(float(loss.detach()))
    torch.testing.assert_close(output.residual, residual.detach())
    assert set(found) == set(own)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, own[key].grad, msg=key)


@pytest.mark.parametrize("name", EXACT)
@torch.no_grad()
def test_what_comes_out_reads_and_writes_the_models_own_units(name: str, pairs: Tensor) -> None:
    recipe = recipe_of(RECIPES[name], 16, pairs, **settings(name, skip=True))
    recipe.W_skip.normal_(generator=torch.Generator().manual_seed(1)).div_(10)
    read_scale, scale, batch = 0.25, 3.0, pairs[:50]
    noise = None if recipe.draw_noise(1) is None else torch.zeros(50, 64)  # then gates stand at their median
    expected = (batch[:, 16:] - recipe.forward(batch, 0.5, noise).residual) / scale
    cfg = SAEConfig(recipe.form, 16, 64, hook_name=READ, hook_out=WRITTEN, apply_b_dec_to_input=False)
    sae = recipe.export(scale, cfg, read_scale)
    found = sae.reconstruct((batch[:, :16] / read_scale)[None])[0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (sae.cfg.hook_name, sae.cfg.hook_out, sae.cfg.apply_b_dec_to_input) == (READ, WRITTEN, False)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))


@pytest.mark.parametrize(
    "name", ["standard", "top_k", *(pytest.param(n, marks=pytest.mark.slow) for n in ("jump_relu", "gated"))]
)
def test_a_skip_helps_and_training_explains_more(name: str, pairs: Tensor) -> None:
    explained = {}
    for skip in (None, True):
        member = new_training_sae("one", Train(saes={"one": settings(name, skip=skip)}, precision="float32"), 16)
        start(member, pairs, 0)
        g = torch.Generator().manual_seed(1)
        for number in range(150):
            batch = StreamBatch(pairs[torch.randint(len(pairs), (128,), generator=g)], (number + 0.5) / 150)
            output = train_step(member, batch)
            left = output.residual.square().sum() / (batch.acts[:, 16:] - batch.acts[:, 16:].mean(0)).square().sum()
            explained.setdefault(skip, []).append(1 - float(left))
    assert explained[None][-1] > explained[None][0] and explained[True][-1] > explained[None][-1] > 0.1


@pytest.mark.parametrize("name", ["standard", "top_k", "jump_relu", "gated_hard_concrete"])
def test_a_stack_takes_the_steps_its_transcoders_would(name: str, pairs: Tensor, monkeypatch: Any) -> None:
    monkeypatch.setattr(stack, "STACKED_ON", ("cpu",))
    train = Train(
        saes={str(seed): settings(name, skip=True, seed=seed) for seed in range(3)}, precision="float32", batch_size=64
    )
    rows = pairs.double()
    alone, together = ([new_training_sae(one, train, 16) for one in train.saes] for _ in range(2))
    for saes in (alone, together):
        for number, sae in enumerate(saes):
            sae.recipe.double()
            start(sae, rows, number)
            with torch.no_grad():  # no pre-activation right at a limit that was read off these rows, no two latents alike
                for parameter in sae.recipe.parameters():
                    parameter += 1e-4 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                sae.recipe.normalise_rows()
    (group,) = in_stacks(together, train)
    stacked = Stack(group)
    for number in range(6):
        batch = StreamBatch(rows[64 * number : 64 * (number + 1)], (number + 0.5) / 6)
        losses = [train_step(sae, batch).loss.detach() for sae in alone]
        for ours, theirs in zip(stacked.step(batch), losses, strict=True):
            torch.testing.assert_close(ours.loss, theirs, rtol=1e-7, atol=0)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.recipe.W_skip, other.recipe.W_skip, rtol=1e-5, atol=1e-7)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_of_both_kinds(make_params: Callable[..., Params], tmp_path: Path) -> None:
    mixed = {"standard": STANDARD, "one": {**TOP_K, **settings("top_k", skip=True)}, "other": settings("standard")}
    params = make_params(saes=mixed, tokens=4096)
    report = stage.train(params, tmp_path / "mixed")
    stage.train(make_params(saes={"standard": STANDARD}, tokens=4096), tmp_path / "alone")
    found, alone = files(tmp_path / "mixed"), files(tmp_path / "alone")
    for name in ("standard/sae_weights.safetensors", "standard/cfg.json", "standard/eval_results.json"):
        assert found[name] == alone[name], "an SAE's companions change nothing of it"
    lm = load_language_model(params.model.name, "cpu")
    tokens = torch.randint(10, 300, (4, 32), generator=torch.Generator().manual_seed(0))
    acts = lm.activations_at(tokens, [READ, WRITTEN])
    for name, skip in (("one", True), ("other", False)):
        sae = load_sae(tmp_path / "mixed" / name)
        assert (sae.cfg.hook_name, sae.cfg.hook_out, sae.W_skip is not None) == (READ, WRITTEN, skip)
        results = json.loads(found[f"{name}/eval_results.json"])
        assert results["variance_explained"] > 0.1 and results["loss_recovered"] > 0
        assert (results["hook_name"], results["hook_out"]) == (READ, WRITTEN)
        x, y = acts[READ][:, 1:], acts[WRITTEN][:, 1:]
        left = (y - sae.reconstruct(x)).square().sum() / (y - y.mean((0, 1))).square().sum()
        assert 1 - float(left) > 0, "it explains the model's own units"
    assert set(report["hooks"]) == {"blocks.1.hook_resid_post", f"{READ} -> {WRITTEN}"}


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    make_params: Callable[..., Params], tmp_path: Path, monkeypatch: Any
) -> None:
    params = make_params(saes={"one": settings("top_k", skip=True)}, checkpoint_steps=20)
    stage.train(params, tmp_path / "whole")
    train_with_a_stop(params, tmp_path, 50, monkeypatch)
    assert files(tmp_path / "whole") == files(tmp_path / "rest")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({**CONFIGS["matching_pursuit"], "hook_out": WRITTEN}, "it takes no hook_out"),
        ({**TOP_K, "skip": True}, "say which hook it writes"),
        ({**STANDARD, "hook_out": WRITTEN, "resample_every": 0.1}, "resample_every belongs to SAEs"),
    ],
)
def test_settings_that_mean_nothing(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        TypeAdapter(TrainedSAE).validate_python(changes)


@pytest.mark.parametrize(
    ("hooks", "match"),
    [
        ((READ, "blocks.2.hook_mlp_out"), "hook_out: it reads .* belong to one layer"),
        ((WRITTEN, READ), "hook_out: it reads .* are the two exchanged"),
        ((READ, "blocks.1.hook_mlp"), "train.saes.one: unknown hook"),
    ],
)
def test_hooks_that_do_not_belong_together(
    hooks: tuple[str, str], match: str, make_params: Callable[..., Params], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=match):
        stage.train(make_params(saes={"one": {**TOP_K, "hook_name": hooks[0], "hook_out": hooks[1]}}), tmp_path / "out")
