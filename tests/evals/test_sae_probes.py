"""k-sparse probing on sae-probes: the solver, the splits, the last token, shared work, intervals, bad input."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score, roc_auc_score

from sae_research.config.evaluation_params import SparseProbingSaeProbes
from sae_research.evals import sae_probes
from sae_research.evals.sae_probes import evaluation as stage_module
from sae_research.evals.sae_probes.probes import (
    COSTS,
    RESAMPLES,
    Scores,
    _text_draws,
    auc,
    mean_interval,
    resampled_metrics,
    top_k_scores,
    top_latents,
    weighted_f1,
)
from sae_research.evals.sae_probes.tasks import (
    LastTokens,
    TypicalNorm,
    chosen_names,
    load_probe_task,
    make_task,
    task_names,
    tokenise,
)
from sae_research.lm import LanguageModel
from sae_research.runtime.errors import UserError
from sae_research.runtime.stages import StageFolder
from sae_research.saes.forms import StandardSAE
from sae_research.saes.pursuit.encoders import IHTPSAE, MPSAE
from sae_research.stats.intervals import accuracy
from sae_research.stats.logistic import l1_path, l2_path
from sae_research.text.split import split_of, text_hash
from sae_research.text.tasks import TaskUnavailable
from tests.helpers.evals_saes import HOOK, D, config, dictionary, everything, identity, standard

TASKS = ["117_us_state_FL", "154_athlete_sport_football"]


# --- the solver ------------------------------------------------------------------------------


def problem(n: int, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Sparse non-negative features of unequal scales, as latents are, and noisy classes."""
    rng = np.random.default_rng(seed)
    x = rng.exponential(size=(n, k)) * (rng.random((n, k)) < 0.4) * 10.0 ** rng.uniform(-1, 1, k)
    y = (x @ (rng.standard_normal(k) / (x.std(0) + 1e-9)) + rng.standard_normal(n) > 0).astype(int)
    return x, y


def l1_objective(x: np.ndarray, y: np.ndarray, cost: float, w: np.ndarray, b: float) -> float:
    return np.abs(w).sum() + cost * np.logaddexp(0, -(2 * y - 1) * (x @ w + b)).sum()


@pytest.mark.parametrize("k", [1, 2, 5, 20])
def test_l1_path_is_the_optimum(k: int) -> None:
    x, y = problem(150, k, seed=k)
    costs = np.array([100.0, 1.0, 0.1, 1e-4])
    weights, intercepts = l1_path(x, y, costs)
    scale = x.std(0)  # saga converges on scaled features only; the penalty is then scaled back by hand
    for cost, w, b in zip(costs, weights, intercepts, strict=True):
        ours = l1_objective(x, y, cost, w, b)
        # no coordinate can be moved to advantage
        for j in range(k + 1):
            for step in (1e-4, -1e-4, 1e-2, -1e-2):
                moved, shifted = w.copy(), b
                if j < k:
                    moved[j] += step / scale[j]
                else:
                    shifted += step
                assert l1_objective(x, y, cost, moved, shifted) >= ours - 1e-9 * abs(ours)
    assert not weights[-1].any(), "the strongest penalty leaves nothing"
    assert intercepts[-1] == pytest.approx(np.log(y.mean() / (1 - y.mean())), abs=1e-6)


