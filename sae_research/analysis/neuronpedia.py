"""Neuronpedia's feature and steering interfaces: latents that it hosts, looked up and steered over the network."""

from __future__ import annotations

import json
import math
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from typing import Any, NamedTuple

from sae_research.endpoints import (
    BadAnswer,
    blotted,
    checked_url,
    error_text,
    keeps_secrets,
    one_line,
    opener,
    read_answer,
)
from sae_research.errors import UserError

HOME = "https://www.neuronpedia.org"
KEY_VARIABLE = "NEURONPEDIA_API_KEY"
MAX_STRENGTH, MAX_TOKENS, MAX_PROMPT = 300.0, 256, 2048
"""What the service allows."""


class Feature(NamedTuple):
    """What Neuronpedia says about a latent."""

    maximum: float
    density: float | None
    raised: list[str]
    explanations: list[str]


class Steered(NamedTuple):
    strength: float
    """In units of the latent's largest activation."""
    amount: float
    seed: int
    default: str
    """The text without steering."""
    steered: str


class Neuronpedia:
    """One source of latents, e.g. `gpt2-small/7-res-jb`, at a Neuronpedia server."""

    def __init__(self, source: str, base_url: str = HOME, timeout: float = 60.0) -> None:
        """Raises `UserError` for a source that is not `MODEL/SOURCE`, or an address that is none."""
        parts = source.split("/")
        if len(parts) != 2 or not all(parts):
            raise UserError(f"{source!r} is no Neuronpedia source; write MODEL/SOURCE, e.g. gpt2-small/7-res-jb "
                            "(`analyze saes --describe RELEASE` lists them)")
        self.model, self.layer = parts
        self.base_url, self.timeout = checked_url(base_url, "--base-url", f"the key belongs in ${KEY_VARIABLE}"), timeout
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(f"the key in ${KEY_VARIABLE} holds characters that no key has; set it again")
        if self._key and not keeps_secrets(self.base_url):
            raise UserError(f"{self.base_url}: ${KEY_VARIABLE} would travel there in the clear; use https")
        self._opener = opener(self.base_url)

    def feature(self, latent: int) -> Feature:
        """Look a latent up."""
        found = self._ask(f"/api/feature/{self.model}/{self.layer}/{latent}")
        if not isinstance(found, dict) or not _is_number(found.get("maxActApprox")):
            raise UserError(f"{self.base_url} has no latent {latent} of {self.model}/{self.layer}")
        density, raised, explanations = (found.get(key) for key in ("frac_nonzero", "pos_str", "explanations"))
        return Feature(float(found["maxActApprox"]), float(density) if _is_number(density) else None,
                       [str(token) for token in raised] if isinstance(raised, list) else [],
                       [str(one.get("description")) for one in explanations if isinstance(one, dict)]
                       if isinstance(explanations, list) else [])

    def steer(self, prompt: str, latent: int, strength: float, maximum: float, seed: int = 0, n_tokens: int = 40,
              temperature: float = 0.7, frequency_penalty: float = 0.0) -> Steered:
        """Ask for a text with and without `strength * maximum` of a latent's direction added. Raises `UserError` for what
        the service does not allow, and when it is down."""
        amount = strength * maximum
        for value, limit, what in ((abs(amount), MAX_STRENGTH, "strength times maximum"), (n_tokens, MAX_TOKENS, "tokens"),
                                   (len(prompt), MAX_PROMPT, "characters of prompt")):
            if value > limit:
                raise UserError(f"Neuronpedia allows {limit:g} {what}, asked for {value:g}")
        if not prompt.strip():
            raise UserError("the prompt is empty")
        found = self._ask("/api/steer", {
            "prompt": prompt, "modelId": self.model, "temperature": temperature, "n_tokens": n_tokens,
            "freq_penalty": frequency_penalty, "seed": seed, "strength_multiplier": 1,
            "features": [{"modelId": self.model, "layer": self.layer, "index": latent, "strength": amount}]})
        if not isinstance(found, dict) or not all(isinstance(found.get(key), str) for key in ("DEFAULT", "STEERED")):
            raise UserError(f"{self.base_url}: the answer holds no DEFAULT and STEERED texts")
        return Steered(strength, amount, seed, found["DEFAULT"], found["STEERED"])

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Accept": "application/json", "Content-Type": "application/json", "User-Agent": "sae-research"}
        if self._key:
            headers["x-api-key"] = self._key
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base_url + urllib.parse.quote(path), data, headers)
        where = self.base_url + path
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                data = read_answer(response, time.monotonic() + self.timeout)
            return json.loads(blotted(data.decode("utf-8", "replace"), self._key))
        except urllib.error.HTTPError as error:
            with error:
                said, _ = error_text(error, self._key)
            hint = f" (is ${KEY_VARIABLE} set?)" if error.code in (401, 403) else \
                " (the hourly limit is used up)" if error.code == 429 else \
                " (a redirect; give --base-url the final address)" if 300 <= error.code < 400 else ""
            raise UserError(f"{where}: HTTP {error.code}{f': {said}' if said else ''}{hint}") from None
        except BadAnswer as reason:
            raise UserError(f"{where}: {reason}") from None
        except (ValueError, RecursionError):
            raise UserError(f"{where}: the answer is not JSON") from None
        except (OSError, HTTPException) as error:
            cause = one_line(str(getattr(error, "reason", error)) or type(error).__name__, self._key)
            raise UserError(f"{self.base_url} cannot be reached ({cause}); `--engine local` steers without a "
                            "network") from None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
