"""Absorption: words and prompts, probes, both definitions, invariances, shared work, letters that do not qualify."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score

from sae_research.config.params import Params
from sae_research.evals.absorption import evaluate, evaluation, words
from sae_research.evals.absorption import letters as main_latents
from sae_research.evals.absorption.letters import (
    Probes,
    Training,
    f1,
    lab_absorbed,
    sae_bench_absorbed,
    train,
    usual_activation,
)
from sae_research.evals.absorption.words import WordActivations
from sae_research.lm import LanguageModel, activations
from sae_research.runtime.errors import NotApplicable, UserError
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SparseAutoencoder
from sae_research.saes.forms import StandardSAE
from sae_research.saes.pursuit.encoders import IHTPSAE, MPSAE
from sae_research.stats.logistic import balanced, newton
from tests.helpers.evals_saes import HOOK, D, config, dictionary, everything, standard


@pytest.fixture
def params(make_params: Any, monkeypatch: pytest.MonkeyPatch) -> Params:
    """The tiny tokenizer knows some 150 words: few of each letter, and a random model shows hardly any."""
    monkeypatch.setattr(evaluation, "MIN_TRAIN_WORDS", 4)
    monkeypatch.setattr(evaluation, "MIN_TEST_WORDS", 1)
    return make_params(absorption={"icl_examples": 2, "icl_prompts": 3, "max_k_value": 3, "min_ground_truth_probe_f1": 0.2})


def run(
    saes: dict[str, SparseAutoencoder], lm: LanguageModel, params: Params, folder: Path
) -> tuple[dict[str, Any], StageFolder]:
    stage = StageFolder(folder)
    return dict(evaluate(saes, lm, params, stage)), stage


def lab(result: dict[str, Any]) -> dict[str, Any]:
    return result["eval_result_unstructured"]["lab_v1"]


def changed(params: Params, **values: Any) -> Params:
    return params.model_copy(update={"absorption": params.absorption.model_copy(update=values)})


# --- words -----------------------------------------------------------------------------------


def test_prompts_ask_for_the_word_and_never_show_it(lm: LanguageModel, params: Params) -> None:
    found = words.load_words(lm, params.absorption, 42)
    assert len(found.texts) > 100
    assert found.notes["dropped_words"] == {}
    prompts = words.whole_prompts(found, params.absorption)
    for i, (word, prompt) in enumerate(zip(found.texts, prompts, strict=True)):
        opening, tail = found.openings.tokens[found.openings.of[i]], found.tails[i]
        assert lm.tokenizer.decode([*opening[1:], *tail]) == prompt
        assert prompt.count("has the first letter:") == 3
        assert prompt.endswith(f"\n{word} has the first letter:")
        assert lm.tokenizer.decode(tail[: found.positions[i] + 1]) == word
        assert words.LETTERS[found.letters[i]] == word.strip()[0].lower()
        assert word.strip().lower() not in {e.strip().lower() for e in found.examples[found.openings.of[i]]}


def test_split_keeps_variants_of_a_word_together_and_follows_the_seed(lm: LanguageModel, params: Params) -> None:
    found, again, other = (words.load_words(lm, params.absorption, seed) for seed in (42, 42, 7))
    assert found.fingerprint() == again.fingerprint() != other.fingerprint()
    stems = [
        {w.strip().lower() for w, held in zip(found.texts, found.test, strict=True) if held == test}
        for test in (False, True)
    ]
    assert not stems[0] & stems[1]
    assert 0.1 < found.test.mean() < 0.35
    examples = [{e.strip().lower() for group in part for e in group} for part in (found.examples[:3], found.examples[3:])]
    assert examples[0] <= stems[0]
    assert examples[1] <= stems[1]
    fewer = words.load_words(lm, params.absorption.model_copy(update={"max_words": 60}), 42)
    assert len(fewer.texts) + sum(fewer.notes["dropped_words"].values()) == 60
    assert set(fewer.texts) < set(found.texts)


def test_words_of_several_tokens_are_read_at_their_last(lm: LanguageModel, params: Params) -> None:
    vocabulary = [" about", " zebra", "people", "quiz", " the", " other", " water", " words"]
    found = words.in_prompts(lm, vocabulary, params.absorption.model_copy(update={"icl_examples": 1}), 1)
    assert sorted(found.texts) == sorted(vocabulary)
    assert found.notes["words_of_several_tokens"] >= 2
    assert len({len(tail) for tail in found.tails}) > 1
    for word, tail, position in zip(found.texts, found.tails, found.positions, strict=True):
        assert lm.tokenizer.decode(tail[: position + 1]) == word
        assert lm.tokenizer.decode(tail[position + 1 :]) == " has the first letter:"


def test_words_that_merge_with_the_template_are_dropped_and_counted(lm: LanguageModel, params: Params) -> None:
    """After "{word}er", "oth" becomes " other": the template shifts."""
    config_ = params.absorption.model_copy(update={"prompt_template": "{word}er", "icl_examples": 0})
    found = words.in_prompts(lm, [" oth", " the"], config_, 1)
    assert " oth" not in found.texts
    assert sum(found.notes["dropped_words"].values()) == 2 - len(found.texts)
    with pytest.raises(UserError, match="no word of .* can be used"):
        words.in_prompts(lm, [" oth"], config_, 1)


# --- activations -----------------------------------------------------------------------------


@pytest.mark.parametrize("continues", [True, False])
@pytest.mark.parametrize("hook", [HOOK, "blocks.0.hook_resid_pre", "blocks.2.attn.hook_z"])
def test_words_activations_are_those_of_whole_prompts(
    lm: LanguageModel, params: Params, hook: str, continues: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert activations._can_continue(lm, hook, torch.tensor([0, 9, 8, 7]), torch.tensor([5, 6]))
    monkeypatch.setattr(activations, "_can_continue", lambda *_: continues)
    found = words.load_words(lm, changed(params, max_words=20).absorption, 42)
    got = WordActivations(lm, hook, found, params).vectors
    for i, tail in enumerate(found.tails):
        prompt = torch.cat([found.openings.tokens[found.openings.of[i]], tail])
        whole = lm.activations(prompt[None], hook)[0, len(prompt) - len(tail) + int(found.positions[i])]
        assert torch.allclose(got[i], whole, atol=1e-4, rtol=1e-4)


def test_sequence_level_encoders_read_whole_prompts_and_the_word_counts(lm: LanguageModel, params: Params) -> None:
    found = words.load_words(lm, changed(params, max_words=20).absorption, 42)
    # a norm rule so strict that most words would fall to it
    strict = params.model_copy(update={"token_mask": params.token_mask.model_copy(update={"outlier_norm_multiple": 1.01})})
    acts = WordActivations(lm, HOOK, found, strict)
    sae = IHTPSAE(dictionary(), torch.zeros(D), 2, config("ihtp", k=2))
    z = acts.latents({"ihtp": sae})["ihtp"].toarray()
    assert (z != 0).any(1).all()
    alone = acts.latents({"token": standard()})["token"]
    assert alone.shape == z.shape
    i = 7
    prompt = torch.cat([found.openings.tokens[found.openings.of[i]], found.tails[i]])[None]
    x = lm.activations(prompt, HOOK)
    from sae_research.lm import token_mask
    from sae_research.lm.activations import HookActivations

    median = HookActivations(lm, HOOK, found.openings.tokens, strict).median_norm
    mask = token_mask(lm, prompt, x, strict.token_mask, median)
    at = prompt.shape[1] - len(found.tails[i]) + int(found.positions[i])
    mask[0, at] = True
    assert z[i] == pytest.approx(sae.encode(x, mask)[0, at].numpy(), abs=1e-3)


# --- probes ----------------------------------------------------------------------------------


def test_training_steps_as_torch_does() -> None:
    """Adam, weighted cross-entropy, L1 and falling rate against torch's own, outputs left out or not."""
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal((90, 7)).astype(np.float32), rng.integers(0, 26, 90)
    labels[:52] = np.tile(np.arange(26), 2)
    y = (labels[:, None] == np.arange(26)).astype(np.float32)
    start = Probes(rng.standard_normal((7, 26)).astype(np.float32) / 9, np.zeros(26, np.float32))
    how = Training(epochs=6, batch_size=90, weight_decay=1e-4, l1=0.01)
    want = torch.nn.Linear(7, 26)
    want.weight.data, want.bias.data = torch.tensor(start.weights.T.copy()), torch.tensor(start.biases.copy())
    optimiser = torch.optim.Adam(want.parameters(), lr=0.01, weight_decay=1e-4)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimiser, gamma=(1e-5 / 0.01) ** (1 / 6))
    target = torch.tensor(y)
    loss = torch.nn.BCEWithLogitsLoss(pos_weight=(len(y) - target.sum(0)) / target.sum(0))
    for _ in range(6):
        optimiser.zero_grad()
        (loss(want(torch.tensor(x)), target) + 0.01 * want.weight.abs().sum(-1).mean()).backward()
        optimiser.step()
        scheduler.step()
    from scipy import sparse

    for features in (x, sparse.csr_matrix(x)):
        got = train(features, y, start, how, (1,))
        assert got.weights.T == pytest.approx(want.weight.detach().numpy(), abs=2e-6)
        assert got.biases == pytest.approx(want.bias.detach().numpy(), abs=2e-6)
    few = [3, 11]
    part = train(x, y[:, few], Probes(start.weights[:, few], start.biases[few]), how, (1,))
    assert part.weights == pytest.approx(got.weights[:, few], abs=2e-6)


