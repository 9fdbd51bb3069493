"""`ae.pt` against dictionary_learning's formulas, written out here, and SAE Bench's loaders."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.saes.formats.dictionary_learning import export_dictionary_learning, load_dictionary_learning
from tests.helpers.random_saes import D_IN, D_SAE, make_sae, random_activations

G = torch.Generator()


def random_state(dict_class: str) -> dict[str, Tensor]:
    """Weights under the keys that dictionary_learning saves for a class; decoder rows of any norm."""
    G.manual_seed(3)

    def r(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=G)

    linear = {"encoder.weight": r(D_SAE, D_IN), "decoder.weight": r(D_IN, D_SAE)}
    plain = {"W_enc": r(D_IN, D_SAE), "b_enc": r(D_SAE), "W_dec": r(D_SAE, D_IN), "b_dec": r(D_IN)}
    scalar = {"k": torch.tensor(4, dtype=torch.int32), "threshold": torch.tensor(0.7)}
    return {
        "AutoEncoder": {**linear, "encoder.bias": r(D_SAE), "bias": r(D_IN)},
        "AutoEncoderNew": {**linear, "encoder.bias": r(D_SAE), "decoder.bias": r(D_IN)},
        "AutoEncoderTopK": {**linear, "encoder.bias": r(D_SAE), "b_dec": r(D_IN), **scalar},
        "BatchTopKSAE": {**linear, "encoder.bias": r(D_SAE), "b_dec": r(D_IN), **scalar},
        "MatryoshkaBatchTopKSAE": {**plain, **scalar, "group_sizes": torch.tensor([10, 30])},
        "JumpReluAutoEncoder": {**plain, "threshold": torch.rand(D_SAE, generator=G)},
        "GatedAutoEncoder": {
            **linear,
            "decoder_bias": r(D_IN),
            "r_mag": r(D_SAE),
            "gate_bias": r(D_SAE),
            "mag_bias": r(D_SAE),
        },
    }[dict_class]


def reconstruct(dict_class: str, s: dict[str, Tensor], x: Tensor) -> Tensor:
    """decode(encode(x)) as dictionary_learning's class defines it."""
    if dict_class == "AutoEncoder":
        return torch.relu((x - s["bias"]) @ s["encoder.weight"].T + s["encoder.bias"]) @ s["decoder.weight"].T + s["bias"]
    if dict_class == "AutoEncoderNew":
        return torch.relu(x @ s["encoder.weight"].T + s["encoder.bias"]) @ s["decoder.weight"].T + s["decoder.bias"]
    if dict_class == "GatedAutoEncoder":
        pi = (x - s["decoder_bias"]) @ s["encoder.weight"].T
        f = (pi + s["gate_bias"] > 0) * torch.relu(s["r_mag"].exp() * pi + s["mag_bias"])
        return f @ s["decoder.weight"].T + s["decoder_bias"]
    if dict_class == "JumpReluAutoEncoder":
        pre = x @ s["W_enc"] + s["b_enc"]
        return torch.relu(pre * (pre > s["threshold"])) @ s["W_dec"] + s["b_dec"]
    W_enc = s["W_enc"] if "W_enc" in s else s["encoder.weight"].T
    W_dec = s["W_dec"] if "W_dec" in s else s["decoder.weight"].T
    f = torch.relu((x - s["b_dec"]) @ W_enc + s["b_enc" if "b_enc" in s else "encoder.bias"])
    if dict_class == "AutoEncoderTopK":
        top = f.topk(int(s["k"]), dim=-1)
        f = torch.zeros_like(f).scatter(-1, top.indices, top.values)
    else:
        f = f * (f > s["threshold"])
    return f @ W_dec + s["b_dec"]


def write(folder: Path, dict_class: str, state: dict[str, Tensor], **trainer: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "ae.pt")
    config = {
        "trainer": {
            "dict_class": dict_class,
            "layer": 4,
            "lm_name": "EleutherAI/pythia-70m-deduped",
            **({"k": 4} if "k" in state else {}),
            **trainer,
        },
        "buffer": {"ctx_len": 64},
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("dict_class", "form"),
    [
        ("AutoEncoder", "standard"),
        ("AutoEncoderNew", "standard"),
        ("AutoEncoderTopK", "topk"),
        ("BatchTopKSAE", "jumprelu"),
        ("MatryoshkaBatchTopKSAE", "jumprelu"),
        ("JumpReluAutoEncoder", "jumprelu"),
        ("GatedAutoEncoder", "gated"),
    ],
)
def test_reads_every_class(dict_class: str, form: str, tmp_path: Path) -> None:
    state, x = random_state(dict_class), random_activations()
    sae = load_dictionary_learning(write(tmp_path, dict_class, state))
    torch.testing.assert_close(sae.decode(sae.encode(x)), reconstruct(dict_class, state, x), atol=1e-4, rtol=1e-4)
    assert sae.cfg.form == form and sae.cfg.hook_name == "blocks.4.hook_resid_post"
    assert (sae.cfg.model_name, sae.cfg.context_size) == ("EleutherAI/pythia-70m-deduped", 64)
    if form != "topk":  # ranked by activation alone: folding would change the winners
        torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert sae.cfg.provenance.get("held_out") == ({"l0": 4.0} if "k" in state else None)


