"""Other libraries' files, made here in their own layout: what is read computes what they say, and is used in full."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.runtime.files import project_root
from sae_research.saes import SparseAutoencoder, load_sae, save_sae
from sae_research.saes.exchange import export_saes, import_saes
from sae_research.saes.formats.llamascopium import PRESENT_KEYS
from sae_research.saes.layouts import LAYOUTS, open_place, table
from sae_research.saes.sources import folder_names, open_sae
from tests.helpers.random_saes import D_IN, D_SAE, make_sae, random_activations

LEVEL = {"atol": 1e-5, "rtol": 1e-4}


def drawn(**shapes: tuple[int, ...]) -> dict[str, Tensor]:
    """Random tensors by name."""
    g = torch.Generator().manual_seed(11)
    return {name: torch.randn(*shape, generator=g) / 2 for name, shape in shapes.items()}


def matrices(d_out: int = D_IN) -> dict[str, Tensor]:
    return drawn(W_enc=(D_IN, D_SAE), b_enc=(D_SAE,), W_dec=(D_SAE, d_out), b_dec=(d_out,))


def only(path: Path) -> SparseAutoencoder:
    (sae,) = open_place(path).values()
    return sae


def save(path: Path, tensors: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    contiguous = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in contiguous.items()})
    elif path.suffix == ".safetensors":
        safetensors.torch.save_file(contiguous, path)
    else:
        torch.save(contiguous, path)


def refused(path: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_place(path)
    assert "\n" not in str(caught.value)


# --- Gemma Scope -----------------------------------------------------------------------------


def jump(pre: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(pre > threshold, torch.relu(pre), torch.zeros_like(pre))


@pytest.mark.parametrize(
    ("place", "model", "read", "written"),
    [
        ("gemma-scope-9b-it-res/layer_20/width_16k/average_l0_47", "gemma-2-9b-it", "blocks.20.hook_resid_post", ""),
        ("gemma-scope-2b-pt-mlp/layer_3/width_16k/average_l0_7", "gemma-2-2b", "blocks.3.hook_mlp_out", ""),
        (
            "models--google--gemma-scope-2b-pt-att/snapshots/abc/layer_3/width_16k/average_l0_7",
            "gemma-2-2b",
            "blocks.3.attn.hook_z",
            "",
        ),
        (
            "google/gemma-scope-2b-pt-transcoders/layer_5/width_16k/average_l0_7",
            "gemma-2-2b",
            "blocks.5.ln2.hook_normalized",
            "blocks.5.hook_mlp_out",
        ),
    ],
)
def test_gemma_scope(place: str, model: str, read: str, written: str, tmp_path: Path) -> None:
    t, x = matrices() | {"threshold": drawn(t=(D_SAE,))["t"].abs()}, random_activations()
    save(tmp_path / place / "params.npz", t)
    sae = only(tmp_path / place)
    expected = jump(x @ t["W_enc"] + t["b_enc"], t["threshold"])
    torch.testing.assert_close(sae.encode(x), expected * t["W_dec"].norm(dim=1), **LEVEL)
    torch.testing.assert_close(sae.reconstruct(x), expected @ t["W_dec"] + t["b_dec"], **LEVEL)
    assert (sae.cfg.model_name, sae.cfg.hook_name, sae.cfg.hook_out) == (model, read, written or read)
    assert sae.cfg.provenance["format"] == "gemma_scope"
    assert open_sae(tmp_path / place).cfg.hook_name == read


def test_gemma_scope_of_the_embedding(tmp_path: Path) -> None:
    """Trained on the table's rows; the model reads sqrt(d_in) times them."""
    t, x = matrices() | {"threshold": drawn(t=(D_SAE,))["t"].abs()}, random_activations()
    save(tmp_path / "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6/params.npz", t)
    sae = only(tmp_path / "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6")
    expected = jump(x @ t["W_enc"] + t["b_enc"], t["threshold"]) @ t["W_dec"] + t["b_dec"]
    torch.testing.assert_close(sae.reconstruct(x * D_IN**0.5), expected * D_IN**0.5, **LEVEL)
    assert sae.cfg.hook_name == "blocks.0.hook_resid_pre"


