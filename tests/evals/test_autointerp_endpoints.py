"""Autointerp: every way in which an endpoint can fail, with a real HTTP server as the endpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sae_research.config.params import Params
from sae_research.evals.autointerp import judge
from sae_research.evals.run import run_evaluation
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import read_json, write_json
from sae_research.runtime.stages import read_status
from sae_research.saes import save_sae
from sae_research.saes.sources import PREPARED
from tests.helpers.autointerp_lab import lab
from tests.helpers.evals_saes import standard
from tests.helpers.llm_server import DROP, HANG, Http, is_scoring, sensible, serve_llm

KEY = "sk-very-secret-0123456789"


@pytest.fixture
def prepared(in_project: Path) -> None:
    """Two SAEs as the setup stage leaves them."""
    for name, seed in (("one", 0), ("two", 1)):
        save_sae(standard(seed), in_project / PREPARED / name)
    write_json(in_project / PREPARED / "manifest.json", {"order": ["one", "two"]})


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
@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Http(401, b'{"error": {"message": "who are you"}}'), "HTTP 401: who are you .*10 of 10 latents got no answer"),
        (Http(404), r"given up: HTTP 404 \(check autointerp.base_url and autointerp.model\)"),
        (Http(500), r"given up: 3 questions in a row without an answer, the last one: HTTP 500 \(2 attempts\)"),
        (HANG, r"no answer within 0.2 s \(2 attempts\)"),
        (DROP, "no connection"),
        (Http(200, b"<html>"), "no chat completion: '<html>'"),
        ("", "none of 10 latents could be scored"),
        ("I would say the first two", "none of 10 latents could be scored: the answers of judge are no lists"),
        ("15", "none of 10 latents could be scored"),
    ],
)
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
    real, calls = judge.judge, []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    with serve_llm() as server:
        params = settings(base_url=server.url, concurrency=1)
        monkeypatch.setattr(judge, "judge", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_evaluation("autointerp", params)
        paid = len(server.bodies)
        assert 6 <= paid <= 8
        monkeypatch.setattr(judge, "judge", real)
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
@pytest.mark.parametrize(
    ("limit", "message"),
    [
        (
            {"max_requests": 19},
            "autointerp would need 20 requests, .* more than autointerp.max_requests = 19 allows; nothing",
        ),
        ({"max_tokens": 500}, "more than autointerp.max_tokens = 500 allows; nothing was asked; raise the limit or lower"),
    ],
)
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
def test_the_key_is_written_nowhere(
    settings: Any, in_project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
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
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": None}, "autointerp.base_url must be given"),
        ({"model": None}, "autointerp.model must be given"),
        ({"buffer": 12}, "autointerp.buffer 12 leaves no window in contexts of 24 tokens"),
        ({"total_tokens": 10**9}, "the split core_eval ends after"),
    ],
)
def test_what_is_missing_is_said(settings: Any, changes: dict[str, Any], message: str) -> None:
    assert message in stage_of(settings(**changes))[1]
