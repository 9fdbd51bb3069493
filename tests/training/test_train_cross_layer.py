"""Cross-layer transcoders in training: losses and gradients against a plain loop over pairs of layers, one layer against a
transcoder, export to the model's units, a run beside SAEs, core on what comes out, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from sae_research.config.params import Params, Train
from sae_research.config.recipes import TrainedSAE
from sae_research.evals.core import evaluate
from sae_research.lm import load_language_model
from sae_research.runtime.errors import UserError
from sae_research.saes import SAEConfig, load_sae
from sae_research.saes.cross_layer import CrossLayerTranscoder
from sae_research.training import stage
from sae_research.training.buffer import StreamBatch
from sae_research.training.evaluation import held_out_table
from sae_research.training.training_sae import TrainingSAE, new_training_sae, start, train_step
from tests.helpers.training import CONFIGS, STANDARD, train_with_a_stop

N, D, F = 3, 16, 20
READ = [f"blocks.{layer}.mlp.hook_in" for layer in range(N)]
WRITTEN = [f"blocks.{layer}.hook_mlp_out" for layer in range(N)]


def settings(layers: int = N, **changes: Any) -> dict[str, Any]:
    own = {"d_sae": layers * F, "hook_names": READ[:layers], "hook_outs": WRITTEN[:layers]}
    return {**CONFIGS["cross_layer"], **own, **changes}


@pytest.fixture
def sides(planted_rows: Tensor) -> Tensor:
    """Rows [2048, 6 D] of three read hooks and three written ones, each a function of the hooks up to its layer."""
    g = torch.Generator().manual_seed(3)
    read = [planted_rows, planted_rows.flip(0), planted_rows.roll(7, 0)]
    written = []
    for layer in range(N):
        hidden = sum(torch.relu(read[before] @ torch.randn(D, 40, generator=g) - 0.2) for before in range(layer + 1))
        written.append(hidden @ torch.randn(40, D, generator=g))
    return torch.cat([side / side.square().sum(1).mean().sqrt() for side in (*read, *written)], dim=1)


def member_of(rows: Tensor, **changes: Any) -> TrainingSAE:
    """An initialised one in double precision, all of whose decoders are used."""
    train = Train(saes={"one": settings(**changes)}, precision="float32", batch_size=64)
    member = new_training_sae("one", train, N * D)
    start(member, rows, 0)
    member.recipe.double()
    with torch.no_grad():
        g = torch.Generator().manual_seed(1)
        for parameter in member.recipe.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=g)
    return member


class Jump(torch.autograd.Function):
    """`pre * 1[pre > threshold]`, with the January 2025 update's gradients."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        pre, threshold = ctx.saved_tensors
        passed = threshold / ctx.bandwidth * grad * ((pre - threshold).abs() < ctx.bandwidth / 2)
        return grad * (pre > threshold) + passed, -passed.sum(0), None


def plain_loss(own: dict[str, Tensor], x: Tensor, y: Tensor, progress: float, config: Any) -> Tensor:
    """The paper's sums, a pair of layers at a time, in the source's units: a token's mean square norm at a hook is D."""
    unit = D**-0.5
    x, y, b_dec = ([part / unit for part in whole.split(D, dim=-1)] for whole in (x, y, own["b_dec"][None]))
    decoders: dict[tuple[int, int], Tensor] = {}
    at = 0
    for written in range(N):
        for layer in range(written + 1):
            decoders[layer, written] = own["W_dec"][at : at + F]
            at += F
    z, penalty, below = [], torch.zeros(()), torch.zeros(())
    for layer in range(N):
        latents = slice(layer * F, (layer + 1) * F)
        pre = x[layer] @ own["W_enc"][latents].T + own["b_enc"][latents] / unit
        threshold = own["log_threshold"][latents].exp() / unit
        z.append(Jump.apply(pre, threshold, config.bandwidth))
        norm = torch.cat([decoders[layer, m] for m in range(layer, N)], dim=1).square().sum(1).sqrt()
        penalty = penalty + torch.tanh(config.tanh_scale * z[-1] * norm).sum()
        below = below + (torch.clamp(threshold - pre, min=0) * norm).sum()
    squared = torch.zeros(())
    for written in range(N):
        hat = b_dec[written] + sum(z[layer] @ decoders[layer, written] for layer in range(written + 1))
        if "W_skip" in own:
            hat = hat + x[written] @ own["W_skip"][written * D : (written + 1) * D].T
        squared = squared + (y[written] - hat).square().sum()
    c_s, c_p = config.sparsity_coefficient, config.pre_activation_coefficient
    return unit**2 * (squared + c_s * progress * penalty + c_p * below) / len(x[0])


