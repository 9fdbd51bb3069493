"""The controls of a transcoder against plain least squares, and the setup stage with a transcoder as the baseline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_research.config.params import Params
from sae_research.evals.core import evaluate
from sae_research.lm import load_language_model
from sae_research.runtime.errors import UserError
from sae_research.saes import SparseAutoencoder, load_sae, save_sae
from sae_research.saes.forms import StandardSAE
from sae_research.saes.pursuit.encoders import MPSAE
from sae_research.setup import run_setup
from sae_research.setup.controls import make_control
from tests.helpers.tiny_saes import D_IN, D_SAE, tiny_sae
from tests.helpers.transcoders import READ, WRITTEN, config, random_transcoder

TOKENS = 400


@pytest.fixture(scope="module")
def sample() -> tuple[Tensor, Tensor]:
    """Activations and what is nearly a linear map of them, neither of mean zero."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(TOKENS, D_IN, generator=g) * torch.linspace(0.2, 3, D_IN) + 1
    y = x @ torch.randn(D_IN, D_IN, generator=g) + 2 * torch.relu(x) + torch.randn(TOKENS, D_IN, generator=g)
    return x, y


def fitted(x: Tensor, y: Tensor) -> Tensor:
    """What least squares with an intercept makes of x [tokens, d_out]."""
    with_one = np.concatenate([x.double().numpy(), np.ones((len(x), 1))], axis=1)
    return torch.from_numpy(with_one @ np.linalg.lstsq(with_one, y.double().numpy(), rcond=None)[0])


def control(kind: str, size: int, sample: tuple[Tensor, Tensor], skip: Tensor | None = None) -> SparseAutoencoder:
    return make_control(kind, size, sample[0], config("standard", D_SAE), Params(), sample[1], skip)