def test_l1_path_equals_scikit_learn_run_to_convergence() -> None:
    x, y = problem(120, 3, seed=5)
    x /= x.std(0)
    for cost in (10.0, 0.3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = LogisticRegression(C=cost, penalty="l1", solver="saga", tol=1e-10, max_iter=20_000).fit(x, y)
        weights, intercepts = l1_path(x, y, np.array([cost]))
        assert weights[0] == pytest.approx(theirs.coef_[0], abs=2e-5)
        assert intercepts[0] == pytest.approx(theirs.intercept_[0], abs=2e-5)
        reached = l1_objective(x, y, cost, theirs.coef_[0], theirs.intercept_[0])
        assert l1_objective(x, y, cost, weights[0], intercepts[0]) <= reached * (1 + 1e-12)


def test_l2_path_equals_scikit_learn_run_to_convergence() -> None:
    for n, d in ((80, 6), (40, 90)):  # also with more dimensions than texts
        x, y = problem(n, d, seed=d)
        x /= x.std(0) + 1e-9
        theirs = LogisticRegression(C=0.5, tol=1e-10, max_iter=20_000).fit(x, y)
        weights, intercepts = l2_path(x, y, np.array([0.5]))
        assert weights[0] == pytest.approx(theirs.coef_[0], abs=1e-5)
        assert intercepts[0] == pytest.approx(theirs.intercept_[0], abs=1e-5)


def test_degenerate_features_have_an_answer() -> None:
    y = np.array([0, 1] * 20)
    nothing = np.zeros((40, 2))
    twins = np.repeat(problem(40, 1, 0)[0], 2, axis=1)
    separable = np.column_stack([y * 5.0, 1 - y])
    for x in (nothing, twins, separable):
        weights, intercepts = l1_path(x, y, COSTS)
        assert np.isfinite(weights).all()
        assert np.isfinite(intercepts).all()
    assert not l1_path(nothing, y, COSTS)[0].any()
    weights, intercepts = l1_path(separable, y, COSTS[:1])
    assert ((separable @ weights[0] + intercepts[0] > 0) == y).all()
    with pytest.raises(ValueError, match="both classes"):
        l1_path(nothing, np.ones(40), COSTS)


def test_metrics_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 50)
    decisions = np.round(rng.standard_normal(50) + labels, 1)  # many ties
    got = Scores(decisions, saturate=False).metrics(labels)
    assert got["auc"] == pytest.approx(roc_auc_score(labels, decisions))
    assert got["f1"] == pytest.approx(f1_score(labels, decisions > 0, average="weighted"))
    assert got["accuracy"] == (labels == (decisions > 0)).mean()
    assert np.isnan(auc(decisions, np.ones(50, bool)))
    assert Scores(100 + decisions, saturate=True).metrics(labels)["auc"] == 0.5, "SAE Bench's probabilities tie at 1"


def test_latents_are_chosen_on_training_texts_relative_to_their_size() -> None:
    rng = torch.Generator().manual_seed(0)
    labels = np.array([0, 1] * 40)
    z = torch.rand(80, 6, generator=rng)
    z[:, 4] *= 1000  # large, but alike in both classes
    z[:, 2] += torch.from_numpy(labels)  # small, and telling
    assert top_latents(z, labels, 1).tolist() == [2]
    assert torch.equal(top_latents(-z, labels, 3), top_latents(z, labels, 3)), "signs do not matter"
    test = torch.rand(80, 6, generator=rng)
    test[:, 5] += 9 * torch.from_numpy(labels)  # telling among test texts only
    found = top_k_scores(z, labels, test, [1, 2, 99], seed=0, saturate=False)
    assert set(found) == {1, 2}, "no k beyond the number of latents"
    assert found[1].metrics(labels)["accuracy"] < 0.7


# --- tasks -----------------------------------------------------------------------------------


def test_the_package_has_113_binary_tasks() -> None:
    names = task_names()
    assert len(names) == len(set(names)) == 113
    assert chosen_names(SparseProbingSaeProbes(dataset_names="all")) == list(names)
    with pytest.raises(UserError, match="did you mean 117_us_state_FL"):
        chosen_names(SparseProbingSaeProbes(dataset_names=["117_us_state_F"]))