@pytest.mark.parametrize("skip", [None, True])
def test_every_step_is_that_of_a_plain_loop(skip: bool | None, sides: Tensor, monkeypatch: Any) -> None:
    member = member_of(sides, skip=skip, pre_activation_coefficient=0.01)
    recipe, rows, n_steps = member.recipe, sides.double(), 8
    real, seen = recipe.forward, []
    parameters = dict(recipe.named_parameters())
    assert set(parameters) == {"W_enc", "b_enc", "W_dec", "b_dec", "log_threshold"} | ({"W_skip"} if skip else set())

    def forward(x: Tensor, progress: float, noise: Tensor | None) -> Any:
        own = {key: value.detach().clone().requires_grad_() for key, value in parameters.items()}
        loss = plain_loss(own, x[:, : N * D], x[:, N * D :], progress, recipe.config)
        loss.backward()
        output = real(x, progress, noise)
        found = torch.autograd.grad(output.loss, list(parameters.values()), retain_graph=True)
        torch.testing.assert_close(output.loss, loss)
        for key, gradient in zip(parameters, found, strict=True):
            torch.testing.assert_close(gradient, own[key].grad, msg=key)
        seen.append(output.loss.detach())
        return output

    monkeypatch.setattr(recipe, "forward", forward)
    for number in range(n_steps):
        train_step(member, StreamBatch(rows[64 * number : 64 * (number + 1)], 0.04 * (number + 0.5) / n_steps))
    assert len(seen) == n_steps and seen[-1] < seen[0]


def test_it_starts_as_so_many_transcoders(sides: Tensor) -> None:
    train = Train(saes={"one": settings()}, precision="float32")
    recipe = new_training_sae("one", train, N * D).recipe
    recipe.initialise(sides, torch.Generator().manual_seed(0))
    for written in range(N):
        rows = recipe.decoder_of(written).detach()
        assert not rows[: written * F].any()
        torch.testing.assert_close(rows[written * F :].norm(dim=1), torch.ones(F))
    output = recipe.compute(sides[:512], 0.5)
    assert float(output.l0) == pytest.approx(N * F / 10, rel=0.3)
    y = sides[:512, N * D :]
    assert output.residual.square().sum() < (y - sides[:, N * D :].mean(0)).square().sum()
    assert torch.allclose(recipe.log_threshold, torch.tensor(math.log(0.1 * D**-0.5)))


@torch.no_grad()
def test_what_comes_out_reads_and_writes_the_models_own_units(sides: Tensor) -> None:
    for skip in (None, True):
        member = member_of(sides, skip=skip)
        recipe = member.recipe.float()
        scales, batch = [0.25, 3.0, 1.5, 0.5, 2.0, 4.0], sides[:50]
        output = recipe.compute(batch, 0.5)
        factors = torch.tensor(scales).repeat_interleave(D)
        about = {"hook_name": " + ".join(READ), "hook_out": " + ".join(WRITTEN), "apply_b_dec_to_input": False}
        sae = recipe.export_layers(scales, SAEConfig("jumprelu", N * D, N * F, **about))
        own = batch / factors
        x, written = own[None, :, : N * D], factors[N * D :]
        hat = batch[:, N * D :] - output.residual
        torch.testing.assert_close(sae.reconstruct(x)[0] * written, hat, atol=1e-4, rtol=1e-4)
        assert float((sae.encode(x) != 0).sum(-1).float().mean()) == pytest.approx(float(output.l0))
        for layer in range(N):
            rows = [sae.decoder(m)[layer * F : (layer + 1) * F] * scales[N + m] for m in range(layer, N)]
            torch.testing.assert_close(torch.cat(rows, dim=1).norm(dim=1), torch.ones(F))


