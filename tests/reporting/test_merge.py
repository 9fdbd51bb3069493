"""Merging: one file per SAE, nothing stale, and a word on every SAE that has no result."""

from __future__ import annotations

import pytest

from sae_research.reporting.results import merge
from sae_research.reporting.rows import read_run
from sae_research.runtime.errors import UserError
from tests.helpers.results import SAES, TASKS, Lab, config, core_result


def test_one_file_per_sae_without_per_latent_details(lab: Lab):
    assert set(merge(lab.root)) == set(SAES)
    merged = lab.read("eval_results/merged/standard.json")
    core, probing = merged["evals"]["core"], merged["evals"]["sparse_probing"]
    assert merged["sae"] == "standard" and merged["cfg"]["hook_name"] == "blocks.8.hook_resid_post"
    assert core["status"] == "ok" and core["metrics"]["l0"] == 61.3 and "details_sae_bench" not in core
    assert set(core["density_histogram"]) == {"log10_edges", "counts", "dead"}
    assert set(probing["tasks"]) == set(TASKS) and len(probing["details_sae_bench"]) == len(TASKS)
    assert merged["evals"]["scr"]["status"] == "disabled"


def test_order_is_baseline_variants_comparison_controls_with_numbers_by_size(lab: Lab):
    assert merge(lab.root) == [
        "standard",
        "standard_ihtp_k1",
        "standard_ihtp_k2",
        "standard_ihtp_k5",
        "standard_ihtp_k10",
        "standard_mpsae_s10",
        "standard_mpsae_s50",
        "standard_mpsae_s100",
        "topk",
        "control_data_rows",
        "control_pca",
        "control_random",
    ]


def test_stale_files_never_survive(lab: Lab):
    merge(lab.root)
    for name in ("core", "sparse_probing"):
        (lab.root / f"eval_results/{name}/topk_eval_results.json").unlink()
    merge(lab.root)
    assert not (lab.root / "eval_results/merged/topk.json").exists()


def test_manifest_decides_which_saes_exist_and_in_which_order(lab: Lab, capsys: pytest.CaptureFixture[str]):
    names = ["topk", "standard", "brand_new"]
    lab.write(
        "downloaded_saes/manifest.json",
        {
            "order": names,
            "saes": {"standard": config("standard"), "topk": config("topk"), "brand_new": config("topk")},
        },
    )
    assert merge(lab.root) == names
    new = lab.read("eval_results/merged/brand_new.json")
    assert new["evals"]["core"] == {
        "status": "missing",
        "message": "the evaluation finished without this SAE",
    }
    assert "left out control_random" in capsys.readouterr().out


def test_skipped_failed_and_absent_are_told_apart(lab: Lab):
    (lab.root / "eval_results/core/topk_eval_results.json").unlink()
    lab.status("core", "ok", skipped={"topk": "another hook point"})
    lab.disable("sparse_probing")
    lab.status("sparse_probing", "failed", "disk full")
    lab.disable("tpp")
    (lab.root / "eval_results/tpp/_status.json").unlink()
    merge(lab.root)
    assert lab.read("eval_results/merged/standard.json")["evals"]["sparse_probing"] == {
        "status": "failed",
        "message": "disk full",
    }
    evals = read_run(lab.root).evals
    assert (evals["tpp"]["status"], evals["scr"]["status"]) == ("missing", "disabled")


def test_an_sae_skipped_everywhere_but_one_keeps_its_reason(lab: Lab):
    (lab.root / "eval_results/core/topk_eval_results.json").unlink()
    lab.status("core", "ok", skipped={"topk": "another hook point"})
    merge(lab.root)
    assert lab.read("eval_results/merged/topk.json")["evals"]["core"] == {
        "status": "skipped",
        "message": "another hook point",
    }


def test_results_left_in_a_disabled_folder_do_not_count(lab: Lab):
    lab.disable("core")
    lab.result("core", "topk", core_result("topk"))
    merge(lab.root)
    assert lab.read("eval_results/merged/topk.json")["evals"]["core"]["status"] == "disabled"


def test_nothing_evaluated_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no evaluation has run"):
        merge(tmp_path)
    with pytest.raises(UserError, match="process_results"):
        read_run(tmp_path)


def test_no_note_is_lost_for_its_name(lab: Lab):
    notes = {"text": "packaged", "sentiment": "film reviews", "candidates": 3, "updates": 5, "second": "b", "device": "cpu"}
    lab.status("core", "ok", notes=notes)
    merge(lab.root)
    assert read_run(lab.root).evals["core"]["notes"] == notes


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", ".."])
def test_names_of_a_manifest_lead_nowhere_else(lab: Lab, name: str):
    lab.write("downloaded_saes/manifest.json", {"order": [name], "saes": {name: config("topk")}})
    with pytest.raises(UserError, match="no name that a file could be called after"):
        merge(lab.root)
    (lab.root / "downloaded_saes/manifest.json").unlink()
    merge(lab.root)
    evaluations = lab.read("eval_results/merged/_evaluations.json")
    lab.write("eval_results/merged/_evaluations.json", {**evaluations, "order": [name]})
    with pytest.raises(UserError, match="no name that a file could be called after"):
        read_run(lab.root)