def test_batched_logistic_regression_is_scikit_learns() -> None:
    rng = np.random.default_rng(1)
    x = np.maximum(rng.standard_normal((4, 200, 3)) * [1, 20, 5], 0)
    y = (x[:, :, 1] / 20 + x[:, :, 0] + rng.standard_normal((4, 200)) > 1.3).astype(float)
    y[3] = x[3, :, 1] > 10  # separable
    x[2, :, 2] = 0  # a dead latent
    got = newton(x, y, balanced(y))
    for problem in range(4):
        want = LogisticRegression(class_weight="balanced", max_iter=10_000, tol=1e-10).fit(x[problem], y[problem])
        assert got[problem, :3] == pytest.approx(want.coef_[0], rel=1e-3, abs=1e-5)
        assert got[problem, 3] == pytest.approx(want.intercept_[0], rel=1e-3, abs=1e-5)


def test_f1_is_scikit_learns() -> None:
    rng = np.random.default_rng(2)
    scores, y = rng.standard_normal((50, 4)), (rng.random((50, 4)) < 0.3).astype(float)
    scores[:, 3], y[:, 3] = -1, 0
    for column in range(4):
        assert f1(scores, y)[column] == pytest.approx(f1_score(y[:, column], scores[:, column] > 0, zero_division=0))


