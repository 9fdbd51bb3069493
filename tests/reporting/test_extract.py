"""Extraction and aggregation: which figures come out, under which names, and what never does."""

from __future__ import annotations

import json
import math

import pytest

from sae_research.reporting.metrics import METRICS, metric_named
from sae_research.reporting.results import aggregate, extract, extract_core_metrics, extract_table_metrics
from sae_research.runtime.errors import UserError
from tests.helpers.results import SAES, Lab, core_result, probing_result


def run(lab: Lab, name: str) -> dict:
    extract(name, lab.root / "eval_results" / name, lab.root / "metrics" / f"{name}.json")
    return lab.read(f"metrics/{name}.json")


def test_core_holds_both_definitions_ours_under_the_plain_name():
    figures = extract_core_metrics(core_result("standard"))
    assert figures["loss_recovered"] == 0.931
    assert figures["loss_recovered_sae_bench"] == 0.9299
    assert figures["variance_explained"] == 0.712
    assert figures["variance_explained_sae_bench"] == 0.9593
    assert figures["variance_explained_legacy_sae_bench"] == 0.6907
    assert figures["l0_sae_bench"] == 60.81
    assert figures["mse_sae_bench"] == 0.01235
    assert figures["fraction_alive_sae_bench"] == 0.61


def test_null_nan_infinite_and_absent_figures_have_no_key():
    result = core_result("standard")
    ours = result["eval_result_unstructured"]["lab_v1"]["metrics"]
    ours.update(kl=math.nan, ce_delta=None, mse=math.inf, interpolated=True)
    del ours["l1"]
    figures = extract_core_metrics(result)
    assert not {"kl", "ce_delta", "mse", "l1", "interpolated", "kl_sae_bench"} & set(figures)
    json.dumps(figures, allow_nan=False)


def test_minus_one_is_how_sae_bench_writes_nan_in_core():
    result = core_result("standard")
    result["eval_result_metrics"]["model_behavior_preservation"].update(kl_div_with_sae=-1.0, kl_div_score=-1.0)
    assert not {"kl_sae_bench", "kl_score_sae_bench"} & set(extract_core_metrics(result))


def test_a_file_of_stock_sae_bench_yields_its_own_figures_only():
    result = core_result("standard") | {"eval_result_unstructured": None}
    figures = extract_core_metrics(result)
    assert figures and all(key.endswith("_sae_bench") for key in figures)


def test_probing_figures_exist_for_every_k_that_was_measured():
    figures = extract_table_metrics("sparse_probing", probing_result("topk"))
    assert figures["sae_top_1_accuracy"] == 0.761
    assert figures["sae_top_5_accuracy_sae_bench"] == 0.843
    assert figures["llm_full_accuracy"] == 0.962
    assert figures["llm_full_accuracy_sae_bench"] == 0.959
    assert not any(key.startswith("llm_top_10") for key in figures)


def test_every_extracted_figure_is_described_in_the_table():
    for name, figures in (
        ("core", extract_core_metrics(core_result("topk"))),
        ("sparse_probing", extract_table_metrics("sparse_probing", probing_result("topk"))),
    ):
        for key in figures:
            assert "Not described" not in metric_named(key, name).definition, key


def test_table_has_one_record_per_key():
    keys = [(metric.eval, metric.key) for metric in METRICS]
    assert len(keys) == len(set(keys))
    assert metric_named("sae_top_20_accuracy", "sparse_probing").label == "Probing top-20"


def test_extract_writes_every_sae_and_the_status(lab: Lab):
    written = run(lab, "core")
    assert set(written) == {*SAES, "_status"}
    assert written["_status"] == {"status": "ok", "saes": len(SAES), "skipped": 0}
    assert all(value is not None for figures in written.values() for value in figures.values())


def test_a_disabled_evaluation_writes_its_status_only(lab: Lab):
    assert run(lab, "scr") == {"_status": {"status": "disabled"}}


def test_a_failed_evaluation_keeps_what_it_finished(lab: Lab):
    lab.disable("core")
    lab.result("core", "topk", core_result("topk"))
    lab.status("core", "failed", "out of memory", skipped={"standard": "no hook"})
    written = run(lab, "core")
    assert set(written) == {"topk", "_status"}
    assert written["_status"] == {"status": "failed", "message": "out of memory", "saes": 1, "skipped": 1}


@pytest.mark.parametrize("status", ["incomplete", "ok"])
def test_an_evaluation_without_results_says_so(lab: Lab, status: str):
    lab.disable("core")
    lab.status("core", status)
    assert run(lab, "core") == {"_status": {"status": status, "saes": 0, "skipped": 0}}


def test_a_folder_without_status_is_told_apart(lab: Lab):
    (lab.root / "eval_results/core/_status.json").unlink()
    assert run(lab, "core")["_status"]["status"] == "missing"


def test_missing_folder_and_damaged_result_are_user_errors(lab: Lab):
    with pytest.raises(UserError, match="no such folder.*dvc repro core_eval"):
        extract("core", lab.root / "nowhere", lab.root / "out.json")
    lab.write("eval_results/core/topk_eval_results.json", '{"half": ')
    with pytest.raises(UserError, match="topk_eval_results.json: not valid JSON"):
        run(lab, "core")


def test_optional_evaluations_are_flattened(lab: Lab):
    lab.evaluate("scr", ["topk"])
    assert run(lab, "scr")["topk"] == {
        "scr_metric_threshold_2_sae_bench": 0.101,
        "scr_dir1_threshold_2_sae_bench": 0.09,
        "scr_dir2_threshold_2_sae_bench": 0.12,
    }


def test_aggregate_is_keyed_by_sae(lab: Lab):
    names = ("core", "sparse_probing", "scr", "tpp", "absorption", "unlearning")
    for name in names:
        run(lab, name)
    aggregate([lab.root / f"metrics/{name}.json" for name in names], lab.root / "metrics/all_metrics.json")
    written = lab.read("metrics/all_metrics.json")
    assert set(written) == set(SAES)
    assert set(written["topk"]) == {"core", "sparse_probing"}
    assert written["topk"]["core"]["l0"] == 32.0


def test_aggregate_refuses_a_file_it_cannot_name(lab: Lab):
    lab.write("metrics/other.json", {})
    with pytest.raises(UserError, match="must be one of core.json"):
        aggregate([lab.root / "metrics/other.json"], lab.root / "out.json")
