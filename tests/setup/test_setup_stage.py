"""The stage from end to end on the tiny model: what it writes, and what each mistake is told."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_research.config.params import Params
from sae_research.lm import load_language_model
from sae_research.planning.saes import planned_saes
from sae_research.runtime import packaged
from sae_research.runtime.errors import UserError
from sae_research.saes import load_sae, save_sae
from sae_research.saes.formats.dictionary_learning import export_dictionary_learning
from sae_research.setup import run_setup
from sae_research.setup.checks import preflight, preflight_contexts
from tests.helpers.tiny_saes import D_IN, D_SAE, HOOK, tiny_sae

ORDER = [
    "standard",
    "standard_ihtp_k1",
    "standard_ihtp_k2",
    "standard_mpsae_s3",
    "standard_mpsae_s5",
    "topk",
    "control_random",
    "control_data_rows",
    "control_pca",
]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_what_it_writes(project: Path, make_params: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run_setup(make_params())
    out = capsys.readouterr().out
    first = contents(project / "downloaded_saes")
    manifest = json.loads(first["manifest.json"])
    assert manifest["order"] == ORDER == list(dict.fromkeys(ORDER))
    for name in ORDER:
        row, sae = manifest["saes"][name], load_sae(project / "downloaded_saes" / name)
        assert row["weights_fingerprint"] == sae.weights_fingerprint()
        assert (row["d_in"], row["hook_name"], row["role"]) == (D_IN, HOOK, sae.cfg.role)
        assert re.search(rf"^{name} ", out, re.MULTILINE)
    rows = manifest["saes"]
    assert rows["standard"]["role"] == "baseline" and rows["topk"]["k"] == 4
    assert (
        rows["standard_ihtp_k2"]["k"],
        rows["standard_ihtp_k2"]["base"],
        rows["standard_ihtp_k2"]["causal"],
    ) == (2, "standard", False)
    assert (rows["standard_mpsae_s3"]["s"], rows["standard_mpsae_s3"]["architecture"]) == (3, "mpsae")
    assert {rows[f"control_{kind}"]["role"] for kind in ("random", "data_rows", "pca")} == {"control"}
    assert [path for path in first if path.startswith("standard_ihtp")] == [
        "standard_ihtp_k1/cfg.json",
        "standard_ihtp_k2/cfg.json",
    ]
    assert "core: up to" in out and "activation cache: about" in out
    text = b"".join(data for path, data in first.items() if path.endswith(".json")).decode()
    assert str(project) not in text and "second" not in text
    run_setup(make_params())
    assert contents(project / "downloaded_saes") == first
    assert sorted(path.name for path in project.iterdir()) == [".cache", "downloaded_saes", "trained_saes"]
    run_setup(make_params(activation_caching={"enabled": False}))  # computed afresh: the same
    assert contents(project / "downloaded_saes") == first


def test_the_estimate_leaves_out_what_is_cached(project: Path, make_params: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from sae_research.evals.core import evaluation

    params = make_params(
        controls={"names": []},
        core_eval={"batch_size_prompts": 2, "n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 1},
    )
    run_setup(params)
    first = capsys.readouterr().out
    lm = load_language_model(params.model.name, "cpu")
    names = json.loads((project / "downloaded_saes/manifest.json").read_text())["order"]
    saes = {name: load_sae(project / "downloaded_saes" / name) for name in names}
    list(evaluation.evaluate({names[0]: saes[names[0]]}, lm, params))
    run_setup(params)
    second = capsys.readouterr().out
    list(evaluation.evaluate(saes, lm, params))
    capsys.readouterr()
    run_setup(params)
    third = capsys.readouterr().out
    n = len(names)
    assert f"for {n} SAEs on" in first and "in the cache" not in first
    assert f"for {n - 1} SAEs on" in second and f"; {1 / n:.0%} is in the cache" in second
    assert f"core: all {n} SAEs are in the cache" in third


def test_controls_are_what_they_say(project: Path, make_params: Any) -> None:
    run_setup(make_params(sae_variants={"ihtp": {"enabled": False}, "mpsae": {"enabled": False}}))
    saes = {name: load_sae(project / "downloaded_saes" / f"control_{name}") for name in ("random", "data_rows", "pca")}
    for name in ("random", "data_rows"):
        assert saes[name].options() == {"s": 4} and saes[name].cfg.d_sae == D_SAE
        torch.testing.assert_close(saes[name].W_dec.norm(dim=1), torch.ones(D_SAE))
        torch.testing.assert_close(saes[name].b_dec, saes["pca"].b_dec)
    assert len(saes["data_rows"].W_dec.unique(dim=0)) > D_SAE // 2
    rows = saes["pca"].W_dec
    assert rows.shape == (8, D_IN)
    torch.testing.assert_close(rows @ rows.T, torch.eye(8), atol=1e-5, rtol=1e-5)
    seen = json.loads((project / "downloaded_saes" / "preflight.json").read_text())
    assert 0 < seen["saes"]["control_pca"]["variance_explained"] <= 1
    assert seen["model"]["name"].endswith("tiny") and seen["hooks"][HOOK]["d_in"] == D_IN
    run_setup(make_params(random_seed=7, sae_variants={"ihtp": {"enabled": False}, "mpsae": {"enabled": False}}))
    other = load_sae(project / "downloaded_saes" / "control_random")
    assert not torch.equal(other.W_dec, saes["random"].W_dec)


def test_every_kind_of_comparison(project: Path, make_params: Any) -> None:
    save_sae(tiny_sae(seed=3, model_name="", hook_name=""), project / "mine" / "run A")
    export_dictionary_learning(tiny_sae(seed=4), project / "mine" / "exported")
    params = make_params(
        comparison_saes={"trained": ["topk"], "folders": ["mine/*"], "python": ["custom_saes.example:AbsTopK"]},
        controls={"names": []},
    )
    manifest = run_setup(params)
    assert manifest["order"][5:] == ["topk", "exported", "run_a", "abs_topk"]
    custom = manifest["saes"]["abs_topk"]
    assert (custom["form"], custom["architecture"], custom["base"]) == (
        "custom_saes.example:AbsTopK",
        "abs_topk",
        "standard",
    )
    assert len(custom["provenance"]["source_sha256"]) == 64
    report = json.loads((project / "downloaded_saes" / "preflight.json").read_text())
    assert [line for line in report["warnings"] if line.startswith("run_a: ")] == [
        f"run_a: names no model; assumed {params.model.name}",
        f"run_a: names no hook; assumed {HOOK}",
    ]


def test_a_baseline_from_a_folder_and_other_hooks(project: Path, make_params: Any) -> None:
    export_dictionary_learning(tiny_sae("topk"), project / "theirs")
    save_sae(tiny_sae(seed=2, hook_name="blocks.0.hook_resid_pre"), project / "trained_saes" / "early")
    params = make_params(
        baseline_sae={"source": "folder", "path": "theirs", "name": "base", "hook_layer": 1},
        comparison_saes={"trained": ["early"]},
        controls={"names": ["random"], "s": 2},
    )
    manifest = run_setup(params)
    assert manifest["saes"]["base"]["form"] == "topk" and manifest["saes"]["base"]["role"] == "baseline"
    assert manifest["saes"]["early"]["hook_name"] == "blocks.0.hook_resid_pre"
    report = json.loads((project / "downloaded_saes" / "preflight.json").read_text())
    assert list(report["hooks"]) == ["blocks.0.hook_resid_pre", HOOK]
    assert report["saes"]["base"]["card"] == {"l0": 4.0} and report["saes"]["base"]["l0"] == 4.0


def test_cards_are_compared(project: Path, make_params: Any, capsys: pytest.CaptureFixture[str]) -> None:
    save_sae(
        tiny_sae("topk", provenance={"held_out": {"l0": 30.0, "variance_explained": 0.9}}), project / "trained_saes" / "topk"
    )
    (project / "trained_saes" / "training_report.json").write_text(
        json.dumps({"saes": {"standard": {"held_out": {"l0": 1.0}}}})
    )
    run_setup(make_params(controls={"names": []}))
    out = capsys.readouterr().out
    assert "warning: topk: L0 is 4 here, its card says 30" in out
    assert re.search(r"warning: topk: explains -?\d\.\d+ of the variance here, its card says 0.900", out)
    assert re.search(r"warning: standard: L0 is .* here, its card says 1\n", out)


def test_mistakes(project: Path, make_params: Any) -> None:
    save_sae(tiny_sae(model_name="gpt2"), project / "bad" / "model")
    save_sae(tiny_sae(hook_name="blocks.9.hook_resid_post"), project / "bad" / "layer")
    save_sae(tiny_sae(center_input=True), project / "bad" / "centred")
    save_sae(tiny_sae(provenance={"activation_norm": 1e6}), project / "bad" / "norm")
    wide = tiny_sae()
    save_sae(
        type(wide)(
            wide.cfg.replace(d_in=D_SAE, d_sae=D_IN), W_enc=wide.W_dec, W_dec=wide.W_enc, b_enc=wide.b_dec, b_dec=wide.b_enc
        ),
        project / "bad" / "wide",
    )
    save_sae(tiny_sae(), project / "other" / "topk")
    (project / "empty").mkdir()
    (project / "downloaded_saes").mkdir()
    (project / "downloaded_saes" / "before").write_text("kept")

    def refused(message: str, **sections: Any) -> None:
        with pytest.raises(UserError, match=message) as caught:
            run_setup(
                make_params(controls={"names": []}, **sections) if "controls" not in sections else make_params(**sections)
            )
        assert "\n" not in str(caught.value)

    for folder, message in [
        ("model", "model was trained on gpt2, model.name is"),
        ("layer", "has layers 0 to 2"),
        ("centred", "a model without LayerNorm"),
        ("norm", "preflight.max_norm_ratio"),
        ("wide", f"reads {D_SAE} dimensions, .* has {D_IN} at"),
    ]:
        refused(message, comparison_saes={"folders": [f"bad/{folder}"]})
    refused("no such trained SAE .there are standard, topk.; run the train stage", baseline_sae={"name": "gone"})
    refused("'none/\\*' matches no folder", comparison_saes={"folders": ["none/*"]})
    refused("no SAE there; expected cfg.json", comparison_saes={"folders": ["empty"]})
    refused(
        "two SAEs would be called topk: trained_saes/topk and the folder other/topk",
        comparison_saes={"trained": ["topk"], "folders": ["other/*"]},
    )
    refused(
        "custom_saes.example:Nothing: custom_saes.example has no class Nothing",
        comparison_saes={"python": ["custom_saes.example:Nothing"]},
    )
    refused(
        f"k_values: 65 is larger than the baseline's d_sae = {D_SAE}",
        sae_variants={"ihtp": {"k_values": [65]}},
    )
    refused(
        "pca_components = 33 is larger than the activations' width 32",
        controls={"pca_components": 33, "s": 2},
    )
    refused("controls.s = 65 is larger", controls={"s": 65})
    refused(
        "baseline standard explains .* preflight.min_variance_explained is 0.99",
        preflight={"tokens": 128, "min_variance_explained": 0.99},
    )
    refused("hook_layer is 8, but the SAE reads blocks.1", baseline_sae={"source": "folder", "path": "other/topk"})
    broken = project / "trained_saes" / "topk" / "sae_weights.safetensors"
    broken.write_bytes(broken.read_bytes()[:100])
    refused("damaged weights")
    assert contents(project / "downloaded_saes") == {"before": b"kept"}  # all or nothing
    assert not list(project.glob(".downloaded_saes*"))


def test_directory_matches_are_named_and_read(project: Path, make_params: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_research.saes import sources

    asked = []

    def release(name: str, sae_id: str) -> Any:
        asked.append((name, sae_id))
        return tiny_sae(seed=8, provenance={"release": name, "sae_id": sae_id})

    monkeypatch.setattr(sources, "from_release", release)
    params = make_params(
        comparison_saes={
            "sae_regex_pattern": "gpt2-small-res-jb",
            "sae_block_pattern": r"blocks\.3\.hook_resid_pre",
        },
        controls={"names": []},
    )
    manifest = run_setup(params)
    assert asked == [("gpt2-small-res-jb", "blocks.3.hook_resid_pre")]
    assert manifest["order"][-1] == "gpt2_small_res_jb_blocks_3_hook_resid_pre"
    assert manifest["saes"][manifest["order"][-1]]["provenance"]["release"] == "gpt2-small-res-jb"


def test_a_comparison_that_fails_is_a_warning_the_baseline_is_not(project: Path, tiny_inputs: Path) -> None:
    lm = load_language_model(str(tiny_inputs / "tiny"), "cpu")
    params = Params.model_validate(
        {"text": {"dataset": str(tiny_inputs / "texts"), "context_size": 24}, "preflight": {"tokens": 256}}
    )
    bad = tiny_sae(seed=1)
    bad.b_enc.fill_(torch.nan)
    found = preflight({"good": tiny_sae(), "bad": bad}, "good", lm, params, preflight_contexts(lm, params))
    assert "NaN" in found.report["saes"]["bad"]["failed"] and found.report["saes"]["good"]["l0"] > 0
    assert any(line.startswith("bad fails, and evaluations will skip it") for line in found.warnings)
    with pytest.raises(UserError, match="the baseline bad fails: .*NaN"):
        preflight({"good": tiny_sae(), "bad": bad}, "bad", lm, params, preflight_contexts(lm, params))


def test_packaged_dictionaries_are_compared(project: Path, make_params: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "FOLDER", project / "packaged")
    transcoder = tiny_sae(
        hook_name="blocks.1.mlp.hook_in", hook_out="blocks.1.hook_mlp_out", d_out=D_IN, apply_b_dec_to_input=False
    )
    save_sae(transcoder, project / "packaged" / "tiny-mlp")
    params = make_params(comparison_saes={"trained": ["topk"], "packaged": ["tiny_mlp"]})
    manifest = run_setup(params)
    found = manifest["saes"]["tiny_mlp"]
    assert (found["role"], found["hook_out"], found["d_sae"]) == ("comparison", "blocks.1.hook_mlp_out", D_SAE)
    planned = {sae.name: sae for sae in planned_saes(params, D_IN)}["tiny_mlp"]
    assert (planned.hook, planned.written, planned.d_sae) == (found["hook_name"], found["hook_out"], D_SAE)
    with pytest.raises(UserError, match="packaged:absent: no such packaged dictionary; there are tiny-mlp"):
        run_setup(make_params(comparison_saes={"packaged": ["absent"]}))
