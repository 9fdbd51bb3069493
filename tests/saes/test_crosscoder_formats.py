"""Other libraries' crosscoders, made here in their own layout: what is read computes what they say, and is used in full."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_research.lm.hooks import parse_hook
from sae_research.runtime.errors import UserError
from sae_research.saes import load_sae, save_sae
from sae_research.saes.crosscoders import decoder_norm_ratios
from sae_research.saes.formats.llamascopium import CROSSCODER_KEYS
from tests.saes.test_formats import LEVEL, drawn, only, refused, save

D, F = 4, 20
HOOKS = ["blocks.1.hook_resid_post", "blocks.2.hook_mlp_out", "blocks.4.hook_resid_post"]
NORMS = (3.0, 0.5, 7.0)


def activations(n: int) -> Tensor:
    """[tokens, n, D]"""
    return torch.randn(2, 9, n, D, generator=torch.Generator().manual_seed(5))


def sides(x: Tensor) -> Tensor:
    return x.flatten(-2)


# --- Llamascopium ----------------------------------------------------------------------------


def llamascopium_folder(folder: Path, **config: Any) -> Path:
    n = len(HOOKS)
    t = drawn(W_E=(n, D, F), b_E=(n, F), W_D=(n, F, D), b_D=(n, D))
    values = {
        "sae_type": "crosscoder",
        "d_model": D,
        "expansion_factor": F / D,
        "use_decoder_bias": True,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "top_k": 5,
        "use_triton_kernel": False,
        "hook_points": HOOKS,
    } | config
    if values["act_fn"] == "jumprelu":
        t["activation_function.log_jumprelu_threshold"] = drawn(t=(F,))["t"] - 1
    for hook, norm in zip(HOOKS, NORMS, strict=True):
        t[f"dataset_average_activation_norm.{hook}"] = torch.tensor(norm)
    save(folder / "sae_weights.safetensors", t)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("act_fn", ["relu", "jumprelu"])
def test_llamascopium(act_fn: str, scaled: bool, tmp_path: Path) -> None:
    norm = "dataset-wise" if scaled else "inference"
    sae = only(llamascopium_folder(tmp_path / "a", act_fn=act_fn, norm_activation=norm))
    n = len(HOOKS)
    t, x = drawn(W_E=(n, D, F), b_E=(n, F), W_D=(n, F, D), b_D=(n, D)), activations(n)
    factors = [D**0.5 / own if scaled else 1.0 for own in NORMS]
    pre = sum((x[..., h, :] * factors[h]) @ t["W_E"][h] + t["b_E"][h] for h in range(n))
    threshold = torch.exp(drawn(t=(F,))["t"] - 1) if act_fn == "jumprelu" else torch.zeros(F)
    fires = torch.stack([pre * t["W_D"][h].norm(dim=1) > threshold for h in range(n)], dim=-2)
    expected = torch.stack([((pre * fires[..., h, :]) @ t["W_D"][h] + t["b_D"][h]) / factors[h] for h in range(n)], dim=-2)
    torch.testing.assert_close(sae.reconstruct(sides(x)), sides(expected), **LEVEL)
    assert torch.equal(sae.encode(sides(x)) > 0, sides(fires) if act_fn == "jumprelu" else fires[..., 0, :])
    assert sae.cfg.hook_names == tuple(HOOKS) and sae.cfg.hook_scales == pytest.approx(factors)
    save_sae(sae, tmp_path / "ours")
    torch.testing.assert_close(load_sae(tmp_path / "ours").reconstruct(sides(x)), sides(expected), **LEVEL)


@pytest.mark.parametrize("act_fn", ["relu", "jumprelu"])
@torch.no_grad()
def test_llamascopium_itself(act_fn: str, tmp_path: Path) -> None:
    """The library's own object, its own files, and its own scaling of what it reads and writes."""
    theirs = pytest.importorskip("llamascopium.models.crosscoder")
    config = theirs.CrosscoderConfig(
        d_model=D, expansion_factor=3, hook_points=HOOKS, act_fn=act_fn, device="cpu", dtype=torch.float32
    )
    assert set(theirs.CrosscoderConfig.model_fields) == CROSSCODER_KEYS
    sae, x = theirs.Crosscoder(config), activations(len(HOOKS))
    for name, parameter in sae.named_parameters():
        drawing = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        parameter.copy_(drawing / 2 - float("threshold" in name))
    sae.set_dataset_average_activation_norm(dict(zip(HOOKS, NORMS, strict=True)))
    sae.save_pretrained(tmp_path)
    config.save_hyperparameters(tmp_path)
    batch = {hook: x[..., number, :] for number, hook in enumerate(HOOKS)}
    scaled, factors = sae.normalize_activations(batch, return_scale_factor=True)
    read = torch.stack([scaled[hook] for hook in HOOKS], dim=-2)
    written = sae(read)
    expected = [written[..., number, :] / factors[hook] for number, hook in enumerate(HOOKS)]
    ours = only(tmp_path)
    torch.testing.assert_close(ours.reconstruct(sides(x)), torch.cat(expected, dim=-1), **LEVEL)
    if act_fn == "jumprelu":
        assert torch.equal(ours.encode(sides(x)) > 0, sides(sae.encode(read) > 0))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"act_fn": "topk"}, "act_fn 'topk' of a crosscoder chooses latents at each hook; save it as JumpReLU"),
        ({"act_fn": "relu"}, r"sae_weights.safetensors: the weights also hold activation_function.log_jumprelu_threshold"),
        ({"hook_points": HOOKS[:2]}, r"W_enc has shape \(3, 4, 20\), expected \(2, 4, 20\) for 2 hooks"),
        ({"hook_points": HOOKS[0]}, "hook_points must be a list of two or more hooks"),
        ({"hook_points": [*HOOKS[:2], "blocks.9.hook_resid_post"]}, "norm of blocks.9.hook_resid_post is missing"),
        ({"hook_point_in": HOOKS[0]}, "holds hook_point_in, which is not known"),
        ({"norm_activation": "token-wise"}, "cannot be folded into the weights: every token"),
        ({"sparsity_include_decoder_norm": False}, "sparsity_include_decoder_norm must be true for a crosscoder"),
    ],
)
def test_llamascopium_refusals(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = llamascopium_folder(tmp_path / "a")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | config))
    refused(folder, message)