def gemma_scope_2(root: Path, skip: bool = True, name: str = "params.safetensors", **config: Any) -> Path:
    folder = root / "gemma-scope-2-1b-it/transcoder_all" / f"layer_4_width_16k_l0_big{'_affine' * skip}"
    return gemma_scope_2_folder(folder, skip, name, **config)


def gemma_scope_2_folder(folder: Path, skip: bool = True, name: str = "params.safetensors", **config: Any) -> Path:
    t = matrices() | {"threshold": drawn(t=(D_SAE,))["t"].abs()}
    spelt = {key.replace("W_", "w_"): tensor for key, tensor in t.items()}
    save(folder / name, spelt | (drawn(affine_skip_connection=(D_IN, D_IN)) if skip else {}))
    values = {
        "architecture": "jump_relu",
        "model_name": "gemma-v3-1b-it",
        "hf_hook_point_in": "model.layers.4.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.4.post_feedforward_layernorm.output",
        "affine_connection": skip,
    }
    (folder / "config.json").write_text(json.dumps(values | config))
    return folder


@pytest.mark.parametrize("name", ["params.safetensors", "params.npz"])
@pytest.mark.parametrize("skip", [True, False])
def test_gemma_scope_2_transcoders(skip: bool, name: str, tmp_path: Path) -> None:
    sae, x = only(gemma_scope_2(tmp_path, skip, name)), random_activations()
    t, threshold = matrices(), drawn(t=(D_SAE,))["t"].abs()
    expected = jump(x @ t["W_enc"] + t["b_enc"], threshold) @ t["W_dec"] + t["b_dec"]
    expected = expected + x @ drawn(s=(D_IN, D_IN))["s"] * skip
    torch.testing.assert_close(sae.reconstruct(x), expected, **LEVEL)
    assert (sae.cfg.hook_name, sae.cfg.hook_out) == ("blocks.4.mlp.hook_in", "blocks.4.hook_mlp_out")
    assert sae.cfg.model_name == "google/gemma-3-1b-it"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"affine_connection": False}, "affine_connection is False, the weights say the opposite"),
        ({"hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output"}, "the folder's name says blocks.4"),
        ({"hf_hook_point_out": "model.layers.4.mlp.output"}, "hf_hook_point_out 'model.layers.4.mlp.output' is not known"),
        ({"architecture": "topk"}, "architecture 'topk' is not known"),
        ({"model_name": "gemma-3-4b-it"}, "model_name is 'gemma-3-4b-it', the folder's name says gemma-3-1b-it"),
    ],
)
def test_gemma_scope_2_contradictions(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(gemma_scope_2(tmp_path, **config), rf"config\.json: .*{message}")


def test_gemma_scope_refusals(tmp_path: Path) -> None:
    t = matrices() | {"threshold": torch.ones(D_SAE)}
    save(tmp_path / "mine" / "params.npz", t)
    refused(tmp_path / "mine", "no folder above them says of which model and hook; keep the repository's own names")
    folder = tmp_path / "gemma-scope-2b-pt-res" / "layer_3"
    save(folder / "params.npz", t | {"scaling": torch.ones(2)})
    refused(folder, "also hold scaling")
    save(folder / "params.npz", {name: tensor for name, tensor in t.items() if name != "threshold"})
    refused(folder, "the weights lack threshold; fetch them again")
    (folder / "params.npz").write_bytes((folder / "params.npz").read_bytes()[:-40])
    refused(folder, r"params\.npz: damaged weights .*; fetch them again")
    np.savez(folder / "params.npz", W_enc=np.array([{"a": 1}], dtype=object))
    refused(folder, "damaged weights .*pickle")
    clt = tmp_path / "gemma-scope-2-1b-pt" / "clt" / "width_262k_l0_big"
    save(clt / "params.safetensors", t)
    refused(clt, "a cross-layer transcoder of Gemma Scope 2 has a file a layer")
    save(gemma_scope_2(tmp_path) / "params.npz", t)
    refused(gemma_scope_2(tmp_path), "holds both params.npz and params.safetensors")


# --- sparsify --------------------------------------------------------------------------------


def sparsify_folder(folder: Path, skip: bool = False, **config: Any) -> Path:
    t = matrices()
    theirs = {"encoder.weight": t["W_enc"].T, "encoder.bias": t["b_enc"], "W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    save(folder / "sae.safetensors", theirs | (drawn(W_skip=(D_IN, D_IN)) if skip else {}))
    values = {
        "activation": "topk",
        "expansion_factor": 32,
        "normalize_decoder": True,
        "num_latents": D_SAE,
        "k": 5,
        "multi_topk": False,
        "skip_connection": skip,
        "transcode": skip,
        "d_in": D_IN,
    }
    (folder / "cfg.json").write_text(json.dumps(values | config))
    (folder.parent / "config.json").write_text(json.dumps({"model": "org/tiny", "ctx_len": 64}))
    return folder


@pytest.mark.parametrize(
    ("name", "skip", "config", "hooks"),
    [
        ("layers.5", False, {}, ("blocks.5.hook_resid_post", "blocks.5.hook_resid_post")),
        ("layers.5.mlp", False, {"activation": "groupmax"}, ("blocks.5.hook_mlp_out", "blocks.5.hook_mlp_out")),
        ("layers.5.mlp", True, {}, ("blocks.5.mlp.hook_in", "blocks.5.hook_mlp_out")),
        ("layers.5.mlp", False, {"transcode": True}, ("blocks.5.mlp.hook_in", "blocks.5.hook_mlp_out")),
        ("model.layers.0.self_attn", False, {}, ("blocks.0.hook_attn_out", "blocks.0.hook_attn_out")),
        ("h.2", False, {"signed": True, "activation": None}, ("blocks.2.hook_resid_post", "blocks.2.hook_resid_post")),
    ],
)
def test_sparsify(name: str, skip: bool, config: dict[str, Any], hooks: tuple[str, str], tmp_path: Path) -> None:
    t, x = matrices(), random_activations()
    sae = only(sparsify_folder(tmp_path / name, skip, **config))
    transcode = skip or config.get("transcode", False)
    pre = (x if transcode else x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]
    if config.get("signed"):
        kept = pre.abs() >= pre.abs().sort(dim=-1, descending=True).values[..., 4:5]
    elif config.get("activation") == "groupmax":
        groups = pre.unflatten(-1, (5, -1))
        kept = (groups == groups.max(dim=-1, keepdim=True).values).flatten(-2) & (pre > 0)
    else:
        kept = (pre >= pre.sort(dim=-1, descending=True).values[..., 4:5]) & (pre > 0)
    z = pre * kept
    torch.testing.assert_close(sae.encode(x), z, **LEVEL)
    expected = z @ t["W_dec"] + t["b_dec"] + (x @ drawn(W_skip=(D_IN, D_IN))["W_skip"].T if skip else 0)
    torch.testing.assert_close(sae.reconstruct(x), expected, **LEVEL)
    assert (sae.cfg.hook_name, sae.cfg.hook_out) == hooks
    assert (sae.cfg.model_name, sae.cfg.context_size) == ("org/tiny", 64)


@pytest.mark.parametrize(("skip", "activation"), [(False, "topk"), (True, "topk"), (False, "groupmax")])
@torch.no_grad()
def test_sparsify_itself_both_ways(skip: bool, activation: str, tmp_path: Path) -> None:
    sparsify = pytest.importorskip("sparsify")
    config = sparsify.SparseCoderConfig(
        activation=activation, num_latents=D_SAE, k=5, skip_connection=skip, transcode=skip, normalize_decoder=False
    )
    theirs, x = sparsify.SparseCoder(D_IN, config), random_activations()
    for parameter in theirs.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 2)
    theirs.save_to_disk(tmp_path / "layers.3.mlp")
    sae = only(tmp_path / "layers.3.mlp")
    flat = x.reshape(-1, D_IN)
    torch.testing.assert_close(sae.reconstruct(x).reshape(-1, D_IN), theirs(flat).sae_out, **LEVEL)
    export_saes(tmp_path / "layers.3.mlp", tmp_path / "out", "sparsify")
    again = sparsify.SparseCoder.load_from_disk(tmp_path / "out" / "layers.3.mlp")
    torch.testing.assert_close(again(flat).sae_out, theirs(flat).sae_out, **LEVEL)


@pytest.mark.parametrize("config", [{}, {"apply_b_dec_to_input": False}, {"hook_name": "blocks.1.hook_attn_out"}])
def test_sparsify_is_written(config: dict[str, Any], tmp_path: Path) -> None:
    sae, x = make_sae("topk", **config), random_activations()
    save_sae(sae, tmp_path / "ours")
    export_saes(tmp_path / "ours", tmp_path / "out", "sparsify")
    (folder,) = (tmp_path / "out").iterdir()
    assert folder.name == ("layers.1.self_attn" if "hook_name" in config else "layers.1")
    back = only(folder)
    torch.testing.assert_close(back.reconstruct(x), sae.reconstruct(x), **LEVEL)
    assert back.cfg.hook_name == sae.cfg.hook_name
    for form, message in (("gated", "sparsify has no form gated"), ("topk", "no module for blocks.1.attn.hook_z")):
        save_sae(make_sae(form, hook_name="blocks.1.attn.hook_z"), tmp_path / form)
        with pytest.raises(UserError, match=message):
            export_saes(tmp_path / form, tmp_path / "x", "sparsify")


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("layers.5", {"skip_connection": True}, "skip_connection is True, the weights say the opposite"),
        ("layers.5", {"activation": "jumprelu"}, "activation 'jumprelu' is not known; known: topk, groupmax"),
        ("layers.5", {"gate": 0.5}, "holds gate, which is not known of sparsify"),
        ("layers.5", {"num_latents": 0}, r"expected \(12, 384\)"),
        ("embed_tokens", {}, "not 'embed_tokens': there is no hook for the embedding"),
        ("mine", {}, "the folder's name must be the module it was trained on"),
        ("layers.5.self_attn", {"transcode": True}, "no hook for what attention is given"),
        ("layers.5", {"k": 50}, "k = 50 must be a whole number between 1 and d_sae"),
    ],
)
def test_sparsify_refusals(name: str, config: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(sparsify_folder(tmp_path / name, **config), message)


# --- Llamascopium ----------------------------------------------------------------------------


def llamascopium_folder(folder: Path, norms: tuple[float, ...] = (3.0,), **config: Any) -> Path:
    """As version 2 saves it: latents are chosen by activation times norm of their row."""
    t, hooks = matrices(), ("blocks.2.hook_resid_post", "blocks.2.hook_mlp_out")[: len(norms)]
    read, written = (hooks[0], hooks[0]) if len(hooks) == 1 else ("blocks.2.mlp.hook_in", hooks[1])
    values = {
        "sae_type": "sae",
        "d_model": D_IN,
        "expansion_factor": D_SAE / D_IN,
        "use_decoder_bias": True,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "top_k": 5,
        "hook_point_in": read,
        "hook_point_out": written,
        "use_glu_encoder": False,
    } | config
    theirs = {"W_E": t["W_enc"], "b_E": t["b_enc"], "W_D": t["W_dec"], "b_D": t["b_dec"]}
    if values["act_fn"] == "jumprelu":
        theirs["activation_function.log_jumprelu_threshold"] = drawn(t=(D_SAE,))["t"] - 2
    for hook, norm in zip((read, written), (*norms, norms[-1]), strict=False):
        theirs[f"dataset_average_activation_norm.{hook}"] = torch.tensor(norm)
    save(folder / "sae_weights.safetensors", theirs)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("norms", [(3.0,), (3.0, 0.5)])
@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk"])
def test_llamascopium(act_fn: str, by_norm: bool, norms: tuple[float, ...], tmp_path: Path) -> None:
    """Its own steps: scale, encode, weigh, choose, weigh back, decode, scale back."""
    sae = only(llamascopium_folder(tmp_path / "a", norms, act_fn=act_fn, sparsity_include_decoder_norm=by_norm))
    t, x = matrices(), random_activations()
    weigh = t["W_dec"].norm(dim=1) if by_norm else torch.ones(D_SAE)
    pre = (x * D_IN**0.5 / norms[0] @ t["W_enc"] + t["b_enc"]) * weigh
    if act_fn == "jumprelu":
        z = pre * (pre > torch.exp(drawn(t=(D_SAE,))["t"] - 2))
    elif act_fn == "topk":
        positive = torch.relu(pre)
        z = positive * (positive >= positive.sort(dim=-1, descending=True).values[..., 4:5])
    else:
        z = torch.relu(pre)
    expected = (z / weigh @ t["W_dec"] + t["b_dec"]) * norms[-1] / D_IN**0.5
    torch.testing.assert_close(sae.reconstruct(x), expected, **LEVEL)
    assert torch.equal(sae.encode(x) > 0, z > 0)
    assert sae.cfg.is_transcoder == (len(norms) == 2)


@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk"])
@torch.no_grad()
def test_llamascopium_itself(act_fn: str, by_norm: bool, tmp_path: Path) -> None:
    """The library's own object, its own files, and its own scaling of what it reads and writes."""
    theirs = pytest.importorskip("llamascopium.models.sae")
    read, written = "blocks.2.mlp.hook_in", "blocks.2.hook_mlp_out"
    config = theirs.SAEConfig(
        d_model=D_IN,
        expansion_factor=3,
        hook_point_in=read,
        hook_point_out=written,
        act_fn=act_fn,
        top_k=5,
        sparsity_include_decoder_norm=by_norm,
        device="cpu",
        dtype=torch.float32,
    )
    assert set(theirs.SAEConfig.model_fields) == PRESENT_KEYS
    sae, x = theirs.SparseAutoEncoder(config), random_activations()
    for name, parameter in sae.named_parameters():
        drawing = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        parameter.copy_(drawing / 2 - 2 * ("threshold" in name))
    sae.set_dataset_average_activation_norm({read: 3.0, written: 0.5})
    sae.save_pretrained(tmp_path)
    config.save_hyperparameters(tmp_path)
    batch, factors = sae.normalize_activations({read: x, written: x}, return_scale_factor=True)
    expected = sae.denormalize_activations({written: sae(batch[read])}, factors)[written]
    ours = only(tmp_path)
    torch.testing.assert_close(ours.reconstruct(x), expected, **LEVEL)
    assert torch.equal(ours.encode(x) > 0, sae.encode(batch[read]) > 0)
    assert (ours.cfg.hook_name, ours.cfg.hook_out) == (read, written)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sae_type": "lorsa"}, "sae_type 'lorsa' is not read"),
        ({"use_glu_encoder": True}, "use_glu_encoder is not read"),
        ({"gate_temperature": 0.5}, "holds gate_temperature, which is not known"),
        ({"act_fn": "batchtopk"}, "act_fn 'batchtopk' is not read: .*save it as JumpReLU in Llamascopium"),
        ({"norm_activation": "token-wise"}, "norm_activation 'token-wise' cannot be folded into the weights: every token"),
        (
            {"hook_point_in": "blocks.3.hook_resid_post"},
            "dataset_average_activation_norm of blocks.3.hook_resid_post is miss",
        ),
        ({"use_decoder_bias": "yes"}, "use_decoder_bias must be true or false"),
        ({"expansion_factor": 2}, r"expected \(12, 24\)"),
    ],
)
def test_llamascopium_refusals(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(llamascopium_folder(tmp_path / "a", **config), message)


# --- single checkpoints, OpenAI, circuit-tracer, temporal ------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("activation", "k"), [("ReLU", None), ("TopK", 5)])
def test_openai(activation: str, k: int | None, tied: bool, tmp_path: Path) -> None:
    t, x = matrices(), 3 * random_activations() + 1
    if tied:
        t["W_dec"] = t["W_enc"].T
    path = tmp_path / "resid_post_mlp_v5_32k" / "autoencoders" / "8.pt"
    path.parent.mkdir(parents=True)
    decoder = {"decoder.linear.weight": t["W_enc"].T} if tied else {"decoder.weight": t["W_dec"].T}
    checkpoint = {
        "pre_bias": t["b_dec"],
        "encoder.weight": t["W_enc"].T,
        "latent_bias": t["b_enc"],
        "stats_last_nonzero": torch.zeros(D_SAE, dtype=torch.long),
        "latents_activation_frequency": torch.ones(D_SAE),
        "latents_mean_square": torch.zeros(D_SAE),
        "activation": activation,
        "activation_state_dict": {} if k is None else {"k": k, "postact_fn": "ReLU"},
        **decoder,
    }
    torch.save(checkpoint, path)
    sae = only(path)
    mean, size, read = 0.0, 1.0, x
    if k is not None:
        mean, size = x.mean(-1, keepdim=True), (x - x.mean(-1, keepdim=True)).std(-1, keepdim=True)
        read = (x - mean) / (size + 1e-5)
    z = torch.relu((read - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
    z = z if k is None else z * (z >= z.sort(dim=-1, descending=True).values[..., k - 1 : k])
    torch.testing.assert_close(sae.reconstruct(x), (z @ t["W_dec"] + t["b_dec"]) * size + mean, atol=1e-4, rtol=1e-4)
    assert (sae.cfg.model_name, sae.cfg.hook_name) == ("gpt2", "blocks.8.hook_resid_post")
    assert only(path.parent).cfg.hook_name == sae.cfg.hook_name
    torch.save(checkpoint | {"activation": "GELU"}, path)
    refused(path, "activation 'GELU' with .* is not known; known: ReLU, TopK over ReLU")
    torch.save(checkpoint | {"further": torch.ones(1)}, path)
    refused(path, "also hold further")
    moved = tmp_path / "resid_post_attn" / "autoencoders" / "8.pt"
    moved.parent.mkdir(parents=True)
    torch.save(checkpoint, moved)
    refused(moved, "resid_post_attn has no hook here; take one of")


def linear_names(infix: str) -> dict[str, Tensor]:
    t = matrices()
    return {
        f"encoder{infix}.weight": t["W_enc"].T,
        f"encoder{infix}.bias": t["b_enc"],
        f"decoder{infix}.weight": t["W_dec"].T,
        f"decoder{infix}.bias": t["b_dec"],
    }


@pytest.mark.parametrize(
    ("name", "infix", "model"),
    [
        ("Llama-3.1-8B-Instruct-SAE-l19.pth", "_linear", "meta-llama/Llama-3.1-8B-Instruct"),
        ("Llama-3.3-70B-Instruct-SAE-l50.pt", "_linear", "meta-llama/Llama-3.3-70B-Instruct"),
        ("DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", "", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"),
    ],
)
def test_published_checkpoints(name: str, infix: str, model: str, tmp_path: Path) -> None:
    t, x = matrices(), random_activations()
    save(tmp_path / name, linear_names(infix))
    sae = only(tmp_path / name)
    expected = torch.relu(x @ t["W_enc"] + t["b_enc"]) @ t["W_dec"] + t["b_dec"]
    torch.testing.assert_close(sae.reconstruct(x), expected, **LEVEL)
    layer = re.findall(r"-l([0-9]+)", name)[0]
    assert (sae.cfg.model_name, sae.cfg.hook_name) == (model, f"blocks.{layer}.hook_resid_post")
    assert only(tmp_path).cfg == sae.cfg
    save(tmp_path / name, linear_names("_linear" if not infix else ""))
    refused(tmp_path / name, "the weights lack .* and also hold")


def test_qwen_scope_and_kissane(tmp_path: Path) -> None:
    t, x = matrices(), random_activations()
    path = tmp_path / "SAE-Res-Qwen3-1.7B-Base-W32K-L0_5" / "layer7.sae.pt"
    save(path, t | {"W_enc": t["W_enc"].T, "W_dec": t["W_dec"].T})
    sae = only(path)
    positive = torch.relu(x @ t["W_enc"] + t["b_enc"])
    z = positive * (positive >= positive.sort(dim=-1, descending=True).values[..., 4:5])
    torch.testing.assert_close(sae.reconstruct(x), z @ t["W_dec"] + t["b_dec"], **LEVEL)
    assert (sae.cfg.model_name, sae.cfg.hook_name) == ("Qwen/Qwen3-1.7B-Base", "blocks.7.hook_resid_post")
    save(tmp_path / "mine" / "layer7.sae.pt", t)
    refused(tmp_path / "mine", "no folder above says of which model; keep the repository's name")
    path = tmp_path / "k" / "gpt2-small_L5_Hcat_z_lr1.20e-03_v9.pt"
    save(path, t)
    config = path.with_name("gpt2-small_L5_Hcat_z_lr1.20e-03_v9_cfg.json")
    config.write_text(json.dumps({"act_name": "blocks.5.attn.hook_z", "act_size": D_IN, "dict_size": D_SAE, "lr": 1e-3}))
    sae = only(path)
    expected = torch.relu((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"]) @ t["W_dec"] + t["b_dec"]
    torch.testing.assert_close(sae.reconstruct(x), expected, **LEVEL)
    config.write_text(config.read_text().replace("blocks.5", "blocks.6"))
    refused(path, "act_name is blocks.6.attn.hook_z, the file's name says layer 5")
    config.unlink()
    refused(path, "_cfg.json: no such file")


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("threshold", [None, (D_SAE,), (1,)])
def test_circuit_tracer(threshold: tuple[int, ...] | None, skip: bool, tmp_path: Path) -> None:
    t, x = matrices(9), random_activations()
    further = {"W_skip": drawn(W_skip=(9, D_IN))["W_skip"]} if skip else {}
    if threshold:
        further["activation_function.threshold"] = drawn(t=threshold)["t"].abs()
    for layer in (3, 4):
        save(tmp_path / f"layer_{layer}.safetensors", t | {"W_enc": t["W_enc"].T} | further)
    about = {"model_name": "org/tiny", "feature_input_hook": "hook_mlp_in", "feature_output_hook": "hook_mlp_out"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(about))
    refused(tmp_path, r"holds 2 of them .*; name one: .*layer_3\.safetensors")
    sae = only(tmp_path / "layer_4.safetensors")
    pre = x @ t["W_enc"] + t["b_enc"]
    z = jump(pre, further["activation_function.threshold"]) if threshold else torch.relu(pre)
    expected = z @ t["W_dec"] + t["b_dec"] + (x @ further["W_skip"].T if skip else 0)
    torch.testing.assert_close(sae.reconstruct(x), expected, **LEVEL)
    assert (sae.cfg.hook_name, sae.cfg.hook_out) == ("blocks.4.hook_mlp_in", "blocks.4.hook_mlp_out")
    (tmp_path / "config.yaml").unlink()
    refused(tmp_path / "layer_4.safetensors", r"config\.yaml: model_name is missing")


def test_layer_0_of_a_cross_layer_transcoder_is_exact(tmp_path: Path) -> None:
    """What it writes at layer 0 is a sum of one term."""
    t, x = matrices(), random_activations()
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"model_name": "org/tiny", "feature_input_hook": "hook_resid_mid"}))
    for layer in (0, 1):
        encoder = {f"{name}_{layer}": t[name] for name in ("b_enc", "b_dec")} | {f"W_enc_{layer}": t["W_enc"].T}
        save(tmp_path / f"W_enc_{layer}.safetensors", encoder)
        later = drawn(other=(D_SAE, D_IN))["other"]
        rows = torch.stack([t["W_dec"], later][: 2 - layer], dim=1)
        save(tmp_path / f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": rows})
    sae = only(tmp_path / "W_enc_0.safetensors")
    expected = torch.relu(x @ t["W_enc"] + t["b_enc"]) @ t["W_dec"] + t["b_dec"]
    torch.testing.assert_close(sae.reconstruct(x), expected, **LEVEL)
    assert sae.cfg.hooks == "blocks.0.hook_mlp_in -> blocks.0.hook_mlp_out"
    assert only(tmp_path / "W_enc_1.safetensors").cfg.is_part
    (tmp_path / "W_dec_0.safetensors").unlink()
    refused(tmp_path / "W_enc_0.safetensors", r"W_dec_0\.safetensors: no such file")


# --- what holds for all ----------------------------------------------------------------------


@pytest.mark.parametrize("form", ["standard", "gated", "signed_hard_concrete", "gated_hard_concrete"])
@pytest.mark.parametrize("config", [{}, {"apply_b_dec_to_input": False}])
@pytest.mark.parametrize("unit", [True, False])
def test_sae_interpretability_is_written(form: str, config: dict[str, Any], unit: bool, tmp_path: Path) -> None:
    sae, x = make_sae(form, unit=unit, **config), random_activations()
    save_sae(sae, tmp_path / "ours")
    export_saes(tmp_path / "ours", tmp_path / "run", "sae_interpretability")
    back = only(tmp_path / "run")
    torch.testing.assert_close(back.reconstruct(x), sae.reconstruct(x), **LEVEL)
    torch.testing.assert_close(back.encode(x), sae.encode(x) * sae.W_dec.norm(dim=1), **LEVEL)
    assert (back.cfg.hook_name, back.cfg.model_name) == (sae.cfg.hook_name, sae.cfg.model_name)
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    assert sorted(before) == ["final_config.yaml", "samples_0.pt"]
    export_saes(tmp_path / "ours", tmp_path / "again", "sae_interpretability")
    assert {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()} == before


def test_sae_interpretability_lacks_the_others(tmp_path: Path) -> None:
    save_sae(make_sae("topk"), tmp_path / "topk")
    with pytest.raises(UserError, match="SAE-Interpretability has no class for the form topk"):
        export_saes(tmp_path / "topk", tmp_path / "out", "sae_interpretability")


def two_formats(root: Path) -> dict[str, Path]:
    both = sparsify_folder(root / "a" / "layers.1")
    save_sae(make_sae("standard"), both)
    gemma = gemma_scope_2(root)
    save(gemma / "sae_weights.safetensors", matrices())
    return {r"SAELens: cfg\.json, sae_weights\.safetensors; sparsify: sae\.safetensors": both, "Llamascopium": gemma}


def test_what_looks_like_two_formats(tmp_path: Path) -> None:
    for message, folder in two_formats(tmp_path).items():
        refused(folder, f"looks like 2 formats .*{message}")


@pytest.mark.parametrize("make", [sparsify_folder, llamascopium_folder])
def test_half_downloads_and_pointers(make: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = make(tmp_path / "layers.1")
    (weights,) = folder.glob("*.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    refused(folder, rf"{weights.name}: damaged weights .*; make or fetch them again")
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    refused(folder, "a pointer of Git LFS, not the weights; run `git lfs pull` there")


def test_an_unfinished_download(tmp_path: Path) -> None:
    folder = gemma_scope_2(tmp_path)
    weights = folder / "params.safetensors"
    weights.rename(folder / "params.safetensors.incomplete")
    with pytest.raises(UserError, match=r"only an unfinished download is there \(params\.safetensors\.incomplete\)"):
        open_sae(folder)


def test_all_are_imported_from_one_place(tmp_path: Path) -> None:
    sparsify_folder(tmp_path / "all" / "layers.5.mlp", skip=True)
    gemma_scope_2(tmp_path / "all")
    (tmp_path / "all" / "config.json").unlink()
    written = import_saes(tmp_path / "all", tmp_path / "ours")
    assert len(written) == 2 and all(load_sae(folder).cfg.is_transcoder for folder in written)


def test_files_of_one_folder_are_several(tmp_path: Path) -> None:
    t = matrices()
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "config.yaml").write_text(yaml.safe_dump({"model_name": "org/tiny"}))
    for layer in (0, 1):
        save(tmp_path / "set" / f"layer_{layer}.safetensors", t | {"W_enc": t["W_enc"].T})
    written = import_saes(tmp_path / "set", tmp_path / "ours")
    assert [folder.name for folder in written] == ["layer_0", "layer_1"]
    assert [load_sae(folder).cfg.hook_layer for folder in written] == [0, 1]
    names = folder_names([str(tmp_path / "set" / "layer_*.safetensors")])
    assert sorted(names.values()) == ["layer_0", "layer_1"]
    assert len(import_saes(tmp_path / "set" / "layer_1.safetensors", tmp_path / "one")) == 1
    assert load_sae(tmp_path / "one").cfg.hook_layer == 1


def test_the_table_of_formats() -> None:
    """`docs/formats.md` has what the records say; `python -m sae_research.saes.layouts` prints it."""
    assert table() in (project_root() / "docs" / "formats.md").read_text()
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)
