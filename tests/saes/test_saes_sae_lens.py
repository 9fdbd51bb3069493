"""SAELens: it reads what we write, we read what it writes, and what cannot be reproduced is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sae_research.runtime.errors import UserError
from sae_research.saes import load_sae, save_sae
from sae_research.saes.files import sae_lens_lacks
from sae_research.saes.formats.sae_lens import centres_input, convert, from_sae_lens
from sae_research.saes.releases import matching_saes, released_saes
from tests.helpers.random_saes import D_IN, D_SAE, make_sae, random_activations

sae_lens = pytest.importorskip("sae_lens")


def lens_sae(architecture: str, training: bool = False, **config: Any) -> Any:
    """A SAELens object with random weights, decoder rows of any norm."""
    metadata = sae_lens.saes.sae.SAEMetadata(
        model_name="tiny",
        hook_name="blocks.1.hook_resid_post",
        context_size=32,
        prepend_bos=False,
        model_from_pretrained_kwargs=config.pop("kwargs", {}),
        sae_lens_version=sae_lens.__version__,
    )
    get = sae_lens.registry.get_sae_training_class if training else sae_lens.registry.get_sae_class
    cls, cfg_cls = get(architecture)
    sae = cls(cfg_cls(d_in=D_IN, d_sae=D_SAE, metadata=metadata, **config))
    g = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g) / 2)
            if name == "threshold":
                parameter.abs_()
    return sae


@pytest.mark.parametrize("form", ["standard", "topk", "gated", "jumprelu"])
@pytest.mark.parametrize("config", [{}, {"apply_b_dec_to_input": False}])
def test_sae_lens_reads_ours(form: str, config: dict[str, Any], tmp_path: Path) -> None:
    sae, x = make_sae(form, **config), random_activations()
    save_sae(sae, tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), sae.encode(x))
        torch.testing.assert_close(theirs(x), sae.decode(sae.encode(x)))
    metadata = theirs.cfg.metadata
    assert (metadata.model_name, metadata.hook_name) == (sae.cfg.model_name, sae.cfg.hook_name)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk", "topk"])
def test_sae_lens_reads_trained_thresholds_as_jumprelu(architecture: str, tmp_path: Path) -> None:
    sae, x = make_sae("jumprelu", architecture=architecture), random_activations()
    sae.threshold.fill_(0.4)
    save_sae(sae, tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), sae.encode(x))
    assert theirs.cfg.architecture() == "jumprelu" and load_sae(tmp_path).cfg.architecture == architecture
    assert sae_lens_lacks(sae) == ""


def test_matching_pursuit_is_read_alike_or_refused(tmp_path: Path) -> None:
    """SAELens takes positive correlations only: our signed pursuit must not pass for it."""
    sae, x = make_sae("nonnegative_matching_pursuit"), random_activations()
    save_sae(sae, tmp_path / "nonnegative")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "nonnegative")
    with torch.no_grad():
        torch.testing.assert_close(theirs.encode(x), sae.encode(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(theirs(x), sae.decode(sae.encode(x)), atol=1e-5, rtol=1e-5)
    for form in ("matching_pursuit", "omp", "linear"):
        sae = make_sae(form)
        save_sae(sae, tmp_path / form)
        assert f"no form {form}" in sae_lens_lacks(sae)
        with pytest.raises(KeyError):
            sae_lens.SAE.load_from_disk(tmp_path / form)
        back = load_sae(tmp_path / form)
        assert back.cfg.form == form
        torch.testing.assert_close(back.encode(x), sae.encode(x))


@pytest.mark.parametrize(
    ("form", "config"),
    [
        ("standard", {}),
        ("gated", {}),
        ("jumprelu", {}),
        ("jumprelu", {"apply_b_dec_to_input": False}),
        ("topk", {"k": 5}),
        ("topk", {"k": 5, "rescale_acts_by_decoder_norm": True}),
    ],
)
def test_we_read_theirs(form: str, config: dict[str, Any], tmp_path: Path) -> None:
    theirs, x = lens_sae(form, **config), random_activations()
    with torch.no_grad():
        expected = theirs(x)
        norms = theirs.W_dec.norm(dim=1)
        expected_z = theirs.encode(x)
    theirs.save_model(tmp_path)
    for sae in (load_sae(tmp_path), from_sae_lens(theirs)):
        assert sae.cfg.form == form and sae.cfg.prepend_bos is False and sae.cfg.context_size == 32
        torch.testing.assert_close(sae.decode(sae.encode(x)), expected, atol=1e-5, rtol=1e-5)
        assert torch.equal(sae.encode(x) != 0, expected_z != 0)
        if form != "topk" or "rescale_acts_by_decoder_norm" in config:
            torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    torch.testing.assert_close(theirs.W_dec.norm(dim=1), norms)  # the object was not changed
    save_sae(sae, tmp_path / "again")
    torch.testing.assert_close(load_sae(tmp_path / "again").encode(x), sae.encode(x))


@pytest.mark.parametrize("rescale", [True, False])
def test_batchtopk_of_a_training_run(rescale: bool, tmp_path: Path) -> None:
    """Its own export for inference is the judge."""
    theirs, x = (
        lens_sae("batchtopk", training=True, k=5, rescale_acts_by_decoder_norm=rescale),
        random_activations(),
    )
    theirs.topk_threshold = torch.tensor(0.8, dtype=torch.double)
    ours = from_sae_lens(theirs)
    theirs.save_inference_model(tmp_path)
    with torch.no_grad():
        expected = sae_lens.SAE.load_from_disk(tmp_path)(x)
    assert ours.cfg.form == "jumprelu"
    torch.testing.assert_close(ours.decode(ours.encode(x)), expected, atol=1e-5, rtol=1e-5)
    loaded = load_sae(tmp_path)
    torch.testing.assert_close(loaded.decode(loaded.encode(x)), expected, atol=1e-5, rtol=1e-5)


def test_normalisation_is_folded_or_refused(tmp_path: Path) -> None:
    theirs, x = lens_sae("standard", normalize_activations="expected_average_only_in"), random_activations()
    with pytest.raises(UserError, match="expected_average_only_in cannot be folded.*factor"):
        from_sae_lens(theirs)
    with torch.no_grad():
        expected = theirs(x * 3.0) / 3.0
    theirs.save_model(tmp_path)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 3.0}')
    sae = load_sae(tmp_path)
    torch.testing.assert_close(sae.decode(sae.encode(x)), expected, atol=1e-4, rtol=1e-4)
    for form, other in (("jumprelu", "layer_norm"), ("topk", "constant_norm_rescale"), ("standard", "covariance_whitening")):
        with pytest.raises(UserError, match=f"{other} cannot be folded"):
            from_sae_lens(lens_sae(form, normalize_activations=other))


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
def test_tokens_of_one_norm(apply_b_dec_to_input: bool, tmp_path: Path) -> None:
    """`constant_norm_rescale` (mistral-7b-res-wg): the bias that grows with a token is one latent more."""
    theirs, x = (
        lens_sae("standard", normalize_activations="constant_norm_rescale", apply_b_dec_to_input=apply_b_dec_to_input),
        7 * random_activations(),
    )
    sae = from_sae_lens(theirs)
    with torch.no_grad():
        torch.testing.assert_close(sae.decode(sae.encode(x)), theirs(x), atol=1e-4, rtol=1e-4)
        fires = theirs.encode(x) > 0
    z = sae.encode(x)
    assert torch.equal(z[..., :-1] > 0, fires) and (z[..., -1] > 0).all() and sae.cfg.d_sae == D_SAE + 1
    save_sae(sae, tmp_path)
    torch.testing.assert_close(load_sae(tmp_path).encode(x), z)


def test_how_the_model_was_loaded() -> None:
    resid, z = "blocks.1.hook_resid_post", "blocks.1.attn.hook_z"
    assert not centres_input({}, resid, "x")
    assert not centres_input({"center_writing_weights": False, "fold_ln": False}, resid, "x")
    assert centres_input({"center_writing_weights": True}, resid, "x")
    assert centres_input({"center_writing_weights": True, "fold_ln": False}, resid, "x")
    assert not centres_input({"center_writing_weights": True}, z, "x")
    for kwargs in (
        {"fold_ln": True},
        {"center_writing_weights": True, "fold_ln": True},
    ):
        with pytest.raises(UserError, match="^x: trained on a model loaded with .*only center_writing_weights"):
            centres_input(kwargs, resid, "x")
    assert from_sae_lens(lens_sae("standard", kwargs={"center_writing_weights": True})).cfg.center_input


def test_other_refusals(tmp_path: Path) -> None:
    theirs = lens_sae("standard")
    values, tensors = theirs.cfg.to_dict(), dict(theirs.state_dict())
    for change, message in [
        ({"architecture": "crosscoder"}, "architecture 'crosscoder' is not supported; known: standard"),
        ({"architecture": "jumprelu"}, "weights lack threshold"),
        ({"d_in": 13}, r"shape \(12, 40\), expected \(13, 40\)"),
        ({"finetuning_scaling_factor": True}, "finetuning_scaling_factor"),
        ({"metadata": {"hook_head_index": 3}}, "one attention head only"),
    ]:
        with pytest.raises(UserError, match=f"^here: .*{message}"):
            convert({**values, **change}, tensors, "here")


def test_configuration_before_version_6(tmp_path: Path) -> None:
    theirs, x = lens_sae("topk", k=5), random_activations()
    old = {
        "architecture": "standard",
        "d_in": D_IN,
        "d_sae": D_SAE,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 5},
        "model_name": "tiny",
        "hook_point": "blocks.1.hook_resid_post",
        "normalize_activations": False,
        "context_size": 32,
    }
    sae = convert(old, dict(theirs.state_dict()), "here")
    assert (sae.cfg.form, sae.cfg.hook_name, sae.options()) == ("topk", "blocks.1.hook_resid_post", {"k": 5})
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x), theirs.encode(x))


def test_directory_matching_is_sae_bench_s() -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    theirs = {(release, sae_id) for release, lookup in get_pretrained_saes_directory().items() for sae_id in lookup.saes_map}
    assert {(sae.release, sae.sae_id) for sae in released_saes()} == theirs
    found = matching_saes(r"gpt2-small-res-jb", r"blocks\.[01]\.hook_resid_pre")
    assert [sae.sae_id for sae in found] == ["blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"]
    with pytest.raises(UserError, match=r"no SAE of SAELens' directory matches .* in full \(0 releases"):
        matching_saes("gpt2-small-res-j", ".*")  # full match, not search
    with pytest.raises(UserError, match="not a regular expression"):
        matching_saes("(", ".*")
