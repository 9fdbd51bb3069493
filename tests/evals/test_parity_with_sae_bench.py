"""Our figures in SAE Bench's definition against those of SAE Bench 0.6.0 (tests/fixtures/make_sae_bench.py),
on the packaged model and real text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sae_research.evals.core import evaluation
from sae_research.evals.probing import Draw, TextActivations, top_k_accuracy
from sae_research.evals.sparse_probing import evaluation as sparse_probing
from sae_research.lm import LanguageModel, load_language_model
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SparseAutoencoder, families
from tests.fixtures import make_sae_bench as fixture

STOCK = json.loads(fixture.FIXTURE.read_text())
FORMS = ("standard", "topk", "mpsae", "ihtp")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load_language_model(fixture.PARAMS.model.name, "cpu")


@pytest.fixture(scope="module")
def saes(lm: LanguageModel) -> dict[str, SparseAutoencoder]:
    return fixture.make_saes(lm)


@pytest.fixture(scope="module")
def ours(lm: LanguageModel, saes: dict[str, SparseAutoencoder], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    patch = pytest.MonkeyPatch()
    patch.setenv("DVC_ROOT", str(tmp_path_factory.mktemp("project")))
    try:
        return dict(evaluation.evaluate(saes, lm, fixture.PARAMS, tokens=fixture.core_tokens(lm), lab=False))
    finally:
        patch.undo()


class Probed(NamedTuple):
    """What probing reads: pooled features of the model and of every SAE, and each text's row."""

    raw: Tensor
    latents: dict[str, Tensor]
    tasks: list[Any]


@pytest.fixture(scope="module")
def probed(lm: LanguageModel, saes: dict[str, SparseAutoencoder], tmp_path_factory: pytest.TempPathFactory) -> Probed:
    patch, params, folder = pytest.MonkeyPatch(), fixture.PARAMS, tmp_path_factory.mktemp("project")
    patch.setenv("DVC_ROOT", str(folder))
    try:
        texts = sparse_probing._load(lm, params, StageFolder(folder / "out"))
        group = TextActivations(lm, fixture.HOOK, texts.tokens, params, params.sparse_probing.context_length)
        return Probed(
            group.raw_means().sae_bench,
            {
                name: means.sae_bench
                for names in families(saes)
                for name, means in group.latent_means({n: saes[n] for n in names})
            },
            fixture.load_tasks(),
        )
    finally:
        patch.undo()


@pytest.mark.parametrize("form", FORMS)
def test_core_equals_stock(form: str, ours: dict[str, Any]) -> None:
    stock = {key: value for key, value in STOCK["core"][form].items() if key != "feature_metrics"}
    got = ours[form]["eval_result_metrics"]
    assert got.keys() == stock.keys()
    for category, metrics in stock.items():
        for key, value in metrics.items():
            assert got[category][key] == pytest.approx(value, rel=1e-4, abs=1e-6), f"{category}.{key}"


@pytest.mark.parametrize("form", FORMS)
def test_latent_records_equal_stock(form: str, ours: dict[str, Any]) -> None:
    for key, column in STOCK["core"][form]["feature_metrics"].items():
        got = [record[key] for record in ours[form]["eval_result_details"]][::16]
        want = [-1.0 if value == "nan" else value for value in column]
        assert got == pytest.approx(want, rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("form", FORMS)
def test_probes_equal_stock_given_its_draws(form: str, probed: Probed) -> None:
    """Every top-k accuracy, of latents and of raw activations, to one test text."""
    params, tasks, stock = fixture.PARAMS, probed.tasks, STOCK["sparse_probing"][form]
    row_of = _row_numbers(tasks)
    one_text = 1.0 / params.sparse_probing.probe_test_set_size + 1e-9
    draws = iter(stock["draws"])
    ks = params.sparse_probing.k_values
    for task in tasks:
        for prefix, features in (("llm", probed.raw), ("sae", probed.latents[form])):
            for k in (None, *ks):  # the order in which SAE Bench fits; None is its full probe
                for label in task.train:
                    train, test = (_draw(next(draws), row_of[task.name][split], label) for split in ("train", "test"))
                    if k is not None:
                        want = stock["per_class"][f"{task.name}_results"][f"{prefix}_top_{k}_test_accuracy"][label]
                        got = top_k_accuracy(features, train, test, k)
                        assert abs(got - want) <= one_text, f"{task.name} {prefix} k={k} {label}"
    assert next(draws, None) is None


def _row_numbers(tasks: list[Any]) -> dict[str, dict[str, torch.Tensor]]:
    """task -> split -> pool row of each text, classes one after another: SAE Bench's numbering of its draws."""
    row_of: dict[str, int] = {}
    for task in tasks:
        for part in (task.train, task.test):
            for class_texts in part.values():
                for text in class_texts:
                    row_of.setdefault(text, len(row_of))
    return {
        task.name: {
            split: torch.tensor([row_of[text] for texts in part.values() for text in texts])
            for split, part in (("train", task.train), ("test", task.test))
        }
        for task in tasks
    }


def _draw(recorded: dict[str, Any], rows: torch.Tensor, label: str) -> Draw:
    assert recorded["class"] == label
    return Draw(rows[torch.tensor(recorded["rows"])], torch.tensor(recorded["labels"], dtype=torch.float32))


@pytest.mark.slow
def test_fixture_is_what_stock_says_today(tmp_path: Path) -> None:
    path = tmp_path / "fresh.json"
    subprocess.run(
        [sys.executable, "-m", "tests.fixtures.make_sae_bench", str(path)], check=True, cwd=Path(__file__).parents[2]
    )
    fresh = json.loads(path.read_text())
    for form in FORMS:
        for category, metrics in STOCK["core"][form].items():
            if category != "feature_metrics":
                assert fresh["core"][form][category] == pytest.approx(metrics, rel=1e-4), f"{form} {category}"
        assert fresh["sparse_probing"][form]["draws"] == STOCK["sparse_probing"][form]["draws"]