@pytest.mark.parametrize("max_texts", [300, None])
def test_our_split_has_no_leak(max_texts: int | None) -> None:
    config = SparseProbingSaeProbes(max_texts=max_texts, probe_train_set_size=200, probe_test_set_size=1000)
    task = load_probe_task("130_temp_cat_Frequency", config, seed=3)  # two thirds of its rows are copies
    train, test = ([task.texts[i] for i in part] for part in (task.lab.train, task.lab.test))
    hashes = [text_hash(text) for text in train + test]
    assert len(set(hashes)) == len(hashes)
    assert {split_of(text) for text in train} == {"probe_train"}
    assert {split_of(text) for text in test} == {"probe_test"}
    assert task.lab.train_labels.mean() == task.lab.test_labels.mean() == 0.5
    assert task.lab.train_labels[-10:].mean() == 0.5, "validation takes the last texts"
    assert len(task.sae_bench.test) == 99
    assert task.notes["sae_bench_test_texts_with_copy_in_train"] > 30
    again = load_probe_task("130_temp_cat_Frequency", config, seed=3)
    assert [a.tolist() for a in (*task.sae_bench, *task.lab)] == [a.tolist() for a in (*again.sae_bench, *again.lab)]


def test_tasks_that_do_not_qualify_say_why() -> None:
    config = SparseProbingSaeProbes(max_texts=None)
    texts = [f"text number {i} of many" for i in range(600)]
    with pytest.raises(TaskUnavailable, match="two classes, found yes"):
        make_task("one", texts, ["yes"] * 600, config, 0)
    with pytest.raises(TaskUnavailable, match="132 texts"):
        make_task("few", texts[:100], [0, 1] * 50, config, 0)
    with pytest.raises(TaskUnavailable, match="distinct probe_t"):
        make_task("copies", ["one text", "another text"] * 300, [0, 1] * 300, config, 0)
    # a text under both labels is nobody's
    task = make_task("mixed", texts + texts[:50], [0, 1] * 300 + [1, 0] * 25, config, 0)
    assert task.notes["conflicting_dropped"] == 50
    assert not {task.texts[i] for i in (*task.lab.train, *task.lab.test)} & set(texts[:50])


# --- the last token --------------------------------------------------------------------------


@pytest.fixture
def params(make_params: Any) -> Any:
    return make_params(
        sparse_probing_sae_probes={
            "dataset_names": TASKS,
            "context_length": 16,
            "max_texts": 140,
            "k_values": [1, 3],
            "probe_train_set_size": 40,
            "probe_test_set_size": 30,
        }
    )


def texts_of(lm: LanguageModel, length: int = 16) -> list[torch.Tensor]:
    return tokenise(lm, ["cat", "a longer text about a horse and a dog in the rain", "", "the wind", "x" * 200], length)


def test_texts_keep_their_end(lm: LanguageModel) -> None:
    whole, cut = (tokenise(lm, ["a text that is longer than the context allows for"], n)[0] for n in (999, 9))
    assert len(cut) == 9
    assert cut[0] == whole[0] == lm.separator_id
    assert torch.equal(cut[1:], whole[-8:])
    assert texts_of(lm)[2].tolist() == [lm.separator_id], "an empty text is its separator"


def test_last_tokens_are_those_of_whole_texts(lm: LanguageModel, params: Any) -> None:
    tokens = texts_of(lm)
    norm = TypicalNorm(lm, HOOK, tokens, params)
    lean, whole = (LastTokens(tokens, norm, params, whole=flag) for flag in (False, True))
    for i, ids in enumerate(tokens):
        alone = lm.activations(ids[None], HOOK)[0]
        assert lean.raw.sae_bench[i] == pytest.approx(alone[-1], abs=1e-5)
    # our definition has nothing to read in a text without tokens
    assert not lean.raw.lab[2].any()
    for ours, other in zip(lean.raw, whole.raw, strict=True):
        assert ours == pytest.approx(other, abs=1e-5)
    saes = {"standard": standard(), "ihtp": IHTPSAE(dictionary(), torch.zeros(D), 2, config("ihtp", k=2))}
    index = torch.tensor([4, 1, 2])
    for name, sae in saes.items():
        got = dict(whole.latents({name: sae}, index))[name]
        for row, i in enumerate(index.tolist()):
            x = lm.activations(tokens[i][None], HOOK)
            batch = next(b for b in whole._batches() if i in b.index.tolist())
            mask = whole._mask(batch)[batch.index.tolist().index(i)][: len(tokens[i])][None]
            z = sae.encode(x, None if sae.per_token else mask)[0]
            assert got.sae_bench[row] == pytest.approx(z[-1], abs=1e-4), name
            counted = mask[0].nonzero()
            want = z[counted[-1, 0]] if len(counted) else torch.zeros(sae.cfg.d_sae)
            assert got.lab[row] == pytest.approx(want, abs=1e-4), name


