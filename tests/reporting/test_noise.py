"""Intervals in every output, seeds recognised, and only differences that exceed noise reported."""

from __future__ import annotations

import csv
import re
from typing import Any

import pytest

from sae_research.reporting.comparisons import comparisons, seed_groups, write_differences_csv
from sae_research.reporting.figures import RunFigures
from sae_research.reporting.metrics import headline, leading_ks
from sae_research.reporting.report import report
from sae_research.reporting.results import merge
from sae_research.reporting.rows import Row
from sae_research.reporting.shapes import failures
from sae_research.reporting.tables import write_plot_data, write_results_csv
from tests.helpers.results import STYLE, Lab, build, config, core_evidence, core_result, probing_result, section


def only(lab: Lab, cores: dict[str, dict[str, Any]]) -> None:
    """Leave these core results and no others."""
    for name in ("core", "sparse_probing"):
        lab.disable(name)
    lab.status("core", "ok", notes={"random_seed": 42})
    for name, result in cores.items():
        lab.result("core", name, result)


def trained(like: str, recipe: str, name: str, shift: float = 0.0, noise: float = 0.01) -> dict[str, Any]:
    """A core result like `like`'s, as a run of `recipe`, its variance explained moved by `shift`."""
    result = core_result(like)
    result["sae_cfg_dict"] = {**config(like), "provenance": {"recipe_id": recipe}, "role": "comparison"}
    lab_block = result["eval_result_unstructured"]["lab_v1"]
    lab_block["metrics"]["variance_explained"] += shift
    lab_block |= core_evidence(name, lab_block["metrics"], noise)
    return result


# --- intervals -------------------------------------------------------------------------------


def test_intervals_stand_in_the_report_with_what_was_resampled(lab: Lab) -> None:
    text = section(report(build(lab)), "Intervals")
    line = next(line for line in text.splitlines() if "| `topk` |" in line)
    cells = re.findall(r"([\d.]+) \[([\d.]+), ([\d.]+)\]", line)
    assert len(cells) == 7, "L0, four core figures, two accuracies; fraction alive has none"
    assert all(float(low) <= float(value) <= float(high) for value, low, high in cells)
    assert "24 documents of 3 sources" in text and "160 test texts" in text
    assert "rough" not in text


def test_few_clusters_are_called_rough(lab: Lab) -> None:
    result = core_result("topk")
    block = result["eval_result_unstructured"]["lab_v1"]
    for sums in (sums for sums in block["cluster_sums"].values() if sums["clusters"] == "predictions"):
        sums["denominator"][0] *= 30  # one document of many: as many clusters, but few of weight
    only(lab, {"topk": result})
    text = section(report(build(lab)), "Intervals")
    assert re.search(r"24 documents of 3 sources, which vary as [123]\.\d of equal size would. \*\*Few documents", text)
    assert text.count("rough") == 1


def test_results_without_intervals_are_said_to_have_none(lab: Lab) -> None:
    bare = core_result("topk")
    for key in ("intervals", "clusters", "cluster_sums"):
        del bare["eval_result_unstructured"]["lab_v1"][key]
    only(lab, {"topk": bare})
    text = report(build(lab))
    assert "hold no intervals" in text and "## Intervals" not in text
    assert "nothing was tested" in section(text, "Which differences exceed noise")


def test_intervals_of_any_evaluation_reach_csv_and_table_but_not_dvc_metrics(lab: Lab) -> None:
    lab.status("ravel", "ok")
    result = core_result("topk") | {
        "eval_result_metrics": {},
        "eval_result_unstructured": {"lab_v1": {"metrics": {"some_score": 0.4}, "intervals": {"some_score": [0.31, 0.52]}}},
    }
    lab.result("ravel", "topk", result)
    run = build(lab)
    assert "| `topk` | 0.400 [0.310, 0.520] |" in section(report(run), "RAVEL")
    write_results_csv(run, lab.root)
    with (lab.root / "metrics/results.csv").open() as handle:
        rows = {(row["sae"], row["metric"], row["definition_version"]): row for row in csv.DictReader(handle)}
    assert (rows["topk", "some_score", "lab_v1"]["low"], rows["topk", "some_score", "lab_v1"]["high"]) == ("0.31", "0.52")
    explained = rows["topk", "variance_explained", "lab_v1"]
    assert float(explained["low"]) < float(explained["value"]) < float(explained["high"])
    assert rows["topk", "variance_explained", "sae_bench_0.6.0"]["low"] == ""


def test_sums_keep_their_digits_when_merged(lab: Lab) -> None:
    merge(lab.root)
    stored = core_result("topk")["eval_result_unstructured"]["lab_v1"]["cluster_sums"]
    assert lab.read("eval_results/merged/topk.json")["evals"]["core"]["cluster_sums"] == stored
    assert any(len(f"{value:.9g}".replace(".", "")) > 4 for value in stored["kl"]["numerator"])


