"""Keys, and the servers that they are sent to: which addresses are usable, where a key may go, what went wrong in a line.

Keys come from the environment, else from the project's `.env`; never from parameters. Whoever sends one takes the address,
the client and the words of this module: no key travels in the clear beyond this machine, none follows a redirect, none is
repeated in a message.
"""

from __future__ import annotations

import ipaddress
import json
import os
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dotenv import dotenv_values

from sae_research.runtime.errors import UserError
from sae_research.runtime.files import project_root

if TYPE_CHECKING:
    import httpx2


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


SHORTEST_KEY = 8
"""Keys shorter than this are no secrets; striking them out would garble answers."""


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


def http_client(url: str, timeout: float, **settings: Any) -> httpx2.Client:
    """For requests to one server. It follows no redirect, which would hand a key to another address, and asks this machine
    without a proxy. timeout: seconds, of connecting and of every wait for more of an answer.

    Raises `UserError` for a proxy in the environment that cannot be used.
    """
    import httpx2  # not for those who only look up a key

    limits, env = httpx2.Limits(max_connections=None), not is_loopback(url)
    try:
        return httpx2.Client(follow_redirects=False, trust_env=env, timeout=timeout, limits=limits, **settings)
    except (ValueError, ImportError, httpx2.InvalidURL):  # a message could repeat a proxy's password
        raise UserError("the proxy that https_proxy, http_proxy or all_proxy names cannot be used; correct it") from None


# --- words ---------------------------------------------------------------------------------------


def blotted(text: str, *keys: str | None) -> str:
    """The text with keys struck out."""
    return redacted(text, *(key for key in keys if key and len(key) >= SHORTEST_KEY))


def one_line(text: str, *keys: str | None, limit: int = 200) -> str:
    """At most `limit` characters of a message, keys struck out before it is cut: half a key is one too many."""
    line = " ".join(blotted(text, *keys).split())
    return line if len(line) <= limit else line[:limit] + "…"


def error_text(answer: str, *keys: str | None) -> str:
    """What the body of an error answer says, in OpenAI's form or as plain text, in one line."""
    try:
        inner = json.loads(answer)
        inner = inner.get("error", inner) if isinstance(inner, dict) else inner
        return one_line(str(inner.get("message") or "") if isinstance(inner, dict) else str(inner), *keys)
    except (ValueError, RecursionError):
        return one_line(answer, *keys)
