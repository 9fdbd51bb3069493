"""Autointerp: which windows are chosen, what the judge's answers are worth, and every way in which an endpoint can fail,
with a real HTTP server as the endpoint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evals_saes import HOOK, D, config, dictionary, everything, identity, standard
from fixtures import make_autointerp as fixture
from llm_server import DROP, HANG, Http, is_scoring, sensible, serve_llm

from sae_research.errors import UserError
from sae_research.evals import autointerp
from sae_research.evals.autointerp import windows
from sae_research.evals.autointerp.windows import Windows, collect_windows
from sae_research.evals.inputs import SAE_FOLDER
from sae_research.evals.pool import HookActivations
from sae_research.evals.run import run_evaluation
from sae_research.instance_sae import MPSAE
from sae_research.lm import LanguageModel
from sae_research.params import Params
from sae_research.saes import SparseAutoencoder, encode_each, save_sae
from sae_research.saes.standard import StandardSAE
from sae_research.store import StageFolder, read_json, read_status, write_json

KEY = "sk-very-secret-0123456789"
BUFFER, TOP, WEIGHTED = 4, 6, 4


@pytest.fixture
def settings(make_params: Any) -> Callable[..., Params]:
    """Parameters for the tiny model; keywords are changes to the autointerp section."""
    def make(**changes: Any) -> Params:
        return make_params(eval_types={"autointerp": True}, autointerp={
            "base_url": "http://127.0.0.1:1/v1", "model": "judge", "api_key_env": "", "n_latents": 5, "buffer": BUFFER,
            "total_tokens": 2_400, "n_top_ex_for_generation": 4, "n_top_ex_for_scoring": TOP - 4,
            "n_iw_sampled_ex_for_generation": 2, "n_iw_sampled_ex_for_scoring": WEIGHTED - 2, "n_random_ex_for_scoring": 5,
            "timeout_seconds": 5, "max_retries": 1, "backoff_seconds": 0.01, "concurrency": 2, **changes})

    return make


def run(saes: dict[str, SparseAutoencoder], lm: LanguageModel, params: Params,
        folder: Path) -> tuple[dict[str, Any], StageFolder]:
    stage = StageFolder(folder)
    return dict(autointerp.evaluate(saes, lm, params, stage)), stage


def lab(result: dict[str, Any]) -> dict[str, Any]:
    return result["eval_result_unstructured"]["lab_v1"]


def activations(lm: LanguageModel, params: Params) -> HookActivations:
    return HookActivations(lm, HOOK, fixture.tokens_of(lm, params), params)


def windows_of(sae: SparseAutoencoder, lm: LanguageModel, params: Params, seed: int = 42) -> Windows:
    return collect_windows({"sae": sae}, activations(lm, params), params.autointerp, seed)["sae"]


def sparse() -> StandardSAE:
    """An SAE whose latents fire on one token in twenty: random windows hold them now and then."""
    sae = standard()
    sae.b_enc.fill_(-12)
    return sae


# --- windows ---------------------------------------------------------------------------------

def dense_codes(sae: SparseAutoencoder, acts: HookActivations) -> torch.Tensor:
    """Absolute codes of all contexts as bfloat16 [contexts, seq, d_sae]."""
    batch = acts.pool.batch(range(len(acts)))
    (_, z), = encode_each({"sae": sae}, batch.acts, acts.lab_mask(batch))
    return z.abs().to(torch.bfloat16)


@pytest.mark.parametrize("name", ["sparse", "mpsae_s3", "identity"])
def test_windows_are_those_of_the_definition(name: str, lm: LanguageModel, settings: Any) -> None:
    """Against a plain search through the dense codes."""
    params, sae = settings(), {**everything(), "sparse": sparse()}[name]
    acts, got = activations(lm, params), windows_of(sae, lm, params)
    z, size = dense_codes(sae, acts), 24
    assert len(got.latents) == 5
    assert got.alive == ((z != 0).sum((0, 1)) > 15).sum()
    for number, latent in enumerate(got.latents):
        code = z[..., latent]
        assert got.firings[number] == (code != 0).sum()
        inner = code[:, BUFFER:-BUFFER].float().numpy()
        rows, columns = np.unravel_index(np.lexsort((np.arange(inner.size), -inner.ravel())), inner.shape)
        top: list[tuple[int, int]] = []
        for row, column in zip(rows.tolist(), (columns + BUFFER).tolist(), strict=True):
            if len(top) < TOP and all(row != r or abs(column - c) > BUFFER for r, c in top):
                top.append((row, column))
        places = [(p // size, p % size) for p in got.positions[number].tolist()]
        assert places[:TOP] == top
        weakest = code[top[-1]]
        for row, column in places[TOP:TOP + WEIGHTED]:
            assert 0 < code[row, column] < weakest
        assert len(set(places[TOP:TOP + WEIGHTED])) == WEIGHTED
        for place, values in zip(places, got.values[number], strict=True):
            assert BUFFER <= place[1] < size - BUFFER
            assert torch.equal(values, code[place[0], place[1] - BUFFER:place[1] + BUFFER + 1])


def test_weighted_windows_are_drawn_by_the_squared_activation(lm: LanguageModel, settings: Any) -> None:
    """The first of them, over many seeds, against the probabilities of the definition."""
    params = settings(override_latents=[3], total_tokens=480)
    acts, sae = activations(lm, params), standard()
    code = dense_codes(sae, acts)[..., 3].float()
    firsts = []
    for seed in range(120):
        chosen = collect_windows({"sae": sae}, acts, params.autointerp, seed)["sae"]
        firsts.append(chosen.positions[0, TOP].item())
    weakest = code.flatten()[chosen.positions[0, TOP - 1]]
    weight = torch.where(code < weakest, code, 0.0)
    weight[:, :BUFFER] = weight[:, -BUFFER:] = 0
    probability = (weight.square() / weight.square().sum()).flatten()
    strongest = probability.argsort(descending=True)[:5]
    for place in strongest.tolist():
        expected = probability[place].item()
        spread = (expected * (1 - expected) / len(firsts)) ** 0.5
        assert abs(firsts.count(place) / len(firsts) - expected) < 4 * spread
    assert probability[strongest].sum() > 0.1
    assert set(firsts) <= set(probability.nonzero()[:, 0].tolist())


def same(one: Windows, other: Windows) -> bool:
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True))


def test_batches_and_neighbours_change_no_window(lm: LanguageModel, settings: Any, make_params: Any) -> None:
    params = settings()
    wide = params.model_copy(update={"model": params.model.model_copy(update={"llm_batch_size": 7})})
    saes = {name: everything()[name] for name in ("standard", "mpsae_s3", "mpsae_s6", "ihtp_k1")}
    together = autointerp.find_windows(saes, lm, params, fixture.tokens_of(lm, params))
    for name, sae in saes.items():
        assert same(windows_of(sae, lm, params), together[name]), name
        assert same(windows_of(sae, lm, wide), together[name]), name
    kept = autointerp.find_windows(saes, lm, params, fixture.tokens_of(lm, params))
    assert all(same(kept[name], together[name]) for name in together), "read from the cache"


def test_sign_changes_no_window_of_a_signed_code(lm: LanguageModel, settings: Any) -> None:
    one, other = (windows_of(MPSAE(sign * dictionary(), torch.zeros(D), 5, config("matching_pursuit", s=5)), lm, settings())
                  for sign in (1, -1))
    assert same(one, other)


def test_dead_latents_are_passed_over_and_the_search_goes_on(lm: LanguageModel, settings: Any,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Four in five latents are dead: the first ones followed hold too few, another pass finds the rest."""
    params, passes = settings(n_latents=8), []
    monkeypatch.setattr(windows, "_SPARE", 0)
    take = windows._Search.take
    monkeypatch.setattr(windows._Search, "take", lambda self, follower: passes.append(1) or take(self, follower))
    dead = torch.zeros(64, dtype=torch.bool)
    dead[np.random.default_rng(0).permutation(64)[:51]] = True
    sae = standard()
    sae.b_enc[dead] = -1e6
    chosen = windows_of(sae, lm, params)
    assert len(passes) == 2
    assert chosen.alive == 13
    assert len(chosen.latents) == 8
    assert not dead[chosen.latents].any()
    order = np.random.default_rng(42).permutation(64).tolist()
    assert chosen.latents == sorted([latent for latent in order if not dead[latent]][:8])
    assert chosen.passed_over == order.index([latent for latent in order if not dead[latent]][7]) + 1 - 8
    everything_alive = windows_of(sae, lm, settings(n_latents=40))
    assert everything_alive.latents == sorted((~dead).nonzero()[:, 0].tolist())


