"""Whitening of the input: the map, what comes out of it in the model's units, steps against a plain loop, runs."""

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
from sae_research.training.stack import in_stacks
from sae_research.training.training_sae import TrainingSAE, new_training_sae, start, train_step
from sae_research.training.whitening import SHRINKAGE, Whitening
from tests.helpers.cuda import DEVICES, cuda
from tests.helpers.training import CONFIGS, HOOK, STANDARD, TOP_K, train_with_a_stop

NAMES = [name for name in CONFIGS if name != "matching_pursuit"]
BATCH_LIMITED = ("batch_top_k", "matryoshka_batch_top_k")
"""Their latents are chosen over a batch in training, by a threshold afterwards."""


def member(name: str, rows: Tensor, whiten: bool | None = True, **changes: Any) -> TrainingSAE:
    ranked = {"inference": "top_k"} if name == "top_k" else {}
    settings = {**CONFIGS[name], **ranked, "whiten": whiten, **changes}
    sae = new_training_sae("one", Train(saes={"one": settings}, precision="float32", batch_size=64), rows.shape[1])
    start(sae, rows, 0)
    return sae


def steps(sae: TrainingSAE, rows: Tensor, n: int = 20) -> list[float]:
    g = torch.Generator().manual_seed(1)
    drawn = (rows[torch.randint(len(rows), (64,), generator=g)] for _ in range(n))
    return [float(train_step(sae, StreamBatch(x, (i + 0.5) / n)).loss) for i, x in enumerate(drawn)]


def plain_map(rows: Tensor) -> tuple[Tensor, Tensor]:
    """(mean, whitening matrix) by singular values, in float64."""
    rows = rows.double()
    mean = rows.mean(0)
    _, singular, vectors = torch.linalg.svd(rows - mean, full_matrices=False)
    variances = singular.square() / len(rows)
    variances = (1 - SHRINKAGE) * variances + SHRINKAGE * variances.mean()
    return mean, vectors.T @ torch.diag((rows.shape[1] * variances) ** -0.5) @ vectors


def test_white_activations_have_equal_variance_in_all_directions(planted_rows: Tensor) -> None:
    whitening = Whitening(16)
    found = whitening.fit(planted_rows).double()
    mean, matrix = plain_map(planted_rows)
    torch.testing.assert_close(whitening.matrix_DD.double(), matrix, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, (planted_rows.double() - mean) @ matrix, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.T @ found / len(found) * 16, torch.eye(16).double(), atol=0.02, rtol=0)
    torch.testing.assert_close(whitening.undone(whitening(planted_rows)) + whitening.mean_D, planted_rows)


def test_the_map_is_sae_lens_up_to_a_rotation(planted_rows: Tensor) -> None:
    from sae_lens.training.activation_scaler import ActivationScaler

    theirs, batches = ActivationScaler(), iter([planted_rows.double()])
    theirs.estimate_whitening(16, batches, 1, eps=0.0)
    assert theirs.whitening is not None
    whitening = Whitening(16)
    whitening.fit(planted_rows)
    ours = whitening.matrix_DD.double() * 16**0.5
    product = theirs.whitening.matrix.T @ torch.linalg.inv(ours)
    torch.testing.assert_close(product @ product.T, torch.eye(16).double(), atol=0.02, rtol=0)
    assert (ours - ours.T).abs().max() < 1e-5 < (theirs.whitening.matrix - theirs.whitening.matrix.T).abs().max()


