"""Autointerp against SAE Bench 0.6.0 (tests/fixtures/make_autointerp.py): windows, wording, parsing, scores."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_research.config.params import Params
from sae_research.evals import autointerp
from sae_research.evals.autointerp import judge
from sae_research.evals.autointerp.judge import Example
from sae_research.evals.autointerp.windows import collect_windows, n_top
from sae_research.lm import LanguageModel
from sae_research.lm.activations import HookActivations
from sae_research.runtime.stages import StageFolder
from sae_research.saes import encode_each
from tests.fixtures import make_autointerp as fixture
from tests.helpers.llm_server import is_scoring, serve_llm

STOCK = json.loads(fixture.FIXTURE.read_text())


@pytest.fixture
def settings(tiny_inputs: Path, in_project: Path) -> Params:
    return fixture.params(tiny_inputs / "tiny", tiny_inputs / "texts", override_latents=fixture.SHOWN)


def example(line: str, lm: LanguageModel) -> Example:
    """One of SAE Bench's examples, its tokens put into words by us."""
    plain = json.loads(line)
    ours = Example(judge.token_strings(lm.tokenizer, plain["toks"]), plain["acts"], plain["threshold"])
    assert ours.active == plain["active"]
    return ours


def sample_of(messages: list[dict[str, str]]) -> list[int]:
    """The numbers that SAE Bench drew for its example of an answer."""
    return [int(n) for n in messages[0]["content"].partition('might look like "')[2].partition('"')[0].split(", ")]


