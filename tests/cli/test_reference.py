"""The generated reference pages are complete: every metric that is written, formulas, sources, sizes behind costs, and a
description of every parameter."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dvc.exceptions import DvcException
from dvc.utils.hydra import apply_overrides

from benchmarks import growth
from sae_research.cli import reference
from sae_research.config.evaluations import AT_HOOK, EVALUATIONS
from sae_research.config.params import load_params
from sae_research.evals.ground_truth import data, measures
from sae_research.reporting import ground_truth, transfer
from sae_research.reporting.metric_families import FAMILIES
from sae_research.reporting.metric_table import METRICS
from sae_research.reporting.stage_metrics import GROUND_TRUTH, PLACES, STATUS, TRANSFER, keys_of

ROOT = Path(__file__).parents[2]


def page(name: str) -> str:
    return (reference.FOLDER / f"{name}.md").read_text()


def section(text: str, title: str) -> str:
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


# --- metrics ---------------------------------------------------------------------------------


def patterns(text: str) -> list[re.Pattern[str]]:
    """Of the keys in a section's tables."""
    inner = {name: "|".join(map(re.escape, values)) for name, values in PLACES.items()} | {"k": r"\d+"}
    keys = re.findall(r"<br>`([^`]+)`", text)
    return [re.compile(re.sub(r"\\{(\w+)\\}", lambda place: f"(?:{inner[place[1]]})", re.escape(key))) for key in keys]


def written(path: Path) -> Iterator[str]:
    """The keys of all SAEs or pairs in a file, and the scopes' keys of rank correlations."""
    for name, values in json.loads(path.read_text()).items():
        for key, value in values.items():
            if name != "_status":
                yield from value if isinstance(value, dict) else [key]


@pytest.mark.parametrize("name", EVALUATIONS)
def test_every_key_of_the_committed_metrics_stands_in_its_evaluations_section(name: str) -> None:
    path, text = ROOT / f"metrics/{name}.json", page("metrics")
    known = patterns(section(text, EVALUATIONS[name].title))
    keys = {key.partition(AT_HOOK)[0] for key in written(path)}
    assert not [key for key in sorted(keys) if not any(one.fullmatch(key) for one in known)]
    assert json.loads(path.read_text())["_status"].keys() <= STATUS.keys()
    assert all(f"`{key}`" in section(text, "Status") for key in STATUS)
    if EVALUATIONS[name].on:
        assert keys


def test_the_records_of_ground_truth_are_what_its_metrics_are() -> None:
    """A record of a metric that no longer exists would stand on the page all the same."""
    keys = set(written(ROOT / "metrics/ground_truth.json"))
    assert keys == {key for metric in GROUND_TRUTH for key in keys_of(metric)}


def test_the_records_of_transfer_are_what_its_metrics_are() -> None:
    keys = [key for metric in TRANSFER for key in keys_of(metric)]
    assert len(keys) == len(set(keys)) and set(keys) == transfer.pair_values({}).keys()
    assert transfer.pair_metrics({}) == {}


def test_records_say_what_the_code_does() -> None:
    said = {metric.key: metric.definition for metric in GROUND_TRUTH}
    for key, value in (
        ("fraction_duplicate", measures.DUPLICATE),
        ("absorption", measures.MIN_EDGE),
        ("f1", data.MIN_FIRINGS),
        ("probed_features", measures.PROBED),
        ("{metric}_with_mcc", measures.MIN_METHODS),
    ):
        assert f" {value} " in said[key], key
    assert set(PLACES["scope"]) == ground_truth.SCOPES.keys() and set(PLACES["metric"]) == set(measures.ALLOWED)
    assert {*ground_truth.TRAINED, *ground_truth.PURSUIT, *measures.ALLOWED, *measures.TRUTHS} <= ground_truth.LABELS.keys()