def test_bars_are_drawn_behind_the_points(lab: Lab) -> None:
    run = build(lab)
    axes = RunFigures(run, STYLE).against_l0("sae_top_1_accuracy").axes[0]
    bars = [line for line in axes.lines if len(line.get_xdata()) == 2 and len(set(line.get_xdata())) == 1]
    assert sorted(tuple(line.get_ydata()) for line in bars) == sorted(row.interval("sae_top_1_accuracy") for row in run.rows)
    write_plot_data(run, lab.root)
    assert all(row["low"] <= row["kl"] <= row["high"] for row in lab.read("metrics/plots/kl.json"))


# --- seeds -----------------------------------------------------------------------------------


def row(name: str, recipe: str | None = None, weights: str | None = None, **figures: float) -> Row:
    return Row(
        name,
        {"provenance": {"recipe_id": recipe} if recipe else {}, "weights_fingerprint": weights},
        {"core": {"metrics": figures}},
    )


def test_seeds_of_one_recipe_are_recognised_and_a_copy_is_no_seed() -> None:
    rows = [
        row("topk_seed1", "r"),
        row("alone", "q"),
        row("topk_seed2", "r"),
        row("variant"),
        row("variant_2"),
        row("std", "s", "w1"),
        row("std_again", "s", "w1"),
    ]
    found = seed_groups(rows)
    assert [(item.name, item.seeds) for item in found] == [
        ("topk", 2),
        ("alone", 1),
        ("variant", 1),
        ("variant_2", 1),
        ("std", 1),
    ]
    assert found[0].title == "`topk` (2 seeds)"
    both = seed_groups([row("a_1", "r", l0=10.0), row("a_2", "r", l0=14.0)])[0]
    assert both.mean(headline("l0")) == 12
    assert both.spread(headline("l0")) == pytest.approx(8**0.5)
    partly = seed_groups([row("a_1", "r", l0=10.0), row("a_2", "r")])[0]
    assert partly.mean(headline("l0")) is None, "a mean over fewer runs than the table says would mislead"


def test_the_report_gives_mean_and_spread_over_seeds(lab: Lab) -> None:
    only(lab, {f"topk_s{i}": trained("topk", "r", f"topk_s{i}", shift) for i, shift in enumerate((0.0, 0.01, -0.01))})
    text = section(report(build(lab)), "Several seeds of one recipe")
    assert "| `topk` | `topk_s0`, `topk_s1`, `topk_s2` |" in text
    assert "| 0.808 ± 0.01 |" in text


def seeds_against_seeds(lab: Lab, count: int) -> str:
    only(
        lab,
        {
            f"{name}_s{i}": trained("topk", name, f"{name}_s{i}", shift + 0.001 * (-1) ** i)
            for name, shift in (("old", 0.0), ("new", 0.1))
            for i in range(count)
        },
    )
    return section(report(build(lab)), "Which differences exceed noise")


def test_better_is_said_with_three_seeds_on_both_sides(lab: Lab) -> None:
    text = seeds_against_seeds(lab, 3)
    assert "- Variance explained: `new` (3 seeds) is better than `old` (3 seeds), by 0.100." in text
    assert "At least 3 seeds: `new` (3 seeds), `old` (3 seeds)" in text
    assert text.count("is better than") == 1, "the other figures are the same but for noise"


def test_better_is_not_said_with_fewer(lab: Lab) -> None:
    text = seeds_against_seeds(lab, 2)
    assert "better" not in text
    assert "No recipe has the 3 seeds" in text


# --- differences -----------------------------------------------------------------------------


def test_differences_that_exceed_noise_are_listed_with_their_terms(lab: Lab) -> None:
    run = build(lab)
    found, text = comparisons(run), section(report(run), "Which differences exceed noise")
    assert f"{len(found)} tests" in text and "Holm" in text and "was trained with one seed" in text
    exceeding = [item for item in found if item.exceeds_noise]
    assert 0 < len(exceeding) < len(found)
    assert len(re.findall(r"\[[+−]?[\d.]+, [+−]?[\d.]+\]", text)) == len(exceeding)
    for item in found:
        assert item.adjusted >= item.found.p
        assert "control" not in item.one.name or item.other is not None
        assert not (item.other and item.one.is_control and item.other.is_control)
        assert "ihtp_k10" not in item.one.name + (item.other.name if item.other else ""), "interpolating"
        if item.other is not None:
            for side in (item.one, item.other):
                prices = [member.mean(headline("l0")) for member in side.members]
                assert min(prices) <= 1.02 * item.l0 and item.l0 <= 1.02 * max(prices), "between its points, or at one"
    signs = {(item.pair, item.metric.key): item.found.value for item in found}
    assert signs[("`topk`", "`control_data_rows`"), "variance_explained"] == pytest.approx(0.808 - 0.841, abs=1e-4)