# --- dictionary_learning ---------------------------------------------------------------------

KINDS = ("CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED")


def dictionary_learning_folder(folder: Path, kind: str = "", n: int = 2, hub: bool = False, **changes: Any) -> Path:
    """kind: of a `BatchTopKCrossCoder`; a `CrossCoder` where empty."""
    t = crosscoder_tensors(n)
    if kind:
        t |= {"k": torch.tensor(4, dtype=torch.int32), "threshold": torch.tensor(0.7)}
        t["threshold"] = torch.linspace(0.4, 0.9, n) if kind == "DECOUPLED" else t["threshold"]
    t["code_normalization_id"] = torch.tensor(KINDS.index(kind or "CROSSCODER") + 1)
    trainer = {
        "dict_class": "BatchTopKCrossCoder" if kind else "CrossCoder",
        "trainer_class": "BatchTopKCrossCoderTrainer",
        "activation_dim": D,
        "dict_size": F,
        "layer": 3,
        "lm_name": "pythia-70m-chat-pythia-70m",
        "code_normalization": kind or "CROSSCODER",
        "code_normalization_alpha_sae": 0.5,
        "code_normalization_alpha_cc": 0.2,
    }
    values: dict[str, Any] = {"trainer": trainer, "buffer": {}}
    if hub:
        values = {"activation_dim": D, "dict_size": F, "num_layers": n, "code_normalization": kind or "CROSSCODER"}
    save(folder / ("model.safetensors" if hub else "ae.pt"), t)
    values |= {key: value for key, value in changes.items() if key == "hook_names"}
    (values if hub else trainer).update({key: value for key, value in changes.items() if key != "hook_names"})
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def crosscoder_tensors(n: int) -> dict[str, Tensor]:
    shapes = {"encoder.weight": (n, D, F), "encoder.bias": (F,), "decoder.weight": (n, F, D), "decoder.bias": (n, D)}
    return drawn(**shapes)


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize("kind", ["", *KINDS])
def test_dictionary_learning(kind: str, hub: bool, tmp_path: Path) -> None:
    """Its own steps: ReLU of the sum over layers; kept where it exceeds the threshold times a norm of the decoders."""
    n = 3
    alphas = {"code_normalization_alpha_sae": 0.5, "code_normalization_alpha_cc": 0.2} if hub else {}
    sae = only(dictionary_learning_folder(tmp_path / "a", kind, n, hub, hook_names=HOOKS, **alphas))
    t, x = crosscoder_tensors(n), activations(n)
    w = t["decoder.weight"]
    f = torch.relu(torch.einsum("btld,ldf->btf", x, t["encoder.weight"]) + t["encoder.bias"])
    summed, alike = w.norm(dim=2).sum(0), w.norm(dim=(0, 2))
    weights = {"CROSSCODER": summed, "SAE": alike, "MIXED": 0.5 * alike + 0.2 * summed, "NONE": torch.ones(F)}
    each = f[..., None, :].expand(*f.shape[:2], n, F)
    if kind == "DECOUPLED":
        each = each * (each * w.norm(dim=2) > torch.linspace(0.4, 0.9, n)[:, None])
    elif kind:
        each = each * (each * weights[kind] > 0.7)
    expected = torch.einsum("btlf,lfd->btld", each, w) + t["decoder.bias"]
    torch.testing.assert_close(sae.reconstruct(sides(x)), sides(expected), **LEVEL)
    assert torch.equal(sae.encode(sides(x)) > 0, (sides(each) if kind == "DECOUPLED" else each[..., 0, :]) > 0)
    assert sae.cfg.hook_names == tuple(HOOKS) and sae.cfg.provenance["format"] == "dictionary_learning"
    if kind != "DECOUPLED":
        torch.testing.assert_close(decoder_norm_ratios(sae), w.norm(dim=2) / summed)
    save_sae(sae, tmp_path / "ours")
    torch.testing.assert_close(load_sae(tmp_path / "ours").reconstruct(sides(x)), sides(expected), **LEVEL)


