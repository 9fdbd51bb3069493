"""Autointerp: what a judge's answers are worth, with a real HTTP server as the judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sae_research.lm import LanguageModel
from tests.helpers.autointerp_lab import TOP, WEIGHTED, lab, run, sparse, windows_of
from tests.helpers.evals_saes import everything, identity, standard
from tests.helpers.llm_server import is_scoring, serve_llm


def test_a_good_judge(lm: LanguageModel, settings: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saes = {name: everything()[name] for name in ("standard", "identity", "mpsae_s3")}
    with serve_llm() as server:
        params = settings(base_url=server.url, prompt_price_per_million=1.0)
        results, stage = run(saes, lm, params, tmp_path / "a")
        assert list(results) == list(saes)
        shown = capsys.readouterr().out
        assert f"autointerp asks judge at {server.url}/chat/completions: 30 requests, about" in shown
        assert "cost about" in shown
        again, stage_again = run(saes, lm, params, tmp_path / "b")
        assert again == results
        assert stage_again.notes == stage.notes
        assert len(server.bodies) == 30, "every answer was kept"
        assert "0 requests, about 0 prompt tokens" in capsys.readouterr().out
        alone, _ = run({"standard": standard()}, lm, params, tmp_path / "c")
        assert alone["standard"] == results["standard"]
    assert stage.skipped == {}
    assert stage.notes["latents"]["standard"] == {"scored": 5}
    got = lab(results["standard"])
    assert got["prompt_tokens"] == 2 * 5 * 100
    assert [record["latent"] for record in got["latents"]] == sorted(record["latent"] for record in got["latents"])


def test_scores_follow_from_the_answers(lm: LanguageModel, settings: Any, tmp_path: Path) -> None:
    """The judge names the first two windows; what is right is counted by hand from the windows."""
    with serve_llm(lambda body, number: "1, 2" if is_scoring(body) else "This neuron activates on x.") as server:
        params = settings(base_url=server.url)
        result = run({"sparse": sparse()}, lm, params, tmp_path / "a")[0]["sparse"]
    n, chosen = 2 + 2 + 5, windows_of(sparse(), lm, params)
    ours, balanced, stock = [], [], []
    for record, values in zip(lab(result)["latents"], chosen.values.float(), strict=True):
        assert record["explanation"] == "x"
        active = set(record["active"])
        firing = (values > 0.01 * values[:TOP].max()).any(1)
        # all windows of the four top and four weighted ones are active; of the random ones, those that are
        assert len(active) == 4 + firing[TOP + WEIGHTED :].sum()
        assert set(record["active_sae_bench"]) <= active
        assert len(record["active_sae_bench"]) == 4
        ours.append(sum((i in (1, 2)) == (i in active) for i in range(1, n + 1)) / n)
        hit = sum(i in active for i in (1, 2))
        if len(active) < n:
            balanced.append((hit / len(active) + 1 - (2 - hit) / (n - len(active))) / 2)
        stock.append(sum((i in (1, 2)) == (i in record["active_sae_bench"]) for i in range(1, n + 1)) / n)
    metrics, intervals = lab(result)["metrics"], lab(result)["intervals"]
    assert metrics["autointerp_score"] == pytest.approx(np.mean(ours))
    assert metrics["autointerp_balanced_score"] == pytest.approx(np.mean(balanced))
    assert metrics["autointerp_std"] == pytest.approx(np.std(ours, ddof=1))
    low, high = intervals["autointerp_score"]
    assert low <= metrics["autointerp_score"] <= high
    assert high - low > 0
    assert ours != stock, "some random window holds its latent"
    bench = result["eval_result_metrics"]["autointerp"]
    assert bench["autointerp_score"] == pytest.approx(np.mean(stock))
    assert bench["autointerp_std_dev"] == pytest.approx(np.std(stock, ddof=1))
    first = lab(result)["latents"][0]
    assert result["eval_result_unstructured"][str(first["latent"])] == {
        "latent": first["latent"],
        "explanation": "x",
        "predictions": [1, 2],
        "correct seqs": first["active_sae_bench"],
        "score": stock[0],
    }


def test_sae_bench_types_accept_the_result(lm: LanguageModel, settings: Any, tmp_path: Path) -> None:
    from pydantic import TypeAdapter
    from sae_bench.evals.autointerp.eval_output import AutoInterpEvalOutput

    with serve_llm() as server:
        params = settings(base_url=server.url, override_latents=[7])
        result = run({"standard": standard()}, lm, params, tmp_path / "a")[0]["standard"]
    read = TypeAdapter(AutoInterpEvalOutput).validate_python(json.loads(json.dumps(result, allow_nan=False)))
    assert read.eval_config.override_latents == [7]
    assert read.eval_config.n_top_ex_for_generation == 4
    assert read.eval_result_metrics.autointerp.autointerp_std_dev == -1, "one latent has no deviation"
    assert "autointerp_std" not in lab(result)["metrics"]
    assert lab(result)["intervals"] == {}


def test_an_sae_without_living_latents_is_skipped(lm: LanguageModel, settings: Any, tmp_path: Path) -> None:
    dead = standard()
    dead.b_enc -= 1e6
    narrow = identity()
    with serve_llm() as server:
        results, stage = run(
            {"dead": dead, "narrow": narrow, "standard": standard()},
            lm,
            settings(base_url=server.url, override_latents=[40]),
            tmp_path / "a",
        )
    assert list(results) == ["standard"]
    assert stage.skipped["dead"].startswith("no latent to explain: 0 fire on more than 15 tokens")
    assert "narrow" in stage.skipped
    for _ in range(2):  # afresh, and from the cache
        results, stage = run({"dead": dead}, lm, settings(), tmp_path / "b")
        assert results == {}
        assert set(stage.skipped) == {"dead"}
