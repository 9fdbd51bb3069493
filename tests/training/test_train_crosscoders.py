"""Crosscoders in training: losses and gradients against plain loops over hooks, decoder-norm ratios, export to the model's
units, stacks, a run beside SAEs, and what is refused."""

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
from sae_research.config.recipes import TrainedSAE, hooks_at
from sae_research.lm import load_language_model
from sae_research.runtime.errors import UserError
from sae_research.saes import SAEConfig, load_sae
from sae_research.saes.crosscoders import decoder_norm_ratios
from sae_research.saes.forms import LinearSAE
from sae_research.training import evaluation, stack, stage
from sae_research.training.buffer import StreamBatch
from sae_research.training.evaluation import HeldOut, held_out_table
from sae_research.training.recipes import RECIPES
from sae_research.training.stack import Stack, in_stacks
from sae_research.training.training_sae import TrainingSAE, new_training_sae, start, train_step
from tests.helpers.training import CONFIGS, STANDARD, TOP_K, recipe_of, train_with_a_stop

A, B, C = "blocks.0.hook_resid_post", "blocks.1.hook_resid_post", "blocks.2.hook_resid_post"
NAMES = ["standard_new", "batch_top_k"]
D, F = 16, 64


def settings(name: str, hooks: int = 2, **changes: Any) -> dict[str, Any]:
    return {**CONFIGS[name], "hook_names": [A, B, C][:hooks], **changes}


@pytest.fixture
def sides(planted_rows: Tensor) -> Tensor:
    """Rows [2048, 48] of three hooks: one, a nonlinear function of it, and one that shares half of its dimensions."""
    g = torch.Generator().manual_seed(3)
    other = torch.relu(planted_rows @ torch.randn(D, 40, generator=g) - 0.2) @ torch.randn(40, D, generator=g)
    third = torch.cat([planted_rows[:, :8], planted_rows[:, 8:].flip(0)], dim=1)
    return torch.cat([side / side.square().sum(1).mean().sqrt() for side in (planted_rows, other, third)], dim=1)


def member_of(name: str, rows: Tensor, hooks: int, **changes: Any) -> TrainingSAE:
    """An initialised crosscoder in double precision, no two of whose latents are alike."""
    train = Train(saes={"one": settings(name, hooks, **changes)}, precision="float32", batch_size=64)
    member = new_training_sae("one", train, hooks * D)
    start(member, rows, 0)
    member.recipe.double()
    with torch.no_grad():
        g = torch.Generator().manual_seed(1)
        for parameter in member.recipe.parameters():
            parameter += 1e-3 * torch.randn(parameter.shape, generator=g)
        if member.recipe.unit_rows:
            member.recipe.normalise_rows()
    return member


def plain_loss(name: str, recipe: Any, own: dict[str, Tensor], x: Tensor, hooks: int, progress: float) -> Tensor:
    """The papers' formulas, hook by hook and latent by latent, with the encoder's weights of each hook apart."""
    inside = [x[:, D * h : D * (h + 1)] for h in range(hooks)]
    W_enc, W_dec = ([own[key][:, D * h : D * (h + 1)] for h in range(hooks)] for key in ("W_enc", "W_dec"))
    b_dec = [own["b_dec"][D * h : D * (h + 1)] for h in range(hooks)]
    pre = own["b_enc"] + sum((inside[h] - b_dec[h]) @ W_enc[h].T for h in range(hooks))
    norms = sum(W_dec[h].square().sum(1).sqrt() for h in range(hooks))
    z = torch.clamp(pre, min=0)
    if name == "batch_top_k":
        weighted = (z * norms).detach().flatten()
        last = weighted.sort(descending=True).values[4 * len(x) - 1]
        z = z * (weighted.view_as(z) >= last)
    squared = sum((inside[h] - z @ W_dec[h] - b_dec[h]).square().sum() for h in range(hooks))
    penalty = torch.zeros(())
    if name == "standard_new":
        penalty = 0.05 * recipe.sparsity_warmup(progress) * sum((z[:, f] * norms[f]).sum() for f in range(F))
    return (squared + penalty) / len(x)


