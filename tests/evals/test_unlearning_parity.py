"""Unlearning in SAE Bench's definition against SAE Bench 0.6.0 (tests/fixtures/make_unlearning.py), run whole."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch

from sae_research.evals.unlearning import intervention
from sae_research.evals.unlearning.intervention import (
    Configuration,
    Firing,
    Job,
    choose_latents,
    codes,
    correct_answers,
    edited_logits,
    edits,
    firing,
)
from sae_research.evals.unlearning.prompts import Prompt, find_known, wordings
from sae_research.lm.activations import HookActivations
from tests.fixtures import make_unlearning as fixture

STOCK = json.loads(fixture.FIXTURE.read_text())
CASES = {"knowing": fixture.knowing_case, "smollm2": fixture.smollm_case}
RUNS = [(case, name) for case in CASES for name in STOCK[case]]
MARKED = [pytest.param(*run, marks=pytest.mark.slow if run[0] == "smollm2" else ()) for run in RUNS]
"""The model that was trained to know its questions answers faster than the packaged one."""


class Ready(NamedTuple):
    """A case, its known questions as prompts (SAE Bench's order), and how many of them are to be forgotten."""

    case: fixture.Case
    corpora: dict[str, HookActivations]
    questions: HookActivations
    prompts: list[Prompt]
    n_forget: int
    known: dict[str, list[int]]


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ready]:
    """What a case needs, made when it is first asked for."""
    return cache(lambda name: _ready(CASES[name](), tmp_path_factory.mktemp(name)))


def _ready(case: fixture.Case, folder: Path) -> Ready:
    prompts: list[Prompt] = []
    known: dict[str, list[int]] = {}
    counts = []
    for name, path in fixture.write_questions(case, folder).items():
        questions = wordings(case.lm, path, "chat")
        known[name] = find_known(case.lm, name, questions, None, 16).known if case.known is None else case.known[name]
        prompts += [next(questions[number]()) for number in known[name]]
        counts.append(len(known[name]))
    hook = next(iter(case.saes.values())).cfg.hook_name
    corpora = {side: HookActivations(case.lm, hook, tokens, case.params) for side, tokens in case.corpora.items()}
    questions = HookActivations(case.lm, hook, [prompt.tokens for prompt in prompts], case.params)
    return Ready(case, corpora, questions, prompts, counts[0], known)


@pytest.mark.parametrize(("case", "name"), MARKED)
def test_known_questions_and_densities_equal_stock(case: str, name: str, ready: Callable[[str], Ready]) -> None:
    """SAE Bench keeps six decimals of a density. A latent that is zero but for rounding on one token may fall either way on
    another processor."""
    run, stock = ready(case), STOCK[case][name]
    assert run.known == stock["known"]
    for side, corpus in run.corpora.items():
        found = firing(corpus, {name: run.case.saes[name]})[name]["sae_bench"].density
        apart = np.abs(np.asarray(found) - np.array(stock["density"][side])) > 1.1e-6
        assert apart.sum() <= 1
        assert found == pytest.approx(np.array(stock["density"][side]), abs=1.1 / corpus.pool.flat.shape[0])


@pytest.mark.parametrize(("case", "name"), MARKED)
def test_chosen_latents_equal_stock(case: str, name: str, ready: Callable[[str], Ready]) -> None:
    """As many, and as frequent: among equally frequent latents SAE Bench's sort picks any."""
    stock = STOCK[case][name]
    density = np.array(stock["density"]["forget"])
    forget = Firing(density, np.zeros(len(density)))
    retain = Firing(np.array(stock["density"]["retain"]), np.zeros(len(density)))
    for entry in stock["configurations"]:
        ours = choose_latents(forget, retain, entry["retain_threshold"], entry["n_features"])
        assert sorted(density[ours]) == sorted(density[entry["latents"]])


@pytest.mark.parametrize(("case", "name"), MARKED)
def test_answers_probabilities_and_score_equal_stock(case: str, name: str, ready: Callable[[str], Ready]) -> None:
    """Given its choice of latents. SAE Bench keeps probabilities in half precision."""
    run, stock = ready(case), STOCK[case][name]
    plan = [
        Configuration(entry["retain_threshold"], entry["n_features"], entry["multiplier"], tuple(entry["latents"]))
        for entry in stock["configurations"]
    ]
    right = correct_answers(
        run.questions, run.prompts, {name: run.case.saes[name]}, {name: {"sae_bench": plan, "lab": plan}}
    )[name]["sae_bench"]
    probabilities = _probabilities(run, name, plan)
    changed = 0
    for row, entry in enumerate(stock["configurations"]):
        found = [entry["sets"][question_set] for question_set in run.known]
        correct = [value for answers in found for value in answers["correct"]]
        want = np.array([values for answers in found for values in answers["probabilities"]])
        assert right[row].astype(int).tolist() == correct
        asked = sorted(probabilities[row])
        changed += len(asked)
        assert np.array([probabilities[row][i] for i in asked]).reshape(-1, 4) == pytest.approx(
            want[asked].reshape(-1, 4), rel=2e-3, abs=2e-4
        )
    assert changed > 0
    assert intervention.unlearning_score(right[:, : run.n_forget], right[:, run.n_forget :], 0.99) == pytest.approx(
        stock["score"], abs=1e-6
    )


def _probabilities(run: Ready, name: str, plan: list[Configuration]) -> list[dict[int, list[float]]]:
    """Per configuration: prompt -> probability of each letter, for the prompts that it changes."""
    found: list[dict[int, list[float]]] = [{} for _ in plan]
    for batch in run.questions.batches():
        ((_, by_definition),) = codes({name: run.case.saes[name]}, batch, run.questions.lab_mask(batch))
        may_edit = batch.real.clone()
        may_edit[:, 0] = False
        for number, configuration in enumerate(plan):
            for row, edit in edits(by_definition["sae_bench"], may_edit, configuration, "sae_bench"):
                prompt = run.prompts[int(batch.index[row])]
                logits = edited_logits(
                    run.questions, batch, [prompt], run.case.saes[name], by_definition, [Job(row, "sae_bench", edit)]
                )
                p = logits[0].softmax(-1)
                found[number][int(batch.index[row])] = [float(p[list(ids)].max()) for ids in prompt.options]
    return found


@pytest.mark.slow
def test_fixture_is_what_stock_says_today(tmp_path: Path) -> None:
    path = tmp_path / "fresh.json"
    subprocess.run(
        [sys.executable, "-m", "tests.fixtures.make_unlearning", str(path)], check=True, cwd=Path(__file__).parents[2]
    )
    fresh = json.loads(path.read_text())
    for case, name in RUNS:
        for entry, want in zip(fresh[case][name]["configurations"], STOCK[case][name]["configurations"], strict=True):
            for question_set, found in want["sets"].items():
                assert entry["sets"][question_set]["correct"] == found["correct"]
        assert fresh[case][name]["score"] == pytest.approx(STOCK[case][name]["score"])
        assert fresh[case][name]["known"] == STOCK[case][name]["known"]


@pytest.mark.slow
def test_the_knowing_model_can_be_trained_anew(tmp_path: Path) -> None:
    from sae_research.lm import load_language_model
    from tests.helpers import knowing_model

    torch.set_num_threads(1)
    knowing_model.train(tmp_path / "model")
    knowing_model.write_data(tmp_path / "data")
    lm = load_language_model(str(tmp_path / "model"), "cpu")
    for name in knowing_model.SUBJECTS:
        assert len(find_known(lm, name, wordings(lm, f"{tmp_path}/data/{name}.jsonl", "chat"), None, 16).known) == 8
