"""Files of cross-layer transcoders: made here in each library's own layout, against a plain reference and, where the library
is installed, against its own objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.saes import SparseAutoencoder, load_sae, save_sae
from sae_research.saes.cross_layer import CrossLayerTranscoder
from sae_research.saes.exchange import import_saes
from sae_research.saes.files import sae_lens_lacks
from sae_research.saes.formats.llamascopium_cross_layer import CROSS_LAYER_KEYS
from sae_research.saes.sources import open_sae
from tests.saes.test_formats import only, refused, save

N, D, F = 3, 12, 20
LEVEL: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def weights(seed: int = 0) -> dict[str, Any]:
    """By name; `W_dec[l][m]` from layer l into layer m."""
    g = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g) / 3

    return {
        "W_enc": drawn(N, D, F),
        "b_enc": drawn(N, F),
        "threshold": drawn(N, F).abs(),
        "W_dec": {layer: {written: drawn(F, D) for written in range(layer, N)} for layer in range(N)},
        "b_dec": drawn(N, D),
        "W_skip": drawn(N, D, D),
    }


def activations() -> Tensor:
    """[2, 5, layers, D]"""
    return torch.randn(2, 5, N, D, generator=torch.Generator().manual_seed(9))


def plain(w: dict[str, Any], z: Tensor) -> Tensor:
    """What is written [2, 5, layers, D] by latents z [2, 5, layers, F], a pair of layers at a time."""
    out = w["b_dec"].expand(2, 5, N, D).clone()
    for layer, rows in w["W_dec"].items():
        for written, matrix in rows.items():
            out[:, :, written] += z[:, :, layer] @ matrix
    return out


def pre_activations(w: dict[str, Any], x: Tensor) -> Tensor:
    return torch.einsum("bsld,ldf->bslf", x, w["W_enc"]) + w["b_enc"]


def hooks(kind: str, first: int = 0) -> str:
    return " + ".join(f"blocks.{layer}.{kind}" for layer in range(first, N))


def of(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    return sae.reconstruct(x.flatten(-2)).unflatten(-1, (N, D))


# --- circuit-tracer --------------------------------------------------------------------------


def circuit_tracer_folder(folder: Path, w: dict[str, Any], thresholds: bool = False) -> Path:
    for layer in range(N):
        encoder = {
            f"W_enc_{layer}": w["W_enc"][layer].T,
            f"b_enc_{layer}": w["b_enc"][layer],
            f"b_dec_{layer}": w["b_dec"][layer],
        }
        if thresholds:
            encoder[f"threshold_{layer}"] = w["threshold"][layer]
        save(folder / f"W_enc_{layer}.safetensors", encoder)
        rows = torch.stack([w["W_dec"][layer][written] for written in range(layer, N)], dim=1)
        save(folder / f"W_dec_{layer}.safetensors", {f"W_dec_{layer}": rows})
    about = {"model_name": "org/tiny", "model_kind": "cross_layer_transcoder", "feature_input_hook": "hook_resid_mid"}
    (folder / "config.yaml").write_text(yaml.safe_dump(about))
    return folder


@pytest.mark.parametrize("thresholds", [False, True])
def test_circuit_tracer(thresholds: bool, tmp_path: Path) -> None:
    w, x = weights(), activations()
    sae = only(circuit_tracer_folder(tmp_path, w, thresholds))
    pre = pre_activations(w, x)
    z = pre * (pre > w["threshold"]) if thresholds else torch.relu(pre)
    torch.testing.assert_close(of(sae, x), plain(w, z), **LEVEL)
    torch.testing.assert_close(sae.encode(x.flatten(-2)), z.flatten(-2), **LEVEL)
    assert (sae.cfg.hook_name, sae.cfg.hook_out) == (hooks("hook_mlp_in"), hooks("hook_mlp_out"))
    assert sae.cfg.model_name == "org/tiny" and sae.cfg.is_cross_layer and not sae.cfg.is_part
    assert sae.cfg.architecture == ("jumprelu_cross_layer" if thresholds else "relu_cross_layer")


def test_one_layer_of_circuit_tracers(tmp_path: Path) -> None:
    """Latents of the whole; SAELens' loader gives the same ones, and warns that what it decodes stands for nothing."""
    w, x = weights(), activations()
    circuit_tracer_folder(tmp_path, w)
    for layer in (1, 2):
        part = only(tmp_path / f"W_enc_{layer}.safetensors")
        z = torch.relu(pre_activations(w, x))[:, :, layer]
        torch.testing.assert_close(part.encode(x[:, :, layer]), z, **LEVEL)
        assert part.cfg.is_part and part.cfg.kind == "cross-layer transcoder's layer"
        assert (part.cfg.hook_name, part.cfg.hook_out) == (f"blocks.{layer}.hook_mlp_in", hooks("hook_mlp_out", layer))
        share = part.decode(z).unflatten(-1, (N - layer, D))
        for written in range(layer, N):
            own = z @ w["W_dec"][layer][written] + (w["b_dec"][layer] if written == layer else 0)
            torch.testing.assert_close(share[:, :, written - layer], own, **LEVEL)
        save_sae(part, tmp_path / "ours")
        assert torch.equal(load_sae(tmp_path / "ours").encode(x[:, :, layer]), part.encode(x[:, :, layer]))
        assert load_sae(tmp_path / "ours").cfg.is_part
    first = only(tmp_path / "W_enc_0.safetensors")
    assert not first.cfg.is_cross_layer and first.cfg.hooks == "blocks.0.hook_mlp_in -> blocks.0.hook_mlp_out"