def test_latents_asked_for_by_number(lm: LanguageModel, settings: Any) -> None:
    chosen = windows_of(standard(), lm, settings(override_latents=[40, 3, 3, 64]))
    assert chosen.latents == [3, 40]
    assert chosen.passed_over == 1, "there is no latent 64"


# --- a judge that answers well ---------------------------------------------------------------

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
        assert len(active) == 4 + firing[TOP + WEIGHTED:].sum()
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
        "latent": first["latent"], "explanation": "x", "predictions": [1, 2], "correct seqs": first["active_sae_bench"],
        "score": stock[0]}


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


# --- endpoints that fail ---------------------------------------------------------------------

@pytest.fixture
def prepared(in_project: Path) -> None:
    """Two SAEs as the setup stage leaves them."""
    for name, seed in (("one", 0), ("two", 1)):
        save_sae(standard(seed), in_project / SAE_FOLDER / name)
    write_json(in_project / SAE_FOLDER / "manifest.json", {"order": ["one", "two"]})


def stage_of(params: Params) -> tuple[dict[str, Any], str]:
    """(status, error) of the whole stage."""
    folder = Path("eval_results/autointerp")
    try:
        run_evaluation("autointerp", params)
    except UserError as error:
        assert "\n" not in str(error)
        assert read_status(folder)["status"] == "failed"
        assert read_status(folder)["message"] == str(error)
        return read_status(folder), str(error)
    return read_status(folder), ""


