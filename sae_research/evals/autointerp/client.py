"""Questions to a language model behind any OpenAI-compatible endpoint, and what they will cost.

The `openai` client sends and retries. Ours are the budget (estimated before anything is asked), the cache of answers, and
the guards of the key: it comes from the environment, goes into one header of requests to one address, follows no redirect,
and is struck out of everything the endpoint says before that is shown or kept.
"""

from __future__ import annotations

import json
import math
import os
import ssl
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from openai import APIError, APIStatusError, APITimeoutError, OpenAI

from sae_research.config.evaluation_params import ChatEndpoint
from sae_research.runtime.cache import ResultCache
from sae_research.runtime.endpoints import blotted, checked_url, error_text, http_client, keeps_secrets, one_line
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import fingerprint

Messages = list[dict[str, str]]
"""`{"role": "system" | "user" | "assistant", "content": ...}`, in order."""

_BYTES_PER_TOKEN, _TOKENS_PER_MESSAGE = 4, 4


class Budget(NamedTuple):
    """An estimate: requests, prompt tokens, and the most tokens that the answers may have."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def plus(self, prompt_tokens: int, completion_tokens: int) -> Budget:
        """With one more request."""
        return Budget(self.requests + 1, self.prompt_tokens + prompt_tokens, self.completion_tokens + completion_tokens)

    def cost(self, endpoint: ChatEndpoint) -> float | None:
        """In the currency of the prices; None without prices."""
        prices = (endpoint.prompt_price_per_million, endpoint.completion_price_per_million)
        if prices == (None, None):
            return None
        return (self.prompt_tokens * (prices[0] or 0) + self.completion_tokens * (prices[1] or 0)) / 1e6

    def words(self, endpoint: ChatEndpoint) -> str:
        """`60 requests, about 50,000 prompt tokens and at most 1,890 answer tokens, cost about 0.0087`"""
        cost = self.cost(endpoint)
        return (
            f"{self.requests:,} requests, about {self.prompt_tokens:,} prompt tokens and at most "
            f"{self.completion_tokens:,} answer tokens" + ("" if cost is None else f", cost about {cost:.4g}")
        )


def estimate_tokens(messages: Messages) -> int:
    """About how many tokens a prompt has: one per four bytes of UTF-8, and four for each message's frame. Models differ
    in their tokens; English comes out within some 20 %."""
    return sum(
        math.ceil(len(message["content"].encode("utf-8", "replace")) / _BYTES_PER_TOKEN) + _TOKENS_PER_MESSAGE
        for message in messages
    )


def check_budget(budget: Budget, endpoint: ChatEndpoint, section: str, remedy: str) -> None:
    """Raises `UserError` when `budget` exceeds the endpoint's limits: nothing is asked then."""
    tokens = budget.prompt_tokens + budget.completion_tokens
    for key, needed, limit in (
        ("max_requests", budget.requests, endpoint.max_requests),
        ("max_tokens", tokens, endpoint.max_tokens),
    ):
        if limit is not None and needed > limit:
            raise UserError(
                f"{section} would need {budget.words(endpoint)}, more than {section}.{key} = {limit:,} "
                f"allows; nothing was asked; raise the limit or {remedy}"
            )


_REFUSES_ALL = (401, 402, 403, 404, 405)
"""Answers that no other question would change: key, quota, address or model are wrong."""
_HEADERS = {"host", "content-type", "content-length", "accept", "accept-encoding", "connection"}
_MARKS = {"x-stainless-raw-response", "x-stainless-retry-count"}
"""By which `openai` finds its way back from a response."""

T = TypeVar("T")
R = TypeVar("R")


class Answer(NamedTuple):
    """What the model said. Token counts are the endpoint's own, None where it names none."""

    text: str
    finish_reason: str
    prompt_tokens: int | None
    completion_tokens: int | None


class NoAnswer(Exception):
    """One question stayed without an answer; says why in a few words."""


