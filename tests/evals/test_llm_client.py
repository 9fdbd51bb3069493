"""The client of OpenAI-compatible endpoints, against a real HTTP server on the loopback that behaves well or badly."""

from __future__ import annotations

import json
import socket
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from sae_research.config.evaluation_params import ChatEndpoint
from sae_research.evals.autointerp.client import Budget, ChatClient, NoAnswer, check_budget, estimate_tokens
from sae_research.runtime.errors import UserError
from tests.helpers.llm_server import DROP, HANG, Http, serve_llm

KEY = "sk-very-secret-0123456789"


def client_of(url: str, **changes: Any) -> ChatClient:
    return ChatClient(
        ChatEndpoint.model_validate(
            {
                "base_url": url,
                "model": "judge",
                "api_key_env": "",
                "timeout_seconds": 5,
                "max_retries": 2,
                "concurrency": 4,
                **changes,
            }
        ),
        "autointerp",
    )


def question(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def everything_under(folder: Path) -> str:
    return "\n".join(path.read_text() for path in folder.rglob("*") if path.is_file())


@pytest.fixture(autouse=True)
def project(in_project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    return in_project


def test_an_answer_is_asked_for_once() -> None:
    with serve_llm(lambda body, number: f"answer {number}") as server:
        first = client_of(server.url).ask(question("a"), 7)
        assert first == ("answer 0", "stop", 100, 5)
        assert server.bodies == [
            {"model": "judge", "messages": question("a"), "max_tokens": 7, "stream": False, "temperature": 0.0}
        ]
        again = client_of(server.url + "/")
        assert again.kept(question("a"), 7) == again.ask(question("a"), 7) == first
        assert len(server.bodies) == 1
        assert again.kept(question("b"), 7) is None
        for changes, text, limit in (
            ({}, "b", 7),
            ({}, "a", 8),
            ({"model": "other"}, "a", 7),
            ({"temperature": 1}, "a", 7),
            ({"completion_limit_field": "max_completion_tokens"}, "a", 7),
        ):
            client_of(server.url, **changes).ask(question(text), limit)
        assert len(server.bodies) == 6
        assert server.bodies[-1]["max_completion_tokens"] == 7
        client_of(server.url, temperature=None).ask(question("a"), 7)
        assert "temperature" not in server.bodies[-1]


def test_the_key_goes_into_one_header_and_nowhere_else(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MY_KEY", f" {KEY}\n")
    replies = [f"your key is {KEY}", Http(401, json.dumps({"error": {"message": f"bad key {KEY}"}}).encode()), "unreached"]
    with serve_llm(lambda body, number: replies[number]) as server:
        client = client_of(server.url, api_key_env="MY_KEY")
        assert client.ask(question("a"), 5).text == "your key is ***"
        with pytest.raises(NoAnswer, match=r"HTTP 401: bad key \*\*\* \(check the key in \$MY_KEY\)"):
            client.ask(question("b"), 5)
        assert {headers["Authorization"] for headers in server.headers} == {f"Bearer {KEY}"}
    assert KEY not in everything_under(project)
    assert KEY not in "".join(capsys.readouterr()) + str(client.down)
    with serve_llm() as server:
        client_of(server.url, api_key_env="NOT_SET_AT_ALL").ask(question("c"), 5)
        assert "Authorization" not in server.headers[0]


def test_variables_of_the_openai_client_reach_no_other_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_ADMIN_KEY", KEY)
    monkeypatch.setenv("OPENAI_ORG_ID", KEY)
    monkeypatch.setenv("OPENAI_PROJECT_ID", KEY)
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", f"Authorization: Bearer {KEY}\nX-Other: {KEY}")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    monkeypatch.setenv("HOUSE_KEY", "house-key")
    with serve_llm() as server:
        client_of(server.url).ask(question("a"), 5)
        client_of(server.url, api_key_env="HOUSE_KEY").ask(question("b"), 5)
        assert KEY not in str(server.headers)
        assert [headers.get("Authorization") for headers in server.headers] == [None, "Bearer house-key"]


def test_a_redirect_takes_the_key_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", KEY)
    with serve_llm() as other:
        with serve_llm(lambda body, number: Http(302, headers={"Location": other.url})) as server:
            client = client_of(server.url, api_key_env="MY_KEY")
            with pytest.raises(NoAnswer, match="HTTP 302.*autointerp.base_url the final address"):
                client.ask(question("a"), 5)
        assert other.bodies == []


def test_overload_is_waited_out() -> None:
    replies = [Http(429, headers={"Retry-After": "0.3"}), Http(503), "done"]
    with serve_llm(lambda body, number: replies[number]) as server:
        client, start = client_of(server.url), time.monotonic()
        assert client.ask(question("a"), 5).text == "done"
        assert time.monotonic() - start > 0.3
        assert len(server.bodies) == 3


@pytest.mark.parametrize(
    ("reply", "reason", "attempts"),
    [
        (Http(500, b"out of order"), r"HTTP 500: out of order \(3 attempts\)", 3),
        (Http(429, b'{"error": {"message": "slow down"}}'), r"HTTP 429: slow down \(3 attempts\)", 3),
        (DROP, "no connection", 3),
        (Http(200, b'{"cut', {"Content-Length": "500"}), r"no connection: .*complete message.*\(3 attempts\)", 3),
        (Http(400, b'{"error": {"message": "context too long"}}'), "^HTTP 400: context too long$", 1),
        (Http(200, b"<html>Welcome</html>"), "no chat completion: '<html>Welcome</html>'", 1),
        (Http(200, b"{}"), "no chat completion", 1),
        (Http(200, b'{"choices": []}'), "no chat completion", 1),
        (Http(200, b'{"choices": [{"message": {"content": 7}}]}'), "no chat completion", 1),
        (Http(200, b'["' + b"x" * 500), "no chat completion: .{190,210}…", 1),
    ],
)
def test_what_stays_without_an_answer_says_why(reply: Any, reason: str, attempts: int, project: Path) -> None:
    with serve_llm(lambda body, number: reply) as server:
        client = client_of(server.url)
        with pytest.raises(NoAnswer, match=reason) as caught:
            client.ask(question("a"), 5)
        assert "\n" not in str(caught.value)
        assert len(server.bodies) == attempts
        assert client.down is None
    assert not list(project.rglob("llm_answers/*")), "only answers are kept"


def test_silence_ends_in_time() -> None:
    with serve_llm(lambda body, number: HANG) as server:
        client, start = client_of(server.url, timeout_seconds=0.2, max_retries=1), time.monotonic()
        with pytest.raises(NoAnswer, match=r"no answer within 0.2 s \(2 attempts\)"):
            client.ask(question("a"), 5)
        assert time.monotonic() - start < 5


def test_nobody_listening() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
    client = client_of(f"http://127.0.0.1:{port}/v1", concurrency=1, max_retries=1)
    for text in "abc":
        with pytest.raises(NoAnswer, match=r"no connection: Connection refused \(2 attempts\)"):
            client.ask(question(text), 5)
    assert (
        client.down == "3 questions in a row without an answer, the last one: no connection: Connection refused (2 attempts)"
    )
    with pytest.raises(NoAnswer, match="given up"):
        client.ask(question("d"), 5)


@pytest.mark.parametrize(
    ("reply", "reason", "attempts"),
    [
        (Http(401, b'{"error": {"message": "no"}}'), "HTTP 401: no .no key was sent", 1),
        (Http(404, b'{"error": {"message": "no model judge"}}'), "HTTP 404: no model judge .check autointerp.base_url", 1),
        (Http(429, b'{"error": {"message": "pay first", "code": "insufficient_quota"}}'), "HTTP 429: pay first", 3),
    ],
)
def test_an_endpoint_that_refuses_everybody_gets_one_question(reply: Http, reason: str, attempts: int) -> None:
    with serve_llm(lambda body, number: reply) as server:
        client = client_of(server.url)
        with pytest.raises(NoAnswer, match=reason):
            client.ask(question("a"), 5)
        assert client.down is not None
        with pytest.raises(NoAnswer, match="given up"):
            client.ask(question("b"), 5)
        assert len(server.bodies) == attempts


def test_kept_answers_are_given_even_when_the_endpoint_is_down() -> None:
    with serve_llm(lambda body, number: "early" if number == 0 else Http(401)) as server:
        client = client_of(server.url)
        client.ask(question("a"), 5)
        with pytest.raises(NoAnswer):
            client.ask(question("b"), 5)
        assert client.ask(question("a"), 5).text == "early"


def test_one_good_answer_resets_the_count_of_bad_ones() -> None:
    with serve_llm(lambda body, number: "fine" if number % 3 == 2 else Http(400)) as server:
        client = client_of(server.url, concurrency=1)
        for number in range(9):
            if number % 3 == 2:
                assert client.ask(question(str(number)), 5).text == "fine"
            else:
                with pytest.raises(NoAnswer):
                    client.ask(question(str(number)), 5)
        assert client.down is None


def test_many_at_once_come_back_in_order() -> None:
    meeting = threading.Barrier(4, timeout=10)  # breaks unless four questions are under way together

    def reply(body: dict[str, Any], number: int) -> str:
        text = body["messages"][0]["content"]
        if int(text) % 4 == 0:
            meeting.wait()
        return text

    with serve_llm(reply) as server:
        client, items = client_of(server.url, concurrency=8), [str(i) for i in range(16)]
        assert list(client.in_order(lambda text: client.ask(question(text), 5).text, items)) == items


def test_an_error_of_ours_lets_nothing_further_be_asked() -> None:
    def work(text: str) -> str:
        if text == "1":
            raise ZeroDivisionError
        time.sleep(0.02)
        return client.ask(question(text), 5).text

    with serve_llm() as server:
        client = client_of(server.url, concurrency=1)
        with pytest.raises(ZeroDivisionError):
            list(client.in_order(work, [str(i) for i in range(50)]))
        assert len(server.bodies) < 25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base_url": None, "model": None}, "autointerp.base_url and autointerp.model must be given"),
        ({"model": None}, "autointerp.model must be given"),
        ({"base_url": "localhost:8000"}, "must look like"),
        ({"base_url": "ftp://localhost/v1"}, "must look like"),
        ({"base_url": "http://host:port/v1"}, "must look like"),
        ({"base_url": "http://user:hunter2@host/v1"}, "must hold no user name"),
        ({"base_url": "https://host/v1?key=hunter2"}, "must hold no user name"),
        ({"base_url": "http://elsewhere.example/v1", "api_key_env": "OPENAI_API_KEY"}, "in the clear"),
        ({"api_key_env": "BROKEN_KEY"}, "no key has"),
    ],
)
def test_endpoints_that_cannot_be_asked(changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "hunter2-hunter2")
    monkeypatch.setenv("BROKEN_KEY", "hunter2\nX: y")
    with pytest.raises(UserError, match=message) as caught:
        client_of("http://127.0.0.1:1/v1", **changes)
    assert "hunter2" not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_key_of_its_own_may_go_to_a_machine_in_the_house(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("HOUSE_KEY", "house-key")
    client_of("http://elsewhere.example/v1", api_key_env="HOUSE_KEY")
    client_of("http://elsewhere.example/v1", api_key_env="")
    client_of("https://elsewhere.example/v1", api_key_env="OPENAI_API_KEY")


def test_a_proxy_is_not_asked_about_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with serve_llm() as proxy, serve_llm(lambda body, number: "direct") as server:
        monkeypatch.setenv("http_proxy", proxy.url)
        assert client_of(server.url).ask(question("a"), 5).text == "direct"
        assert proxy.bodies == []


def test_budget() -> None:
    budget = Budget().plus(1_000, 30).plus(500, 33)
    endpoint = ChatEndpoint(max_requests=2, max_tokens=1_563)
    assert budget == (2, 1_500, 63)
    assert budget.cost(endpoint) is None
    assert budget.words(endpoint) == "2 requests, about 1,500 prompt tokens and at most 63 answer tokens"
    priced = ChatEndpoint(prompt_price_per_million=0.15, completion_price_per_million=0.6)
    assert budget.cost(priced) == pytest.approx((1_500 * 0.15 + 63 * 0.6) / 1e6)
    assert budget.words(priced).endswith("cost about 0.0002628")
    check_budget(budget, endpoint, "autointerp", "lower autointerp.n_latents")
    check_budget(budget, ChatEndpoint(max_requests=None, max_tokens=None), "autointerp", "")
    for changes, key in (({"max_requests": 1}, "max_requests"), ({"max_tokens": 1_562}, "max_tokens")):
        with pytest.raises(UserError, match=f"more than autointerp.{key}.*nothing was asked.*lower autointerp.n_latents"):
            check_budget(budget, endpoint.model_copy(update=changes), "autointerp", "lower autointerp.n_latents")
    assert estimate_tokens([{"role": "user", "content": "four tokens or so"}]) == 5 + 4
    assert estimate_tokens(question("漢字")) > estimate_tokens(question("ab"))