# --- the evaluation --------------------------------------------------------------------------


def run(saes: Any, lm: LanguageModel, params: Any, folder: Path) -> tuple[dict[str, Any], StageFolder]:
    stage = StageFolder(folder)
    results = dict(sae_probes.evaluate(saes, lm, params, stage))
    for name, result in results.items():
        stage.write_result(name, result)  # JSON without NaN
    return results, stage


def lab(result: dict[str, Any]) -> dict[str, Any]:
    return result["eval_result_unstructured"]["lab_v1"]


def test_one_sae_equals_many_and_results_are_kept(lm: LanguageModel, params: Any, tmp_path: Path, monkeypatch: Any) -> None:
    together, stage = run(everything(), lm, params, tmp_path / "a")
    assert not stage.skipped
    monkeypatch.setenv("SAE_RESEARCH_NO_CACHE", "1")
    for name in ("standard", "mpsae_s6", "ihtp_k4"):
        alone = run({name: everything()[name]}, lm, params, tmp_path / "b")[0][name]
        assert lab(alone)["metrics"] == pytest.approx(lab(together[name])["metrics"], abs=1 / 30 + 1e-9), name
    monkeypatch.delenv("SAE_RESEARCH_NO_CACHE")
    monkeypatch.setattr(stage_module, "LastTokens", lambda *_, **__: pytest.fail("computed again although cached"))
    assert run(everything(), lm, params, tmp_path / "c")[0] == together


