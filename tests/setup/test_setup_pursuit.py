"""Pursuit variants of `sae_variants`: which SAEs they become, with which options, and what a poor dictionary is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sae_research.runtime.errors import UserError
from sae_research.saes import load_sae, save_sae
from sae_research.setup import run_setup
from tests.helpers.tiny_saes import D_IN, tiny_sae

VARIANTS = {
    "ihtp": {"k_values": [2], "iterations": 3},
    "mpsae": {"s_values": [3], "tolerance": 0.25},
    "omp": {"enabled": True, "s_values": [2, 4]},
    "topk_refit": {"enabled": True, "k_values": [3], "iterations": 2},
    "nn_mpsae": {"enabled": True, "s_values": [3]},
    "nn_omp": {"enabled": True, "s_values": [2], "tolerance": 0.1},
}


def test_every_section_becomes_saes_with_its_options(project: Path, make_params: Any) -> None:
    manifest = run_setup(make_params(sae_variants=VARIANTS, controls={"names": []}, comparison_saes={"trained": []}))
    assert manifest["order"] == [
        "standard",
        "standard_ihtp_k2",
        "standard_mpsae_s3",
        "standard_omp_s2",
        "standard_omp_s4",
        "standard_topk_refit_k3",
        "standard_nn_mpsae_s3",
        "standard_nn_omp_s2",
    ]
    found = {name: load_sae(project / "downloaded_saes" / name) for name in manifest["order"]}
    assert {name: (sae.cfg.form, sae.options()) for name, sae in found.items() if name != "standard"} == {
        "standard_ihtp_k2": ("ihtp", {"k": 2, "iterations": 3}),
        "standard_mpsae_s3": ("matching_pursuit", {"s": 3, "tolerance": 0.25}),
        "standard_omp_s2": ("omp", {"s": 2}),
        "standard_omp_s4": ("omp", {"s": 4}),
        "standard_topk_refit_k3": ("topk_refit", {"k": 3, "iterations": 2}),
        "standard_nn_mpsae_s3": ("nonnegative_matching_pursuit", {"s": 3}),
        "standard_nn_omp_s2": ("nonnegative_omp", {"s": 2, "tolerance": 0.1}),
    }
    rows = manifest["saes"]
    assert {name: rows[name]["architecture"] for name in found} == {
        name: name.removeprefix("standard_").rpartition("_")[0] or name for name in found
    }
    assert [name for name in found if not rows[name]["signed"]] == ["standard", "standard_nn_mpsae_s3", "standard_nn_omp_s2"]
    assert [name for name in found if not rows[name]["per_token"]] == ["standard_ihtp_k2"]


def test_other_dictionaries_are_read_too(project: Path, make_params: Any) -> None:
    save_sae(tiny_sae(seed=5), project / "trained_saes" / "other")
    settings = {"controls": {"names": []}, "comparison_saes": {"trained": ["other"]}}
    manifest = run_setup(make_params(sae_variants={"dictionaries": ["other"], "mpsae": {"s_values": [3]}}, **settings))
    order = manifest["order"]
    assert order.index("other") < order.index("other_mpsae_s3")
    assert manifest["saes"]["other_mpsae_s3"]["base"] == "other"
    assert manifest["saes"]["standard_mpsae_s3"]["base"] == "standard"
    found = {name: load_sae(project / "downloaded_saes" / name) for name in ("standard", "other", "other_mpsae_s3")}
    directions = torch.nn.functional.normalize(found["other"].W_dec, dim=-1)
    read = torch.nn.functional.normalize(found["other_mpsae_s3"].W_dec, dim=-1)
    assert torch.allclose(read, directions) and not torch.allclose(found["other"].W_dec, found["standard"].W_dec)
    with pytest.raises(
        UserError, match=r"not among the compared SAEs \(the baseline's is always read\): absent; known: other"
    ):
        run_setup(make_params(sae_variants={"dictionaries": ["absent"], "mpsae": {"s_values": [3]}}, **settings))
    small = tiny_sae(seed=5)
    small.W_enc, small.b_enc, small.W_dec = small.W_enc[:, :32].clone(), small.b_enc[:32].clone(), small.W_dec[:32].clone()
    small.cfg = small.cfg.replace(d_sae=32)
    save_sae(small, project / "trained_saes" / "other")
    with pytest.raises(UserError, match="s_values: 40 is larger than other's d_sae = 32"):
        run_setup(make_params(sae_variants={"dictionaries": ["other"], "mpsae": {"s_values": [40]}}, **settings))


def test_a_poor_dictionary_is_noted_or_refused(project: Path, make_params: Any, capsys: pytest.CaptureFixture[str]) -> None:
    sae = tiny_sae()
    sae.W_dec[3] *= 2
    sae.W_dec[5:7] = 0
    sae.W_dec[9] = -sae.W_dec[8]
    assert sae.W_dec.shape[1] == D_IN
    save_sae(sae, project / "trained_saes" / "standard")
    run_setup(make_params(comparison_saes={"trained": []}, controls={"names": []}))
    out = capsys.readouterr().out
    about = "warning: standard, as a dictionary for pursuit: "
    assert about + "1 of 64 atoms are not of unit norm (2 to 2): scaled to it" in out
    assert about + "2 of 64 atoms are zero vectors: never taken" in out
    assert about + "1 atoms repeat another up to sign: the first stands for all" in out
    with pytest.raises(UserError, match="1 of 64 atoms are not of unit norm .* and 2 of 64 atoms are zero vectors; pursuit"):
        run_setup(make_params(comparison_saes={"trained": []}, sae_variants={"normalise": "refuse"}))
    off = {name: {"enabled": False} for name in ("ihtp", "mpsae", "omp")}
    run_setup(
        make_params(comparison_saes={"trained": []}, controls={"names": []}, sae_variants={"normalise": "refuse", **off})
    )  # nobody pursues


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"omp": {"enabled": True, "s_values": [65]}},
            "sae_variants.omp.s_values: 65 is larger than the baseline's d_sae = 64",
        ),
        ({"topk_refit": {"enabled": True, "k_values": [65]}}, "sae_variants.topk_refit.k_values: 65 is larger"),
    ],
)
def test_sizes_beyond_the_dictionary_are_refused(project: Path, make_params: Any, section: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_setup(make_params(sae_variants={"mpsae": {"s_values": [3]}, **section}))