@pytest.mark.parametrize(
    ("form", "config"),
    [
        ("standard", {}),
        ("standard", {"apply_b_dec_to_input": False}),
        ("topk", {}),
        ("gated", {}),
        ("gated", {"apply_b_dec_to_input": False}),
        ("jumprelu", {}),
        ("jumprelu", {"apply_b_dec_to_input": False}),
    ],
)
def test_export_round_trip(form: str, config: dict[str, Any], tmp_path: Path) -> None:
    sae, x = make_sae(form, **config), random_activations()
    export_dictionary_learning(sae, tmp_path)
    back = load_dictionary_learning(tmp_path)
    torch.testing.assert_close(back.encode(x), sae.encode(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(back.decode(back.encode(x)), sae.decode(sae.encode(x)), atol=1e-5, rtol=1e-5)
    assert (back.cfg.hook_name, back.cfg.model_name) == (sae.cfg.hook_name, sae.cfg.model_name)


LIKE_BATCHTOPK = {"architecture": "batchtopk", "provenance": {"hyper_parameters": {"k": 6}}}
LIKE_MATRYOSHKA = {
    "architecture": "matryoshka_batchtopk",
    "provenance": {"hyper_parameters": {"k": 6, "group_fractions": [0.25, 0.75]}},
}
STOCK = {
    "standard": ("relu_sae", "relu", "StandardTrainer"),
    "standard_new": ("relu_sae", "relu", "StandardTrainerAprilUpdate"),
    "p_anneal": ("relu_sae", "relu", "PAnnealTrainer"),
    "topk": ("topk_sae", "topk", "TopKTrainer"),
    "batchtopk": ("batch_topk_sae", "batch_topk", "BatchTopKTrainer"),
    "matryoshka_batchtopk": ("batch_topk_sae", "matryoshka_batch_topk", "MatryoshkaBatchTopKTrainer"),
    "jumprelu": ("jumprelu_sae", "jump_relu", "JumpReluTrainer"),
    "gated": ("gated_sae", "gated", "GatedSAETrainer"),
}


def exported_kind(kind: str) -> Any:
    """A random SAE as the recipe `kind` leaves it."""
    config: dict[str, Any] = {"hook_name": "blocks.4.hook_resid_post"}
    if kind in ("standard_new", "p_anneal"):
        return make_sae("standard", provenance={"recipe": kind}, **config)
    if kind in ("batchtopk", "matryoshka_batchtopk"):
        sae = make_sae("jumprelu", **config, **(LIKE_BATCHTOPK if kind == "batchtopk" else LIKE_MATRYOSHKA))
        sae.threshold.fill_(0.4)
        return sae
    return make_sae(kind, **config)


@pytest.mark.parametrize("kind", STOCK)
def test_stock_sae_bench_reads_the_export(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module_name, loader, trainer_class = STOCK[kind]
    module = importlib.import_module(f"sae_bench.custom_saes.{module_name}")
    sae, x = exported_kind(kind), random_activations()
    export_dictionary_learning(sae, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["trainer"]["trainer_class"] == trainer_class
    monkeypatch.setattr(module, "hf_hub_download", lambda filename, **_: str(tmp_path / Path(filename).name))
    load = getattr(module, f"load_dictionary_learning_{loader}_sae")
    theirs = load("org/repo", "some/ae.pt", "tiny", torch.device("cpu"), torch.float32, layer=4)
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), sae.encode(x))
        torch.testing.assert_close(theirs(x), sae.decode(sae.encode(x)))


@pytest.mark.parametrize(
    ("kind", "dict_class"),
    [
        ("batchtopk", "BatchTopKSAE"),
        ("matryoshka_batchtopk", "MatryoshkaBatchTopKSAE"),
        ("jumprelu", "JumpReluAutoEncoder"),
        ("standard", "AutoEncoderNew"),
        ("standard_new", "AutoEncoder"),
    ],
)
def test_class_and_group_survive_two_round_trips(kind: str, dict_class: str, tmp_path: Path) -> None:
    sae, x = exported_kind(kind), random_activations()
    wanted = dict_class if dict_class == "AutoEncoderNew" else None
    assert export_dictionary_learning(sae, tmp_path / "a", wanted) == dict_class
    back = load_dictionary_learning(tmp_path / "a")
    torch.testing.assert_close(back.encode(x), sae.encode(x))
    assert back.cfg.architecture == sae.cfg.architecture
    assert export_dictionary_learning(back, tmp_path / "b", wanted) == dict_class
    first, second = (json.loads((tmp_path / n / "config.json").read_text())["trainer"] for n in "ab")
    assert {key: first[key] for key in ("trainer_class", *(k for k in ("k", "group_sizes") if k in first))} == {
        key: second[key] for key in ("trainer_class", *(k for k in ("k", "group_sizes") if k in second))
    }
    if kind == "matryoshka_batchtopk":
        assert second["group_sizes"] == [10, 30] and second["k"] == 6


def test_topk_with_a_threshold(tmp_path: Path) -> None:
    """By default as what encodes alike; by name as their own trainer writes it, with k and the threshold."""
    sae, x = exported_kind("batchtopk"), random_activations()
    sae.cfg = sae.cfg.replace(architecture="topk")
    assert export_dictionary_learning(sae, tmp_path / "a") == "JumpReluAutoEncoder"
    torch.testing.assert_close(load_dictionary_learning(tmp_path / "a").encode(x), sae.encode(x))
    assert export_dictionary_learning(sae, tmp_path / "b", "AutoEncoderTopK") == "AutoEncoderTopK"
    state = torch.load(tmp_path / "b" / "ae.pt", weights_only=True)
    assert (int(state["k"]), float(state["threshold"])) == (6, pytest.approx(0.4))
    with pytest.raises(UserError, match="cannot be a GatedAutoEncoder; possible: JumpReluAutoEncoder"):
        export_dictionary_learning(sae, tmp_path, "GatedAutoEncoder")
    with pytest.raises(UserError, match="one threshold for all latents"):
        export_dictionary_learning(make_sae("jumprelu"), tmp_path, "BatchTopKSAE")
    bare = exported_kind("batchtopk")
    bare.cfg = bare.cfg.replace(provenance={})
    with pytest.raises(UserError, match="k this SAE was trained with is not recorded"):
        export_dictionary_learning(bare, tmp_path)


def test_equal_saes_give_equal_bytes(tmp_path: Path) -> None:
    for name in "ab":
        export_dictionary_learning(make_sae("standard"), tmp_path / name)
    assert (tmp_path / "a" / "ae.pt").read_bytes() == (tmp_path / "b" / "ae.pt").read_bytes()


@pytest.mark.parametrize(
    ("submodule", "hook"),
    [
        ("resid_post_layer_4", "hook_resid_post"),
        ("attention_out_layer_4", "hook_attn_out"),
        ("mlp_out_layer_4", "hook_mlp_out"),
        ("resid_pre_layer_4", "hook_resid_pre"),
    ],
)
def test_submodule_decides_the_hook(submodule: str, hook: str, tmp_path: Path) -> None:
    folder = write(tmp_path, "AutoEncoder", random_state("AutoEncoder"), submodule_name=submodule)
    assert load_dictionary_learning(folder).cfg.hook_name == f"blocks.4.{hook}"


def test_what_is_refused(tmp_path: Path) -> None:
    good = write(tmp_path / "good", "AutoEncoder", random_state("AutoEncoder"))

    def refused(folder: Path, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            load_dictionary_learning(folder)
        assert "\n" not in str(caught.value)

    refused(write(tmp_path / "a", "IdentityDict", {}), "dict_class 'IdentityDict' is not supported; known: ")
    refused(
        write(tmp_path / "b", "GatedAutoEncoder", random_state("AutoEncoder")),
        "not the weights of GatedAutoEncoder, which config.json names: lacks decoder_bias.*also holds bias",
    )
    spoilt = random_state("AutoEncoder")
    spoilt["bias"][0] = torch.nan
    refused(write(tmp_path / "c", "AutoEncoder", spoilt), "b_dec holds NaN")
    refused(write(tmp_path / "d", "AutoEncoder", random_state("AutoEncoder"), layer="four"), "layer must be a whole number")
    shutil.copytree(good, tmp_path / "e")
    (tmp_path / "e" / "ae.pt").write_bytes((good / "ae.pt").read_bytes()[:300])
    refused(tmp_path / "e", "damaged")
    shutil.copytree(good, tmp_path / "f")
    torch.save({"model": torch.nn.Linear(2, 2)}, tmp_path / "f" / "ae.pt")
    refused(tmp_path / "f", "only plain state dicts are read")
    shutil.copytree(good, tmp_path / "g")
    (tmp_path / "g" / "config.json").write_text("{}")
    refused(tmp_path / "g", "no `trainer` section")
    (tmp_path / "g" / "ae.pt").unlink()
    (tmp_path / "g" / "config.json").write_text((good / "config.json").read_text())
    refused(tmp_path / "g", "no such file")


def test_a_file_of_old_torch_is_read(tmp_path: Path) -> None:
    state = random_state("AutoEncoder")
    folder = write(tmp_path, "AutoEncoder", state)
    torch.save(state, folder / "ae.pt", _use_new_zipfile_serialization=False)
    assert load_dictionary_learning(folder).cfg.d_sae == D_SAE


def test_forms_without_a_class_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no class for the form matching_pursuit"):
        export_dictionary_learning(make_sae("matching_pursuit"), tmp_path)
    with pytest.raises(UserError, match="no name for the hook 'blocks.1.attn.hook_z'"):
        export_dictionary_learning(make_sae("standard", hook_name="blocks.1.attn.hook_z"), tmp_path)
    with pytest.raises(UserError, match="centred"):
        export_dictionary_learning(make_sae("standard", center_input=True), tmp_path)