class ChatClient:
    """Asks one model at one endpoint; safe to use from several threads.

    Every answer goes to the result cache under the content of its question (endpoint, model, messages, limit,
    temperature), so nothing is paid for twice. `down` says why the endpoint is given up: it refused in a way that no
    other question would change, or left max(3, concurrency) questions in a row unanswered. From then on only kept
    answers are given.
    """

    def __init__(self, endpoint: ChatEndpoint, section: str) -> None:
        """section: where `endpoint` stands in params.yaml, for messages. Raises `UserError` for an endpoint that is not
        fully given, or a key that cannot be sent safely."""
        self.endpoint, self.section = endpoint, section
        base_url = _checked_url(endpoint, section)
        self.url = f"{base_url}/chat/completions"
        self._key = _read_key(endpoint, self.url, section)
        self._cache = ResultCache("llm_answers")
        self._lock, self._stopped = threading.Lock(), threading.Event()
        self._unanswered_in_a_row = 0
        self.down: str | None = None
        timeout, hooks = endpoint.timeout_seconds, {"request": [self._before_sending]}
        self._openai = OpenAI(
            api_key="set before sending",
            base_url=base_url,
            timeout=timeout,
            max_retries=endpoint.max_retries,
            http_client=http_client(base_url, timeout, event_hooks=hooks),
        )

    def kept(self, messages: Messages, max_tokens: int) -> Answer | None:
        """The answer in the cache, if there is one."""
        found = self._cache.get(self._key_of(self._body(messages, max_tokens)))
        return None if found is None else Answer(**found)

    def ask(self, messages: Messages, max_tokens: int) -> Answer:
        """The model's answer, of at most `max_tokens` tokens. Raises `NoAnswer`."""
        body = self._body(messages, max_tokens)
        key = self._key_of(body)
        found = self._cache.get(key)
        if found is not None:
            return Answer(**found)
        try:
            answer = self._parse(self._openai.chat.completions.with_raw_response.create(**body).content)
        except APIError as error:
            reason, refuses_all = self._refusal(error) if isinstance(error, APIStatusError) else self._lost(error)
            self._unanswered(reason, refuses_all)
            raise NoAnswer(reason) from None
        except NoAnswer as reason:
            self._unanswered(str(reason))
            raise
        with self._lock:
            self._unanswered_in_a_row = 0
        self._cache.put(key, answer._asdict())
        return answer

    def in_order(self, work: Callable[[T], R], items: Sequence[T]) -> Iterator[R]:
        """`work(item)` of every item, on `concurrency` threads, in the order of the items. An interruption, or an error
        in `work`, lets nothing further be asked."""
        with ThreadPoolExecutor(self.endpoint.concurrency) as pool:
            futures = [pool.submit(work, item) for item in items]
            try:
                for future in futures:
                    yield future.result()
            except BaseException:
                self._stopped.set()
                for future in futures:
                    future.cancel()
                raise

    # --- one question ---

    def _body(self, messages: Messages, max_tokens: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.endpoint.model,
            "messages": messages,
            self.endpoint.completion_limit_field: max_tokens,
            "stream": False,
        }
        if self.endpoint.temperature is not None:
            body["temperature"] = self.endpoint.temperature
        return body

    def _key_of(self, body: dict[str, Any]) -> str:
        return fingerprint([self.url, body])[:40]

    def _before_sending(self, request: Any) -> None:
        """Runs before every attempt. Raises `NoAnswer` once the endpoint is given up."""
        if self._stopped.is_set():
            raise NoAnswer("not asked: the endpoint was given up")
        for name in set(request.headers) - _HEADERS - _MARKS:  # `openai` adds what its own variables hold
            del request.headers[name]
        request.headers["User-Agent"] = "sae-research"
        if self._key:
            request.headers["Authorization"] = f"Bearer {self._key}"

    def _parse(self, data: bytes) -> Answer:
        try:
            value = json.loads(data)
            choice = value["choices"][0]
            text = choice["message"].get("content") or ""
            usage = value.get("usage") or {}
            if not isinstance(text, str):
                raise TypeError
            return Answer(
                blotted(text.strip(), self._key),
                blotted(str(choice.get("finish_reason") or ""), self._key),
                _count(usage.get("prompt_tokens")),
                _count(usage.get("completion_tokens")),
            )
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            said = one_line(data.decode("utf-8", "replace"), self._key)
            raise NoAnswer(f"the answer is no chat completion: {said!r}") from None

    # --- what went wrong: (reason, whether no other question would fare better) ---

    def _refusal(self, error: APIStatusError) -> tuple[str, bool]:
        status = error.status_code
        said = error_text(error.response.text, self._key)
        reason = f"HTTP {status}" + (f": {said}" if said else "")
        refuses_all = error.code == "insufficient_quota" or status in _REFUSES_ALL or 300 <= status < 400
        return reason + (self._hint(status) if refuses_all else _attempts(error)), refuses_all

    def _hint(self, status: int) -> str:
        if status in (401, 403):
            name = self.endpoint.api_key_env
            if self._key:
                return f" (check the key in ${name})"
            unset = f"${name} is empty or not set" if name else f"{self.section}.api_key_env names no variable"
            return f" (no key was sent: {unset})"
        if 300 <= status < 400:
            return f" (a redirect; give {self.section}.base_url the final address)"
        return f" (check {self.section}.base_url and {self.section}.model)" if status in (404, 405) else ""

    def _lost(self, error: APIError) -> tuple[str, bool]:
        """No HTTP answer came at all, or not whole."""
        if isinstance(error, APITimeoutError):
            return f"no answer within {self.endpoint.timeout_seconds:g} s{_attempts(error)}", False
        cause: BaseException = error
        while deeper := cause.__cause__ or cause.__context__:
            cause = deeper
        if isinstance(cause, ssl.SSLCertVerificationError):
            return f"its certificate is not valid: {cause.verify_message}", True
        said = cause.strerror if isinstance(cause, OSError) and cause.strerror else str(cause)
        return f"no connection: {one_line(said, self._key) or type(cause).__name__}{_attempts(error)}", False

    def _unanswered(self, reason: str, refuses_all: bool = False) -> None:
        limit = max(3, self.endpoint.concurrency)
        with self._lock:
            self._unanswered_in_a_row += 1
            if refuses_all:
                self.down = self.down or reason
            elif self._unanswered_in_a_row >= limit:
                self.down = self.down or f"{limit} questions in a row without an answer, the last one: {reason}"
            if self.down:
                self._stopped.set()


