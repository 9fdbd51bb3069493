"""Servers asked over HTTP, and the keys they ask for.

Keys come from the environment, else from the project's `.env`; never from parameters, and they are never printed. Whoever
sends a key takes the address, the opener and the words of this module: no key travels in the clear beyond this machine, none
follows a redirect, none is repeated in a message.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import time
import urllib.error
import urllib.request
from typing import Any
from urllib.parse import urlsplit

from dotenv import dotenv_values

from sae_research.runtime.errors import UserError
from sae_research.runtime.files import project_root


def secret(*names: str) -> str | None:
    """The first of these variables that is set and not empty; None where none is. `.env` holds lines `NAME=value`.

    Raises `UserError` for a `.env` that cannot be read.
    """
    file = project_root() / ".env"
    try:
        values = {**(dotenv_values(file) if file.is_file() else {}), **os.environ}
    except (UnicodeDecodeError, OSError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"{file}: {reason}; it holds lines NAME=value") from None
    return next((value for name in names if (value := values.get(name))), None)


def redacted(text: str, *secrets: str | None) -> str:
    """The text with every secret struck out: messages of other libraries may repeat what they were sent."""
    for value in secrets:
        if value:
            text = text.replace(value, "***")
    return text


LARGEST_ANSWER = 10_000_000
SHORTEST_KEY = 8
"""Keys shorter than this are no secrets; striking them out would garble answers."""


class BadAnswer(Exception):
    """A server's answer that no use can be made of; says why in a few words."""


# --- addresses -----------------------------------------------------------------------------------


def checked_url(url: str, name: str, key_goes: str) -> str:
    """A base URL without a trailing slash. What it says is not repeated in messages: it may hold a password.

    name: of the setting that holds it, for messages; key_goes: where a key belongs instead. Raises `UserError`.
    """
    url = str(url).strip().rstrip("/")
    try:
        parts = urlsplit(url)
        usable = (
            parts.scheme in ("http", "https")
            and parts.hostname
            and (parts.port or 1)
            and url.isascii()
            and url.isprintable()
            and " " not in url
            and bool(parts.hostname.encode("idna"))
        )
    except ValueError:
        usable = False
    if not usable:
        raise UserError(f"{name} must look like https://host/v1 or http://localhost:8000/v1")
    if parts.username is not None or parts.query or parts.fragment:
        raise UserError(f"{name} must hold no user name, password or query: addresses are shown and kept; {key_goes}")
    return url


def is_loopback(url: str) -> bool:
    """Whether a URL leads to this machine: the name `localhost`, or an address of the loopback network, written out. A
    name that only looks like one (`127.0.0.1.example.org`) leads anywhere, and what is in doubt counts as elsewhere."""
    host = urlsplit(url).hostname or ""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def keeps_secrets(url: str) -> bool:
    """Whether a key sent to this URL cannot be read on the way."""
    return urlsplit(url).scheme == "https" or is_loopback(url)


# --- requests ------------------------------------------------------------------------------------


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: following it would hand the key to another address and drop the question."""

    def redirect_request(self, *_: Any) -> None:
        return None


def opener(url: str) -> urllib.request.OpenerDirector:
    """Opens requests to a server: no redirect is followed, and this machine is asked without a proxy."""
    proxies = [urllib.request.ProxyHandler({})] if is_loopback(url) else []
    return urllib.request.build_opener(_NoRedirect, *proxies)


def read_answer(response: http.client.HTTPResponse, deadline: float) -> bytes:
    """The whole body, within the deadline (`time.monotonic`) however slowly it drips.

    Raises `TimeoutError`, `BadAnswer` for a body that is too long, `IncompleteRead` for one cut short.
    """
    chunks, size = [], 0
    while chunk := response.read1(65_536):
        chunks.append(chunk)
        size += len(chunk)
        if time.monotonic() > deadline:
            raise TimeoutError
        if size > LARGEST_ANSWER:
            raise BadAnswer(f"the answer is longer than {LARGEST_ANSWER:,} bytes")
    expected = response.getheader("Content-Length")
    if expected is not None and expected.isdigit() and size < int(expected):
        raise http.client.IncompleteRead(b"".join(chunks), int(expected) - size)
    return b"".join(chunks)


# --- words ---------------------------------------------------------------------------------------


def blotted(text: str, *keys: str | None) -> str:
    """The text with keys struck out."""
    return redacted(text, *(key for key in keys if key and len(key) >= SHORTEST_KEY))


def one_line(text: str, *keys: str | None, limit: int = 200) -> str:
    """At most `limit` characters of a message, keys struck out before it is cut: half a key is one too many."""
    line = " ".join(blotted(text, *keys).split())
    return line if len(line) <= limit else line[:limit] + "…"


def error_text(error: urllib.error.HTTPError, *keys: str | None) -> tuple[str, str]:
    """(message, code) of an error answer, in OpenAI's form or as plain text, in one line."""
    try:
        data = error.read(20_000)
    except (OSError, http.client.HTTPException):
        return "", ""
    try:
        inner = json.loads(data)
        inner = inner.get("error", inner) if isinstance(inner, dict) else inner
        if isinstance(inner, dict):
            return one_line(str(inner.get("message") or ""), *keys), str(inner.get("code") or "")
        return one_line(str(inner), *keys), ""
    except (ValueError, RecursionError):
        return one_line(data.decode("utf-8", "replace"), *keys), ""
