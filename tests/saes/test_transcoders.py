"""Transcoders: what they are compared with, their skip, their files, and SAELens' own classes as the judge of its layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_research.runtime.errors import UserError
from sae_research.saes import SAEConfig, SparseAutoencoder, form_class, load_sae, save_sae
from sae_research.saes.exchange import export_saes
from sae_research.saes.files import sae_lens_lacks
from sae_research.saes.formats.sae_lens import from_sae_lens
from tests.helpers.random_saes import D_IN, D_SAE, make_sae, random_activations

READ, WRITTEN, D_OUT = "blocks.1.mlp.hook_in", "blocks.1.hook_mlp_out", 10
ARCHITECTURES = {
    "transcoder": ("standard", False),
    "skip_transcoder": ("standard", True),
    "jumprelu_transcoder": ("jumprelu", False),
    "jumprelu_skip_transcoder": ("jumprelu", True),
}
"""SAELens' name: our form, and whether there is a skip."""


def transcoder(form: str = "standard", skip: bool = True, **config: Any) -> SparseAutoencoder:
    """A random transcoder of another width than it reads."""
    sae, g = make_sae(form), torch.Generator().manual_seed(7)
    tensors = {
        **sae.tensors(),
        "W_dec": torch.nn.functional.normalize(torch.randn(D_SAE, D_OUT, generator=g), dim=1),
        "b_dec": torch.randn(D_OUT, generator=g),
        **({"W_skip": torch.randn(D_OUT, D_IN, generator=g)} if skip else {}),
    }
    hooks = {"hook_name": READ, "hook_out": WRITTEN, "d_out": D_OUT, "apply_b_dec_to_input": False}
    return form_class(form).from_tensors(sae.cfg.replace(**hooks | config), tensors)


def lens(architecture: str, **metadata: Any) -> Any:
    """SAELens' object with random weights, decoder rows of any norm."""
    sae_lens = pytest.importorskip("sae_lens")
    about = {"model_name": "tiny", "hook_name": READ, "hook_name_out": WRITTEN, "prepend_bos": False, "context_size": 32}
    cls, cfg_cls = sae_lens.registry.get_sae_class(architecture)
    cfg = cfg_cls(
        d_in=D_IN,
        d_out=D_OUT,
        d_sae=D_SAE,
        apply_b_dec_to_input=False,
        metadata=sae_lens.saes.sae.SAEMetadata(**about | metadata),
    )
    sae, g = cls(cfg), torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) / 2)
            if name == "threshold":
                parameter.abs_()
    return sae


@torch.no_grad()
def test_reconstruction_is_the_linear_part_and_the_skip() -> None:
    sae, x = transcoder(), random_activations()
    z = sae.encode(x)
    expected = torch.relu(x @ sae.W_enc + sae.b_enc) @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(sae.decode(z), expected)
    torch.testing.assert_close(sae.reconstruct(x), expected + torch.einsum("bsi,oi->bso", x, sae.W_skip))
    assert torch.equal(sae.reconstruct(x, z=z), sae.reconstruct(x))
    mask = torch.rand(3, 7, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(sae.reconstruct(x, mask)[mask], sae.reconstruct(x)[mask])
    plain = make_sae("standard")
    assert torch.equal(plain.reconstruct(x), plain.decode(plain.encode(x)))


def test_what_is_compared_with_what() -> None:
    sae, x, y = transcoder(), random_activations(), torch.randn(3, 7, D_OUT)
    assert torch.equal(sae.target(x, y), y)
    with pytest.raises(UserError, match=f"it reads {READ}; what it writes is to be compared with {WRITTEN}"):
        sae.target(x)
    plain = make_sae("standard")
    assert torch.equal(plain.target(x), x) and torch.equal(plain.target(x, x), x)
    assert plain.cfg.hook_out == plain.cfg.hook_name and plain.cfg.d_out == plain.cfg.d_in
    moved = plain.cfg.replace(hook_name="blocks.2.hook_resid_pre", d_in=5)
    assert not moved.is_transcoder and moved.d_out == 5
    assert sae.cfg.replace(hook_name="blocks.1.hook_mlp_in").hook_out == WRITTEN


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input must be false where a dictionary reads"),
        ({"center_input": True}, "center_input must be false"),
        ({"hook_name": ""}, "does not say which hook it reads"),
        ({"hook_out": READ}, "no hook_out says where it writes"),
        ({"hook_out": READ, "d_out": D_IN}, r"W_dec has shape \(40, 10\), expected \(40, 12\)"),
        ({"d_out": 9}, r"W_dec has shape \(40, 10\), expected \(40, 9\)"),
    ],
)
def test_configurations_that_contradict_themselves(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        transcoder(**changes)


def test_a_skip_needs_somewhere_to_go() -> None:
    sae = make_sae("standard")
    with pytest.raises(UserError, match="W_skip from a hook to itself"):
        type(sae)(sae.cfg, **sae.tensors(), W_skip=torch.eye(D_IN))


@pytest.mark.parametrize("form", ["sae_lens_matching_pursuit", "matching_pursuit", "omp"])
def test_atoms_that_explain_what_is_read_write_nothing_else(form: str) -> None:
    sae = make_sae(form)
    with pytest.raises(UserError, match=form):
        type(sae).from_tensors(sae.cfg.replace(hook_out=WRITTEN, apply_b_dec_to_input=False), sae.tensors())


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("form", ["standard", "jumprelu", "topk", "gated"])
def test_our_files(form: str, skip: bool, tmp_path: Path) -> None:
    sae, x = transcoder(form, skip), random_activations()
    save_sae(sae, tmp_path)
    back = load_sae(tmp_path)
    assert back.cfg == sae.cfg and back.weights_fingerprint() == sae.weights_fingerprint()
    assert torch.equal(back.reconstruct(x), sae.reconstruct(x))
    metadata = json.loads((tmp_path / "cfg.json").read_text())["metadata"]
    assert (metadata["hook_name"], metadata["hook_name_out"]) == (READ, WRITTEN)
    save_sae(back, tmp_path / "again")
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert bool(sae_lens_lacks(sae)) == (form in ("topk", "gated"))


@pytest.mark.parametrize(("architecture", "kind"), ARCHITECTURES.items())
@torch.no_grad()
def test_sae_lens_reads_ours(architecture: str, kind: tuple[str, bool], tmp_path: Path) -> None:
    sae_lens = pytest.importorskip("sae_lens")
    sae, x = transcoder(*kind), random_activations()
    save_sae(sae, tmp_path / "one")
    export_saes(tmp_path / "one", tmp_path / "out", "sae_lens")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "out")
    assert theirs.cfg.architecture() == architecture
    torch.testing.assert_close(theirs.encode(x), sae.encode(x))
    torch.testing.assert_close(theirs(x), sae.reconstruct(x))
    assert (theirs.cfg.metadata.hook_name, theirs.cfg.metadata.hook_name_out) == (READ, WRITTEN)