def test_later_layers_are_written_too(sides: Tensor) -> None:
    """What layers 1 and 2 put out depends on what layer 0 reads: a trained one explains more than its own layers' rows."""
    train = Train(saes={"one": settings(sparsity_coefficient=0.1, d_sae=3 * 64)}, precision="float32", batch_size=128)
    member = new_training_sae("one", train, N * D)
    start(member, sides, 0)
    for number in range(300):
        first = 128 * number % 1920
        train_step(member, StreamBatch(sides[first : first + 128], (number + 0.5) / 300))
    recipe = member.recipe
    whole = recipe.compute(sides[:512], 1.0).residual.split(D, 1)
    with torch.no_grad():
        for written in range(N):
            recipe.decoder_of(written)[: written * 64] = 0
    without = recipe.compute(sides[:512], 1.0).residual.split(D, 1)
    assert whole[1].square().sum() < 0.8 * without[1].square().sum()
    assert whole[2].square().sum() < 0.8 * without[2].square().sum()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_beside_an_sae(make_params: Callable[..., Params], tmp_path: Path) -> None:
    mixed = {"standard": STANDARD, "clt": settings(2, d_sae=128, sparsity_coefficient=0.3)}
    params = make_params(saes=mixed, tokens=4096)
    report = stage.train(params, tmp_path / "mixed")
    stage.train(make_params(saes={"standard": STANDARD}, tokens=4096), tmp_path / "alone")
    found, alone = files(tmp_path / "mixed"), files(tmp_path / "alone")
    for name in ("standard/sae_weights.safetensors", "standard/cfg.json", "standard/eval_results.json"):
        assert found[name] == alone[name], "an SAE's companions change nothing of it"
    place = f"{READ[0]} + {READ[1]} -> {WRITTEN[0]} + {WRITTEN[1]}"
    assert report["hooks"][place]["pca_reference"] == {} and "clt  " in held_out_table(report)
    sae = load_sae(tmp_path / "mixed" / "clt")
    assert isinstance(sae, CrossLayerTranscoder) and sae.cfg.hooks == place and sae.cfg.d_sae == 128
    results = json.loads(found["clt/eval_results.json"])
    assert list(results["by_hook"]) == WRITTEN[:2] and "hook_outs" not in results["hyper_parameters"]
    assert results["variance_explained"] > 0.1 and results["kl"] > 0 and "loss_recovered" in results
    for at in results["by_hook"].values():
        assert at["variance_explained"] > 0 and at["ce_clean"] == results["ce_clean"]
    lm = load_language_model(params.model.name, "cpu")
    sizes = {"batch_size_prompts": 3, "n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 2}
    small = params.model_copy(update={"core_eval": params.core_eval.model_copy(update=sizes)})
    ((_, core),) = evaluate({"clt": sae}, lm, small)
    lab = core["eval_result_unstructured"]["lab_v1"]
    assert lab["metrics"]["variance_explained"] > 0.1
    assert [key for key in lab["metrics"] if key.startswith("kl@")] == [f"kl@{hook}" for hook in WRITTEN[:2]]


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    make_params: Callable[..., Params], tmp_path: Path, monkeypatch: Any
) -> None:
    params = make_params(saes={"one": settings()}, checkpoint_steps=20)
    stage.train(params, tmp_path / "whole")
    train_with_a_stop(params, tmp_path, 50, monkeypatch)
    assert files(tmp_path / "whole") == files(tmp_path / "rest")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hook_outs": None}, "hook_names and hook_outs belong together"),
        ({"hook_names": None}, "hook_names and hook_outs belong together"),
        ({"hook_outs": WRITTEN[:2]}, "one hook that is written for each that is read"),
        ({"d_sae": 61}, "d_sae = 61 latents do not divide into equal parts of 3 layers"),
        ({"hook_out": WRITTEN[0]}, "hook_names and hook_out exclude each other"),
        ({"recipe": "tanh_jump_relu"}, "hook_outs"),
    ],
)
def test_settings_that_mean_nothing(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        TypeAdapter(TrainedSAE).validate_python(settings(**changes))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hook_outs": WRITTEN[::-1]}, "hook_outs: .*hooks belong to one layer"),
        ({"hook_names": WRITTEN, "hook_outs": READ}, "are the two exchanged"),
        ({"hook_names": READ[::-1], "hook_outs": WRITTEN[::-1]}, "in the order of their layers"),
    ],
)
def test_hooks_that_do_not_belong_together(
    changes: dict[str, Any], match: str, make_params: Callable[..., Params], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=match):
        stage.train(make_params(saes={"one": settings(**changes)}), tmp_path / "out")
