"""Architectures and factors of SAELens that scale tokens, keep signs, look at earlier tokens, or that it has dropped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from sae_research.runtime.errors import UserError
from sae_research.saes import SparseAutoencoder, load_sae, save_sae
from sae_research.saes.files import SAE_LENS_FORMS, sae_lens_lacks
from sae_research.saes.formats.sae_lens import FORMS, convert, from_sae_lens
from tests.helpers.random_saes import D_IN, D_SAE, make_sae, random_activations
from tests.saes.test_saes_sae_lens import lens_sae

sae_lens = pytest.importorskip("sae_lens")
TEMPORAL = {"n_heads": 2, "n_attn_layers": 2, "bottleneck_factor": 5, "kval_topk": 4, "tied_weights": False}


def test_every_architecture_of_the_package_is_read() -> None:
    from sae_lens.registry import SAE_CLASS_REGISTRY

    assert set(SAE_CLASS_REGISTRY) <= set(FORMS) and set(SAE_LENS_FORMS) <= set(SAE_CLASS_REGISTRY)


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("config", [{}, {"k": 5}, {"k": 5, "rescale_acts_by_decoder_norm": True}])
@torch.no_grad()
def test_layer_norm(config: dict[str, Any], apply_b_dec_to_input: bool, tmp_path: Path) -> None:
    """OpenAI's TopK SAEs on GPT-2: a bias that grows with the token, and the token's mean, are latents."""
    architecture = "topk" if config else "standard"
    theirs = lens_sae(architecture, normalize_activations="layer_norm", apply_b_dec_to_input=apply_b_dec_to_input, **config)
    x = 5 * random_activations() + 2
    theirs.save_model(tmp_path / "lens")
    for sae in (from_sae_lens(theirs), load_sae(tmp_path / "lens")):
        z = sae.encode(x)
        torch.testing.assert_close(sae.decode(z), theirs(x), atol=1e-4, rtol=1e-4)
        assert torch.equal(z[..., :-2] > 0, theirs.encode(x) > 0) and sae.cfg.d_sae == D_SAE + 2
        torch.testing.assert_close(z[..., -1], x.mean(-1))
    save_sae(sae, tmp_path / "ours")
    assert torch.equal(load_sae(tmp_path / "ours").encode(x), z) and sae_lens_lacks(sae)


@pytest.mark.parametrize("rescale", [True, False])
@torch.no_grad()
def test_abstopk_both_ways(rescale: bool, tmp_path: Path) -> None:
    theirs, x = lens_sae("abstopk", k=4, rescale_acts_by_decoder_norm=rescale), random_activations()
    sae = from_sae_lens(theirs)
    torch.testing.assert_close(sae.decode(sae.encode(x)), theirs(x), atol=1e-5, rtol=1e-5)
    assert torch.equal(sae.encode(x) != 0, theirs.encode(x) != 0) and (sae.encode(x) < 0).any()
    save_sae(sae, tmp_path)
    again = sae_lens.SAE.load_from_disk(tmp_path)
    torch.testing.assert_close(again.encode(x), sae.encode(x))
    assert sae_lens_lacks(sae) == ""


def old_configuration(**changes: Any) -> dict[str, Any]:
    return {
        "architecture": "standard",
        "d_in": D_IN,
        "d_sae": D_SAE,
        "model_name": "tiny",
        "hook_name": "blocks.1.hook_resid_post",
        "normalize_activations": "none",
        "context_size": 32,
    } | changes


def test_tanh_relu_is_what_it_was() -> None:
    """SAELens 6 reads it as a ReLU."""
    tensors, x = make_sae("standard", unit=False).tensors(), random_activations()
    sae = convert(old_configuration(activation_fn_str="tanh-relu"), tensors, "here")
    z = torch.tanh(torch.relu((x - tensors["b_dec"]) @ tensors["W_enc"] + tensors["b_enc"]))
    torch.testing.assert_close(sae.encode(x), z)
    torch.testing.assert_close(sae.decode(sae.encode(x)), z @ tensors["W_dec"] + tensors["b_dec"])


@pytest.mark.parametrize("name", ["finetuning_scaling_factor", "scaling_factor"])
@pytest.mark.parametrize("form", ["standard", "gated", "jumprelu"])
def test_finetuned_factors(form: str, name: str) -> None:
    sae, x = make_sae(form, unit=False), random_activations()
    factor = torch.rand(D_SAE, generator=torch.Generator().manual_seed(3)) + 0.5
    tensors, values = sae.tensors() | {name: factor}, old_configuration(architecture=form)
    found = convert(values | {"finetuning_scaling_factor": True}, tensors, "here")
    expected = (sae.encode(x) * factor) @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(found.decode(found.encode(x)), expected, atol=1e-5, rtol=1e-5)
    plain = convert(values, sae.tensors() | {name: torch.ones(D_SAE)}, "here")
    torch.testing.assert_close(plain.decode(plain.encode(x)), sae.decode(sae.encode(x)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("said", "tensors", "message"),
    [
        (True, {}, "the configuration says finetuning_scaling_factor, the weights lack it"),
        (False, {"scaling_factor": torch.full((D_SAE,), 2.0)}, "does not say finetuning_scaling_factor: true"),
        (True, {"scaling_factor": torch.ones(3)}, r"scaling_factor has shape \(3,\), expected \(40,\)"),
        (
            True,
            {"scaling_factor": torch.ones(D_SAE), "finetuning_scaling_factor": torch.ones(D_SAE)},
            "hold both finetuning_scaling_factor and scaling_factor",
        ),
    ],
)
def test_factors_that_do_not_fit(said: bool, tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(UserError, match=f"^here: .*{message}"):
        convert(old_configuration(finetuning_scaling_factor=said), make_sae("standard").tensors() | tensors, "here")


def temporal(**config: Any) -> Any:
    return lens_sae("temporal", **TEMPORAL | config)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"tied_weights": True},
        {"tied_weights": True, "apply_b_dec_to_input": False},
        {"sae_diff_type": "relu", "n_attn_layers": 1},
        {"normalize_activations": "constant_scalar_rescale", "activation_normalization_factor": 0.2},
    ],
)
@torch.no_grad()
def test_temporal(config: dict[str, Any], tmp_path: Path) -> None:
    theirs, x = temporal(**config), 5 * random_activations()
    theirs.save_model(tmp_path / "lens")
    scale = config.get("activation_normalization_factor", 1.0)
    for sae in (from_sae_lens(theirs), load_sae(tmp_path / "lens")):
        torch.testing.assert_close(sae.encode(x), theirs.encode(x), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(sae.reconstruct(x), theirs(x), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(sae.W_dec * scale, theirs.W_dec)
    save_sae(sae, tmp_path / "ours")
    again = load_sae(tmp_path / "ours")
    assert torch.equal(again.reconstruct(x), sae.reconstruct(x)) and "no form sae_lens_temporal" in sae_lens_lacks(sae)
    with pytest.raises(KeyError):
        sae_lens.SAE.load_from_disk(tmp_path / "ours")


@torch.no_grad()
def test_temporal_takes_tokens_that_do_not_count_for_absent() -> None:
    sae, x = make_sae("sae_lens_temporal"), random_activations()
    keep = torch.tensor([0, 1, 3, 6])
    mask = torch.zeros(x.shape[:2], dtype=torch.bool)
    mask[:, keep] = True
    z = sae.encode(x, mask)
    torch.testing.assert_close(z[:, keep], sae.encode(x[:, keep]))
    torch.testing.assert_close(sae.reconstruct(x, mask)[:, keep], sae.reconstruct(x[:, keep]))
    assert not z[~mask].any()
    changed = x.clone()
    changed[~mask] = 1e3
    assert torch.equal(sae.encode(changed, mask), z)
    torch.testing.assert_close(sae.encode(x)[:, :3], sae.encode(x[:, :3]))  # no later token matters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_attn_layers": 3}, "lack a part of attn_layers, of which n_attn_layers says 3"),
        ({"bottleneck_factor": 4}, "bottleneck_factor 4 makes 10 dimensions of keys, the weights have 8"),
        ({"n_heads": 3}, "do not split into 3 heads"),
        ({"tied_weights": True}, "the weights hold W_enc, and the configuration says tied_weights"),
        ({"sae_diff_type": "jump"}, "sae_diff_type 'jump' is not known"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations = 'layer_norm' of a temporal SAE"),
        ({"kval_topk": 41}, "k = 41 is more than its 40 latents"),
    ],
)
def test_temporal_files_that_contradict_themselves(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    temporal().save_model(tmp_path)
    values = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps(values | change))
    with pytest.raises(UserError, match=message) as caught:
        load_sae(tmp_path)
    assert "\n" not in str(caught.value)
    path = tmp_path / "sae_weights.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(path) | {"further": torch.ones(2)}, path)
    (tmp_path / "cfg.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="also hold further, which the architecture temporal does not use"):
        load_sae(tmp_path)


@pytest.mark.parametrize("form", ["groupmax", "abs_topk"])
def test_plain_references(form: str) -> None:
    sae, x = make_sae(form), random_activations()
    z = sae.encode(x)
    for token, found in zip(x.reshape(-1, D_IN), z.reshape(-1, D_SAE), strict=True):
        pre = (token - sae.b_dec) @ sae.W_enc + sae.b_enc
        expected = torch.zeros(D_SAE)
        if form == "groupmax":
            for start in range(0, D_SAE, D_SAE // 5):
                best = start + int(pre[start : start + D_SAE // 5].argmax())
                expected[best] = max(float(pre[best]), 0.0)
        else:
            for latent in sorted(range(D_SAE), key=lambda latent: -abs(float(pre[latent])))[:5]:
                expected[latent] = pre[latent]
        torch.testing.assert_close(found, expected)


def check_refusal(sae: SparseAutoencoder, k: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        type(sae).from_tensors(sae.cfg.replace(options={**sae.options(), "k": k}), sae.tensors())


def test_options_that_do_not_fit() -> None:
    check_refusal(make_sae("groupmax"), 7, "do not make k = 7 groups of one size")
    check_refusal(make_sae("layer_norm"), 39, "k = 39 is more than its 38 latents")
    check_refusal(make_sae("abs_topk"), 41, "between 1 and d_sae")
