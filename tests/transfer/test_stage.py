"""The stage end to end on the tiny model, its metrics, its section of the report and its pictures; bad input."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sae_research.config.params import Params
from sae_research.config.reporting import Visualization
from sae_research.lm import load_language_model
from sae_research.reporting import transfer_figures
from sae_research.reporting.transfer import extract_transfer, transfer
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import write_json
from sae_research.runtime.stages import write_disabled
from sae_research.saes import load_sae, save_sae
from sae_research.saes.crosscoders import decoder_norm_ratios
from sae_research.saes.sources import check_fits
from sae_research.transfer import stage
from sae_research.transfer.stage import RESULTS, run_stage
from tests.helpers.tiny_model import make_tiny_model
from tests.helpers.tiny_saes import tiny_sae
from tests.transfer.conftest import HOOK


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_offline_pair_its_controls_and_everything_after(
    make_params: Any, in_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_stage(make_params())
    folder = in_project / RESULTS
    assert read(folder / "_status.json")["status"] == "ok"
    itself = read(folder / "control_self_eval_results.json")
    perturbed = read(folder / "control_perturbed_eval_results.json")
    pair = read(folder / "finetuned_eval_results.json")
    hook = pair["setting"]["hook"]
    for stats in itself["similarity"].values():
        assert stats["all"]["cosine"] == stats["all"]["cka"] == 1 and stats["all"]["euclidean"] == 0
    alive = itself["latents"]["base"]["by_interval"]["alive"]
    assert alive["pearson_median"] == alive["jaccard_mean"] == alive["density_ratio_mean"] == 1
    assert alive["logit_correlation_mean"] == 1 and itself["losses"]["clean_kl"]["value"] == pytest.approx(0, abs=1e-6)
    assert itself["losses"]["models"]["base"] == itself["losses"]["models"]["finetuned"]
    strong = perturbed["latents"]["base"]["by_interval"]["alive"]
    assert strong["pearson_median"] < 0.5 and perturbed["similarity"][hook]["all"]["cosine"] < 0.6
    assert pair["moved"]["weights"]["relative_change"] > 0 and pair["moved"]["outputs"]["kl"] > 0
    with (folder / "latents.tsv").open(newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))
    assert [int(row["latent"]) for row in rows] == list(range(64))
    assert sum(row["sample"] == "dense" for row in rows) == pair["latents"]["base"]["by_sample"]["dense"]["latents"]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for work in ("sweep", "patched_losses", "weights_moved", "repair"):
        monkeypatch.setattr(stage, work, lambda *_: pytest.fail("everything was in the cache"))
    run_stage(make_params())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    check_skipped_control(make_params(), folder, monkeypatch)
    monkeypatch.setattr(stage, "repair", lambda _, limit: {"status": "again", "limit": limit})
    run_stage(make_params(repair={"tokens": 240}))
    again = read(folder / "finetuned_eval_results.json")
    assert again.pop("repair") == {"status": "again", "limit": pair["similarity"][hook]["limit"]}
    assert again == {key: value for key, value in pair.items() if key != "repair"}, "only the changed part runs again"
    run_stage(make_params())
    check_metrics(in_project)
    check_report_and_pictures(in_project)


def check_skipped_control(params: Params, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise can raise norms so far that a rule removes nearly everything: no reason to lose the rest."""
    evaluate = stage.evaluate

    def fails(pair: Any, name: str, *rest: Any) -> Any:
        if name == "control_perturbed":
            raise UserError("the rule median removes 87 % of tokens")
        return evaluate(pair, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(stage, "evaluate", fails)
        run_stage(params)
    status = read(folder / "_status.json")
    assert status["status"] == "ok" and status["skipped"] == {"control_perturbed": "the rule median removes 87 % of tokens"}
    assert not (folder / "control_perturbed_eval_results.json").exists()
    assert "Skipped, control: perturbed: the rule median removes 87 %" in transfer(folder.parents[1])


def check_metrics(root: Path) -> None:
    extract_transfer(root / RESULTS, root / "metrics/transfer.json")
    figures = read(root / "metrics/transfer.json")
    assert figures["_status"] == {"status": "ok", "pairs": 3}
    assert figures["control_self"]["cosine"] == figures["control_self"]["pearson_median"] == 1
    assert {"base_variance_explained", "finetuned_kl", "cka_with_outliers", "repair_gap"} <= figures["finetuned"].keys()


def check_report_and_pictures(root: Path) -> None:
    text = transfer(root)
    for words in ("Good Tokens in Base (%)", "control: perturbed", "Pearson", "Repair", "images/transfer/densities.png"):
        assert words in text
    stale = root / "images/transfer/gone.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"")
    written = transfer_figures.draw_transfer(Params().visualization.model_copy(update={"dpi": 30}), root)
    assert {path.stem for path in written} == set(transfer_figures.FIGURES) and not stale.exists()
    for path in written:
        assert np.asarray(Image.open(path)).std() > 5, f"{path.name} is blank"


@pytest.mark.slow
def test_equal_runs_write_equal_bytes(make_params: Any, in_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAE_RESEARCH_NO_CACHE", "1")
    found = []
    for _ in range(2):
        run_stage(make_params())
        found.append({path.name: path.read_bytes() for path in (in_project / RESULTS).iterdir()})
    assert found[0] == found[1]


def test_switched_off(in_project: Path) -> None:
    write_disabled(in_project / RESULTS)
    assert read(in_project / RESULTS / "_status.json")["status"] == "disabled"
    extract_transfer(in_project / RESULTS, in_project / "metrics/transfer.json")
    assert read(in_project / "metrics/transfer.json") == {"_status": {"status": "disabled"}}
    assert transfer(in_project) == "" and transfer_figures.draw_transfer(Params().visualization, in_project) == []


def test_own_sae_of_the_finetuned_model(make_params: Any, in_project: Path, models_folder: Path) -> None:
    save_sae(tiny_sae("standard", seed=4, model_name="near"), in_project / "theirs")
    run_stage(
        make_params(
            finetuned_model=str(models_folder / "near"),
            controls={"names": []},
            repair={"enabled": False},
            finetuned_sae={"source": "folder", "path": "theirs"},
            tokens=480,
            patched_tokens=96,
            tokenizer=str(models_folder / "near"),
        )
    )
    result = read(in_project / RESULTS / "finetuned_eval_results.json")
    assert set(result["quality"]) == set(result["latents"]) == {"base", "finetuned"}
    assert set(result["losses"]["models"]["base"]["kept"]["saes"]) == {"base", "finetuned"}
    assert result["repair"]["status"] == "disabled" and (in_project / RESULTS / "latents_finetuned_sae.tsv").is_file()
    assert "Latents of the finetuned model's SAE" in transfer(in_project)


def test_crosscoder_of_the_pair(
    make_params: Any, in_project: Path, models_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ran(crosscoder: dict[str, Any] | None) -> dict[str, Any]:
        run_stage(
            make_params(
                finetuned_model=str(models_folder / "near"),
                controls={"names": []},
                repair={"enabled": False},
                tokens=480,
                patched_tokens=96,
                crosscoder=crosscoder,
            )
        )
        return read(in_project / RESULTS / "finetuned_eval_results.json")

    without = ran(None)
    assert "crosscoder" not in without and "crosscoder of both" not in transfer(in_project)
    sizes = {"d_sae": 48, "k": 4, "tokens": 4800, "batch_size": 64, "held_out_tokens": 480}
    found = ran({**sizes, "checked": 2, "checked_tokens": 96})
    crosscoder = found.pop("crosscoder")
    assert found == without, "the rest is as it was"
    assert min(side["variance_explained"] for side in crosscoder["models"].values()) > 0.3
    with (in_project / RESULTS / "crosscoder_latents.tsv").open(newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))
    fire = [row for row in rows if int(row["firings"])]
    counts = {name: sum(row["class"] == name for row in fire) for name in crosscoder["classes"]}
    assert counts == {name: part["latents"] for name, part in crosscoder["classes"].items()} and len(rows) == 48
    assert sum(counts.values()) == len(fire) == 48 - crosscoder["dead"]
    ends = [crosscoder["ablations"]["groups"][name] for name in ("base_end", "finetuned_end")]
    assert ends[0]["finetuned_share"] < ends[1]["finetuned_share"] and min(end["kl"] for end in ends) > 0
    assert ran({**sizes, "checked": 2, "checked_tokens": 96})["crosscoder"] == crosscoder
    text = transfer(in_project)
    assert "by decoder norms the finetune made none and lost none" in text or any(
        crosscoder["classes"][name]["latents"] for name in ("base_only", "finetuned_only")
    )
    with monkeypatch.context() as patch:
        patch.setattr(transfer_figures, "FIGURES", {})
        assert [path.stem for path in transfer_figures.draw_transfer(Visualization(), in_project)] == ["crosscoder_shares"]
    assert "crosscoder_shares.png" in text
    assert sum(crosscoder["share_histogram"]["counts"]) == len(fire)
    assert "A crosscoder of both models" in text and "leans to the finetuned model" in text
    extract_transfer(in_project / RESULTS, in_project / "metrics/transfer.json")
    figures = read(in_project / "metrics/transfer.json")["finetuned"]
    assert figures["crosscoder_finetuned_end_kl"] == pytest.approx(ends[1]["kl"], rel=1e-3)
    with monkeypatch.context() as patch:
        patch.setattr(stage, "trained", lambda *_: pytest.fail("it was trained and kept"))
        assert "kl" in ran({**sizes, "checked": 1, "checked_tokens": 96})["crosscoder"]["ablations"]["latents"][0]
    saved = load_sae(in_project / RESULTS / "crosscoder")
    assert saved.cfg.hook_names == (f"base {HOOK}", f"finetuned {HOOK}") and saved.cfg.d_sae == 48
    shares = decoder_norm_ratios(saved)[1]
    assert [float(row["finetuned_share"]) for row in rows] == pytest.approx(shares.tolist(), rel=1e-4)
    with pytest.raises(UserError, match="unknown hook|is not known|trained on"):
        check_fits("it", saved, load_language_model(make_params().model.name, "cpu"), [])


@pytest.mark.slow
def test_other_tokenizer_end_to_end(make_params: Any, in_project: Path, models_folder: Path) -> None:
    run_stage(
        make_params(
            finetuned_model=str(models_folder / "other_tokenizer"),
            controls={"names": ["self"]},
            tokens=480,
            patched_tokens=96,
        )
    )
    result = read(in_project / RESULTS / "finetuned_eval_results.json")
    assert result["coverage"]["tokenizers"] == "each its own" and 0.1 < result["coverage"]["matched_fraction"] < 1
    assert result["latents"]["base"]["logits"]["shared_fraction"] < 1
    assert (in_project / RESULTS / "tokenizer_mismatches.tsv").read_text().count("\n") > 10
    assert "bits per byte" in transfer(in_project)


@pytest.mark.parametrize(("shape", "message"), [({"d_model": 40}, "has width 32"), ({"n_layers": 2}, "has depth 3")])
def test_models_of_other_shapes(make_params: Any, in_project: Path, shape: dict[str, int], message: str) -> None:
    other = make_tiny_model(in_project / "other", **shape)
    with pytest.raises(UserError, match=message):
        run_stage(make_params(finetuned_model=str(other)))
    assert read(in_project / RESULTS / "_status.json")["status"] == "failed"
    assert "failed: " in transfer(in_project) and message in transfer(in_project)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hooks": ["blocks.9.hook_mlp_out"]}, "the model has layers 0 to 2"),
        ({"sae": {"name": "missing"}}, "holds no SAE 'missing'; there are topk"),
        ({"sae": {"source": "folder", "path": "no/such"}}, "transfer.sae: no/such: no SAE there"),
        ({"finetuned_model": "no/such/folder"}, "transfer.finetuned_model: cannot load"),
        ({"tokenizer": "no/such/folder"}, "transfer.tokenizer: cannot load"),
    ],
)
def test_one_clear_line(make_params: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        run_stage(make_params(**changes))
    assert "\n" not in str(caught.value)


def test_an_sae_of_another_model(make_params: Any, in_project: Path, models_folder: Path) -> None:
    save_sae(tiny_sae(model_name="gpt2"), in_project / "downloaded_saes/foreign")
    with pytest.raises(UserError, match="was trained on gpt2"):
        run_stage(make_params(sae={"name": "foreign"}))
    with pytest.raises(UserError, match="transfer.finetuned_sae was trained on gpt2"):
        run_stage(make_params(finetuned_sae={"name": "foreign"}, finetuned_model=str(models_folder / "near")))


def test_known_outlier_values_are_part_of_the_key(make_pair: Any, in_project: Path) -> None:
    pair = make_pair("near")
    before = stage._key(pair, "finetuned")
    write_json(in_project / "outlier_cfg.json", {"absolute_threshold": {pair.base.name: 7.0}})
    assert stage._key(pair, "finetuned") != before


def test_base_tokenizer_for_another_vocabulary(make_params: Any, in_project: Path, models_folder: Path) -> None:
    with pytest.raises(UserError, match="use tokenize: own or auto"):
        run_stage(make_params(finetuned_model=str(models_folder / "other_tokenizer"), tokenize="base"))
    assert (in_project / RESULTS / "tokenizer_check.json").is_file(), "what the check found is written first"