# --- parts -------------------------------------------------------------------------------------


def _attempts(error: APIError) -> str:
    """` (3 attempts)`; nothing for a question that was asked once."""
    retries = int(error.request.headers.get("x-stainless-retry-count", 0))
    return f" ({retries + 1} attempts)" if retries else ""


def _checked_url(endpoint: ChatEndpoint, section: str) -> str:
    """The base URL without a trailing slash. What it says is not repeated in messages: it may hold a password."""
    missing = [f"{section}.{key}" for key in ("base_url", "model") if not getattr(endpoint, key)]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} must be given: {section} asks a language model behind an "
            f"OpenAI-compatible endpoint, e.g. {section}.base_url: http://localhost:8000/v1"
        )
    url = str(endpoint.base_url).strip().rstrip("/").removesuffix("/chat/completions")
    return checked_url(
        url, f"{section}.base_url", f"put the key into the environment variable that {section}.api_key_env names"
    )


def _read_key(endpoint: ChatEndpoint, url: str, section: str) -> str:
    """The key from the environment, empty for none. Raises `UserError` where sending it would be a mistake."""
    name = endpoint.api_key_env
    key = os.environ.get(name, "").strip() if name else ""
    if not (key.isascii() and key.isprintable()):
        raise UserError(f"the key in ${name} holds characters that no key has; set it again")
    own = ChatEndpoint.model_fields["api_key_env"].default
    if key and name == own and not keeps_secrets(url):
        raise UserError(
            f"{section}.base_url is plain http to another machine, and ${name} would travel there in the "
            f"clear: use https, or name this endpoint's own variable in {section}.api_key_env "
            '("" sends no key)'
        )
    return key


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