def test_sae_lens_loads_the_same_latents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaders = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders")
    circuit_tracer_folder(tmp_path, weights())
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"model_name": "tiny", "feature_input_hook": "hook_mlp_in", "feature_output_hook": "hook_mlp_out"})
    )
    monkeypatch.setattr(loaders, "hf_hub_download", lambda _, name, **__: str(tmp_path / name))
    shapes = {"W_enc_1": (F, D), "b_enc_1": (F,), "b_dec_1": (D,)}
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda *_: shapes)
    with pytest.warns(UserWarning, match="only be used to find feature activations"):
        _, state, _ = loaders.mntss_clt_layer_huggingface_loader("org/tiny", "1")
    x = activations()[:, :, 1]
    theirs = torch.relu(x @ state["W_enc"] + state["b_enc"])
    torch.testing.assert_close(only(tmp_path / "W_enc_1.safetensors").encode(x), theirs, **LEVEL)


def test_what_circuit_tracer_folders_lack(tmp_path: Path) -> None:
    circuit_tracer_folder(tmp_path, weights(), thresholds=True)
    path = tmp_path / "W_enc_1.safetensors"
    good = path.read_bytes()
    w = weights()
    encoder = {"W_enc_1": w["W_enc"][1].T, "b_enc_1": w["b_enc"][1], "b_dec_1": w["b_dec"][1]}
    for tensors, message in (
        (encoder, "threshold has shape None, layer 0's"),
        (encoder | {"threshold_1": -w["threshold"][1]}, "thresholds below 0"),
        (encoder | {"threshold_1": w["threshold"][1], "bias_1": w["b_dec"][1]}, "also hold bias"),
    ):
        save(path, tensors)
        refused(tmp_path, message)
    path.write_bytes(good)
    save(tmp_path / "W_dec_2.safetensors", {"W_dec_2": torch.zeros(F, 2, D)})
    refused(tmp_path, "layer 2 of 3 has 2 decoders, expected 1")
    (tmp_path / "W_dec_2.safetensors").unlink()
    refused(tmp_path, r"of 3 layers, of which W_dec_2\.safetensors are missing; fetch them, or name one layer")


# --- Gemma Scope 2 ---------------------------------------------------------------------------