@pytest.mark.parametrize("hooks", [2, 3])
@pytest.mark.parametrize("name", NAMES)
def test_every_step_is_that_of_a_plain_loop(name: str, hooks: int, sides: Tensor, monkeypatch: Any) -> None:
    member, rows = member_of(name, sides[:, : hooks * D], hooks), sides[:, : hooks * D].double()
    recipe, n_steps = member.recipe, 8
    real = recipe.forward
    seen: list[Tensor] = []

    def forward(x: Tensor, progress: float, noise: Tensor | None) -> Any:
        own = {key: value.detach().clone().requires_grad_() for key, value in recipe.named_parameters()}
        loss = plain_loss(name, recipe, own, x, hooks, progress)
        loss.backward()
        output = real(x, progress, noise)
        found = torch.autograd.grad(output.loss, list(own_parameters.values()), retain_graph=True)
        torch.testing.assert_close(output.loss, loss)
        for key, gradient in zip(own_parameters, found, strict=True):
            torch.testing.assert_close(gradient, own[key].grad, msg=key)
        seen.append(output.loss.detach())
        return output

    own_parameters = dict(recipe.named_parameters())
    monkeypatch.setattr(recipe, "forward", forward)
    for number in range(n_steps):
        train_step(member, StreamBatch(rows[64 * number : 64 * (number + 1)], 0.04 * (number + 0.5) / n_steps))
    assert len(seen) == n_steps and seen[-1] < seen[0]


@pytest.mark.parametrize("name", NAMES)
def test_two_equal_hooks_share_every_latent_alike(name: str, planted_rows: Tensor) -> None:
    """From equal decoders; from different ones they do not."""
    ratios = {}
    for init in ("data_rows", "random"):
        twice = Train(saes={"one": settings(name, init=init)}, precision="float32")
        member, rows = new_training_sae("one", twice, 2 * D), planted_rows.repeat(1, 2)
        start(member, rows, 0)
        for number in range(100):
            train_step(member, StreamBatch(rows[16 * number : 16 * number + 128], (number + 0.5) / 100))
        cfg = SAEConfig("standard", 2 * D, F, hook_name=f"{A} + {B}", hook_scales=(0.5, 3.0))
        ratios[init] = decoder_norm_ratios(member.recipe.export(1.0, cfg))
    torch.testing.assert_close(ratios["data_rows"], torch.full((2, F), 0.5), atol=1e-5, rtol=0)
    assert (ratios["random"] - 0.5).abs().max() > 0.05
    torch.testing.assert_close(ratios["random"].sum(0), torch.ones(F))


@pytest.mark.parametrize("hooks", [2, 3])
@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_what_comes_out_reads_and_writes_the_models_own_units(name: str, hooks: int, sides: Tensor) -> None:
    recipe = recipe_of(RECIPES[name], hooks * D, sides[:, : hooks * D], **settings(name, hooks))
    scales, batch = (0.25, 3.0, 1.5)[:hooks], sides[:50, : hooks * D]
    output = recipe.compute(batch, 0.5)
    if name == "batch_top_k":
        recipe.threshold.mul_(1 - 1e-5)  # that of this one batch, whose last latent lies right at it
    per_column = torch.tensor(scales).repeat_interleave(D)
    cfg = SAEConfig(recipe.form, hooks * D, F, hook_name=" + ".join([A, B, C][:hooks]), hook_scales=scales)
    sae = recipe.export(1.0, cfg)
    x = (batch / per_column)[None]
    z = sae.encode(x)[0]
    torch.testing.assert_close(sae.reconstruct(x)[0] * per_column, batch - output.residual, atol=1e-4, rtol=1e-4)
    assert float((z != 0).sum(1).float().mean()) == pytest.approx(float(output.l0))
    norms = torch.stack([side.norm(dim=1) for side in recipe.W_dec.chunk(hooks, dim=1)])
    torch.testing.assert_close(decoder_norm_ratios(sae), norms / norms.sum(0))
    written = (sae.W_dec * per_column).chunk(hooks, dim=1)
    torch.testing.assert_close(sum(side.norm(dim=1) for side in written), torch.ones(F))
    if name == "batch_top_k":
        torch.testing.assert_close(
            sae.threshold, recipe.threshold.expand(F)
        )  # the activations' units are those it was taken in