# --- definitions -----------------------------------------------------------------------------


def test_absorption_by_hand() -> None:
    """Latent 0 is the main one; 1 and 2 lie along the letter, 3 does not."""
    cosine = np.array([1.0, 0.5, 0.5, 0.0])
    z = np.array(
        [
            [2.0, 0, 0, 9],  # the main latent carries all
            [0.0, 4, 0, 9],  # another carries it wholly
            [1.0, 1, 1, 9],  # half and half
            [1.8, 0.2, 0, 9],  # the other's part is too small
            [0.0, 0, 0, 9],
        ]
    )  # nobody carries it
    for got in (
        sae_bench_absorbed(z, np.full(5, 2.0), cosine, [0]),
        lab_absorbed(z, np.full(5, 2.0), cosine, cosine, [0], np.array([2.0])),
    ):
        assert got.fraction.tolist() == [0, 1, 0.5, 0, 0]
        assert got.full.tolist() == [False, True, False, False, False]
    # against the letter's direction there is nothing to absorb
    assert not sae_bench_absorbed(z, np.full(5, -2.0), cosine, [0]).fraction.any()


def test_signed_codes_count_in_their_own_direction() -> None:
    """Turning latents about (row and activation) changes nothing in ours; SAE Bench's takes a negative one for silent."""
    cosine, main = np.array([1.0, 0.5, 0.3]), [0]
    z, projection = np.array([[2.0, 0.1, 0], [0.0, 4, 0], [0.008, 4, 0], [1.0, 3, 1]]), np.array([2.0, 2, 2, 2])
    usual = usual_activation(z[:, main])
    want = lab_absorbed(z, projection, cosine, cosine, main, usual)
    assert want.full.tolist() == [False, True, True, False]  # 0.008 is below 1 % of the usual activation
    for turn in ([-1, 1, 1], [1, -1, 1], [-1, -1, -1]):
        got = lab_absorbed(z * turn, projection, cosine * turn, cosine * turn, main, usual_activation((z * turn)[:, main]))
        assert got.fraction == pytest.approx(want.fraction)
        assert got.full.tolist() == want.full.tolist()
    turned = sae_bench_absorbed(z * [-1, 1, 1], projection, cosine * [-1, 1, 1], main)
    assert turned.full.tolist() == [False, True, True, True] != sae_bench_absorbed(z, projection, cosine, main).full.tolist()


