"""Neuronpedia's feature and steering interfaces: latents that it hosts, looked up and steered over the network."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException
from typing import Any, NamedTuple

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
        if not base_url.startswith(("https://", "http://")):
            raise UserError(f"{base_url!r} is no address; it begins with https://")
        self.model, self.layer = parts
        self.base_url, self.timeout = base_url.rstrip("/"), timeout
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        host = urllib.parse.urlsplit(base_url).hostname or ""
        local = host in ("localhost", "::1") or host.startswith("127.")
        if self._key and not local and base_url.startswith("http://"):
            raise UserError(f"{base_url}: ${KEY_VARIABLE} would travel there in the clear; use https")
        self._opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if local else []))

    def feature(self, latent: int) -> Feature:
        """Look a latent up."""
        found = self._ask(f"/api/feature/{self.model}/{self.layer}/{latent}")
        if not isinstance(found, dict) or not isinstance(found.get("maxActApprox"), int | float):
            raise UserError(f"{self.base_url} has no latent {latent} of {self.model}/{self.layer}")
        return Feature(float(found["maxActApprox"]), found.get("frac_nonzero"), list(found.get("pos_str") or []),
                       [str(e.get("description")) for e in found.get("explanations") or []])

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
        request = urllib.request.Request(self.base_url + path, data, headers)
        try:
            with self._opener.open(request, timeout=self.timeout) as response:
                return json.loads(response.read(10_000_000))
        except urllib.error.HTTPError as error:
            with error:
                said = " ".join(error.read(500).decode("utf-8", "replace").split())[:200]
            if self._key:
                said = said.replace(self._key, "***")
            hint = f" (is ${KEY_VARIABLE} set?)" if error.code in (401, 403) else \
                " (the hourly limit is used up)" if error.code == 429 else ""
            raise UserError(f"{self.base_url}{path}: HTTP {error.code}{f': {said}' if said else ''}{hint}") from None
        except ValueError:
            raise UserError(f"{self.base_url}{path}: the answer is not JSON") from None
        except (OSError, HTTPException) as error:
            cause = getattr(error, "reason", error)
            raise UserError(f"{self.base_url} cannot be reached ({cause}); `--engine local` steers without a "
                            "network") from None
