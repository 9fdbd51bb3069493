"""Cross-layer transcoders in a comparison and as its baseline, and controls of their kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_research.config.params import Params
from sae_research.evals.core import evaluate
from sae_research.evals.harness import PreparedSAEs
from sae_research.lm import load_language_model
from sae_research.runtime.errors import UserError
from sae_research.saes import load_sae, save_sae
from sae_research.setup import run_setup
from sae_research.setup.cross_layer_controls import make_cross_layer_control
from tests.evals.test_core_eval import lab
from tests.evals.test_cross_layer import part
from tests.helpers.cross_layer import LAYERS, READ, WRITTEN, D, F, config, random_clt, writing
from tests.setup.test_transcoder_controls import fitted

MODEL = "somewhere/tiny"
BASELINE = {"source": "folder", "path": "one", "hook_layer": 0, "name": "one"}


@pytest.fixture(scope="module")
def sample() -> tuple[Tensor, Tensor]:
    """What each layer reads and writes, side by side, neither of mean zero."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, LAYERS * D, generator=g) * torch.linspace(0.2, 3, LAYERS * D) + 1
    y = torch.cat([2 * torch.relu(side) + side @ torch.randn(D, D, generator=g) for side in x.chunk(LAYERS, 1)], dim=1)
    return x, y + torch.randn(y.shape, generator=g)


def control(kind: str, size: int, sample: tuple[Tensor, Tensor], skip: Tensor | None = None) -> Any:
    return make_cross_layer_control(kind, size, *sample, config(), Params(), skip)


def pairs(sample: tuple[Tensor, Tensor], sae: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(read, written, reconstructed) by layer."""
    hat = sae.reconstruct(sample[0][None])[0]
    return list(zip(*(values.chunk(LAYERS, 1) for values in (*sample, hat)), strict=True))


def test_the_linear_map_is_least_squares_in_each_layer(sample: tuple[Tensor, Tensor]) -> None:
    sae = control("linear_map", 0, sample)
    assert not sae.encode(sample[0][None]).any()
    for x, y, hat in pairs(sample, sae):
        torch.testing.assert_close(hat.double(), fitted(x, y), atol=1e-3, rtol=1e-3)
    own = control("skip", 0, sample, sae.W_skip)
    torch.testing.assert_close(own.reconstruct(sample[0][None]), sae.reconstruct(sample[0][None]), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["random", "data_rows"])
def test_untrained_rows_stand_for_what_a_linear_map_makes_of_them(kind: str, sample: tuple[Tensor, Tensor]) -> None:
    sae = control(kind, 4, sample)
    z = sae.encode(sample[0][None])[0]
    assert sae.cfg.d_sae == LAYERS * F and all(float((part != 0).sum(1).max()) <= 4 for part in z.chunk(LAYERS, 1))
    for layer, (x, y, hat) in enumerate(pairs(sample, sae)):
        rows = sae.W_enc[:, layer * F : (layer + 1) * F].T
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(F))
        largest = torch.relu((x - x.mean(0)) @ rows.T)
        kept = largest * (largest >= largest.sort(descending=True).values[:, 3:4])
        torch.testing.assert_close(hat.double(), fitted(kept.double() @ rows.double(), y), atol=2e-3, rtol=2e-3)
        assert not sae.decoder(layer)[: layer * F].any()


def test_compared_beside_an_sae(project: Path, make_params: Any, capsys: pytest.CaptureFixture[str]) -> None:
    made = random_clt(skip=True, model_name=MODEL)
    for name, sae in (("clt", made), ("layer", part(model_name=MODEL))):
        save_sae(sae, project / "trained_saes" / name)
    manifest = run_setup(make_params())
    assert made.cfg.hooks in capsys.readouterr().out
    assert manifest["saes"]["clt"]["hook_out"] == " + ".join(WRITTEN) and manifest["saes"]["layer"]["role"] == "comparison"
    report = json.loads((project / "downloaded_saes" / "preflight.json").read_text())
    assert report["saes"]["clt"]["variance_explained"] < 1 and report["saes"]["layer"]["l0"] > 0
    x = torch.randn(2, 5, LAYERS * D, generator=torch.Generator().manual_seed(0))
    assert torch.equal(load_sae(project / "downloaded_saes" / "clt").reconstruct(x), made.reconstruct(x))


def test_as_the_baseline_with_controls_of_its_kind(project: Path, make_params: Any) -> None:
    save_sae(random_clt(skip=True, model_name=MODEL), project / "one")
    params = make_params(baseline_sae=BASELINE, controls={"pca_components": 4, "s": 4})
    manifest = run_setup(params)
    controls = [name for name in manifest["order"] if name.startswith("control_")]
    assert set(controls) == {"control_random", "control_data_rows", "control_linear_map", "control_skip"}
    said = json.loads((project / "downloaded_saes" / "preflight.json").read_text())["warnings"]
    assert any("no control control_pca" in line for line in said) and any("no variants" in line for line in said)
    lm = load_language_model(params.model.name, "cpu")
    small = {"batch_size_prompts": 3, "n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 2}
    params = params.model_copy(update={"core_eval": params.core_eval.model_copy(update=small)})
    saes = PreparedSAEs(project / "downloaded_saes", lm, controls)
    found = {name: lab(result) for name, result in evaluate(saes, lm, params)}
    assert found["control_linear_map"]["l0"] == 0 and found["control_linear_map"]["variance_explained"] > 0.1
    assert 0 < found["control_data_rows"]["l0"] <= 4 * LAYERS


def test_what_is_no_baseline(project: Path, make_params: Any) -> None:
    save_sae(part(model_name=MODEL), project / "one")
    with pytest.raises(UserError, match="one is a cross-layer transcoder's layer .* of a baseline of one hook"):
        run_setup(make_params(baseline_sae=BASELINE | {"hook_layer": 1}))
    save_sae(writing(torch.zeros(LAYERS * D)), project / "two")
    sae = load_sae(project / "two")
    sae.cfg = sae.cfg.replace(model_name=MODEL)
    save_sae(sae, project / "two")
    with pytest.raises(UserError, match=f"hook_layer is 2, but the SAE reads {READ[0]}"):
        run_setup(make_params(baseline_sae=BASELINE | {"path": "two", "name": "two", "hook_layer": 2}))