def test_every_comparison_is_kept_in_a_file(lab: Lab) -> None:
    run = build(lab)
    found = comparisons(run)
    write_differences_csv(found, lab.root)
    with (lab.root / "metrics/differences.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    assert len(rows) == len(found)
    assert {row["other"] for row in rows} >= {"raw residual stream", "control_data_rows"}
    assert all(float(row["low"]) <= float(row["difference"]) <= float(row["high"]) for row in rows)


def test_the_report_says_when_nothing_exceeds_noise(lab: Lab) -> None:
    only(lab, {name: trained("topk", name, name, 0.0, noise=0.05) for name in ("one", "other")})
    text = section(report(build(lab)), "Which differences exceed noise")
    assert "4 tests: 1 pairs" not in text and "4 tests: 1 pair," in text
    assert "**No difference exceeds noise.**" in text
    assert "| SAE | minus |" not in text


def test_an_sae_under_two_names_differs_by_exactly_nothing(lab: Lab) -> None:
    only(lab, {name: trained("topk", name, "same") for name in ("one", "other")})
    for item in comparisons(build(lab)):
        assert (item.found.value, item.found.p, item.adjusted) == (0, 1, 1)


def test_figures_on_other_text_are_not_compared(lab: Lab) -> None:
    results = {name: trained("topk", name, name, shift) for name, shift in (("one", 0.0), ("other", 0.2))}
    assert len(comparisons_of(lab, results)) == 4
    results["other"]["eval_result_unstructured"]["lab_v1"]["clusters"]["sparsity"]["key"] = "other text"
    assert {item.metric.key for item in comparisons_of(lab, results)} == {"loss_recovered", "ce_delta", "kl"}


def comparisons_of(lab: Lab, results: dict[str, dict[str, Any]]) -> list[Any]:
    only(lab, results)
    return comparisons(build(lab))


# --- what is shown of k, of unreliable metrics, of evaluations that do not apply ----------------


def test_tables_and_figures_follow_the_values_of_k_that_were_measured(lab: Lab) -> None:
    assert (leading_ks([1, 2, 5]), leading_ks([2, 10, 50]), leading_ks([7])) == ((1, 5), (2, 10), (7,))
    for sae in ("topk", "standard"):
        result = probing_result(sae)
        block = result["eval_result_unstructured"]["lab_v1"]
        for part in (block["metrics"], block["intervals"], block["outcomes"]["correct"], *block["tasks"].values()):
            for kind in ("sae", "llm"):
                part[f"{kind}_top_20_accuracy"] = part.pop(f"{kind}_top_5_accuracy")
                del part[f"{kind}_top_1_accuracy"]
        result["eval_result_metrics"] = {"llm": {}, "sae": {}}
        lab.result("sparse_probing", sae, result)
    for path in (lab.root / "eval_results/sparse_probing").glob("*_eval_results.json"):
        if path.name.split("_eval")[0] not in ("topk", "standard"):
            path.unlink()
    run = build(lab)
    assert run.plotted[-2:] == ("sae_top_2_accuracy", "sae_top_20_accuracy")
    text = report(run)
    assert "Probing top-20 ↑" in text and "top-5" not in text and "images/l0_vs_sae_top_20_accuracy.png" in text
    assert "the raw residual stream reaches" in text
    write_plot_data(run, lab.root)
    assert len(lab.read("metrics/plots/sae_top_20_accuracy.json")) == 2
    assert lab.read("metrics/plots/sae_top_5_accuracy.json") == [], "dvc.yaml names it"


def test_scr_figures_carry_the_line_on_their_worth_and_no_test(lab: Lab) -> None:
    assert "2605.18229" not in report(build(lab))
    lab.evaluate("scr")
    run = build(lab)
    text = section(report(run), "Spurious correlation removal")
    assert text.count("arXiv 2605.18229") == 1
    assert "scr" not in {item.metric.eval for item in comparisons(run)}
    assert "SCR" not in section(report(run), "Results")


def test_an_evaluation_that_does_not_apply_is_a_status_like_the_others(lab: Lab) -> None:
    lab.disable("unlearning")
    lab.status("unlearning", "not_applicable", "the model knows too few of the questions")
    (lab.root / "METRICS.md").write_text("")
    assert "| Unlearning | not_applicable | 0 | the model knows too few of the questions |" in report(build(lab))
    assert failures(lab.root) == []
    lab.status("unlearning", "failed", "no memory")
    assert failures(lab.root) == ["unlearning: failed: no memory"]