@pytest.mark.parametrize("name", ["standard", "top_k", "gated"])
def test_white_activations_are_left_as_they_are(name: str, planted_rows: Tensor) -> None:
    mean, matrix = plain_map(planted_rows)
    white = (planted_rows.double() - mean) @ matrix
    covariance = white.T @ white / len(white) * 16
    white = (white @ torch.linalg.inv(torch.linalg.cholesky(covariance)).T).float()  # the shrinkage's rest
    plain, whitened = (member(name, white, whiten) for whiten in (None, True))
    torch.testing.assert_close(whitened.recipe.whitening.matrix_DD, torch.eye(16), atol=1e-5, rtol=0)
    assert steps(whitened, white, 8) == pytest.approx(steps(plain, white, 8), rel=1e-3)
    cfg = SAEConfig(plain.recipe.form, 16, 64, hook_name=HOOK)
    ours, theirs = (sae.recipe.export(2.0, cfg).reconstruct(white[None, :100] / 2) for sae in (whitened, plain))
    assert (ours - theirs).square().sum() < 1e-3 * theirs.square().sum()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_what_comes_out_does_on_plain_activations_what_training_does_on_white_ones(name: str, planted_rows: Tensor) -> None:
    skewed = planted_rows @ torch.diag(torch.logspace(-2, 0, 16))
    skewed = skewed / skewed.square().sum(1).mean().sqrt()
    sae = member(name, skewed)
    with torch.enable_grad():
        steps(sae, skewed, 10)
    recipe, scale, batch = sae.recipe, 3.0, skewed[:50]
    inside = recipe.whitening(batch)
    noise = None if recipe.draw_noise(1) is None else torch.zeros(50, 64)  # then gates stand at their median
    output = recipe.forward(inside, 0.5, noise)
    found = recipe.export(scale, SAEConfig(recipe.form, 16, 64, hook_name=HOOK, apply_b_dec_to_input=recipe.reads_b_dec))
    z, x_hat = found.encode((batch / scale)[None])[0], found.reconstruct((batch / scale)[None])[0]
    assert found.cfg.apply_b_dec_to_input and torch.equal(x_hat, found.decode(z))
    norms = found.W_dec.norm(dim=1)
    if name in ("top_k", "abs_top_k"):
        assert norms.mean() == pytest.approx(1) and norms.std() > 0.01
    else:
        torch.testing.assert_close(norms, torch.ones(64))
    if name in BATCH_LIMITED:
        pre = recipe.encode(inside)
        expected_z = torch.relu(pre) * (pre > recipe.threshold)
        assert ((z > 0) != (expected_z > 0)).sum() <= 2
        return
    assert float((z != 0).sum(1).float().mean()) == pytest.approx(float(output.l0))
    expected = (inside - output.residual) @ torch.linalg.inv(recipe.whitening.matrix_DD.double()).float()
    torch.testing.assert_close(x_hat, (expected + recipe.whitening.mean_D) / scale, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_folding_is_sae_lens(planted_rows: Tensor) -> None:
    from sae_lens import StandardSAE, StandardSAEConfig

    recipe = member("standard", planted_rows).recipe
    theirs = StandardSAE(StandardSAEConfig(d_in=16, d_sae=64, apply_b_dec_to_input=True))
    for key, value in recipe.own_tensors(1.0).items():
        getattr(theirs, key).copy_(value)
    own = recipe.whitening
    theirs.fold_activation_whitening(own.mean_D.double(), own.matrix_DD.double(), own.inverse_DD.double())
    ours = recipe.export(1.0, SAEConfig("standard", 16, 64, hook_name=HOOK))
    factor = theirs.W_dec.norm(dim=1)
    x = planted_rows[None, :200]
    torch.testing.assert_close(ours.encode(x), theirs.encode(x) * factor, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.reconstruct(x), theirs(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["standard", "top_k"])
def test_steps_are_those_of_a_plain_loop(name: str, planted_rows: Tensor) -> None:
    """Adam on the loss of whitened rows, written out."""
    rows = planted_rows.double()
    no_dead = {"aux_k_coefficient": 0.0} if name == "top_k" else {}
    settings = {"one": {**CONFIGS[name], **no_dead, "whiten": True, "learning_rate": 0.003}}
    sae = new_training_sae("one", Train(saes=settings, precision="float32", batch_size=64), 16)
    recipe = sae.recipe.double()
    start(sae, rows, 0)
    with torch.no_grad():
        for parameter in recipe.parameters():
            parameter += 1e-4 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
        recipe.normalise_rows()
    own = {key: value.detach().clone().requires_grad_() for key, value in recipe.named_parameters()}
    optimiser = torch.optim.Adam(own.values(), betas=recipe.betas)
    mean, matrix = plain_map(rows)
    for number in range(6):
        batch = StreamBatch(rows[64 * number : 64 * (number + 1)], (number + 0.5) / 6)
        loss = train_step(sae, batch).loss
        x = (batch.acts - mean) @ matrix
        z = torch.relu((x - own["b_dec"]) @ own["W_enc"].T + own["b_enc"])
        if name == "top_k":
            z = torch.zeros_like(z).scatter(1, z.topk(4).indices, z.topk(4).values)
        expected = (x - z @ own["W_dec"] - own["b_dec"]).square().sum(1).mean()
        if name == "standard":
            expected = expected + recipe.penalty(batch.progress) * z.sum(1).mean()
        optimiser.zero_grad()
        expected.backward()
        with torch.no_grad():
            gradient = own["W_dec"].grad
            gradient -= (gradient * own["W_dec"]).sum(1, keepdim=True) * own["W_dec"]
            if recipe.clip_norm:
                torch.nn.utils.clip_grad_norm_(own.values(), recipe.clip_norm)
            optimiser.param_groups[0]["lr"] = recipe.learning_rate(batch.progress)
            optimiser.step()
            own["W_dec"] /= own["W_dec"].norm(dim=1, keepdim=True)
        assert float(loss) == pytest.approx(float(expected.detach()), rel=1e-6)
    for key, value in recipe.named_parameters():
        torch.testing.assert_close(value, own[key], rtol=1e-4, atol=1e-6, msg=key)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_run_with_a_stop_ends_with_the_bytes_of_one_without(
    make_params: Callable[..., Params], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what it reports is of plain activations."""
    saes = {"plain": STANDARD, "white": {**STANDARD, "whiten": True}, "topk": {**TOP_K, "whiten": True}}
    params = make_params(saes=saes, tokens=4096, checkpoint_steps=10)
    stage.train(params, tmp_path / "whole")
    train_with_a_stop(params, tmp_path, 30, monkeypatch)
    whole = files(tmp_path / "whole")
    assert whole == files(tmp_path / "rest")
    stage.train(make_params(saes={"plain": STANDARD}, tokens=4096), tmp_path / "alone")
    for name, content in files(tmp_path / "alone").items():
        if name.startswith("plain/"):
            assert whole[name] == content, "an SAE's companions change nothing of it"
    lm = load_language_model(params.model.name, "cpu")
    x = lm.activations(torch.randint(10, 300, (16, 32), generator=torch.Generator().manual_seed(0)), HOOK)[:, 1:]
    for name in ("white", "topk"):
        sae = load_sae(tmp_path / "whole" / name)
        results = json.loads(whole[f"{name}/eval_results.json"])
        explained = 1 - float((x - sae.reconstruct(x)).square().sum() / (x - x.mean((0, 1))).square().sum())
        assert results["variance_explained"] == pytest.approx(explained, abs=0.15) and explained > 0.2
        assert results["hyper_parameters"]["whiten"] is True and results["loss_recovered"] > 0
        last = whole[f"{name}/training_curve.tsv"].decode().splitlines()[-1].split("\t")
        assert float(last[-1]) == pytest.approx(results["variance_explained"], abs=0.15)
    assert "whiten" not in json.loads(whole["plain/eval_results.json"])["hyper_parameters"]


def test_no_stack_holds_it(planted_rows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "STACKED_ON", ("cpu",))
    train = Train(saes={"a": TOP_K, "b": {**TOP_K, "whiten": True}, "c": {**TOP_K, "whiten": True}, "d": TOP_K})
    groups = in_stacks([new_training_sae(name, train, 16) for name in train.saes], train)
    assert [[sae.name for sae in group] for group in groups] == [["a", "d"], ["b"], ["c"]]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (CONFIGS["matching_pursuit"], "matching_pursuit has no encoder"),
        ({**TOP_K, "hook_out": "blocks.1.hook_mlp_out"}, "belongs to SAEs, which write the hook they read"),
        ({**CONFIGS["batch_top_k"], "hook_names": [HOOK, "blocks.2.hook_resid_post"]}, "belongs to SAEs"),
    ],
)
def test_settings_that_mean_nothing(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValidationError, match=match):
        TypeAdapter(TrainedSAE).validate_python({**changes, "whiten": True})


def test_activations_that_give_no_covariance() -> None:
    with pytest.raises(UserError, match="covariance of 16 dimensions .* in which 16 tokens count; raise train.tokens"):
        Whitening(16).fit(torch.randn(16, 16))
    with pytest.raises(UserError, match="all equal"):
        Whitening(16).fit(torch.ones(20, 16))


@pytest.mark.parametrize("device", DEVICES)
def test_on_a_device_it_is_what_it_is_on_the_cpu(device: str, planted_rows: Tensor) -> None:
    train = Train(saes={"one": {**STANDARD, "whiten": True}}, precision="float32", batch_size=64)

    def losses(place: str) -> list[float]:
        rows, sae = planted_rows.to(place), new_training_sae("one", train, 16, place)
        start(sae, rows, 0)
        found = [float(train_step(sae, StreamBatch(rows[64 * i :][:64], (i + 0.5) / 4)).loss) for i in range(4)]
        exported = sae.recipe.export(2.0, SAEConfig("standard", 16, 64, hook_name=HOOK)).tensors()
        assert {tensor.device.type for tensor in exported.values()} == {"cpu"}
        return found

    here = losses("cpu")
    with cuda(device):
        assert losses("cuda") == pytest.approx(here, rel=2e-3)
