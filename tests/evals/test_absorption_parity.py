"""Absorption in SAE Bench's definition against SAE Bench 0.6.0 (tests/fixtures/make_absorption.py), on the packaged
model, given the same words, prompts, and starts and orders of probes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_research.evals.absorption import evaluation
from sae_research.evals.absorption.evaluation import Letters
from sae_research.evals.absorption.letters import Probes
from sae_research.evals.absorption.words import LETTERS, WordActivations
from sae_research.lm import load_language_model
from tests.fixtures import make_absorption as fixture

STOCK = json.loads(fixture.FIXTURE.read_text())
FORMS = ("standard", "topk", "mpsae")


@pytest.fixture(scope="module")
def acts() -> WordActivations:
    lm = load_language_model(fixture.PARAMS.model.name, "cpu")
    return WordActivations(lm, fixture.HOOK, fixture.make_words(lm), fixture.PARAMS)


@pytest.fixture(scope="module")
def letters(acts: WordActivations) -> Letters:
    """The letters that the fixture's threshold lets through."""
    kept = evaluation._ground_truth(
        acts.vectors.numpy(), acts.words.letters, acts.words.test, np.arange(26), fixture.PARAMS.random_seed
    )
    probes = Probes(np.array(kept["weights"], np.float32), np.array(kept["biases"], np.float32))
    low = {
        letter: "low"
        for letter, value in zip(LETTERS, kept["f1"], strict=True)
        if value <= fixture.PARAMS.absorption.min_ground_truth_probe_f1
    }
    return Letters(np.arange(26), kept["f1"], probes, low)


def test_words_are_the_fixtures(acts: WordActivations) -> None:
    assert acts.words.fingerprint() == STOCK["words"]


def test_probes_on_the_model_equal_stock(letters: Letters) -> None:
    for form in FORMS:
        assert dict(zip(LETTERS, letters.f1, strict=True)) == pytest.approx(STOCK["saes"][form]["f1_probe"], abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_letters_equal_stock(form: str, acts: WordActivations, letters: Letters) -> None:
    """Split latents, words and absorption of every letter; F1 of every probe, but for words on the very edge, as
    scikit-learn stops before its optimum."""
    sae = fixture.make_saes(acts)[form]
    got = evaluation.score(sae, acts.latents({form: sae})[form], acts, letters.qualifying())
    assert len(got) >= 20
    edges = 0
    for letter, found in got.items():
        want, ours = STOCK["saes"][form]["letters"][letter], found["sae_bench"]
        assert ours["main_latents"] == want["split_feats"], letter
        assert found["words"] == want["num_probe_true_positives"], letter
        assert ours["full_absorption_words"] == want["num_full_absorption"], letter
        assert ours["full_absorption"] == pytest.approx(want["full_absorption_rate"]), letter
        assert ours["absorption_fraction"] == pytest.approx(want["mean_absorption_fraction"], abs=1e-4), letter
        assert ours["f1_by_k"] == pytest.approx(want["f1_by_k"], abs=0.03), letter
        edges += sum(abs(a - b) > 1e-6 for a, b in zip(ours["f1_by_k"], want["f1_by_k"], strict=True))
    assert edges <= 2
    assert 0 < sum(found["sae_bench"]["full_absorption_words"] for found in got.values())


@pytest.mark.slow
def test_fixture_is_what_stock_says_today(tmp_path: Path) -> None:
    path = tmp_path / "fresh.json"
    subprocess.run(
        [sys.executable, "-m", "tests.fixtures.make_absorption", str(path)], check=True, cwd=Path(__file__).parents[2]
    )
    fresh = json.loads(path.read_text())
    assert fresh["words"] == STOCK["words"]
    for form in FORMS:
        want: dict[str, Any] = STOCK["saes"][form]
        assert fresh["saes"][form]["f1_probe"] == pytest.approx(want["f1_probe"], abs=1e-6)
        for letter, record in want["letters"].items():
            found = fresh["saes"][form]["letters"][letter]
            assert found["split_feats"] == record["split_feats"], f"{form} {letter}"
            assert found["mean_absorption_fraction"] == pytest.approx(record["mean_absorption_fraction"], abs=1e-4)