def written(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    assert (sae.cfg.hook_name, sae.cfg.hook_out, sae.cfg.role) == (READ, WRITTEN, "control")
    with torch.no_grad():
        return sae.reconstruct(x[None])[0].double()


def test_the_linear_map_is_least_squares_and_so_is_a_skip_fitted_by_it(sample: tuple[Tensor, Tensor]) -> None:
    x, y = sample
    expected = fitted(x, y)
    sae = control("linear_map", 0, sample)
    torch.testing.assert_close(written(sae, x), expected, atol=1e-4, rtol=1e-4)
    assert not sae.encode(x[None]).any()
    # a transcoder with that skip and latents that never fire
    map_DO = torch.linalg.lstsq((x - x.mean(0)).double(), (y - y.mean(0)).double()).solution
    silent = StandardSAE(
        config("standard"),
        W_enc=torch.zeros(D_IN, 64),
        b_enc=torch.full((64,), -1.0),
        W_dec=torch.randn(64, D_IN),
        b_dec=(y.double().mean(0) - x.double().mean(0) @ map_DO).float(),
        W_skip=map_DO.T.float(),
    )
    torch.testing.assert_close(silent.reconstruct(x[None])[0].double(), written(sae, x), atol=1e-4, rtol=1e-4)


def test_the_skip_alone_is_right_on_average(sample: tuple[Tensor, Tensor]) -> None:
    x, y = sample
    skip = torch.randn(D_IN, D_IN, generator=torch.Generator().manual_seed(1))
    expected = (x - x.mean(0)).double() @ skip.double().T + y.double().mean(0)
    torch.testing.assert_close(written(control("skip", 0, sample, skip), x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [3, D_IN])
def test_principal_components_of_what_the_map_writes(size: int, sample: tuple[Tensor, Tensor]) -> None:
    """Of rank n the least error is that of the map itself and the trailing singular values of what it writes."""
    x, y = sample
    hat, sae = fitted(x, y), control("pca", size, sample)
    least = (y - hat).square().sum() + torch.linalg.svdvals(hat - hat.mean(0))[size:].square().sum()
    assert float((y - written(sae, x)).square().sum()) == pytest.approx(float(least), rel=1e-4)
    assert sae.cfg.d_sae == size == int((sae.encode(x[None]) != 0).sum(-1).float().mean())


@pytest.mark.parametrize("kind", ["random", "data_rows"])
def test_untrained_rows_are_read_by_pursuit_and_written_through_a_map(kind: str, sample: tuple[Tensor, Tensor]) -> None:
    x, y = sample
    sae = control(kind, 4, sample)
    plain = make_control(kind, 4, x, tiny_sae().cfg, Params())  # of an SAE at the read hook
    assert isinstance(plain, MPSAE)
    z = plain.encode(x[None])
    assert torch.equal(sae.encode(x[None]), z) and int((z != 0).sum(-1).max()) <= 4
    mask = torch.arange(TOKENS)[None] % 3 > 0
    assert torch.equal(sae.encode(x[None], mask), plain.encode(x[None], mask))
    torch.testing.assert_close(written(sae, x), fitted(plain.decode(z)[0], y), atol=1e-3, rtol=1e-3)


def test_setup_with_a_transcoder(project: Path, make_params: Any, capsys: pytest.CaptureFixture[str]) -> None:
    made = random_transcoder(skip=True, model_name="somewhere/tiny")
    save_sae(made, project / "mine" / "one")
    params = make_params(
        baseline_sae={"source": "folder", "path": "mine/one", "hook_layer": 1, "name": "one"},
        sae_variants={"mpsae": {"s_values": [999]}, "omp": {"enabled": False}},  # there are none
        core_eval={"batch_size_prompts": 2, "n_eval_reconstruction_batches": 2, "n_eval_sparsity_variance_batches": 3},
    )
    run_setup(params)
    out = capsys.readouterr().out
    folder = project / "downloaded_saes"
    manifest = json.loads((folder / "manifest.json").read_text())
    kinds = ["random", "data_rows", "pca", "linear_map", "skip"]
    assert manifest["order"] == ["one", "standard", "topk", *(f"control_{kind}" for kind in kinds)]
    for kind in kinds:
        row = manifest["saes"][f"control_{kind}"]
        assert (row["hook_name"], row["hook_out"], row["role"]) == (READ, WRITTEN, "control")
    assert f"{READ} -> {WRITTEN}" in out
    assert "warning: no variants (ihtp, mpsae): the decoder of one is no dictionary of what it reads" in out
    report = json.loads((folder / "preflight.json").read_text())
    assert set(report["hooks"]) == {f"{READ} -> {WRITTEN}", "blocks.1.hook_resid_post"}
    lm = load_language_model(params.model.name, "cpu")
    saes = {name: load_sae(folder / name) for name in manifest["order"]}
    results = {name: one["eval_result_unstructured"]["lab_v1"]["metrics"] for name, one in evaluate(saes, lm, params)}
    explained = {kind: results[f"control_{kind}"]["variance_explained"] for kind in kinds}
    assert explained["linear_map"] > max(explained["pca"], explained["random"], explained["skip"]) > 0
    assert results["control_linear_map"]["l0"] == results["control_skip"]["l0"] == 0
    assert results["control_pca"]["l0"] == 8


def test_more_components_than_the_written_hook_has(project: Path, make_params: Any) -> None:
    save_sae(random_transcoder(model_name="somewhere/tiny"), project / "one")
    baseline = {"source": "folder", "path": "one", "hook_layer": 1, "name": "one"}
    with pytest.raises(UserError, match="pca_components = 33 is larger than the activations' width 32"):
        run_setup(make_params(baseline_sae=baseline, controls={"pca_components": 33, "s": 4}))
    with pytest.raises(UserError, match="baseline_sae.hook_layer is 2, but the SAE reads blocks.1.mlp.hook_in"):
        run_setup(make_params(baseline_sae=baseline | {"hook_layer": 2}))