def test_splits_stop_at_the_first_latent_that_adds_too_little() -> None:
    assert main_latents._split([0.5, 0.6, 0.62, 0.9], 0.03) == 2
    assert main_latents._split([0.5, 0.5], 0.03) == 1
    assert main_latents._split([], 0.03) == 0


def test_a_known_dictionary_is_found_absorbed(lm: LanguageModel, params: Params) -> None:
    """One atom per letter that fires on its words, but on two words of one letter another atom does in its place."""
    found = words.load_words(lm, params.absorption, 42)
    acts = WordActivations(lm, HOOK, found, params)
    numbers = np.flatnonzero(np.bincount(found.letters[~found.test], minlength=26) >= 4)
    numbers = numbers[np.bincount(found.letters[found.test], minlength=26)[numbers] >= 3][:3]
    directions = np.eye(D, len(numbers))
    labels = found.letters
    latents = np.zeros((len(labels), 8), np.float32)
    for column, number in enumerate(numbers):
        latents[labels == number, column] = 10
    victims = np.flatnonzero((labels == numbers[0]) & found.test)[:2]
    latents[victims, 0], latents[victims, 5] = 0, 10
    rows = np.zeros((8, D), np.float32)
    rows[range(len(numbers)), range(len(numbers))] = 1
    rows[5, 0], rows[6, D - 1], rows[7, D - 2] = 1, 1, 1
    rows[3, D - 3], rows[4, D - 4] = 1, 1
    acts.__dict__["vectors"] = torch.from_numpy(latents @ rows)
    from scipy import sparse

    sae = StandardSAE(
        config("standard", 8),
        W_enc=torch.from_numpy(rows.T.copy()),
        b_enc=torch.zeros(8),
        W_dec=torch.from_numpy(rows),
        b_dec=torch.zeros(D),
    )
    letters = evaluation.Letters(
        numbers, [1.0] * len(numbers), Probes(directions.astype(np.float32), np.full(len(numbers), -5, np.float32)), {}
    )
    scores = evaluation.score(sae, sparse.csr_matrix(latents), acts, letters)
    n_words = int(((labels == numbers[0]) & found.test).sum())
    absorbed, *whole = (scores[words.LETTERS[i]]["lab"] for i in numbers)
    assert absorbed["main_latents"] == [0]
    assert absorbed["full_absorption_words"] == 2
    assert absorbed["absorption_fraction"] == pytest.approx(2 / n_words)
    assert [w["main_latents"] for w in whole] == [[i] for i in range(1, len(numbers))]
    assert all(w["absorption_fraction"] == 0 and w["main_latents_f1"] == 1 for w in whole)


# --- the evaluation --------------------------------------------------------------------------


def test_every_sae_is_scored_on_the_letters_that_qualify(lm: LanguageModel, params: Params, tmp_path: Path) -> None:
    results, stage = run(everything(), lm, params, tmp_path / "out")
    assert list(results) == list(everything())
    letters = set(stage.notes["absorption"]["letters"])
    skipped = {key.removeprefix("letter ") for key in stage.skipped}
    assert letters | skipped == set(words.LETTERS)
    assert not letters & skipped
    assert letters
    assert "SAE Bench asks for 20" in stage.notes["absorption"]["few_letters"]
    for name, result in results.items():
        json.dumps(result, allow_nan=False)
        assert {record["first_letter"] for record in result["eval_result_details"]} == letters, name
        assert set(lab(result)["letters"]) == letters
        assert set(lab(result)["skipped_letters"]) == skipped
        assert 0 <= lab(result)["metrics"]["absorption_fraction"] <= 1
        assert result["eval_type_id"] == "absorption_first_letter"