@pytest.mark.parametrize(("architecture", "kind"), ARCHITECTURES.items())
@torch.no_grad()
def test_we_read_theirs(architecture: str, kind: tuple[str, bool], tmp_path: Path) -> None:
    theirs, x = lens(architecture), random_activations()
    expected = theirs(x)
    theirs.save_model(tmp_path)
    read = [load_sae(tmp_path), from_sae_lens(theirs)]
    theirs.fold_W_dec_norm()  # ours have unit decoder rows, as SAE Bench's loaders make them
    for sae in read:
        assert (sae.cfg.form, sae.W_skip is not None) == kind
        assert (sae.cfg.hook_name, sae.cfg.hook_out, sae.cfg.d_out) == (READ, WRITTEN, D_OUT)
        torch.testing.assert_close(sae.encode(x), theirs.encode(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sae.reconstruct(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("said", ["model.layers.1.pre_feedforward_layernorm.output", None])
def test_what_gemma_scope_2_calls_hook_mlp_in(said: str | None, tmp_path: Path) -> None:
    lens("jumprelu_skip_transcoder", hook_name="blocks.1.hook_mlp_in", hf_hook_name=said).save_model(tmp_path)
    assert load_sae(tmp_path).cfg.hook_name == (READ if said else "blocks.1.hook_mlp_in")
    lens("transcoder", hook_name="blocks.2.hook_mlp_in", hf_hook_name=said).save_model(tmp_path)
    if said:
        with pytest.raises(UserError, match="hook_name is blocks.2.hook_mlp_in, hf_hook_name model.layers.1"):
            load_sae(tmp_path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"metadata": {"hook_name_out": None}}, r"lacks metadata.hook_name_out; add the hook"),
        ({"metadata": {"hook_name": None}}, r"lacks metadata.hook_name; add the hook"),
        ({"metadata": {"hook_head_index_out": 1}}, "reads one attention head only .hook_head_index_out"),
        ({"metadata": {"model_from_pretrained_kwargs": {"center_writing_weights": True}}}, "center_input must be false"),
        ({"d_out": None}, "the configuration lacks 'd_out'"),
        ({"d_out": 11}, r"W_dec has shape \(40, 10\), expected \(40, 11\)"),
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input must be false"),
        ({"normalize_activations": "expected_average_only_in"}, "of a transcoder is not supported"),
        ({"architecture": "transcoder"}, "also hold W_skip, which the architecture transcoder does not use"),
        ({"architecture": "jumprelu_skip_transcoder"}, "weights lack threshold"),
        ({"architecture": "standard", "d_out": None}, "also hold W_skip"),
    ],
)
def test_sae_lens_folders_are_used_in_full(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    lens("skip_transcoder").save_model(tmp_path)
    path = tmp_path / "cfg.json"
    values = json.loads(path.read_text())
    values["metadata"] |= changes.get("metadata", {})
    values |= {key: value for key, value in changes.items() if key != "metadata"}
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    with pytest.raises(UserError, match=match) as caught:
        load_sae(tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


def test_other_refusals(tmp_path: Path) -> None:
    lens("transcoder").save_model(tmp_path / "lens")
    path = tmp_path / "lens" / "cfg.json"
    path.write_text(path.read_text().replace('"transcoder"', '"skip_transcoder"'))
    with pytest.raises(UserError, match="weights lack W_skip for the architecture skip_transcoder"):
        load_sae(tmp_path / "lens")
    save_sae(transcoder(), tmp_path / "ours")
    with pytest.raises(UserError, match="dictionary_learning has no transcoders; export it as sae_lens"):
        export_saes(tmp_path / "ours", tmp_path / "out", "dictionary_learning")
    path = tmp_path / "ours" / "cfg.json"
    path.write_text(path.read_text().replace(WRITTEN, "blocks.1.hook_resid_post", 1))
    with pytest.raises(UserError, match="does not fit the rest of the file"):
        load_sae(tmp_path / "ours")
    with pytest.raises(UserError, match="no hook_out says where it writes"):
        SAEConfig(form="standard", d_in=4, d_sae=8, d_out=5)
