"""Damaged results, statuses, manifests and merged files end every command in one line, and nothing is written elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae_research.reporting.results import aggregate, extract, merge
from sae_research.reporting.rows import read_run
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import checked_name
from tests.helpers.results import SAES, Lab

RESULT = "eval_results/core/topk_eval_results.json"
OTHER_SHAPES = [
    "",
    "{",
    "[]",
    "null",
    "3",
    '"x"',
    "{}",
    '{"eval_result_metrics": []}',
    '{"eval_result_metrics": {"a": 3}}',
    '{"eval_result_metrics": {"a": {"b": "0.7"}}}',
    '{"eval_result_metrics": {}, "sae_cfg_dict": []}',
    '{"eval_result_metrics": {}, "eval_type_id": "sparse_probing"}',
    '{"eval_result_metrics": {}, "eval_result_unstructured": {"lab_v1": {"intervals": {"l0": 3}}}}',
    "\x00",
]


def refused(act: Callable[[], Any], *words: str) -> None:
    with pytest.raises(UserError) as said:
        act()
    assert all(word in str(said.value) for word in words) and "\n" not in str(said.value), said.value


def test_damaged_results(lab: Lab) -> None:
    for text in OTHER_SHAPES:
        (lab.root / RESULT).write_text(text)
        refused(lambda: extract("core", lab.root / "eval_results/core", lab.root / "metrics/core.json"), RESULT)
        refused(lambda: merge(lab.root), RESULT)
    assert not (lab.root / "metrics/core.json").exists()


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", '{"status": 3}', '{"status": "ok", "skipped": [1]}', '{"status": "ok", "notes": {"random_seed": "x"}}'],
)
def test_damaged_statuses(lab: Lab, text: str) -> None:
    (lab.root / "eval_results/core/_status.json").write_text(text)
    refused(lambda: extract("core", lab.root / "eval_results/core", lab.root / "metrics/core.json"), "_status.json")
    refused(lambda: merge(lab.root), "_status.json")


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a/b", "..", ".hidden", "", "x" * 201, "a\nb"])
def test_names_that_lead_elsewhere(lab: Lab, name: str) -> None:
    refused(lambda: checked_name(name, "here"), "here: the name")
    lab.write("downloaded_saes/manifest.json", {"order": [name], "saes": {name: {"role": "baseline"}}})
    refused(lambda: merge(lab.root), "manifest.json", "name")
    (lab.root / "downloaded_saes/manifest.json").unlink()
    merge(lab.root)
    merged = lab.read("eval_results/merged/_evaluations.json")
    lab.write("eval_results/merged/_evaluations.json", {**merged, "order": [name]})
    refused(lambda: read_run(lab.root), "_evaluations.json", "name")
    assert not (lab.root / "eval_results/evil.json").exists()


def test_good_names_pass() -> None:
    for name in (*SAES, "matching_pursuit-1.5+x", "_own", "a" * 150):
        assert checked_name(name, "here") == name


def test_damaged_merged_files_and_metrics(lab: Lab) -> None:
    merge(lab.root)
    for name, texts in {
        "_evaluations": ["", "[]", '{"order": []}', '{"order": 3, "evals": {}}'],
        "topk": ["", "[]", '{"sae": "topk"}', '{"sae": "topk", "cfg": {}, "evals": {"core": []}}'],
    }.items():
        path = lab.root / f"eval_results/merged/{name}.json"
        whole = path.read_text()
        for text in texts:
            path.write_text(text)
            refused(lambda: read_run(lab.root), path.name, "process_results" if text else "")
        path.write_text(whole)
    for text in ("", "[]", '{"topk": 3}'):
        (lab.root / "core.json").write_text(text)
        refused(lambda: aggregate([lab.root / "core.json"], lab.root / "all.json"), "core.json")


def test_the_manifest(lab: Lab) -> None:
    path: Path = lab.root / "downloaded_saes/manifest.json"
    path.parent.mkdir(exist_ok=True)
    for value in ([], {}, {"saes": []}, {"saes": {"topk": 3}}, {"saes": {"topk": {}}, "order": "topk"}):
        path.write_text(json.dumps(value))
        refused(lambda: merge(lab.root), "manifest.json")