@pytest.mark.parametrize("name", NAMES)
def test_a_stack_takes_the_steps_its_crosscoders_would(name: str, sides: Tensor, monkeypatch: Any) -> None:
    monkeypatch.setattr(stack, "STACKED_ON", ("cpu",))
    train = Train(saes={str(seed): settings(name, seed=seed) for seed in range(3)}, precision="float32", batch_size=64)
    rows = sides[:, : 2 * D].double()
    alone, together = ([new_training_sae(one, train, 2 * D) for one in train.saes] for _ in range(2))
    for saes in (alone, together):
        for number, sae in enumerate(saes):
            sae.recipe.double()
            start(sae, rows, number)
            with torch.no_grad():
                for parameter in sae.recipe.parameters():
                    parameter += 1e-4 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                if sae.recipe.unit_rows:
                    sae.recipe.normalise_rows()
    (group,) = in_stacks(together, train)
    stacked = Stack(group)
    for number in range(6):
        batch = StreamBatch(rows[64 * number : 64 * (number + 1)], (number + 0.5) / 6)
        losses = [train_step(sae, batch).loss.detach() for sae in alone]
        for ours, theirs in zip(stacked.step(batch), losses, strict=True):
            torch.testing.assert_close(ours.loss, theirs, rtol=1e-7, atol=0)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.recipe.W_dec, other.recipe.W_dec, rtol=1e-5, atol=1e-7)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_of_both_kinds(make_params: Callable[..., Params], tmp_path: Path) -> None:
    mixed = {"standard": STANDARD, "batch": settings("batch_top_k"), "l1": settings("standard_new", 3, l1_coefficient=0.02)}
    params = make_params(saes=mixed, tokens=4096)
    report = stage.train(params, tmp_path / "mixed")
    stage.train(make_params(saes={"standard": STANDARD}, tokens=4096), tmp_path / "alone")
    found, alone = files(tmp_path / "mixed"), files(tmp_path / "alone")
    for name in ("standard/sae_weights.safetensors", "standard/cfg.json", "standard/eval_results.json"):
        assert found[name] == alone[name], "an SAE's companions change nothing of it"
    assert set(report["hooks"]) == {B, f"{A} + {B}", f"{A} + {B} + {C}"}
    lm = load_language_model(params.model.name, "cpu")
    tokens = torch.randint(10, 300, (4, 32), generator=torch.Generator().manual_seed(0))
    acts = lm.activations_at(tokens, [A, B, C])
    for name, hooks in (("batch", [A, B]), ("l1", [A, B, C])):
        sae = load_sae(tmp_path / "mixed" / name)
        assert sae.cfg.hook_names == tuple(hooks) and sae.cfg.d_in == sum(acts[hook].shape[-1] for hook in hooks)
        x = torch.cat([acts[hook][:, 1:] for hook in hooks], dim=-1)
        parts = zip(x.chunk(len(hooks), -1), sae.reconstruct(x).chunk(len(hooks), -1), strict=True)
        for own, hat in parts:
            left = (own - hat).square().sum() / (own - own.mean((0, 1))).square().sum()
            assert 1 - float(left) > 0, "it explains the model's own units at every hook"
        results = json.loads(found[f"{name}/eval_results.json"])
        assert results["loss_recovered"] > 0 and results["variance_explained"] > 0.1
        shares = decoder_norm_ratios(sae)
        for hook, expected in zip(hooks, shares, strict=True):
            at = results["by_hook"][hook]
            assert at["variance_explained"] > 0.1 and at["ce_clean"] == results["ce_clean"]
            assert torch.tensor(results["decoder_norm_ratios"][hook]) == pytest.approx(expected, rel=1e-3)
            assert sum(at["decoder_norm_ratio"]["counts"]) == F
            assert at["decoder_norm_ratio"]["counts"][4] == int(((expected >= 0.4) & (expected < 0.5)).sum())
        assert "hook_names" not in results["hyper_parameters"]
    assert f"{name}  " in held_out_table(report) and "latents by the share of the hook" in held_out_table(report)