def test_dictionary_learning_of_two_models(tmp_path: Path) -> None:
    sae = only(dictionary_learning_folder(tmp_path / "a", submodule_name="resid_post_layer_3"))
    hook = "blocks.3.hook_resid_post"
    assert sae.cfg.hook_names == (f"base {hook}", f"finetuned {hook}")
    with pytest.raises(UserError, match="of one of two models: a crosscoder of a base model and its finetune"):
        parse_hook(sae.cfg.hook_names[0])
    state = torch.load(tmp_path / "a/ae.pt", weights_only=True)
    torch.save({f"_orig_mod.{name}": tensor for name, tensor in state.items()}, tmp_path / "a/ae.pt")
    torch.testing.assert_close(only(tmp_path / "a").W_dec, sae.W_dec)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 3}, r"config.json: does not say what its 3 layers are; add hook_names"),
        ({"hub": True}, "does not say what its 2 layers are; add hook_names"),
        ({"hook_names": HOOKS}, "hook_names must be a list of 2 hooks"),
        ({"hook_names": ["layer 3", "layer 4"]}, "the hook 'layer 3' is not known"),
        ({"dict_class": "BatchTopKCrossCoder"}, "ae.pt: lacks a threshold, and dict_class is BatchTopKCrossCoder"),
        ({"dict_size": 10}, "encoder.weight has 20 for dict_size, config.json says 10"),
        ({"kind": "SAE", "code_normalization": "NONE"}, "code_normalization_id is SAE's, config.json says NONE"),
        ({"code_normalization": "MINE"}, "code_normalization 'MINE' is not known"),
        ({"num_decoder_layers": 1}, "num_decoder_layers is not read"),
    ],
)
def test_dictionary_learning_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(dictionary_learning_folder(tmp_path / "a", **changes), message)


def test_dictionary_learning_tensors_that_are_not_read(tmp_path: Path) -> None:
    folder = dictionary_learning_folder(tmp_path / "a")
    save(folder / "ae.pt", crosscoder_tensors(2) | {"target_rms": torch.tensor(1.0)})
    refused(folder, "ae.pt: the weights also hold target_rms")


# --- Gemma Scope 2 ---------------------------------------------------------------------------

LAYERS, PER_LAYER = (7, 13, 17), 10


def gemma_scope_part(index: int) -> dict[str, Tensor]:
    """The latents that read one layer; no decoders into layers before it."""
    shapes = {"w_enc": (D, PER_LAYER), "b_enc": (PER_LAYER,), "w_dec": (PER_LAYER, 3, D), "b_dec": (D,)}
    g = torch.Generator().manual_seed(index)
    t = {name: torch.randn(*shape, generator=g) / 2 for name, shape in shapes.items()}
    t["w_dec"][:, :index] = 0
    return t | {"threshold": torch.rand(PER_LAYER, generator=g)}