def written() -> list[str]:
    folder = Path("eval_results/autointerp")
    return sorted(path.name.removesuffix("_eval_results.json") for path in folder.glob("*_results.json"))


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize(("reply", "message"), [
    (Http(401, b'{"error": {"message": "who are you"}}'), "HTTP 401: who are you .*10 of 10 latents got no answer"),
    (Http(404), r"given up: HTTP 404 \(check autointerp.base_url and autointerp.model\)"),
    (Http(500), r"given up: 3 questions in a row without an answer, the last one: HTTP 500 \(2 attempts\)"),
    (HANG, r"no answer within 0.2 s \(2 attempts\)"),
    (DROP, "no connection"),
    (Http(200, b"<html>"), "no chat completion: '<html>'"),
    ("", "none of 10 latents could be scored"),
    ("I would say the first two", "none of 10 latents could be scored: the answers of judge are no lists"),
    ("15", "none of 10 latents could be scored"),
])
def test_an_endpoint_of_no_use_fails_the_stage(reply: Any, message: str, settings: Any) -> None:
    with serve_llm(lambda body, number: reply) as server:
        status, error = stage_of(settings(base_url=server.url, timeout_seconds=0.2))
        assert written() == []
    pytest.raises(UserError, _raise, error).match(message)
    assert sum(n for states in status["notes"]["latents"].values() for n in states.values()) == 10
    assert set(status["skipped"]) == {"one", "two"}


def _raise(message: str) -> None:
    raise UserError(message)


@pytest.mark.usefixtures("prepared")
def test_nonsense_is_counted_and_left_out(settings: Any, capsys: pytest.CaptureFixture[str]) -> None:
    odd = ["I cannot tell", "", "99", "1; 2"]

    def reply(body: dict[str, Any], number: int) -> str:
        return odd.pop() if is_scoring(body) and odd else sensible(body)

    with serve_llm(reply) as server:
        status, error = stage_of(settings(base_url=server.url, concurrency=1))
    assert error == ""
    assert status["status"] == "ok"
    assert written() == ["one", "two"]
    assert status["notes"]["latents"] == {"one": {"scored": 1, "unparsable": 4}, "two": {"scored": 5}}
    assert status["notes"]["not_scored"]["one"][0].startswith("4 of 5 latents unparsable, e.g. the answer")
    assert "one: 4 of 5 latents unparsable" in capsys.readouterr().out
    result = read_json(Path("eval_results/autointerp/one_eval_results.json"))
    metrics = lab(result)["metrics"]
    assert (metrics["latents_scored"], metrics["latents_unparsable"], metrics["latents_failed"]) == (1, 4, 0)
    assert len(result["eval_result_unstructured"]) == 1 + 3, "SAE Bench itself reads '' as none and '99' as nothing"


@pytest.mark.usefixtures("prepared")
def test_a_run_cut_short_continues_without_paying_twice(settings: Any) -> None:
    """The endpoint dies half-way: what was scored is written, and the second run asks only for the rest."""
    with serve_llm(lambda body, number: sensible(body) if number < 13 else DROP) as server:
        params, port = settings(base_url=server.url, concurrency=1), int(server.url.split(":")[2].split("/")[0])
        status, error = stage_of(params)
        assert "given up: 3 questions in a row without an answer" in error
        assert "4 of 10 latents got no answer; answers so far are kept: run again" in error
        assert status["notes"]["latents"] == {"one": {"scored": 5}, "two": {"failed": 4, "scored": 1}}
        assert written() == ["one", "two"]
        assert lab(read_json(Path("eval_results/autointerp/two_eval_results.json")))["metrics"]["latents_failed"] == 4
    with serve_llm(port=port) as server:
        status, error = stage_of(params)
        assert (error, status["status"]) == ("", "ok")
        assert len(server.bodies) == 20 - 13
    whole = {name: Path(f"eval_results/autointerp/{name}_eval_results.json").read_bytes() for name in ("one", "two")}
    with serve_llm(port=port) as server:
        stage_of(params)
        assert server.bodies == []
    assert whole == {name: Path(f"eval_results/autointerp/{name}_eval_results.json").read_bytes() for name in whole}


