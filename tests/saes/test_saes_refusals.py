"""What a file says is used or refused: keys, tensors, hooks, sizes, kinds of file."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from sae_research.runtime.errors import UserError
from sae_research.saes import load_sae, save_sae, save_variant
from sae_research.saes.formats.dictionary_learning import export_dictionary_learning, hook_name, load_dictionary_learning
from sae_research.saes.formats.sae_lens import from_sae_lens
from sae_research.saes.formats.sae_lens_settings import OF_ALL, OF_ARCHITECTURE, TRAINING_ONLY, settings
from sae_research.saes.layouts import open_place
from sae_research.saes.reading import hook_of, load_state
from tests.helpers.random_saes import D_IN, D_SAE, make_sae, random_activations


def lens_folder(folder: Path, **changes: Any) -> Path:
    """A folder as SAELens 6 writes it; changes: tensors, else keys of cfg.json."""
    given = {name: value for name, value in changes.items() if isinstance(value, torch.Tensor)}
    tensors = make_sae("standard").tensors() | given
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "architecture": "standard",
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.54.12", "model_name": "tiny", "hook_name": "blocks.1.hook_resid_post"},
    }
    (folder / "cfg.json").write_text(json.dumps(values | {k: v for k, v in changes.items() if k not in given}))
    safetensors.torch.save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "sae_weights.safetensors")
    return folder


def flipped(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.T.contiguous()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"threshold": torch.ones(D_SAE)}, "the weights also hold threshold, which the architecture standard does not use"),
        (
            {"architecture": "jumprelu", "threshold": torch.ones(D_SAE), "log_threshold": torch.ones(D_SAE)},
            "hold both log_threshold and threshold",
        ),
        ({"mask": torch.ones(3)}, "the weights also hold mask"),
        ({"activation_fn": "tanh-relu"}, "the activation function 'tanh-relu' is not that of the architecture standard"),
        ({"activation_fn_str": "topk"}, "the activation function 'topk' is not that of"),
        ({"k": 5}, "the configuration holds k, which the architecture standard does not use"),
        ({"noise_at_inference": 0.1}, "the configuration holds noise_at_inference"),
        ({"residual_threshold": 0.1}, "holds residual_threshold"),
        ({"architecture": None}, "architecture None is not supported; known: standard"),
        ({"architecture": ["standard"]}, r"architecture \['standard'\] is not supported"),
        ({"d_sae": 10**18}, "d_sae must be a whole number from 1 to 1,000,000,000, not 1000000000000000000"),
        ({"d_sae": 1}, r"W_enc has shape \(12, 40\), expected \(12, 1\)"),
        ({"d_in": "12"}, "d_in must be a whole number"),
        ({"apply_b_dec_to_input": "false"}, "apply_b_dec_to_input must be true or false, not 'false'"),
        ({"dtype": "float99"}, "dtype 'float99' is no precision"),
        ({"metadata": [1]}, "metadata must be a section of settings"),
        ({"reshape_activations": "hook_z"}, "reshape_activations 'hook_z' does not fit its hook"),
        ({"metadata": {"hook_name": "resid_mid"}}, "the hook 'resid_mid' is not known; write TransformerLens' name"),
        ({"metadata": {"hook_name": "blocks.1.hook_resid_pre", "hook_layer": 2}}, "hook_layer is 2, the hook is blocks.1"),
        ({"W_enc": flipped(make_sae("standard").W_enc)}, r"W_enc has shape \(40, 12\), .* \(it is transposed\)"),
        ({"W_dec": make_sae("standard").W_dec.long()}, "W_dec is int64; weights must be dense floating-point numbers"),
        ({"b_enc": torch.full((D_SAE,), torch.inf)}, "b_enc holds NaN or infinity"),
        ({"b_enc": torch.zeros(0)}, r"b_enc has shape \(0,\)"),
    ],
)
def test_sae_lens_folders_are_used_in_full(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_sae(lens_folder(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_what_says_nothing_new_is_read(tmp_path: Path) -> None:
    sae, x = make_sae("standard"), random_activations()
    for number, changes in enumerate(
        ({"activation_fn": "relu"}, {"l1_coefficient": 3.0}, {"hook_head_index": None}, {"skip": None})
    ):
        torch.testing.assert_close(load_sae(lens_folder(tmp_path / str(number), **changes)).encode(x), sae.encode(x))


def test_old_configurations_are_used_in_full() -> None:
    old = {
        "model_name": "gpt2-small",
        "hook_point": "blocks.1.hook_resid_pre",
        "hook_point_layer": 1,
        "d_in": 4,
        "d_sae": 8,
        "hook_point_head_index": None,
        "dtype": "torch.float32",
        "l1_coefficient": 8e-5,
        "lp_norm": 1,
        "run_name": "x",
        "use_ghost_grads": False,
        "dead_feature_window": 5000,
        "store_batch_size": 32,
        "wandb_project": "y",
    }
    assert settings(old, "here")["architecture"] == "standard"
    for change, message in (
        ({"sigmoid_gates": True}, "holds sigmoid_gates"),
        ({"activation_fn_str": "gelu"}, "'gelu'"),
        ({"activation_fn_kwargs": {"slope": 2}}, "activation_fn_kwargs holds slope"),
        ({"hook_name": "blocks.2.hook_resid_pre"}, "says hook_name twice, in two spellings"),
        ({"hook_point_layer": 7}, "hook_layer is 7, the hook is blocks.1"),
    ):
        with pytest.raises(UserError, match=f"^here: .*{message}"):
            settings(old | change, "here")


def test_known_keys_are_those_of_the_package() -> None:
    pytest.importorskip("sae_lens")
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    def keys(config: Any) -> set[str]:
        return {field.name for field in dataclasses.fields(config)}

    training: set[str] = set()
    for architecture, own in OF_ARCHITECTURE.items():
        if architecture in SAE_CLASS_REGISTRY:
            assert keys(SAE_CLASS_REGISTRY[architecture][1]) | {"architecture"} == OF_ALL | own
        if architecture in SAE_TRAINING_CLASS_REGISTRY:  # it trains no transcoders
            training |= keys(SAE_TRAINING_CLASS_REGISTRY[architecture][1]) - OF_ALL - own
    assert training == TRAINING_ONLY


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"max_iterations": 6, "residual_threshold": 0.0},
        {"residual_threshold": 1.5, "stop_on_duplicate_support": False},
        {"max_iterations": 6, "residual_threshold": 0.0, "stop_on_duplicate_support": False},
        {"apply_b_dec_to_input": False},
    ],
)
@pytest.mark.parametrize("unit", [True, False])
def test_matching_pursuit_of_sae_lens(config: dict[str, Any], unit: bool, tmp_path: Path) -> None:
    """Against its own class; where it is our non-negative matching pursuit, it is opened as that."""
    pytest.importorskip("sae_lens")
    from sae_lens.saes.matching_pursuit_sae import MatchingPursuitSAE, MatchingPursuitSAEConfig

    theirs, source = MatchingPursuitSAE(MatchingPursuitSAEConfig(d_in=D_IN, d_sae=D_SAE, **config)), make_sae("standard")
    with torch.no_grad():
        theirs.W_dec.copy_(source.W_dec * (1 if unit else 0.9 + 0.2 * torch.rand(D_SAE, 1)))
        theirs.b_dec.copy_(source.b_dec)
    theirs.save_model(tmp_path / "theirs")
    x, mask = random_activations(), torch.rand(3, 7) > 0.3
    fast = unit and config.get("residual_threshold") == 0 and "stop_on_duplicate_support" in config
    for sae in (load_sae(tmp_path / "theirs"), from_sae_lens(theirs)):
        assert sae.cfg.form == ("nonnegative_matching_pursuit" if fast else "sae_lens_matching_pursuit")
        with torch.no_grad():
            torch.testing.assert_close(sae.encode(x), theirs.encode(x), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(sae.decode(sae.encode(x)), theirs(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sae.encode(x, mask), sae.encode(x) * mask[..., None], atol=1e-6, rtol=1e-6)
    save_sae(sae, tmp_path / "ours")
    torch.testing.assert_close(load_sae(tmp_path / "ours").encode(x), sae.encode(x))


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("model.layers.14", "blocks.14.hook_resid_post"),
        ("transformer.h.3", "blocks.3.hook_resid_post"),
        ("gpt_neox.layers.2", "blocks.2.hook_resid_post"),
        ("blocks.8.attn.hook_z", "blocks.8.attn.hook_z"),
        ("", ""),
    ],
)
def test_hooks_of_modules(name: str, hook: str) -> None:
    assert hook_of(name, "here") == hook


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.14.input_layernorm",
        "layer 14",
        "model.layers",
        "model.layers.x",
        "h.3/..",
        "model.layers.14.mlp",
        "model.layers.14.mlp.act",
        "resid_post_layer_4",
    ],
)
def test_hooks_that_are_never_guessed(name: str) -> None:
    with pytest.raises(UserError, match="^here: the hook .* is not known"):
        hook_of(name, "here")


@pytest.mark.parametrize(
    "submodule",
    [
        "resid_mid_layer_1",
        "residual_layer_1",
        "mlp_in_layer_1",
        "my_mlp_layer_1",
        "resid_post_layer_2",
        "attn",
        "model.layers.2",
        "model.layers.1.mlp",
        7,
    ],
)
def test_submodules_that_are_never_guessed(submodule: Any) -> None:
    with pytest.raises(UserError, match="submodule_name|is not known"):
        hook_name({"layer": 1, "submodule_name": submodule}, Path("config.json"))
    assert hook_name({"layer": 1, "submodule_name": "model.layers.1"}, Path("c")) == "blocks.1.hook_resid_post"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dict_size": 41}, "expected .* d_sae 41"),
        ({"activation_dim": 13}, "expected .* d_in 13"),
        ({"dict_size": 10**18}, "dict_size must be a whole number"),
        ({"k": 7}, "k is 5, config.json says 7"),
        ({"lm_name": 3}, "lm_name must be a text"),
    ],
)
def test_dictionary_learning_says_what_its_weights_say(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    export_dictionary_learning(make_sae("topk"), tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"trainer": values["trainer"] | change}))
    with pytest.raises(UserError, match=message):
        open_place(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(values | {"buffer": {"io": "in"}}))
    with pytest.raises(UserError, match=r"buffer\.io is 'in'"):
        open_place(tmp_path)


def test_a_flipped_bit_of_a_checkpoint_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "ae.pt"
    torch.save({"W": torch.arange(4096.0)}, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="does not fit its checksum"):
        load_state(path)
    save_sae(make_sae("standard"), tmp_path / "ours")
    path = tmp_path / "ours" / "sae_weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged weights, or others than cfg.json was written with"):
        load_sae(tmp_path / "ours")


def test_pipes_devices_and_folders_in_the_place_of_files(tmp_path: Path) -> None:
    signal.alarm(60)  # a reader that waits for a pipe's other end would wait for ever
    for name, harm in (("pipe", os.mkfifo), ("folder", Path.mkdir), ("device", lambda path: path.symlink_to("/dev/zero"))):
        for file in ("cfg.json", "sae_weights.safetensors", "ae.pt", "config.json"):
            folder = tmp_path / f"{name}_{file}"
            save_sae(make_sae("standard"), folder)
            export_dictionary_learning(make_sae("standard"), folder)
            (folder / file).unlink()
            harm(folder / file)
            with pytest.raises(UserError, match="not a file"):
                (load_sae if file in ("cfg.json", "sae_weights.safetensors") else load_dictionary_learning)(folder)
    signal.alarm(0)


def test_own_folders_say_one_thing(tmp_path: Path) -> None:
    save_sae(make_sae("topk"), tmp_path)
    text = (tmp_path / "cfg.json").read_text()

    def refused(message: str, change: Any) -> None:
        values = json.loads(text)
        change(values)
        (tmp_path / "cfg.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=message):
            load_sae(tmp_path)

    refused("normalize_activations = layer_norm does not fit", lambda v: v.update(normalize_activations="layer_norm"))
    refused("k = 6 does not fit", lambda v: v.update(k=6))
    refused("noise = 1 does not fit", lambda v: v.update(noise=1))
    refused("role 'boss' is not known", lambda v: v["metadata"]["sae_research"].update(role="boss"))
    refused("prepend_bos must be true or false", lambda v: v["metadata"].update(prepend_bos="no"))
    refused("SAE form|architecture must be", lambda v: v.update(architecture=None))
    (tmp_path / "cfg.json").write_text(text.replace('"d_in": 12', '"d_in": 12, "d_in": 13'))
    with pytest.raises(UserError, match="the key 'd_in' stands there twice"):
        load_sae(tmp_path)


@pytest.mark.parametrize("place", ["../../evil", "/etc", "..", "../a/b", "base", "../.hidden", "../a/../b"])
def test_weights_lie_in_a_folder_beside(place: str, tmp_path: Path) -> None:
    base = make_sae("standard")
    save_sae(base, tmp_path / "base")
    save_variant(base.cfg.replace(form="ihtp", options={"k": 2}), {"k": 2}, tmp_path / "variant", tmp_path / "base")
    path = tmp_path / "variant" / "cfg.json"
    values = json.loads(path.read_text())
    values["metadata"]["sae_research"]["weights_from"]["folder"] = place
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="weights_from.folder"):
        load_sae(tmp_path / "variant")


def test_sparsify_is_named(tmp_path: Path) -> None:
    (tmp_path / "cfg.json").write_text(
        json.dumps({"activation": "topk", "expansion_factor": 32, "num_latents": 0, "k": 32, "d_in": 8})
    )
    (tmp_path / "sae.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"sae\.safetensors: damaged weights"):
        open_place(tmp_path)


def test_one_latent_is_an_sae(tmp_path: Path) -> None:
    sae = make_sae("standard")
    one = {"W_enc": sae.W_enc[:, :1], "b_enc": sae.b_enc[:1], "W_dec": sae.W_dec[:1], "b_dec": sae.b_dec}
    loaded = load_sae(lens_folder(tmp_path, d_sae=1, **one))
    torch.testing.assert_close(loaded.encode(random_activations()), sae.encode(random_activations())[..., :1])
