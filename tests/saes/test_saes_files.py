"""SAE folders: round trips, variants, and what is said of damaged ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from sae_research.runtime.errors import UserError
from sae_research.saes import SAEConfig, SparseAutoencoder, form_class, load_sae, save_sae, save_variant
from tests.helpers.random_saes import OWN_FORMS, make_sae, random_activations


@pytest.mark.parametrize("form", OWN_FORMS)
def test_round_trip(form: str, tmp_path: Path) -> None:
    sae, x = (
        make_sae(form, provenance={"seed": 3}, role="comparison", center_input=True),
        random_activations(),
    )
    save_sae(sae, tmp_path / "a")
    loaded = load_sae(tmp_path / "a")
    assert loaded.cfg == sae.cfg and loaded.options() == sae.options()
    torch.testing.assert_close(loaded.encode(x), sae.encode(x))
    torch.testing.assert_close(loaded.decode(loaded.encode(x)), sae.decode(sae.encode(x)))
    save_sae(make_sae(form, provenance={"seed": 3}, role="comparison", center_input=True), tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_variant_shares_the_weights_and_pins_them(tmp_path: Path) -> None:
    base = make_sae("standard")
    save_sae(base, tmp_path / "base")
    cfg = base.cfg.replace(form="ihtp", architecture="ihtp", role="variant", base="base", options={"k": 2})
    save_variant(cfg, {"k": 2}, tmp_path / "base_ihtp_k2", tmp_path / "base")
    assert [file.name for file in (tmp_path / "base_ihtp_k2").iterdir()] == ["cfg.json"]
    (tmp_path / "base").parent.rename(tmp_path.with_name("moved"))
    variant = load_sae(tmp_path.with_name("moved") / "base_ihtp_k2")
    assert (variant.cfg.form, variant.cfg.base, variant.options()) == ("ihtp", "base", {"k": 2})
    torch.testing.assert_close(variant.W_dec, base.W_dec)
    save_sae(make_sae("standard", seed=1), tmp_path.with_name("moved") / "base")
    with pytest.raises(UserError, match="changed since this variant was made"):
        load_sae(tmp_path.with_name("moved") / "base_ihtp_k2")


def test_a_class_of_ones_own(tmp_path: Path) -> None:
    from custom_saes.example import AbsTopK

    base, x = make_sae("gated"), random_activations()
    sae = AbsTopK.from_baseline(base)
    sae.cfg = sae.cfg.replace(form="custom_saes.example:AbsTopK")
    save_sae(sae, tmp_path)
    loaded = load_sae(tmp_path)
    assert isinstance(loaded, AbsTopK) and loaded.cfg.architecture == "abs_topk"
    z = loaded.encode(x)
    assert (z != 0).sum(-1).unique().tolist() == [32] and (z < 0).any()
    torch.testing.assert_close(z, sae.encode(x))


def break_json(folder: Path) -> None:
    (folder / "cfg.json").write_text("{")


def drop_key(folder: Path) -> None:
    values = json.loads((folder / "cfg.json").read_text())
    del values["d_sae"]
    (folder / "cfg.json").write_text(json.dumps(values))


def drop_option(folder: Path) -> None:
    values = json.loads((folder / "cfg.json").read_text())
    values["metadata"]["sae_research"]["options"] = {}
    (folder / "cfg.json").write_text(json.dumps(values))


def no_weights(folder: Path) -> None:
    (folder / "sae_weights.safetensors").unlink()


def truncate(folder: Path) -> None:
    path = folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:200])


def wrong_width(folder: Path) -> None:
    values = json.loads((folder / "cfg.json").read_text())
    values["d_in"] = 13
    (folder / "cfg.json").write_text(json.dumps(values))


def nan(folder: Path) -> None:
    sae = make_sae("topk")
    sae.W_enc[0, 0] = torch.nan
    save_sae(sae, folder)


def unknown_form(folder: Path) -> None:
    values = json.loads((folder / "cfg.json").read_text())
    values["architecture"] = "topkk"
    (folder / "cfg.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (break_json, "not valid JSON"),
        (drop_key, "key 'd_sae' is missing"),
        (drop_option, "k = 5 does not fit the rest of the file"),
        (no_weights, "no such file"),
        (truncate, "damaged weights"),
        (
            wrong_width,
            r"shape \(12, 40\), expected "
            r"\(13, 40\)",
        ),
        (nan, "W_enc holds NaN"),
        (unknown_form, "unknown SAE form 'topkk'; known: "),
    ],
)
def test_harmed_folders(harm, message: str, tmp_path: Path) -> None:
    save_sae(make_sae("topk"), tmp_path)
    harm(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        load_sae(tmp_path)
    assert "\n" not in str(caught.value)


def test_mistakes_in_a_users_module_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "half_written.py").write_text("class Mine(:")
    (tmp_path / "needs_more.py").write_text("import not_there_at_all")
    (tmp_path / "other_kind.py").write_text("class Mine: ...")
    for form, message in {
        "no_such_file:Mine": r"cannot import no_such_file \(.*\); put the file into custom_saes/",
        "half_written:Mine": r"cannot import half_written \(.*line 1\)\)$",
        "needs_more:Mine": r"cannot import needs_more \(No module named 'not_there_at_all'\)$",
        "other_kind:Yours": "other_kind has no class Yours",
        "other_kind:Mine": "Mine is not a subclass of",
    }.items():
        with pytest.raises(UserError, match=message):
            form_class(form)
    with pytest.raises(UserError, match="defines no encode"):
        SparseAutoencoder.encode(make_sae("standard"), random_activations())


def test_centred_input_and_target() -> None:
    """An SAE of a centred stream ignores the mean over d_in, and is held only to the rest."""
    sae, x = make_sae("standard", center_input=True), random_activations()
    torch.testing.assert_close(sae.encode(x + 3), sae.encode(x))
    torch.testing.assert_close(sae.target(x), x - x.mean(-1, keepdim=True))
    plain = make_sae("standard")
    assert torch.equal(plain.target(x), x)


def test_hook_layer() -> None:
    assert make_sae("standard").cfg.hook_layer == 1
    with pytest.raises(UserError, match="names no layer"):
        _ = SAEConfig(form="standard", d_in=1, d_sae=1, hook_name="embed").hook_layer