def test_every_evaluation_has_formulas_and_sources_that_exist() -> None:
    assert {metric.eval for metric in (*METRICS, *GROUND_TRUTH, *TRANSFER)} == FAMILIES.keys() == EVALUATIONS.keys()
    elsewhere = "\n".join(
        path.read_text()
        for folder in ("sae_research", "docs")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".py", ".md") and path.name != "metric_families.py" and path.parent != reference.FOLDER
    )
    package = importlib.util.find_spec("sae_bench")
    for name, family in FAMILIES.items():
        text = section(page("metrics"), EVALUATIONS[name].title)
        assert all(line in text for line in (*family.formulas, *family.sources))
        assert "`" in "".join(family.formulas)
        papers, files = (
            re.findall(pattern, " ".join(family.sources)) for pattern in (r"arXiv (\S{10})", r"sae_bench/\S+\.py")
        )
        assert papers or files, name
        assert all(f"arXiv {paper}" in elsewhere for paper in papers), papers
        if package is not None and package.origin:
            assert all((Path(package.origin).parents[1] / file).is_file() for file in files), files


# --- costs -----------------------------------------------------------------------------------


def test_the_record_of_costs_holds_the_sizes_of_its_program() -> None:
    record = json.loads((ROOT / growth.RECORD).read_text())
    assert record["sizes"] == json.loads(json.dumps(growth.SIZES)) and record["width"] == growth.WIDTH


@pytest.mark.parametrize("name", EVALUATIONS)
def test_a_cost_says_at_which_sizes_or_why_there_is_none(name: str) -> None:
    evaluation, costs = EVALUATIONS[name], reference.Costs()
    rows = dict(costs.rows(evaluation))
    assert all(text.strip("–- ") for text in rows.values())
    cost = costs.of(evaluation)
    if cost is None:
        assert "not measured" in rows["Cost"]
        return
    assert costs.sizes(evaluation), "as expensive as by default: say nothing of sizes"
    assert all(f"`{key}: " in rows["Cost, measured"] for key in growth.SIZES[name])
    assert cost.default > cost.planned and cost.expected == pytest.approx(
        cost.default * cost.measured / cost.planned, rel=0.1
    )
    assert f"about {cost.expected:g} s" in rows["Cost, default sizes"]


def test_costs_follow_the_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def expected(change: dict[str, Any]) -> float:
        record = json.loads((ROOT / growth.RECORD).read_text())
        record["sizes"]["ravel"] |= change
        path = tmp_path / "growth.json"
        path.write_text(json.dumps(record))
        monkeypatch.setattr(reference, "COSTS", path)
        costs = reference.Costs()
        assert all(
            f"`{key}: {value}`" in dict(costs.rows(EVALUATIONS["ravel"]))["Cost, measured"] for key, value in change.items()
        )
        cost = costs.of(EVALUATIONS["ravel"])
        assert cost is not None
        return cost.expected

    assert expected({"num_pairs_per_attribute": 12}) < 0.7 * expected({})


def test_an_evaluation_without_records_has_a_place_on_both_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """One's own, of which neither formulas nor costs are known."""
    own = dataclasses.replace(EVALUATIONS["core"], name="own", title="Own")
    monkeypatch.setattr(reference, "EVALUATIONS", {"own": own})
    monkeypatch.setattr(reference, "METRICS", (dataclasses.replace(METRICS[0], eval="own"),))
    assert "\n## Own\n" in reference.metrics()
    assert "has not run since it was added" in section(reference.evaluations(), "Own")


# --- parameters ------------------------------------------------------------------------------


def test_no_parameter_is_without_a_description() -> None:
    rows = re.findall(r"^\| (`\S+`) \| (.*) \| (.*) \|$", page("parameters"), re.MULTILINE)
    assert len(rows) > 350
    assert not [key for key, default, text in rows if not text.strip() or not default.strip()]


def test_a_key_that_the_file_does_not_list_is_added_with_a_plus(tmp_path: Path) -> None:
    (override,) = re.findall(r"-S (\+\S+)`", page("parameters"))
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    with pytest.raises(DvcException):
        apply_overrides(path, [override.lstrip("+")])
    apply_overrides(path, [override])
    assert load_params(path).train.saes["topk"].lr_schedule == override.rpartition("=")[2]
