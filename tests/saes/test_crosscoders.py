"""Crosscoders: what they compute against a plain sum over hooks, their files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_research.runtime.errors import UserError
from sae_research.saes import SAEConfig, SparseAutoencoder, form_class, load_sae, save_sae
from sae_research.saes.crosscoders import by_hook, decoder_norm_ratios, normalised
from sae_research.saes.exchange import export_saes
from sae_research.saes.files import sae_lens_lacks
from sae_research.saes.sources import open_sae
from tests.helpers.random_saes import make_sae

A, B, C = "blocks.1.hook_resid_pre", "blocks.2.hook_mlp_out", "blocks.3.hook_resid_post"
D, F, SCALES = 6, 20, (0.5, 4.0, 1.5)


def crosscoder(form: str = "standard", **config: Any) -> SparseAutoencoder:
    g = torch.Generator().manual_seed(0)
    tensors = {
        "W_enc": torch.randn(3 * D, F, generator=g),
        "b_enc": torch.randn(F, generator=g),
        "W_dec": torch.randn(F, 3 * D, generator=g),
        "b_dec": torch.randn(3 * D, generator=g),
        **({"threshold": torch.rand(F, generator=g)} if form == "jumprelu" else {}),
    }
    settings = {"hook_name": f"{A} + {B} + {C}", "hook_scales": SCALES, "apply_b_dec_to_input": False, "model_name": "tiny"}
    return form_class(form)(cfg=SAEConfig(form, 3 * D, F, **settings | config), **tensors)


@pytest.mark.parametrize("form", ["standard", "jumprelu"])
def test_it_sums_over_hooks_and_writes_each(form: str) -> None:
    sae, x = crosscoder(form), torch.randn(2, 5, 3 * D, generator=torch.Generator().manual_seed(1))
    assert sae.cfg.hook_names == (A, B, C) and sae.cfg.is_crosscoder and not sae.cfg.is_transcoder
    read = by_hook(x, sae.cfg)
    assert list(read) == [A, B, C]
    pre = sae.b_enc.expand(2, 5, F)
    for number, own in enumerate(read.values()):
        pre = pre + torch.einsum("bsd,df->bsf", own, sae.W_enc[D * number : D * (number + 1)])
    z = torch.relu(pre) * (pre > sae.threshold if form == "jumprelu" else 1)
    written = by_hook(sae.reconstruct(x), sae.cfg)
    for number, hat in enumerate(written.values()):
        part = slice(D * number, D * (number + 1))
        torch.testing.assert_close(hat, torch.einsum("bsf,fd->bsd", z, sae.W_dec[:, part]) + sae.b_dec[part])
    assert torch.equal(sae.target(x), x)
    for scale, (hook, own) in zip(SCALES, by_hook(normalised(x, sae.cfg), sae.cfg).items(), strict=True):
        assert torch.equal(own, read[hook] * scale)


def test_ratios_are_shares_in_normalised_units() -> None:
    sae = crosscoder()
    ratios = decoder_norm_ratios(sae)
    for f in range(F):
        norms = [SCALES[h] * float(sae.W_dec[f, D * h : D * (h + 1)].square().sum()) ** 0.5 for h in range(3)]
        assert ratios[:, f].tolist() == pytest.approx([norm / sum(norms) for norm in norms], rel=1e-5)
    sae.W_dec[3] = 0
    assert decoder_norm_ratios(sae)[:, 3].isnan().all()
    with pytest.raises(UserError, match="between the hooks of a crosscoder; this has one"):
        decoder_norm_ratios(make_sae("standard"))


@pytest.mark.parametrize("form", ["standard", "jumprelu"])
def test_a_folder_holds_all_of_it(form: str, tmp_path: Path) -> None:
    sae, x = crosscoder(form), torch.randn(2, 5, 3 * D)
    save_sae(sae, tmp_path / "one")
    for read in (load_sae(tmp_path / "one"), open_sae(str(tmp_path / "one"))):
        assert read.cfg == sae.cfg.replace(provenance=read.cfg.provenance)
        assert torch.equal(read.reconstruct(x), sae.reconstruct(x)) and type(read) is type(sae)
    assert load_sae(tmp_path / "one").weights_fingerprint() == sae.weights_fingerprint()
    save_sae(load_sae(tmp_path / "one"), tmp_path / "two")
    for name in ("cfg.json", "sae_weights.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert f"no form {form} as a crosscoder" in sae_lens_lacks(sae)
    lens = pytest.importorskip("sae_lens")
    with pytest.raises(Exception, match=f"{form}_crosscoder"):
        lens.SAE.load_from_disk(str(tmp_path / "one"))
    with pytest.raises(UserError, match="has one hook; a crosscoder has several"):
        export_saes(tmp_path / "one", tmp_path / "out", "dictionary_learning")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hook_scales": [1.0, 2.0]}, "a crosscoder of 3 hooks needs as many positive hook_scales"),
        ({"hook_scales": [1.0, 2.0, 0.0]}, "needs as many positive hook_scales"),
        ({"hook_scales": None}, "needs as many positive hook_scales"),
        ({"hook_scales": "two"}, "hook_scales must be a list of numbers"),
        ({"hook_name": A}, "hook_scales belong to a crosscoder"),
        ({"hook_name": f"{A} + {B}"}, "a crosscoder of 2 hooks needs"),
        ({"hook_name": f"{A} + {B} + {A}"}, "must be named, each once"),
        ({"hook_name": f"{A} + {B} + nowhere"}, "the hook 'nowhere' is not known"),
        ({"hook_name": f"{A} + {B} + {C} + blocks.4.hook_resid_post"}, "do not divide into those of 4 hooks"),
        ({"architecture": "standard"}, "architecture = standard does not fit the rest of the file"),
    ],
)
def test_a_file_that_says_something_else(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    save_sae(crosscoder(), tmp_path)
    values = json.loads((tmp_path / "cfg.json").read_text())
    for key, value in change.items():
        place = values if key == "architecture" else values["metadata"]
        (place["sae_research"] if key == "hook_scales" else place)[key] = value
    (tmp_path / "cfg.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=match):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"hook_out": A}, "a crosscoder writes the hooks that it reads"),
        ({"center_input": True}, "each hook has its own mean"),
        ({"hook_name": f"{A} + {A} + {C}"}, "each once"),
    ],
)
def test_configurations_that_mean_nothing(change: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        crosscoder(**change)


def test_it_takes_no_skip() -> None:
    sae = crosscoder()
    with pytest.raises(UserError, match="W_skip from a hook to itself is no dictionary"):
        type(sae)(cfg=sae.cfg, **sae.tensors(), W_skip=torch.zeros(3 * D, 3 * D))
    with pytest.raises(UserError, match="steering takes SAEs, which read and write one hook; a crosscoder has several"):
        sae.cfg.check_one_hook("steering")
