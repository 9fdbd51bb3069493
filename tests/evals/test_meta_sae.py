"""Meta-SAE: against SAE Bench's spread over seeds, shared dictionaries, determinism, what does not qualify."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_research.config.evaluation_params import MetaSAE
from sae_research.evals import meta_sae
from sae_research.evals.meta_sae import evaluation
from sae_research.evals.meta_sae.evaluation import BatchTopKSAE, measure, shared_dictionaries, train_meta_sae
from sae_research.lm import LanguageModel
from sae_research.runtime.stages import StageFolder
from sae_research.saes.forms import LinearSAE
from sae_research.saes.pursuit.encoders import IHTPSAE, MPSAE
from tests.fixtures import make_meta_sae as fixture
from tests.helpers.evals_saes import D, config, dictionary, standard

STOCK = json.loads(fixture.FIXTURE.read_text())


def explained(seeds: range) -> np.ndarray:
    rows = fixture.dictionary()
    return np.array(
        [
            measure(train_meta_sae(rows, fixture.CONFIG, seed), rows)["sae_bench"]["decoder_fraction_variance_explained"]
            for seed in seeds
        ]
    )


def assert_same_distribution(ours: np.ndarray, stock: np.ndarray) -> None:
    """Means closer than four standard errors, and spreads alike."""
    error = (ours.var(ddof=1) / len(ours) + stock.var(ddof=1) / len(stock)) ** 0.5
    assert abs(ours.mean() - stock.mean()) < 4 * error, (ours, stock)
    assert 0.25 < ours.std(ddof=1) / stock.std(ddof=1) < 4


@pytest.mark.slow
def test_figures_lie_within_stocks_spread() -> None:
    stock, ours = np.array(STOCK["decoder_fraction_variance_explained"]), explained(range(5))
    assert_same_distribution(ours, stock)
    assert abs(ours.mean() - stock.mean()) < np.ptp(stock)
    # and the comparison would notice one active meta-latent fewer
    fewer = fixture.CONFIG.model_copy(update={"k": 3})
    rows = fixture.dictionary()
    found = [
        measure(train_meta_sae(rows, fewer, seed), rows)["sae_bench"]["decoder_fraction_variance_explained"]
        for seed in range(3)
    ]
    assert max(found) < stock.min()


@pytest.mark.slow
def test_fixture_is_what_stock_says_today(tmp_path: Path) -> None:
    path = tmp_path / "fresh.json"
    subprocess.run(
        [sys.executable, "-m", "tests.fixtures.make_meta_sae", str(path)], check=True, cwd=Path(__file__).parents[2]
    )
    fresh = json.loads(path.read_text())
    assert fresh["fields"] == STOCK["fields"]
    key = "decoder_fraction_variance_explained"
    assert fresh[key] == pytest.approx(STOCK[key], abs=0.01)


def test_sparse_and_dense_paths_are_one() -> None:
    """On a GPU autograd goes the dense way; both reconstruct alike and have the same gradients."""
    sae = BatchTopKSAE(12, 20, 3, torch.Generator().manual_seed(0))
    x = torch.randn(30, 12, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        sae.b_enc += 0.01
        sae.b_dec += 0.1
    code = sae(x)
    assert len(code.active) == 3 * 30
    dense = sae._decode_densely(x, code.active)
    assert code.x_hat.detach() == pytest.approx(dense.detach(), abs=1e-6)
    grads = [torch.autograd.grad((x_hat - x).square().sum(), list(sae.parameters())) for x_hat in (code.x_hat, dense)]
    for ours, plain in zip(*grads, strict=True):
        assert ours == pytest.approx(plain, abs=1e-4)


def test_looking_above_the_last_limit_changes_nothing() -> None:
    sae = BatchTopKSAE(8, 16, 2, torch.Generator().manual_seed(0))
    acts = torch.rand(500, generator=torch.Generator().manual_seed(1))
    want = acts.topk(60).indices.sort().values
    for hint in (0.0, 0.5, 0.99):  # the last leaves too few and is given up
        sae._hint = hint
        assert torch.equal(sae._largest(acts, 60), want)
    assert sae._largest(torch.tensor([0.0, 1.0, 0.0]), 2).tolist() == [1], "zeros are never active"


# --- the evaluation --------------------------------------------------------------------------


@pytest.fixture
def params(make_params: Any) -> Any:
    return make_params(meta_sae={"train_steps": 40, "train_batch_size": 64})


def run(saes: Any, lm: LanguageModel, params: Any, folder: Path) -> tuple[dict[str, Any], StageFolder]:
    stage = StageFolder(folder)
    results = dict(meta_sae.evaluate(saes, lm, params, stage))
    for name, result in results.items():
        stage.write_result(name, result)
    return results, stage


def family() -> dict[str, Any]:
    W, b = dictionary(), torch.zeros(D)
    return {
        "standard": standard(),
        "mpsae": MPSAE(1.7 * W, b, 3, config("matching_pursuit", s=3)),
        "ihtp": IHTPSAE(W, b, 1, config("ihtp", k=1)),
        "other": standard(seed=1),
    }


def test_one_dictionary_is_one_run(lm: LanguageModel, params: Any, tmp_path: Path, monkeypatch: Any) -> None:
    trained: list[int] = []
    real = evaluation.train_meta_sae
    monkeypatch.setattr(evaluation, "train_meta_sae", lambda *given: trained.append(1) or real(*given))
    monkeypatch.setattr(LanguageModel, "_forward", lambda *_: pytest.fail("the model is not needed"))
    assert shared_dictionaries(family()) == {
        "standard": "standard",
        "mpsae": "standard",
        "ihtp": "standard",
        "other": "other",
    }
    results, stage = run(family(), lm, params, tmp_path / "a")
    assert len(trained) == 2
    assert stage.notes["shared_dictionaries"] == {"mpsae": "standard", "ihtp": "standard"}
    blocks = {name: result["eval_result_unstructured"]["lab_v1"] for name, result in results.items()}
    assert blocks["standard"] == blocks["mpsae"] == blocks["ihtp"] != blocks["other"]
    low, high = blocks["standard"]["intervals"]["meta_sae_variance_explained"]
    assert low < blocks["standard"]["metrics"]["meta_sae_variance_explained"] < high
    assert run(family(), lm, params, tmp_path / "b")[0] == results
    assert len(trained) == 2, "the second run reads the cache"
    monkeypatch.setenv("SAE_RESEARCH_NO_CACHE", "1")
    assert run({"other": family()["other"]}, lm, params, tmp_path / "c")[0]["other"] == results["other"]
    more = params.model_copy(update={"meta_sae": params.meta_sae.model_copy(update={"n_seeds": 2})})
    monkeypatch.delenv("SAE_RESEARCH_NO_CACHE")
    trained.clear()
    both = run({"other": family()["other"]}, lm, more, tmp_path / "d")[0]["other"]
    assert len(trained) == 1, "a further seed pays for itself"
    assert len(both["eval_result_unstructured"]["lab_v1"]["seeds"]) == 2


def test_schema_equals_stock(lm: LanguageModel, params: Any, tmp_path: Path) -> None:
    result = run({"standard": standard()}, lm, params, tmp_path / "out")[0]["standard"]
    assert sorted(result) == STOCK["fields"]["result"]
    assert sorted(result["eval_config"]) == STOCK["fields"]["eval_config"]
    assert sorted(result["eval_result_metrics"]["meta_structure"]) == STOCK["fields"]["metrics"]


def test_sae_bench_types_accept_the_result(lm: LanguageModel, params: Any, tmp_path: Path) -> None:
    from dataclasses import asdict

    from pydantic import TypeAdapter
    from sae_bench.evals.meta_structure.eval_output import MetaStructureEvalOutput

    result = run({"standard": standard()}, lm, params, tmp_path / "out")[0]["standard"]
    assert asdict(TypeAdapter(MetaStructureEvalOutput).validate_python(result)) == result


def test_rows_that_do_not_vary_are_skipped(lm: LanguageModel, params: Any, tmp_path: Path) -> None:
    flat = LinearSAE(
        config("linear", D), W_enc=torch.eye(D), b_enc=torch.zeros(D), W_dec=torch.ones(D, D), b_dec=torch.zeros(D)
    )
    results, stage = run({"flat": flat, "standard": standard()}, lm, params, tmp_path / "out")
    assert list(results) == ["standard"]
    assert stage.skipped == {"flat": "the rows of its decoder do not vary"}


def test_a_dictionary_smaller_than_k_still_trains() -> None:
    rows = torch.eye(6)
    found = measure(train_meta_sae(rows, MetaSAE(train_steps=20, train_batch_size=8), 0), rows)
    assert found["width"] == 4
    assert len(found["explained"]) == 6