def gemma_scope_folder(folder: Path, w: dict[str, Any], skip: bool = False) -> Path:
    folder = folder / "gemma-scope-2-1b-pt" / "clt" / ("width_16k_l0_medium" + "_affine" * skip)
    for layer in range(N):
        earlier = [torch.zeros(F, D)] * layer
        tensors = {
            "w_enc": w["W_enc"][layer],
            "b_enc": w["b_enc"][layer],
            "threshold": w["threshold"][layer],
            "w_dec": torch.stack([*earlier, *(w["W_dec"][layer][written] for written in range(layer, N))], dim=1),
            "b_dec": w["b_dec"][layer],
            **({"affine_skip_connection": w["W_skip"][layer]} if skip else {}),
        }
        save(folder / f"params_layer_{layer}.safetensors", tensors)
    config = {
        "architecture": "jump_relu",
        "type": "clt",
        "hf_hook_point_in": "model.layers.{all}.pre_feedforward_layernorm.output",
        "hf_hook_point_out": "model.layers.{all}.post_feedforward_layernorm.output",
        "affine_connection": skip,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("skip", [False, True])
def test_gemma_scope_2(skip: bool, tmp_path: Path) -> None:
    """circuit-tracer reads the skip as `x @ W_skip` of the same layer, and the decoders from a layer's own on."""
    w, x = weights(), activations()
    folder = gemma_scope_folder(tmp_path, w, skip)
    sae, pre = only(folder), pre_activations(w, x)
    z = pre * (pre > w["threshold"])
    expected = plain(w, z) + (torch.einsum("bsld,lde->bsle", x, w["W_skip"]) if skip else 0)
    torch.testing.assert_close(of(sae, x), expected, **LEVEL)
    assert (sae.cfg.hook_name, sae.cfg.hook_out) == (hooks("mlp.hook_in"), hooks("hook_mlp_out"))
    assert sae.cfg.model_name == "google/gemma-3-1b-pt"
    part = only(folder / "params_layer_1.safetensors")
    torch.testing.assert_close(part.encode(x[:, :, 1]), z[:, :, 1], **LEVEL)
    assert part.cfg.is_part and part.cfg.hook_out == hooks("hook_mlp_out", 1)
    first = only(folder / "params_layer_0.safetensors")
    torch.testing.assert_close(first.reconstruct(x[:, :, 0]), expected[:, :, 0], **LEVEL)
    assert not first.cfg.is_cross_layer


def test_what_gemma_scope_2_folders_lack(tmp_path: Path) -> None:
    w = weights()
    folder = gemma_scope_folder(tmp_path, w)
    (folder / "config.json").write_text(json.dumps({"architecture": "jump_relu", "affine_connection": True}))
    refused(folder, "affine_connection is True, the weights say the opposite")
    (folder / "config.json").unlink()
    (folder / "params_layer_1.safetensors").rename(folder / "kept")
    refused(folder, r"of 3 layers, of which params_layer_1\.safetensors are missing")
    tensors = {"w_enc": w["W_enc"][1], "w_dec": torch.ones(F, N, D), "b_dec": w["b_dec"][1]}
    save(folder / "params_layer_1.safetensors", tensors | {"b_enc": w["b_enc"][1], "threshold": w["threshold"][1]})
    refused(folder, "decoders into layers before 1 that are not zero")
    (folder.parent.parent / "clt").rename(folder.parent.parent / "elsewhere")
    refused(folder.parent.parent / "elsewhere" / folder.name, "no folder above it is called clt")


# --- Llamascopium ----------------------------------------------------------------------------

IN = [f"blocks.{layer}.ln2.hook_normalized" for layer in range(N)]
OUT = [f"blocks.{layer}.hook_mlp_out" for layer in range(N)]
NORMS = {hook: 0.5 + number / 3 for number, hook in enumerate([*IN, *OUT])}


def llamascopium_folder(folder: Path, w: dict[str, Any], **config: Any) -> Path:
    values = {
        "sae_type": "clt",
        "d_model": D,
        "expansion_factor": F / D,
        "act_fn": "jumprelu",
        "norm_activation": "dataset-wise",
        "sparsity_include_decoder_norm": True,
        "top_k": 4,
        "hook_points_in": IN,
        "hook_points_out": OUT,
    } | config
    theirs = {"W_E": w["W_enc"], "b_E": w["b_enc"]}
    for written in range(N):
        theirs[f"W_D.{written}"] = torch.stack([w["W_dec"][layer][written] for layer in range(written + 1)])
        theirs[f"b_D.{written}"] = w["b_dec"][written]
    if values["act_fn"] == "jumprelu":
        theirs["activation_function.log_jumprelu_threshold"] = w["threshold"].log()
    if values["norm_activation"] == "dataset-wise":
        theirs |= {f"dataset_average_activation_norm.{hook}": torch.tensor(norm) for hook, norm in NORMS.items()}
    save(folder / "sae_weights.safetensors", theirs)
    (folder / "config.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("norm", ["dataset-wise", "inference"])
@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk"])
def test_llamascopium(act_fn: str, by_norm: bool, norm: str, tmp_path: Path) -> None:
    w, x = weights(), activations()
    folder = llamascopium_folder(tmp_path, w, act_fn=act_fn, sparsity_include_decoder_norm=by_norm, norm_activation=norm)
    sae = only(folder)
    scaled = norm == "dataset-wise"
    f_in, f_out = (torch.tensor([D**0.5 / NORMS[hook] if scaled else 1.0 for hook in part])[:, None] for part in (IN, OUT))
    rows = [torch.cat(list(w["W_dec"][layer].values()), dim=1).norm(dim=1) for layer in range(N)]
    weigh = torch.stack(rows) if by_norm else torch.ones(N, F)
    pre = pre_activations(w, x * f_in) * weigh
    if act_fn == "jumprelu":
        z = pre * (pre > w["threshold"])
    else:
        z = torch.relu(pre)
        if act_fn == "topk":
            z = z * (z >= z.sort(dim=-1, descending=True).values[..., 3:4])
    torch.testing.assert_close(of(sae, x), plain(w, z / weigh) / f_out, **LEVEL)
    assert torch.equal(sae.encode(x.flatten(-2)) > 0, z.flatten(-2) > 0)
    assert (sae.cfg.hook_name, sae.cfg.hook_out) == (" + ".join(IN), " + ".join(OUT))


@pytest.mark.parametrize("by_norm", [True, False])
@pytest.mark.parametrize("act_fn", ["relu", "jumprelu", "topk"])
@torch.no_grad()
def test_llamascopium_itself(act_fn: str, by_norm: bool, tmp_path: Path) -> None:
    """The library's own object, its own files, and its own scaling of what it reads and writes."""
    theirs = pytest.importorskip("llamascopium.models.clt")
    config = theirs.CLTConfig(
        d_model=D,
        expansion_factor=2,
        hook_points_in=IN,
        hook_points_out=OUT,
        act_fn=act_fn,
        top_k=4,
        sparsity_include_decoder_norm=by_norm,
        device="cpu",
        dtype=torch.float32,
    )
    assert set(theirs.CLTConfig.model_fields) == CROSS_LAYER_KEYS
    clt, x = theirs.CrossLayerTranscoder(config), activations().flatten(0, 1)
    for number, (name, parameter) in enumerate(clt.named_parameters()):
        drawing = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.copy_(drawing / 2 - 2 * ("threshold" in name))
    clt.set_dataset_average_activation_norm(NORMS)
    clt.save_pretrained(tmp_path)
    config.save_hyperparameters(tmp_path)
    raw = {hook: x[:, layer] for layer, hook in enumerate(IN)} | {hook: x[:, 0] for hook in OUT}
    batch, factors = clt.normalize_activations(raw, return_scale_factor=True)
    read = clt.prepare_input(batch)[0]
    written = clt.decode(clt.encode(read))
    expected = [written[layer] / (D**0.5 / NORMS[hook]) for layer, hook in enumerate(OUT)]
    ours = only(tmp_path)
    torch.testing.assert_close(ours.reconstruct(x.flatten(-2)[None])[0], torch.cat(expected, dim=-1), **LEVEL)
    assert torch.equal(ours.encode(x.flatten(-2)[None])[0] > 0, clt.encode(read).flatten(-2) > 0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"act_fn": "batchlayertopk"}, "act_fn 'batchlayertopk' is not read: it chooses among the latents of all layers"),
        ({"gate_temperature": 0.5}, "holds gate_temperature, which is not known"),
        ({"norm_activation": "token-wise"}, "cannot be folded into the weights"),
        ({"hook_points_in": "blocks.0.ln2.hook_normalized"}, "hook_points_in must be a list of hooks"),
        ({"hook_points_in": IN[:2]}, "2 hooks are read and 3 written"),
        ({"expansion_factor": 2}, r"W_E of a layer has shape \(12, 20\), expected \(12, 24\) of config\.json"),
        ({"act_fn": "relu", "hook_points_in": IN[::-1]}, "in the order of their layers"),
    ],
)
def test_llamascopium_refusals(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(llamascopium_folder(tmp_path, weights(), **config), message)


# --- this project's own ----------------------------------------------------------------------


@pytest.mark.parametrize("make", [circuit_tracer_folder, gemma_scope_folder, llamascopium_folder])
def test_import_writes_a_folder_of_this_project(make: Any, tmp_path: Path) -> None:
    source, x = make(tmp_path / "theirs", weights()), activations().flatten(-2)
    sae = only(source)
    assert [path.name for path in import_saes(source, tmp_path / "ours")] == ["ours"]
    for read in (load_sae(tmp_path / "ours"), open_sae(str(tmp_path / "ours"))):
        assert isinstance(read, CrossLayerTranscoder) and torch.equal(read.reconstruct(x), sae.reconstruct(x))
        assert read.cfg.hooks == sae.cfg.hooks and read.weights_fingerprint() == sae.weights_fingerprint()
    assert "no form cross_layer as a cross-layer transcoder" in sae_lens_lacks(sae)
    path = tmp_path / "ours" / "cfg.json"
    path.write_text(path.read_text().replace("blocks.2.hook_mlp_out", "blocks.1.hook_mlp_out"))
    with pytest.raises(UserError, match="in the order of their layers"):
        load_sae(tmp_path / "ours")