GEMMA = "google/gemma-scope-2-1b-pt/crosscoder/layer_7_13_17_width_16k_l0_medium"


def gemma_scope_folder(folder: Path, **config: Any) -> Path:
    for index in range(len(LAYERS)):
        save(folder / f"params_layer_{index}.safetensors", gemma_scope_part(index))
    values = {
        "hf_hook_point_in": "model.layers.{7,13,17}.output",
        "hf_hook_point_out": "model.layers.{7,13,17}.output",
        "width": 3 * PER_LAYER,
        "model_name": "google/gemma-3-1b-pt",
        "architecture": "jump_relu",
        "l0": 50,
        "affine_connection": False,
        "type": "crosscoder",
    } | config
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def test_gemma_scope_2(tmp_path: Path) -> None:
    """Each layer's latents from its own activations; what they write added up over the layers that they come from."""
    sae, x = only(gemma_scope_folder(tmp_path / GEMMA)), activations(3)
    expected, fires = torch.zeros_like(x), []
    for index in range(3):
        t = gemma_scope_part(index)
        pre = x[..., index, :] @ t["w_enc"] + t["b_enc"]
        z = torch.relu(pre) * (pre > t["threshold"])
        fires.append(z > 0)
        expected += torch.einsum("btf,fld->btld", z, t["w_dec"])
        expected[..., index, :] += t["b_dec"]
    torch.testing.assert_close(sae.reconstruct(sides(x)), sides(expected), **LEVEL)
    assert torch.equal(sae.encode(sides(x)) > 0, torch.cat(fires, dim=-1))
    assert sae.cfg.hook_names == tuple(f"blocks.{layer}.hook_resid_post" for layer in LAYERS)
    assert (sae.cfg.model_name, sae.cfg.provenance["held_out"]) == ("google/gemma-3-1b-pt", {"l0": 50.0})
    (tmp_path / GEMMA / "config.json").unlink()
    assert only(tmp_path / GEMMA).cfg.d_sae == 30


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hf_hook_point_out": "model.layers.{7,13,18}.output"}, "hf_hook_point_out is .*says otherwise"),
        ({"hf_hook_point_in": "model.layers.7.output"}, "hf_hook_point_in .* is not known; known: model.layers.{7,13"),
        ({"name": "layer_7_13_22_width_16k_l0_medium"}, "hf_hook_point_in is .*the folder's name .*says otherwise"),
        ({"width": 10}, "width is 10, the weights have 30 latents"),
        ({"model_name": "google/gemma-3-4b-pt"}, "model_name is 'gemma-3-4b-pt', the folder's name says gemma-3-1b-pt"),
        ({"type": "clt"}, "type 'clt' is not read of a crosscoder"),
        ({"affine_connection": True}, "affine_connection of a crosscoder is not read"),
        ({"architecture": "topk"}, "architecture 'topk' is not read"),
    ],
)
def test_gemma_scope_2_refusals(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    place = Path(GEMMA).with_name(config.pop("name", Path(GEMMA).name))
    refused(gemma_scope_folder(tmp_path / place, **config), message)


def test_gemma_scope_2_files_that_do_not_fit(tmp_path: Path) -> None:
    folder = gemma_scope_folder(tmp_path / GEMMA)
    extra = folder / "params_layer_3.safetensors"
    save(extra, gemma_scope_part(2))
    refused(folder, "params_layer_3.safetensors: one more file than the 3 layers")
    extra.unlink()
    save(folder / "params_layer_1.safetensors", gemma_scope_part(1) | {"mean": torch.zeros(D)})
    refused(folder, "params_layer_1.safetensors: the weights also hold mean")
    part = gemma_scope_part(1)
    save(folder / "params_layer_1.safetensors", part | {"w_dec": part["w_dec"][:, :2]})
    refused(folder, r"params_layer_1.safetensors: w_dec has shape \(10, 2, 4\), expected \(10, 3, 4\)")
    (folder / "params_layer_1.safetensors").unlink()
    refused(folder, "params_layer_1.safetensors")