def test_one_sae_equals_many_cold_equals_warm(
    lm: LanguageModel, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    together, _ = run(everything(), lm, params, tmp_path / "a")
    monkeypatch.setenv("SAE_RESEARCH_NO_CACHE", "1")
    for name, sae in everything().items():
        assert run({name: sae}, lm, params, tmp_path / "b")[0][name] == together[name], name
    monkeypatch.delenv("SAE_RESEARCH_NO_CACHE")
    monkeypatch.setattr(evaluation, "score", lambda *_: pytest.fail("computed again although cached"))
    monkeypatch.setattr(evaluation, "_ground_truth", lambda *_: pytest.fail("probes trained again although cached"))
    assert run(everything(), lm, params, tmp_path / "c")[0] == together


def test_batch_size_changes_nothing_that_is_counted(
    lm: LanguageModel, params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAE_RESEARCH_NO_CACHE", "1")
    uncached = params.model_copy(
        update={"activation_caching": params.activation_caching.model_copy(update={"enabled": False})}
    )
    want = run(everything(), lm, uncached, tmp_path / "a")[0]
    wide = uncached.model_copy(update={"model": uncached.model.model_copy(update={"llm_batch_size": 33})})
    for name, result in run(everything(), lm, wide, tmp_path / "b")[0].items():
        assert_close(lab(result), lab(want[name]))


def assert_close(got: dict[str, Any], want: dict[str, Any]) -> None:
    for letter, found in want["letters"].items():
        assert got["letters"][letter]["main_latents"] == found["main_latents"]
        for key in ("absorption_fraction", "full_absorption", "main_latents_f1"):
            assert got["letters"][letter][key] == pytest.approx(found[key], abs=1e-3)


def test_a_latent_and_its_negative_count_the_same(lm: LanguageModel, params: Params, tmp_path: Path) -> None:
    W, b = dictionary(), torch.zeros(D)
    one, other = (
        lab(run({"s": MPSAE(sign * W, b, 5, config("matching_pursuit", s=5))}, lm, params, tmp_path / str(sign))[0]["s"])
        for sign in (1, -1)
    )
    assert_close(other, one)


def test_the_order_of_latents_changes_nothing(lm: LanguageModel, params: Params, tmp_path: Path) -> None:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))
    plain = standard()
    shuffled = StandardSAE(
        config("standard"),
        W_enc=plain.W_enc[:, order],
        b_enc=plain.b_enc[order],
        W_dec=plain.W_dec[order],
        b_dec=plain.b_dec,
    )
    results, _ = run({"plain": plain, "shuffled": shuffled}, lm, params, tmp_path / "out")
    got, want = lab(results["shuffled"]), lab(results["plain"])
    for letter, found in want["letters"].items():
        assert [int(order[i]) for i in got["letters"][letter]["main_latents"]] == found["main_latents"]
        assert got["letters"][letter]["absorption_fraction"] == pytest.approx(found["absorption_fraction"], abs=1e-3)


def test_an_sae_narrower_than_k_and_one_that_is_silent_are_scored(lm: LanguageModel, params: Params, tmp_path: Path) -> None:
    W = dictionary(d_sae=2)
    narrow = StandardSAE(config("standard", 2), W_enc=W.T.contiguous(), b_enc=torch.zeros(2), W_dec=W, b_dec=torch.zeros(D))
    W = dictionary()
    silent = StandardSAE(
        config("standard"), W_enc=W.T.contiguous(), b_enc=torch.full((64,), -1e6), W_dec=W, b_dec=torch.zeros(D)
    )
    results, _ = run({"narrow": narrow, "silent": silent}, lm, params, tmp_path / "out")
    for result in results.values():
        json.dumps(result, allow_nan=False)
    assert lab(results["silent"])["metrics"]["absorption_fraction"] == 0
    assert lab(results["silent"])["metrics"]["main_latents_f1"] == 0


def test_no_letter_is_not_applicable_and_several_hooks_are_told_apart(
    lm: LanguageModel, params: Params, tmp_path: Path
) -> None:
    with pytest.raises(NotApplicable, match="probe F1 above 1.0"):
        run({"standard": standard()}, lm, changed(params, min_ground_truth_probe_f1=1.0), tmp_path / "out")
    other = standard()
    other.cfg = other.cfg.replace(hook_name="blocks.2.hook_mlp_out")
    results, stage = run({"one": standard(), "other": other}, lm, params, tmp_path / "out")
    assert set(results) | set(stage.skipped) >= {"one", "other"}
    assert any(key.endswith("at blocks.2.hook_mlp_out") for key in stage.skipped)


def test_the_template_is_checked(make_params: Any) -> None:
    with pytest.raises(ValueError, match="must hold {word} once"):
        make_params(absorption={"prompt_template": "the first letter:"})


def test_one_bad_sae_is_listed_and_the_others_score(lm: LanguageModel, params: Params, tmp_path: Path) -> None:
    bad = standard(1)
    bad.b_enc.fill_(torch.nan)
    found, stage = run({"bad": bad, "good": standard()}, lm, params, tmp_path)
    assert "NaN" in stage.skipped["bad"] and found == run({"good": standard()}, lm, params, tmp_path)[0]
