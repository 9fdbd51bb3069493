"""What core evaluation and sparse probing say of how sure their figures are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_research.evals.core import evaluation
from sae_research.evals.sparse_probing import evaluation as sparse_probing
from sae_research.lm import LanguageModel
from sae_research.runtime.stages import StageFolder
from sae_research.stats import reconstruction
from sae_research.stats.intervals import accuracy, difference, ratio
from sae_research.text import tokens as stream
from sae_research.text.split import split_of
from sae_research.text.tokens import Contexts
from tests.helpers.evals_saes import identity, standard

RATIOS = {
    "l0",
    "variance_explained",
    "kl",
    "ce_delta",
    "loss_recovered",
    "loss_recovered_mean_ablation",
    "cosine_about_mean",
    "bias_about_mean",
}


def contexts(doc_ids: list[list[int]], sources: list[str]) -> Contexts:
    ids = torch.tensor(doc_ids, dtype=torch.int32)
    return Contexts(torch.arange(ids.numel()).reshape(ids.shape), ids, [f"d{i}" for i in range(len(sources))], sources)


# --- clusters --------------------------------------------------------------------------------


def test_a_token_counts_for_its_own_document_wherever_it_was_packed() -> None:
    found = reconstruction.clusters_of(contexts([[-1, 0, 0, -1], [-1, 1, 1, 1], [-1, 1, 2, 2]], ["x", "x", "x"]), 0, 3)
    assert found.about | {"key": ""} == {"level": "document", "clusters": 3, "documents": 3, "sources": 1, "key": ""}
    assert found.index.tolist() == [[-1, 0, 0, -1], [-1, 1, 1, 1], [-1, 1, 2, 2]]
    values = torch.tensor([[9.0, 1, 2, 9], [9, 10, 20, 40]])
    counted = torch.tensor([[True, True, True, True], [True, True, False, True]])
    assert found.sums(torch.tensor([0, 1]), counted, values).tolist() == [3.0, 50.0, 0.0]
    assert found.sums(torch.tensor([2]), counted[:1, :3], values[:1, :3]).tolist() == [0.0, 1.0, 2.0]


def test_sources_are_the_clusters_once_there_are_enough() -> None:
    many = [f"s{i % 10}" for i in range(30)]
    found = reconstruction.clusters_of(contexts([list(range(30))], many), 0, 1)
    assert (found.about["level"], found.count, found.about["documents"]) == ("source", 10, 30)
    assert found.index[0, 3] == found.index[0, 13] == found.index[0, 23]
    few = reconstruction.clusters_of(contexts([list(range(30))], [f"s{i % 9}" for i in range(30)]), 0, 1)
    assert (few.about["level"], few.count, few.about["sources"]) == ("document", 30, 9)


def test_only_the_contexts_asked_for_belong_and_other_tokens_are_another_key() -> None:
    text = contexts([[-1, 0, 0], [-1, 1, 1]], ["x", "x"])
    first, second = reconstruction.clusters_of(text, 0, 1), reconstruction.clusters_of(text, 1, 2)
    assert first.index.tolist() == [[-1, 0, 0], [-1, -1, -1]]
    assert (first.count, second.count) == (1, 1)
    assert first.about["key"] != second.about["key"]
    changed = text._replace(tokens=text.tokens + 1)
    assert reconstruction.clusters_of(changed, 0, 1).about["key"] != first.about["key"]
    assert reconstruction.clusters_of(text, 0, 1).about == first.about


def test_contexts_for_predictions_come_from_all_over_the_text() -> None:
    text = contexts([[-1, doc, doc] for doc in range(4) for _ in range(3)], ["x"] * 4)
    found = stream.reorder_evenly(text, 4)
    assert found.doc_ids[:4, 1].tolist() == [0, 1, 2, 3]
    assert (
        reconstruction.clusters_of(found, 0, 4).about["documents"]
        == 4
        > reconstruction.clusters_of(text, 0, 4).about["documents"]
    )
    assert sorted(map(tuple, found.tokens.tolist())) == sorted(map(tuple, text.tokens.tolist()))


def test_very_many_documents_are_pooled() -> None:
    found = reconstruction.clusters_of(contexts([list(range(2000))], ["x"] * 2000), 0, 1)
    assert found.count <= reconstruction.MAX_CLUSTERS
    assert np.bincount(found.index[0]).min() >= 1
    assert found.about["documents"] == 2000


# --- core ------------------------------------------------------------------------------------


def block(result: dict[str, Any]) -> dict[str, Any]:
    return result["eval_result_unstructured"]["lab_v1"]


def test_cluster_sums_add_up_to_the_figures_and_intervals_hold_them(lm: LanguageModel, make_params: Any) -> None:
    params = make_params(
        core_eval={"batch_size_prompts": 10, "n_eval_reconstruction_batches": 5, "n_eval_sparsity_variance_batches": 6}
    )
    for name, result in evaluation.evaluate({"identity": identity(), "standard": standard()}, lm, params):
        got = block(result)
        assert set(got["cluster_sums"]) == RATIOS
        for key, sums in got["cluster_sums"].items():
            figure = ratio(sums["numerator"], sums["denominator"])
            assert figure.value == pytest.approx(got["metrics"][key], rel=1e-4, abs=1e-6), (name, key)
            about = got["clusters"][sums["clusters"]]
            assert len(sums["numerator"]) <= about["clusters"]
            if key in got["intervals"]:
                low, high = got["intervals"][key]
                assert low - 1e-9 <= got["metrics"][key] <= high + 1e-9, (name, key)
        assert set(got["intervals"]) == RATIOS
        assert "fraction_alive" not in got["intervals"]


def test_batch_size_changes_no_cluster(lm: LanguageModel, make_params: Any) -> None:
    sizes = (
        {"batch_size_prompts": 6, "n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 2},
        {"batch_size_prompts": 3, "n_eval_reconstruction_batches": 2, "n_eval_sparsity_variance_batches": 4},
    )
    wide, narrow = (
        block(dict(evaluation.evaluate({"s": standard()}, lm, make_params(core_eval=size)))["s"]) for size in sizes
    )
    assert wide["clusters"] == narrow["clusters"]
    for key, sums in wide["cluster_sums"].items():
        assert sums["numerator"] == pytest.approx(narrow["cluster_sums"][key]["numerator"], rel=1e-3, abs=1e-4), key


def test_tokens_of_unknown_origin_are_clustered_by_context(lm: LanguageModel, make_params: Any) -> None:
    tokens = torch.randint(10, 200, (15, 24), generator=torch.Generator().manual_seed(0))
    about = block(dict(evaluation.evaluate({"s": standard()}, lm, make_params(), tokens=tokens))["s"])["clusters"]
    assert about["predictions"] | {"key": ""} == {"level": "context", "clusters": 6, "key": ""}
    assert about["sparsity"]["clusters"] == 9


# --- sparse probing --------------------------------------------------------------------------


@pytest.fixture
def task_file(tmp_path: Path) -> str:
    """Three classes of texts that differ by their words."""
    words = {"animals": "cat dog horse mouse", "weather": "rain snow wind storm", "tools": "saw axe file drill"}
    lines = []
    for label, vocabulary in words.items():
        wanted = {"probe_train": 12, "probe_test": 12}
        for i in range(2000):
            text = f"{i} a {' '.join(np.random.default_rng(i).choice(vocabulary.split(), 3))} and {i * 7}"
            if wanted.get(split_of(text), 0):
                wanted[split_of(text)] -= 1
                lines.append(json.dumps({"text": text, "label": label}))
    path = tmp_path / "task.jsonl"
    path.write_text("\n".join(lines))
    return str(path)


def test_outcomes_add_up_to_the_accuracies_and_pair_saes(
    lm: LanguageModel, make_params: Any, tmp_path: Path, task_file: str
) -> None:
    params = make_params(
        sparse_probing={
            "dataset_names": [task_file],
            "probe_train_set_size": 24,
            "probe_test_set_size": 24,
            "k_values": [1, 3],
            "context_length": 32,
        }
    )
    saes = {"identity": identity(), "standard": standard()}
    results = {name: block(result) for name, result in sparse_probing.evaluate(saes, lm, params, StageFolder(tmp_path))}
    for got in results.values():
        outcomes = got["outcomes"]
        for key, correct in outcomes["correct"].items():
            assert accuracy(outcomes["asked"], correct).value == pytest.approx(got["metrics"][key]), key
            low, high = got["intervals"][key]
            assert low <= got["metrics"][key] <= high
            assert high - low < 0.6
        assert set(outcomes["correct"]) == set(got["metrics"])
    one, other = (results[name]["outcomes"] for name in saes)
    assert one["key"] == other["key"] and one["asked"] == other["asked"]
    figures = [accuracy(one["asked"], one["correct"][f"{kind}_top_3_accuracy"]) for kind in ("sae", "llm")]
    assert difference(figures[:1], figures[1:], 0).value == 0, "the identity reads what the raw probe reads"
