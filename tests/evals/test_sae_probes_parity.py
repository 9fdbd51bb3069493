"""Our structured block against the package sae-probes as SAE Bench 0.6.0 wraps it (tests/fixtures/make_sae_probes.py), on
the packaged model and real texts.

SAE Bench's saga stops at most 1000 passes in, ours at the optimum: a figure may differ by a test text or two (of 99), their
mean hardly.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_research.evals import sae_probes
from sae_research.evals.sae_probes.tasks import TaskRows, read_rows, sae_bench_split
from sae_research.lm import load_language_model
from sae_research.runtime.files import fingerprint
from sae_research.runtime.stages import StageFolder
from tests.fixtures import make_sae_probes as fixture

STOCK = json.loads(fixture.FIXTURE.read_text())
ONE_TEXT = 1 / 99


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    lm = load_language_model(fixture.params("folds").model.name, "cpu")  # from the project's own cache
    saes = fixture.make_saes(lm)  # so is the index of held-out texts
    patch = pytest.MonkeyPatch()
    patch.setenv("DVC_ROOT", str(tmp_path_factory.mktemp("project")))
    try:
        return {
            config: dict(sae_probes.evaluate(saes, lm, fixture.params(config), StageFolder(tmp_path_factory.mktemp(config))))
            for config in fixture.CONFIGS
        }
    finally:
        patch.undo()


@pytest.mark.parametrize("config", fixture.CONFIGS)
def test_rows_are_those_that_stock_draws(config: str) -> None:
    given = fixture.params(config)
    for name, parts in STOCK["splits"][config].items():
        frame = read_rows(name)
        labels = np.unique(frame["target"].to_numpy(), return_inverse=True)[1]
        kept = TaskRows(frame["prompt"].tolist(), labels, given.random_seed).of_sae_bench(
            given.sparse_probing_sae_probes.max_texts
        )
        drawn = sae_bench_split(labels, kept, given.random_seed)
        assert [fingerprint(np.searchsorted(kept, rows).tolist()) for rows in drawn] == parts


@pytest.mark.slow
@pytest.mark.parametrize("config", fixture.CONFIGS)
def test_figures_equal_stock(config: str, ours: dict[str, Any]) -> None:
    gaps = []
    for name, stock in STOCK["results"][config].items():
        details = {record["dataset_name"]: record for record in ours[config][name]["eval_result_details"]}
        assert len(details) == len(stock["eval_result_details"])
        for record in stock["eval_result_details"]:
            got = details[record["dataset_name"]]
            for key, value in record.items():
                if not isinstance(value, float):
                    continue
                # the probe on all dimensions is scikit-learn's own on either side; activations round differently with the
                # number of threads, which may swap a pair of texts in the order that the AUC counts
                most = 0.25 * ONE_TEXT if key.startswith("llm") else 2.5 * ONE_TEXT
                assert got[key] == pytest.approx(value, abs=most), f"{name} {record['dataset_name']} {key}"
                gaps.append(abs(got[key] - value))
        for k, metrics in stock["sae_metrics_by_k"].items():
            assert ours[config][name]["sae_metrics_by_k"][int(k)] == pytest.approx(metrics, abs=2 * ONE_TEXT)
    assert np.mean(gaps) < 0.2 * ONE_TEXT


def test_schema_equals_stock(ours: dict[str, Any]) -> None:
    result = ours["held_out"]["topk"]
    stock = STOCK["results"]["held_out"]["topk"]
    assert sorted(result) == STOCK["fields"]["result"]
    assert sorted(result["eval_config"]) == STOCK["fields"]["eval_config"]
    for category, metrics in stock["eval_result_metrics"].items():
        assert result["eval_result_metrics"][category].keys() == metrics.keys()
    assert result["eval_result_details"][0].keys() == stock["eval_result_details"][0].keys()


@pytest.mark.slow
def test_sae_bench_types_accept_the_result(ours: dict[str, Any]) -> None:
    from dataclasses import asdict

    from pydantic import TypeAdapter
    from sae_bench.evals.sparse_probing_sae_probes.eval_output import SparseProbingSaeProbesEvalOutput

    for result in ours["held_out"].values():
        assert asdict(TypeAdapter(SparseProbingSaeProbesEvalOutput).validate_python(result)) == result


@pytest.mark.slow
def test_fixture_is_what_stock_says_today(tmp_path: Path) -> None:
    path = tmp_path / "fresh.json"
    subprocess.run(
        [sys.executable, "-m", "tests.fixtures.make_sae_probes", str(path)], check=True, cwd=Path(__file__).parents[2]
    )
    fresh = json.loads(path.read_text())
    assert fresh["splits"] == STOCK["splits"]
    assert fresh["fields"] == STOCK["fields"]
    for config, results in STOCK["results"].items():
        for name, stock in results.items():
            for k, metrics in stock["sae_metrics_by_k"].items():
                assert fresh["results"][config][name]["sae_metrics_by_k"][k] == pytest.approx(metrics, abs=ONE_TEXT)