def test_an_added_sae_and_task_pay_only_for_themselves(
    lm: LanguageModel, params: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    saes = everything()
    run({"standard": saes["standard"]}, lm, params, tmp_path / "a")
    encoded: list[str] = []
    real = StandardSAE.encode
    monkeypatch.setattr(StandardSAE, "encode", lambda self, *given: encoded.append("standard") or real(self, *given))
    passes: list[int] = []
    forward = LanguageModel.activations
    monkeypatch.setattr(LanguageModel, "activations", lambda *given: passes.append(1) or forward(*given))
    run({"standard": saes["standard"], "mpsae": saes["mpsae_s3"]}, lm, params, tmp_path / "b")
    assert not encoded
    assert not passes, "a per-token SAE reads the last tokens that are kept"


def test_signs_order_and_batches_change_nothing(lm: LanguageModel, params: Any, tmp_path: Path) -> None:
    W, b = dictionary(), torch.zeros(D)
    order = torch.randperm(len(W), generator=torch.Generator().manual_seed(1))
    saes = {
        name: MPSAE(rows, b, 5, config("matching_pursuit", s=5))
        for name, rows in (("plain", W), ("flipped", -W), ("shuffled", W[order]))
    }
    results = {name: lab(result)["metrics"] for name, result in run(saes, lm, params, tmp_path / "a")[0].items()}
    assert results["flipped"] == pytest.approx(results["plain"], abs=1e-9)
    # latents that tie are taken in another order
    assert results["shuffled"] == pytest.approx(results["plain"], abs=0.05)
    wide = params.model_copy(update={"model": params.model.model_copy(update={"llm_batch_size": 32})})
    uncached = wide.model_copy(update={"activation_caching": wide.activation_caching.model_copy(update={"enabled": False})})
    again = run({"plain": saes["plain"]}, lm, uncached, tmp_path / "b")[0]["plain"]
    assert lab(again)["metrics"] == pytest.approx(results["plain"], abs=1 / 30 + 1e-9)


def test_what_a_result_holds(lm: LanguageModel, params: Any, tmp_path: Path) -> None:
    silent = StandardSAE(
        config("standard"), W_enc=torch.zeros(D, 64), b_enc=torch.full((64,), -1.0), W_dec=dictionary(), b_dec=torch.zeros(D)
    )
    results, stage = run({"identity": identity(), "silent": silent}, lm, params, tmp_path / "out")
    block = lab(results["identity"])
    assert (
        set(block["metrics"])
        == set(block["intervals"])
        == {f"sae_probes_{probe}_{metric}" for probe in ("llm", "top_1", "top_3") for metric in ("accuracy", "auc", "f1")}
    )
    for key, (low, high) in block["intervals"].items():
        assert low <= block["metrics"][key] <= high, key
    found = accuracy(block["outcomes"]["asked"], block["outcomes"]["correct"]["sae_probes_top_3_accuracy"])
    assert found.value == pytest.approx(block["metrics"]["sae_probes_top_3_accuracy"])
    assert stage.notes["tasks"][TASKS[0]]["sizes"] == {"sae_bench": [40, 99], "lab_v1": [40, 30]}
    bench = results["identity"]
    assert set(bench["sae_metrics_by_k"]) == {1, 3}, "SAE Bench has no field for k = 3 but keeps it here"
    assert bench["sae_metrics_by_k"][1]["test_auc"] == bench["eval_result_metrics"]["sae"]["sae_top_1_test_auc"] > 0
    # a code that never fires tells nothing, and is scored all the same
    assert lab(results["silent"])["metrics"]["sae_probes_top_1_auc"] == 0.5


def test_a_k_beyond_the_latents_and_a_poor_task_are_skipped(
    lm: LanguageModel, params: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    wide = params.model_copy(
        update={"sparse_probing_sae_probes": params.sparse_probing_sae_probes.model_copy(update={"k_values": [1, 40]})}
    )
    real = stage_module.load_probe_task

    def poor(name: str, *given: Any) -> Any:
        if name == TASKS[1]:
            raise TaskUnavailable("a binary task needs two classes, found x")
        return real(name, *given)

    monkeypatch.setattr(stage_module, "load_probe_task", poor)
    results, stage = run({"identity": identity()}, lm, wide, tmp_path / "out")
    assert stage.skipped == {
        TASKS[1]: "a binary task needs two classes, found x",
        "identity, k = 40": "the SAE has 32 latents",
    }
    assert "sae_probes_top_40_auc" not in lab(results["identity"])["metrics"]
    monkeypatch.setattr(stage_module, "load_probe_task", lambda *_: poor(TASKS[1]))
    with pytest.raises(UserError, match="no task is usable"):
        run({"identity": identity()}, lm, wide, tmp_path / "none")


# --- intervals -------------------------------------------------------------------------------


def test_resampled_metrics_are_those_of_the_texts_drawn() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 30)
    scores = Scores(np.round(rng.standard_normal(30) + labels, 1), saturate=False)
    drawn = resampled_metrics(scores, labels, "task", 0)
    weights = _text_draws(tuple((labels > 0).tolist()), "task", 0)
    for i in (0, 7):
        rows = np.repeat(np.arange(30), weights[i].astype(int))
        want = Scores(scores.decisions[rows], saturate=False).metrics(labels[rows])
        assert {key: values[i] for key, values in drawn.items()} == pytest.approx(want, abs=1e-6)
    assert weighted_f1(scores.decisions > 0, labels > 0) == pytest.approx(
        f1_score(labels, scores.decisions > 0, average="weighted")
    )


def test_intervals_know_tasks_and_texts() -> None:
    rng = np.random.default_rng(0)
    of_texts = {f"t{i}": 0.7 + 0.02 * rng.standard_normal(RESAMPLES) for i in range(10)}
    low, high = mean_interval(of_texts, 0)
    assert high - low == pytest.approx(2 * 1.96 * 0.02 / 10**0.5, rel=0.15)
    of_tasks = {name: values + 0.1 * (i % 2) for i, (name, values) in enumerate(of_texts.items())}
    wider = mean_interval(of_tasks, 0)
    assert wider[1] - wider[0] == pytest.approx(2 * 1.96 * (0.02**2 + 0.05**2) ** 0.5 / 10**0.5, rel=0.15)
    assert mean_interval(of_tasks, 0) == wider