@torch.no_grad()
def test_losses_hook_by_hook_and_all_at_once(make_params: Callable[..., Params]) -> None:
    """Against runs with plain hooks on the layers; what reconstructs exactly loses nothing, zeros everything."""
    params = make_params(evaluate_tokens=64)
    lm = load_language_model(params.model.name, "cpu")
    tokens = torch.randint(10, 300, (2, 32), generator=torch.Generator().manual_seed(0))
    place, width = f"{A} + {B}", 2 * lm.d_in(A)
    acts = torch.cat([lm.activations(tokens, hook) for hook in hooks_at(place)], dim=-1)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[:, 0] = False
    cfg = SAEConfig("linear", width, width, hook_name=place, hook_scales=(1.0, 1.0), apply_b_dec_to_input=False)
    g, eye = torch.Generator().manual_seed(1), torch.eye(width)
    rows = {"exact": eye, "zeros": torch.zeros_like(eye), "noisy": eye + torch.randn(width, width, generator=g) / 20}
    zeros = torch.zeros(width)
    saes = {name: LinearSAE(cfg, W_enc=eye, b_enc=zeros, W_dec=W_dec, b_dec=zeros) for name, W_dec in rows.items()}
    found = evaluation.loss_recovered(saes, HeldOut(tokens, {place: acts}, {place: mask}), lm, params)
    for of_hooks in (found["exact"], *found["exact"]["by_hook"].values()):
        assert of_hooks["loss_recovered"] == pytest.approx(1, abs=1e-4) and of_hooks["kl"] == pytest.approx(0, abs=1e-6)
    for of_hooks in (found["zeros"], *found["zeros"]["by_hook"].values()):
        assert of_hooks["loss_recovered"] == pytest.approx(0, abs=1e-4)
    hats = dict(zip((0, 1), saes["noisy"].reconstruct(acts).chunk(2, dim=-1), strict=True))
    for of_hooks, replaced in (
        (found["noisy"], (0, 1)),
        (found["noisy"]["by_hook"][A], (0,)),
        (found["noisy"]["by_hook"][B], (1,)),
    ):

        def put(layer: int) -> Callable[..., Any]:
            def after(_: Any, __: Any, output: Any) -> Any:
                own = output[0] if isinstance(output, tuple) else output
                own = torch.where(mask[..., None], hats[layer], own)
                return (own, *output[1:]) if isinstance(output, tuple) else own

            return after

        handles = [lm.layers[layer].register_forward_hook(put(layer)) for layer in replaced]
        log_p = torch.log_softmax(lm.model(input_ids=tokens).logits.float(), -1)
        for handle in handles:
            handle.remove()
        ce = -log_p[:, :-1].gather(2, tokens[:, 1:, None])[..., 0][mask[:, :-1]].mean()
        assert of_hooks["ce_patched"] == pytest.approx(float(ce), rel=1e-5)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    make_params: Callable[..., Params], tmp_path: Path, monkeypatch: Any
) -> None:
    params = make_params(saes={"one": settings("batch_top_k", 3)}, checkpoint_steps=20)
    stage.train(params, tmp_path / "whole")
    train_with_a_stop(params, tmp_path, 50, monkeypatch)
    assert files(tmp_path / "whole") == files(tmp_path / "rest")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({**CONFIGS["batch_top_k"], "hook_names": [A]}, f"has several hooks; for one write hook_name: {A}"),
        ({**CONFIGS["batch_top_k"], "hook_names": [A, B, A]}, f"{A} stands there twice"),
        ({**CONFIGS["batch_top_k"], "hook_names": [A, B], "hook_out": C}, "hook_names and hook_out exclude each other"),
        ({**CONFIGS["batch_top_k"], "hook_names": [A, B], "hook_name": C}, "hook_names and hook_name exclude each other"),
        ({**CONFIGS["batch_top_k"], "hook_names": [A, B], "skip": True}, "skip: true belongs to a transcoder"),
        ({**CONFIGS["standard_new"], "hook_names": [A, B], "resample_every": 0.1}, "resample_every belongs to SAEs"),
        ({**TOP_K, "hook_names": [A, B]}, "top_k trains no crosscoders"),
    ],
)
def test_settings_that_mean_nothing(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        TypeAdapter(TrainedSAE).validate_python(changes)


@pytest.mark.parametrize(
    ("hooks", "match"),
    [
        ([A, "blocks.9.hook_resid_post"], "hook blocks.9.hook_resid_post: the model has layers"),
        ([A, "blocks.1.hook_mlp"], "train.saes.one: unknown hook 'blocks.1.hook_mlp'"),
    ],
)
def test_hooks_that_the_model_lacks(
    hooks: list[str], match: str, make_params: Callable[..., Params], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=match):
        stage.train(make_params(saes={"one": {**CONFIGS["batch_top_k"], "hook_names": hooks}}), tmp_path / "out")
