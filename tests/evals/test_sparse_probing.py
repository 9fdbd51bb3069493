"""Sparse probing: what probes may see, invariances, shared work, tasks that do not qualify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_research.evals import probing
from sae_research.evals.sparse_probing import evaluation
from sae_research.lm import LanguageModel
from sae_research.runtime.errors import UserError
from sae_research.runtime.stages import StageFolder
from sae_research.saes.pursuit.encoders import MPSAE
from sae_research.stats import logistic
from sae_research.text.split import split_of
from tests.helpers.evals_saes import D, config, dictionary, everything, identity, standard


@pytest.fixture
def task_file(tmp_path: Path) -> str:
    """Two classes that differ by their words, enough texts in either probing split."""
    words = {"animals": "cat dog horse mouse bird", "weather": "rain snow wind storm cloud"}
    lines, wanted = [], {(label, split): 12 for label in words for split in ("probe_train", "probe_test")}
    for i in range(2000):
        for label, vocabulary in words.items():
            text = f"{i} the {' '.join(np.random.default_rng(i).choice(vocabulary.split(), 4))} of {i * 7}"
            key = (label, split_of(text))
            if wanted.get(key, 0):
                wanted[key] -= 1
                lines.append(json.dumps({"text": text, "label": label}))
    path = tmp_path / "task.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


def run(saes: Any, lm: LanguageModel, params: Any, folder: Path) -> tuple[dict[str, Any], StageFolder]:
    stage = StageFolder(folder)
    return dict(evaluation.evaluate(saes, lm, params, stage)), stage


def lab(result: dict[str, Any]) -> dict[str, float]:
    return result["eval_result_unstructured"]["lab_v1"]["metrics"]


@pytest.fixture
def params(make_params: Any, task_file: str) -> Any:
    return make_params(
        sparse_probing={
            "dataset_names": [task_file],
            "probe_train_set_size": 24,
            "probe_test_set_size": 24,
            "k_values": [1, 3],
            "context_length": 32,
        }
    )


def test_identity_reads_what_the_raw_probe_reads(lm: LanguageModel, params: Any, tmp_path: Path) -> None:
    results, stage = run({"identity": identity()}, lm, params, tmp_path / "out")
    got = lab(results["identity"])
    for kind in ("top_1", "top_3", "full"):
        assert got[f"sae_{kind}_accuracy"] == got[f"llm_{kind}_accuracy"]
    assert got["llm_full_accuracy"] > 0.6
    assert not stage.skipped


def test_one_sae_equals_many_and_results_are_kept(lm: LanguageModel, params: Any, tmp_path: Path, monkeypatch: Any) -> None:
    together, _ = run(everything(), lm, params, tmp_path / "a")
    monkeypatch.setenv("SAE_RESEARCH_NO_CACHE", "1")
    for name, sae in everything().items():
        alone = run({name: sae}, lm, params, tmp_path / "b")[0][name]
        assert alone == together[name], name
    monkeypatch.delenv("SAE_RESEARCH_NO_CACHE")
    monkeypatch.setattr(evaluation, "_accuracies", lambda *_: pytest.fail("computed again although cached"))
    assert run(everything(), lm, params, tmp_path / "c")[0] == together


def test_a_task_more_costs_only_itself(
    lm: LanguageModel, params: Any, make_params: Any, task_file: str, tmp_path: Path, monkeypatch: Any
) -> None:
    other = tmp_path / "other.jsonl"  # some of its texts stand in the first task too
    lines = [json.loads(line) for line in Path(task_file).read_text().splitlines()]
    other.write_text(
        "\n".join(json.dumps(row) for old in lines for row in (old, old | {"text": " ".join(reversed(old["text"].split()))}))
    )

    def with_tasks(*names: str) -> Any:
        return make_params(sparse_probing=params.sparse_probing.model_dump() | {"dataset_names": list(names)})

    saes = {"standard": standard(), "mpsae_s3": everything()["mpsae_s3"]}
    alone, _ = run(saes, lm, with_tasks(task_file), tmp_path / "a")
    computed, read, real = [], [], evaluation._accuracies
    monkeypatch.setattr(evaluation, "_accuracies", lambda *a: computed.append(a[4]) or real(*a))
    monkeypatch.setattr(
        lm, "activations", lambda tokens, hook: read.append(len(tokens)) or LanguageModel.activations(lm, tokens, hook)
    )
    both, _ = run(saes, lm, with_tasks(task_file, str(other)), tmp_path / "b")
    assert sorted(computed) == ["llm", "sae", "sae"]
    texts = evaluation._load(lm, with_tasks(task_file, str(other)), StageFolder(tmp_path / "c"))
    assert texts.sizes[1] < texts.sizes[0] and sum(texts.sizes) == len(texts.tokens)
    assert sum(read) == texts.sizes[1] + texts.sizes[3], "the model reads the new texts alone"
    tasks = {name: result["eval_result_unstructured"]["lab_v1"]["tasks"] for name, result in both.items()}
    for name, result in alone.items():
        assert tasks[name][task_file] == result["eval_result_unstructured"]["lab_v1"]["tasks"][task_file]
    monkeypatch.setenv("SAE_RESEARCH_NO_CACHE", "1")
    assert run(saes, lm, with_tasks(task_file, str(other)), tmp_path / "d")[0] == both, "whatever was kept before"


def test_sign_flip_changes_no_accuracy(lm: LanguageModel, params: Any, tmp_path: Path) -> None:
    W, b = dictionary(), torch.zeros(D)
    one, other = (
        lab(run({"s": MPSAE(sign * W, b, 5, config("matching_pursuit", s=5))}, lm, params, tmp_path / str(sign))[0]["s"])
        for sign in (1, -1)
    )
    assert {k: v for k, v in one.items() if "top" in k} == {k: v for k, v in other.items() if "top" in k}


def test_batch_size_and_padding_change_no_accuracy(lm: LanguageModel, params: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("SAE_RESEARCH_NO_CACHE", "1")
    want = run(everything(), lm, params, tmp_path / "a")[0]
    wide = params.model_copy(update={"model": params.model.model_copy(update={"llm_batch_size": 48})})
    for name, result in run(everything(), lm, wide, tmp_path / "b")[0].items():
        assert lab(result) == pytest.approx(lab(want[name]), abs=1 / 24 + 1e-9)


def test_tasks_that_do_not_qualify_are_skipped_with_the_reason(
    lm: LanguageModel, params: Any, tmp_path: Path, make_params: Any, task_file: str
) -> None:
    few = tmp_path / "few.csv"
    few.write_text("text,label\nabc,a\ndef,b\n")
    mixed = make_params(sparse_probing=params.sparse_probing.model_dump() | {"dataset_names": [str(few), task_file]})
    results, stage = run({"standard": standard()}, lm, mixed, tmp_path / "out")
    assert list(results) == ["standard"]
    assert list(stage.skipped) == [str(few)]
    none = make_params(sparse_probing=params.sparse_probing.model_dump() | {"dataset_names": [str(few)]})
    with pytest.raises(UserError, match="no task is usable"):
        run({"standard": standard()}, lm, none, tmp_path / "out")


def test_dimensions_are_chosen_on_training_texts_alone() -> None:
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(80, 6, generator=rng)
    labels = torch.cat([torch.ones(20), torch.zeros(20)])
    features[:40, 2] += 3 * labels  # informative where the probe is trained
    features[40:, 5] += 90 * labels  # informative only among the test texts
    train, test = probing.Draw(torch.arange(40), labels), probing.Draw(torch.arange(40, 80), labels)
    assert probing.top_dimensions(features[:40], labels, 1).tolist() == [2]
    assert probing.top_k_accuracy(features, train, test, 1) < 0.75


def test_draws_are_balanced_and_paired() -> None:
    rows = {"a": torch.arange(10), "b": torch.arange(10, 20), "c": torch.arange(20, 30), "d": torch.arange(30, 40)}
    first, again = (probing.draw(rows, "b", 3, "train") for _ in range(2))
    assert torch.equal(first.rows, again.rows)
    assert first.labels.sum() == 10
    negatives = first.rows[first.labels == 0]
    assert len(set(negatives.tolist())) == 10
    assert not set(negatives.tolist()) & set(rows["b"].tolist())
    assert all(3 <= sum(int(row) // 10 == c for row in negatives) + 1 <= 5 for c in (0, 2, 3))
    assert not torch.equal(first.rows, probing.draw(rows, "b", 3, "test").rows)


def test_full_probe_steps_as_adamw_does() -> None:
    rng = np.random.default_rng(0)
    theta = rng.standard_normal(6).astype(np.float32)
    parameter = torch.nn.Parameter(torch.tensor(theta))
    optimiser = torch.optim.AdamW([parameter], lr=1e-2)
    first, second = np.zeros_like(theta), np.zeros_like(theta)
    for step in range(1, 20):
        gradient = rng.standard_normal(6).astype(np.float32)
        parameter.grad = torch.tensor(gradient)
        optimiser.step()
        logistic.adamw_step(theta, gradient, first, second, step, 1e-2)
        assert theta == pytest.approx(parameter.detach().numpy(), abs=1e-6)


def test_full_probe_separates_what_is_separable() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((60, 8)).astype(np.float32)
    y = (x[:, 3] > 0).astype(np.float32)
    probe, accuracy = logistic.fit_by_adamw(x[:40], y[:40], x[40:], y[40:], 0, batch_size=4)
    assert accuracy >= 0.9
    assert np.abs(probe.weight).argmax() == 3