def test_windows_equal_stock(lm: LanguageModel, settings: Params) -> None:
    """The strongest windows are the same, with the same activations; what SAE Bench drew by weight, ours could draw."""
    tokens = fixture.tokens_of(lm, settings)
    sae, config = fixture.loose_sae(lm, tokens), settings.autointerp
    acts, size, buffer = HookActivations(lm, fixture.HOOK, tokens, settings), tokens.shape[1], config.buffer
    chosen = collect_windows({"sae": sae}, acts, config, settings.random_seed)["sae"]
    batch = acts.pool.batch(range(len(acts)))
    ((_, z),) = encode_each({"sae": sae}, batch.acts, acts.sae_bench_mask(batch))
    assert chosen.latents == fixture.SHOWN
    for number, latent in enumerate(chosen.latents):
        stock = STOCK["windows"][str(latent)]
        code = z[..., latent].to(torch.bfloat16)
        ours = [(p // size, p % size) for p in chosen.positions[number, : n_top(config)].tolist()]
        theirs = [(row, column) for row, column in stock["top"]]
        # up to ties, and to one step of bfloat16: the two libraries run the model in another order
        assert [float(code[place]) for place in ours] == pytest.approx([float(code[p]) for p in theirs], rel=2**-7)
        weakest = code[theirs[-1]]
        assert all(code[place] <= weakest * (1 + 2**-6) for place in set(ours) ^ set(theirs))
        assert all(0 < code[row, column] < weakest for row, column in stock["weighted"])
        # every window that SAE Bench shows holds the activations that ours would hold there
        shown = [json.loads(line) for line in (*stock["shown"], *stock["scored"])]
        windows = [(row, slice(column - buffer, column + buffer + 1)) for row, column in (*theirs, *stock["weighted"])]
        cut = {tuple(tokens[window].tolist()): code[window].tolist() for window in windows}
        # random windows carry zeros, also where one happens to be a window chosen for its strength
        held = [plain for plain in shown if tuple(plain["toks"]) in cut and any(plain["acts"])]
        assert len(held) == 19
        for plain in held:
            assert plain["acts"] == pytest.approx(cut[tuple(plain["toks"])], rel=2**-7, abs=1e-6)
        threshold = config.act_threshold_frac * chosen.values[number, : n_top(config)].max().item()
        assert held[0]["threshold"] == pytest.approx(threshold)


def test_both_questions_equal_stock_to_the_byte(lm: LanguageModel, settings: Params) -> None:
    for stock in STOCK["windows"].values():
        shown, scored = ([example(line, lm) for line in stock[key]] for key in ("shown", "scored"))
        assert judge.explanation_messages(shown, True) == stock["explanation_question"]
        sample = sample_of(stock["scoring_question"])
        assert judge.scoring_messages("a word", scored, sample) == stock["scoring_question"]
    for stock in STOCK["wording"]:
        examples = [example(line, lm) for line in stock["examples"]]
        assert judge.explanation_messages(examples, stock["demonstrations"]) == stock["explanation_question"]
        listed = sorted(examples, key=lambda ex: max(ex.acts), reverse=True)
        asked = judge.scoring_messages("odd text", listed, sample_of(stock["scoring_question"]))
        # five odd texts in place of fourteen windows: SAE Bench names the number of its configuration
        asked[0]["content"] = asked[0]["content"].replace("shown 5 example", "shown 14 example")
        assert asked == stock["scoring_question"]


def test_the_questions_we_ask_are_sae_benchs_up_to_draws(lm: LanguageModel, settings: Params) -> None:
    """Our own dealing: as many windows of each kind, strongest first, and the same frame around them."""
    tokens, config = fixture.tokens_of(lm, settings), settings.autointerp
    sae = fixture.loose_sae(lm, tokens)
    chosen = autointerp.find_windows({"sae": sae}, lm, settings, tokens)["sae"]
    for sheet in judge.make_sheets(chosen, tokens, lm, config, settings.random_seed):
        stock = STOCK["windows"][str(sheet.latent)]
        asked = sheet.explanation_question(config)
        assert asked[0] == stock["explanation_question"][0]
        lines = asked[1]["content"].split("\n")
        assert lines[:2] == stock["explanation_question"][1]["content"].split("\n")[:2]
        assert [line.partition(".")[0] for line in lines[2:]] == [str(n) for n in range(1, 16)]
        assert "<<" in lines[2]
        asked = sheet.scoring_question("a word")
        sample = ", ".join(str(n) for n in sheet.sample_answer)
        stock_sample = ", ".join(str(n) for n in sample_of(stock["scoring_question"]))
        assert asked[0]["content"].replace(sample, stock_sample) == stock["scoring_question"][0]["content"]
        assert (len(sheet.shown), len(sheet.scored), sum(sheet.drawn_at_random), len(sheet.sample_answer)) == (15, 14, 10, 4)


def test_parsing_equals_stock() -> None:
    stock = STOCK["parsing"]
    for answer, explanation in stock["explanations"].items():
        assert judge.parse_explanation(answer) == explanation
    active, n = stock["active"], len(stock["active"])
    fires, silent = Example(["a"], [1.0], 0.5), Example(["a"], [0.0], 0.5)
    sheet = judge.Sheet(0, 99, [], [fires if a else silent for a in active], [not a for a in active], [])
    for answer, predictions in stock["predictions"].items():
        assert judge.parse_predictions(answer) == predictions, repr(answer)
        got = judge._scores(sheet, answer)
        assert got.get("score_sae_bench") == stock["scores"][answer], repr(answer)
        sensible = predictions is not None and answer.strip() and all(1 <= p <= n for p in predictions)
        assert got["state"] == (judge.SCORED if sensible else judge.UNPARSABLE), repr(answer)
    assert judge.parse_predictions("²") is None, "SAE Bench stops with an error here"


@pytest.mark.slow
def test_scores_agree_with_stock_within_its_own_spread(lm: LanguageModel, settings: Params, tmp_path: Path) -> None:
    """The whole evaluation against the same judge by rule, over the same ten seeds; draws differ."""
    tokens = fixture.tokens_of(lm, settings)
    sae, ours, stock = fixture.word_sae(lm, tokens), [], STOCK["scores"]
    with serve_llm() as server:
        for seed in stock["seeds"]:
            config = settings.autointerp.model_copy(update={"base_url": server.url, "override_latents": None})
            params = settings.model_copy(update={"random_seed": seed, "autointerp": config})
            ((_, result),) = autointerp.evaluate({"sae": sae}, lm, params, StageFolder(tmp_path / "out"))
            ours.append(result["eval_result_metrics"]["autointerp"]["autointerp_score"])
        assert len(server.bodies) == stock["requests"]
        for kind, scoring in (("explanation", False), ("scoring", True)):
            limits = {body["max_tokens"] for body in server.bodies if is_scoring(body) == scoring}
            assert sorted(limits) == stock["max_tokens"][kind]
        assert {key for body in server.bodies for key in body} == set(stock["fields"]) - {"n"}, "n is 1 either way"
    spread = (statistics.variance(ours) / len(ours) + statistics.variance(stock["means"]) / len(stock["means"])) ** 0.5
    assert abs(statistics.fmean(ours) - statistics.fmean(stock["means"])) < 2.5 * spread
    assert statistics.fmean(stock["means"]) > 0.8, "the latents can be explained"


@pytest.mark.slow
def test_fixture_is_what_stock_says_today(tmp_path: Path) -> None:
    path = tmp_path / "fresh.json"
    subprocess.run(
        [sys.executable, "-m", "tests.fixtures.make_autointerp", str(path)], check=True, cwd=Path(__file__).parents[2]
    )
    fresh: dict[str, Any] = json.loads(path.read_text())
    for key in ("parsing", "wording"):
        assert fresh[key] == STOCK[key]
    assert [w["top"] for w in fresh["windows"].values()] == [w["top"] for w in STOCK["windows"].values()]
    assert fresh["scores"]["means"] == pytest.approx(STOCK["scores"]["means"], abs=0.02)