@pytest.mark.usefixtures("prepared")
def test_a_killed_run_continues(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = autointerp.stage.judge.judge, []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    with serve_llm() as server:
        params = settings(base_url=server.url, concurrency=1)
        monkeypatch.setattr(autointerp.stage.judge, "judge", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_evaluation("autointerp", params)
        paid = len(server.bodies)
        assert 6 <= paid <= 8
        monkeypatch.setattr(autointerp.stage.judge, "judge", real)
        assert stage_of(params)[1] == ""
        assert len(server.bodies) == 20


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize(("tolerated", "ok"), [(0.2, True), (0.05, False)])
def test_single_questions_without_an_answer(settings: Any, tolerated: float, ok: bool) -> None:
    with serve_llm(lambda body, number: Http(400, b"too long") if number in (2, 9) else sensible(body)) as server:
        status, error = stage_of(settings(base_url=server.url, concurrency=1, max_failed_fraction=tolerated))
    assert written() == ["one", "two"]
    assert status["notes"]["latents"] == dict.fromkeys(("one", "two"), {"failed": 1, "scored": 4})
    assert (error == "") == ok
    if not ok:
        assert "left too much unanswered: 2 of 10 latents got no answer" in error


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize(("limit", "message"), [
    ({"max_requests": 19}, "autointerp would need 20 requests, .* more than autointerp.max_requests = 19 allows; nothing"),
    ({"max_tokens": 500}, "more than autointerp.max_tokens = 500 allows; nothing was asked; raise the limit or lower"),
])
def test_limits_stop_before_anything_is_asked(settings: Any, limit: dict[str, int], message: str) -> None:
    with serve_llm() as server:
        _, error = stage_of(settings(base_url=server.url, **limit))
        assert server.bodies == []
    pytest.raises(UserError, _raise, error).match(message)


@pytest.mark.usefixtures("prepared")
def test_limits_count_only_what_is_new(settings: Any) -> None:
    with serve_llm() as server:
        assert stage_of(settings(base_url=server.url))[1] == ""
        assert stage_of(settings(base_url=server.url, max_requests=1))[1] == ""


@pytest.mark.usefixtures("prepared")
def test_the_key_is_written_nowhere(settings: Any, in_project: Path, monkeypatch: pytest.MonkeyPatch,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)

    def reply(body: dict[str, Any], number: int) -> str | Http:
        if number > 12:
            return Http(403, json.dumps({"error": {"message": f"{KEY} is spent"}}).encode())
        return f"the key is {KEY}" if number == 3 else sensible(body)

    with serve_llm(reply) as server:
        _, error = stage_of(settings(base_url=server.url, api_key_env="JUDGE_KEY", concurrency=1))
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
    assert "*** is spent (check the key in $JUDGE_KEY)" in error
    assert KEY not in "".join(capsys.readouterr())
    for path in in_project.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


@pytest.mark.usefixtures("prepared")
@pytest.mark.parametrize(("changes", "message"), [
    ({"base_url": None}, "autointerp.base_url must be given"),
    ({"model": None}, "autointerp.model must be given"),
    ({"buffer": 12}, "autointerp.buffer 12 leaves no window in contexts of 24 tokens"),
    ({"total_tokens": 10**9}, "the split core_eval ends after"),
])
def test_what_is_missing_is_said(settings: Any, changes: dict[str, Any], message: str) -> None:
    assert message in stage_of(settings(**changes))[1]


def test_an_sae_without_living_latents_is_skipped(lm: LanguageModel, settings: Any, tmp_path: Path) -> None:
    dead = standard()
    dead.b_enc -= 1e6
    narrow = identity()
    with serve_llm() as server:
        results, stage = run({"dead": dead, "narrow": narrow, "standard": standard()}, lm,
                             settings(base_url=server.url, override_latents=[40]), tmp_path / "a")
    assert list(results) == ["standard"]
    assert stage.skipped["dead"].startswith("no latent to explain: 0 fire on more than 15 tokens")
    assert "narrow" in stage.skipped
    for _ in range(2):  # afresh, and from the cache
        results, stage = run({"dead": dead}, lm, settings(), tmp_path / "b")
        assert results == {}
        assert set(stage.skipped) == {"dead"}


def test_a_latent_with_one_strength_only_is_passed_over(lm: LanguageModel, settings: Any) -> None:
    """Nothing weaker than its strongest windows: no weighted ones to draw."""
    class Binary(StandardSAE):
        def encode(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return (super().encode(x, mask) > 0).float()

    sae = standard()
    sae.__class__ = Binary
    chosen = windows_of(sae, lm, settings())
    assert chosen.latents == []
    assert chosen.passed_over == 64
    assert chosen.alive > 0
