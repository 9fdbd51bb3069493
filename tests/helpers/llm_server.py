"""A loopback server that speaks OpenAI's chat API, well or badly.

    with serve_llm() as server:
        params = {"base_url": server.url, "model": "judge", "api_key_env": ""}

`reply(question, number)` decides what each request gets: a text (a proper completion), an `Http`, `HANG` or `DROP`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Lock, Thread
from typing import Any, NamedTuple

HANG, DROP = "<hang>", "<drop>"
"""No answer until the server ends; the connection closed without an answer."""


class Http(NamedTuple):
    """An HTTP answer as it stands."""

    status: int
    body: bytes = b""
    headers: dict[str, str] = {}


Reply = Callable[[dict[str, Any], int], str | Http]


class LLMServer:
    """What was asked: bodies and headers in the order in which they came."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""
        self.ending, self.lock = Event(), Lock()


@contextmanager
def serve_llm(reply: Reply | None = None, port: int = 0) -> Iterator[LLMServer]:
    """Serve on 127.0.0.1, by default with `sensible`; yields the server, whose `url` is the base URL."""
    state = LLMServer(reply or sensible)
    handler = type("Handler", (_Handler,), {"state": state})
    server = _Server(("127.0.0.1", port), handler)
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.ending.set()
        server.shutdown()
        server.server_close()
        thread.join()


def completion(text: str | None, finish_reason: str = "stop", usage: tuple[int, int] | None = (100, 5)) -> bytes:
    """The body of a proper answer."""
    counts = {} if usage is None else {"usage": dict(zip(("prompt_tokens", "completion_tokens"), usage, strict=True))}
    return json.dumps(
        {
            "object": "chat.completion",
            "model": "judge",
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}],
            **counts,
        }
    ).encode()


def is_scoring(question: dict[str, Any]) -> bool:
    """Whether autointerp's second question is asked: which examples activate."""
    return question["messages"][-1]["content"].startswith("Here is the explanation")


def sensible(question: dict[str, Any], number: int = 0) -> str:
    """A judge by rule: it explains by the commonest marked tokens, and names the examples that hold one of them."""
    text = question["messages"][-1]["content"]
    if not is_scoring(question):
        marked = Counter(token.strip() for token in re.findall(r"<<(.*?)>>", text) if token.strip())
        commonest = sorted(marked, key=lambda token: (-marked[token], token))[:4]
        return "This neuron activates on " + " ".join(commonest or ["nothing"]) + "."
    words = text.partition("fires on ")[2].partition(".\n\n")[0].split()
    examples = re.findall(r"^(\d+)\. (.*)$", text.partition("examples:\n\n")[2], flags=re.MULTILINE)
    named = [n for n, example in examples if any(word in example.split() for word in words)]
    return ", ".join(named) or "None"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # with the default of 5, one of eight simultaneous callers waits a second


class _Handler(BaseHTTPRequestHandler):
    state: LLMServer

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: tests read `bodies`."""

    def do_GET(self) -> None:
        with self.state.lock:
            self.state.bodies.append({"GET": self.path})
        self._send(Http(404))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.state.lock:
            number = len(self.state.bodies)
            self.state.bodies.append(body)
            self.state.headers.append(dict(self.headers))
        known = self.path == "/v1/chat/completions"
        answer = self.state.reply(body, number) if known else Http(404, b'{"error": {"message": "no such path"}}')
        if answer == HANG:
            self.state.ending.wait(30)
        elif answer != DROP:
            self._send(Http(200, completion(answer)) if isinstance(answer, str) else answer)

    def _send(self, answer: Http) -> None:
        self.send_response(answer.status)
        for name, value in {
            "Content-Type": "application/json",
            "Content-Length": str(len(answer.body)),
            **answer.headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(answer.body)
            self.wfile.flush()
        except OSError:
            return  # the client gave up waiting
