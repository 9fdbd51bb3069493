"""Our RAVEL in SAE Bench's definition against SAE Bench 0.6.0 (tests/fixtures/make_ravel.py), on the packaged model.

SAE Bench cannot run as installed (`benchmarks/stock_ravel.py` says why), and it reads other files, so parity is shown
function by function on the same prompts: the pairs drawn, the loss of every step, the mask learnt, the answers, the scores.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_research.evals.ravel import patches
from sae_research.evals.ravel.evaluation import sae_bench_scores
from sae_research.evals.ravel.pairs import Plan, sae_bench_plan
from sae_research.evals.ravel.patches import Problem, PromptActivations, Swap, learn, temperatures
from sae_research.evals.ravel.prompts import Known
from sae_research.lm import LanguageModel, load_language_model
from tests.fixtures import make_ravel as fixture

STOCK = json.loads(fixture.FIXTURE.read_text())


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load_language_model(fixture.PARAMS.model.name, "cpu")


@pytest.fixture(scope="module")
def known(lm: LanguageModel) -> list[Known]:
    return [Known(prompt, first) for prompt, first in zip(fixture.make_prompts(lm), STOCK["first"], strict=True)]


@pytest.fixture(scope="module")
def plan(known: list[Known]) -> Plan:
    config = fixture.PARAMS.ravel
    others = [attribute for attribute in fixture.ATTRIBUTES if attribute != fixture.ATTRIBUTE]
    return sae_bench_plan(
        random.Random(fixture.SEED),
        [one.prompt for one in known],
        range(len(known)),
        fixture.ATTRIBUTE,
        others,
        config.num_pairs_per_attribute,
        config.train_test_split,
    )


@pytest.fixture(scope="module")
def swap(lm: LanguageModel, known: list[Known]) -> Swap:
    group, sae = PromptActivations(lm, fixture.HOOK, known, fixture.PARAMS), fixture.make_sae(lm)
    assert len(group.usable) == len(known), "where no entity token is masked, our latents are SAE Bench's"
    return Swap(sae, group.entity_latents({"sae": sae})["sae"], group)


def test_pairs_equal_stock(known: list[Known], plan: Plan) -> None:
    for ours, stock in zip(plan, STOCK["pairs"], strict=True):
        assert [
            [
                list(known[p.base].prompt.ids),
                list(known[p.source].prompt.ids),
                known[p.target].first,
                known[p.target].prompt.label,
            ]
            for p in ours
        ] == stock


def test_learning_equals_stock(plan: Plan, swap: Swap, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    original = patches._loss

    def noted(rows: Any, swap: Swap) -> torch.Tensor:
        loss = original(rows, swap)
        losses.append(loss.item())
        return loss

    monkeypatch.setattr(patches, "_loss", noted)
    numbers = learn([Problem(plan.train, keeps_error=False)], swap, fixture.PARAMS)[0]
    assert losses == pytest.approx(STOCK["losses"], rel=1e-4)
    torch.testing.assert_close(numbers, torch.tensor(STOCK["numbers"]), atol=2e-5, rtol=1e-3)
    assert (numbers != 0).sum() > 10


def test_answers_and_scores_equal_stock(lm: LanguageModel, known: list[Known], plan: Plan, swap: Swap) -> None:
    taken = (torch.tensor(STOCK["numbers"]) > 0).float()
    with torch.no_grad():
        patched = swap.patched(plan.test, taken.expand(len(plan.test), -1), torch.zeros(len(plan.test), dtype=torch.bool))
    answers = swap.group.answers(plan.test, patched)
    assert answers == STOCK["answers"]
    scores = sae_bench_scores(known, plan.test, answers)
    assert {
        "cause_score": scores.cause,
        "isolation_score": scores.isolation,
        "disentangle_score": scores.disentanglement,
    } == pytest.approx(STOCK["scores"])


def test_temperatures_fall_from_one_to_1e_4_in_equal_ratios() -> None:
    """SAE Bench's `torch.logspace` over all steps of all epochs."""
    falling = temperatures(9)
    assert falling[0] == 1
    assert float(falling[-1]) == pytest.approx(1e-4)
    assert (falling[1:] / falling[:-1]).tolist() == pytest.approx([10**-0.5] * 8)


@pytest.mark.slow
def test_fixture_is_what_stock_says_today(tmp_path: Path) -> None:
    path = tmp_path / "fresh.json"
    subprocess.run([sys.executable, "-m", "tests.fixtures.make_ravel", str(path)], check=True, cwd=Path(__file__).parents[2])
    fresh = json.loads(path.read_text())
    for key in ("pairs", "answers", "first", "scores"):
        assert fresh[key] == STOCK[key]
    assert fresh["losses"] == pytest.approx(STOCK["losses"], rel=1e-4)
    assert fresh["numbers"] == pytest.approx(STOCK["numbers"], abs=2e-5)
