"""Latents that others host: SAELens' directory of releases, and Neuronpedia's pages, features, search and steering."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeGuard
from urllib.parse import quote

import httpx2

from sae_research.runtime.endpoints import (
    blotted,
    checked_url,
    error_text,
    http_client,
    keeps_secrets,
    one_line,
)
from sae_research.runtime.errors import UserError, did_you_mean
from sae_research.runtime.files import read_json
from sae_research.saes.releases import release_directory
from sae_research.saes.sources import PREPARED, TRAINED, open_sae, sae_name

HOME = "https://www.neuronpedia.org"
EMBED = "?embed=true&embedexplanation=true&embedplots=true&embedtest=true&height=300"


def list_releases(pattern: str = "") -> list[dict[str, Any]]:
    """One row a release, sorted by model: model, release, repo_id, number of SAEs, whether Neuronpedia has it. pattern: a
    regular expression searched for in release, model and repository, case aside.

    Raises `UserError` for a pattern that is none, or one that matches nothing.
    """
    try:
        wanted = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise UserError(f"--search {pattern!r} is not a regular expression ({error})") from None
    rows = [
        {
            "model": value.get("model", ""),
            "release": name,
            "repo_id": value["repo_id"],
            "saes": len(value["saes"]),
            "neuronpedia": any(entry.get("neuronpedia") for entry in value["saes"]),
        }
        for name, value in release_directory().items()
        if any(wanted.search(str(text)) for text in (name, value.get("model", ""), value["repo_id"]))
    ]
    if not rows:
        raise UserError(f"no release of SAELens matches {pattern!r} in its name, model or repository")
    return sorted(rows, key=lambda row: (row["model"], row["release"]))


def list_saes(release: str, pattern: str = "") -> list[dict[str, Any]]:
    """One row an SAE of a release: id, path, Neuronpedia id, the metrics its card gives, and every further value that the
    directory has of an SAE. Raises `UserError` for an unknown release, with those that look alike."""
    entries = _release(release)["saes"]
    shown = ("id", "path", "neuronpedia", "l0", "variance_explained")
    further = dict.fromkeys(
        key for entry in entries for key, value in entry.items() if key not in shown and not isinstance(value, list | dict)
    )
    return [
        {
            "sae_id": str(entry["id"]),
            "path": str(entry.get("path", entry["id"])),
            "neuronpedia": entry.get("neuronpedia"),
            "l0": entry.get("l0"),
            "variance_explained": entry.get("variance_explained"),
            **{key: entry.get(key) for key in further},
        }
        for entry in entries
        if re.search(pattern, str(entry["id"]), re.IGNORECASE)
    ]


def describe_release(release: str) -> dict[str, Any]:
    """Every field that the directory has of a release, those of sections under dotted names, its SAEs as their number.
    Raises `UserError` for an unknown release, with those that look alike."""
    value = _release(release)
    fields = {"release": release}
    for key, own in value.items():
        if key != "saes":
            fields |= flattened(own, key)
    hosted = sum(bool(entry.get("neuronpedia")) for entry in value["saes"])
    return {**fields, "saes": len(value["saes"]), "saes at Neuronpedia": hosted}


def flattened(value: Any, key: str) -> dict[str, Any]:
    """A value under its name; of a section every value under a dotted one."""
    if not isinstance(value, dict) or not value:
        return {key: value}
    return {name: inner for own, part in value.items() for name, inner in flattened(part, f"{key}.{own}").items()}


def _release(release: str) -> dict[str, Any]:
    known = release_directory()
    if release not in known:
        hint = did_you_mean(release, known, "; `analyze saes --search TEXT` finds releases")
        raise UserError(f"SAELens has no release {release!r}{hint}")
    return known[release]


def neuronpedia_source(release: str, sae_id: str) -> str:
    """`MODEL/SOURCE` at Neuronpedia. Raises `UserError` where it has none."""
    rows = [row for row in list_saes(release) if row["sae_id"] == sae_id]
    if not rows:
        raise UserError(f"release {release} has no SAE {sae_id!r}; `analyze saes --describe {release}` lists them")
    if not rows[0]["neuronpedia"]:
        raise UserError(f"Neuronpedia has no dashboards of {release} / {sae_id}")
    return str(rows[0]["neuronpedia"])


def neuronpedia_page(source: str, latent: int, embed: bool = False) -> str:
    """Address of a latent's page, or of the part of it that is made to stand in another page."""
    return f"{HOME}/{source}/{latent}" + (EMBED if embed else "")


def neuronpedia_iframe(source: str, latent: int, width: int | str = "100%", height: int = 400) -> Any:
    """A latent's page inside a notebook: an `IPython.display.IFrame`. Raises `UserError` where IPython is missing."""
    try:
        from IPython.display import IFrame
    except ImportError:
        raise UserError("a page in a notebook needs IPython (`uv pip install ipython`)") from None
    return IFrame(neuronpedia_page(source, latent, embed=True), width, height)


def quick_list(source: str, latents: Sequence[int], name: str = "latents") -> str:
    """Address of Neuronpedia's page that lists latents of one source under a name. Raises `UserError` for a source that is
    not `MODEL/SOURCE`, and for no latents."""
    model, layer = source_parts(source)
    if not latents:
        raise UserError("a list needs at least one latent")
    entries = [{"modelId": model, "layer": layer, "index": str(latent)} for latent in latents]
    return f"{HOME}/quick-list/?name={quote(name, safe='')}&features={quote(json.dumps(entries), safe='')}"


def source_parts(source: str) -> tuple[str, str]:
    """Model and layer of `MODEL/SOURCE`. Raises `UserError` for anything else."""
    parts = source.split("/")
    if len(parts) != 2 or not all(parts):
        raise UserError(
            f"{source!r} is no Neuronpedia source; write MODEL/SOURCE, e.g. gpt2-small/7-res-jb "
            "(`analyze saes --describe RELEASE` lists them)"
        )
    return parts[0], parts[1]


def list_local() -> list[dict[str, Any]]:
    """One row an SAE that the pipeline wrote: folder, form, sizes, model, hook."""
    rows = []
    for root in (PREPARED, TRAINED):
        for path in sorted(root.glob("*/cfg.json")):
            values = read_json(path)
            metadata = values.get("metadata") or {}
            rows.append(
                {
                    "folder": str(path.parent),
                    "form": values.get("architecture"),
                    "d_in": values.get("d_in"),
                    "d_sae": values.get("d_sae"),
                    "model": metadata.get("model_name"),
                    "hook": metadata.get("hook_name"),
                }
            )
    return rows


def describe(reference: str) -> dict[str, Any]:
    """Everything an SAE's configuration says. Downloads a release that is not in the hub's cache."""
    name, sae = sae_name(reference), open_sae(reference)
    cfg = sae.cfg
    return {
        "name": name,
        "form": cfg.form,
        "d_in": cfg.d_in,
        "d_sae": cfg.d_sae,
        "model_name": cfg.model_name,
        "hook_name": cfg.hook_name,
        "dtype": cfg.dtype,
        "context_size": cfg.context_size,
        "prepend_bos": cfg.prepend_bos,
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
        "center_input": cfg.center_input,
        **sae.options(),
        "architecture": cfg.architecture,
        "role": cfg.role,
        "base": cfg.base,
        "per_token": sae.per_token,
        "causal": sae.causal,
        "signed": sae.signed,
        "parameters": sum(tensor.numel() for tensor in sae.tensors().values()),
        "provenance": cfg.provenance,
    }


KEY_VARIABLE = "NEURONPEDIA_API_KEY"
MAX_STRENGTH, MAX_TOKENS, MAX_PROMPT, MIN_QUERY = 300.0, 256, 2048, 3
"""What the service allows."""
LOCAL_STEERING = "; `--engine local` steers without a network"


class Explained(NamedTuple):
    """One explanation that a search found."""

    source: str
    """MODEL/SOURCE."""
    latent: int
    explanation: str
    similarity: float | None
    """Cosine of query and explanation, where the server says it."""


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
        self.model, self.layer = source_parts(source)
        self.base_url = checked_url(base_url, "--base-url", f"the key belongs in ${KEY_VARIABLE}")
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        if not (self._key.isascii() and self._key.isprintable()):
            raise UserError(f"the key in ${KEY_VARIABLE} holds characters that no key has; set it again")
        if self._key and not keeps_secrets(self.base_url):
            raise UserError(f"{self.base_url}: ${KEY_VARIABLE} would travel there in the clear; use https")
        self._http = http_client(self.base_url, timeout, headers={"User-Agent": "sae-research"})

    def feature(self, latent: int) -> Feature:
        """Look a latent up."""
        found = self._ask(f"/api/feature/{self.model}/{self.layer}/{latent}", otherwise=LOCAL_STEERING)
        if not isinstance(found, dict) or not _is_number(found.get("maxActApprox")):
            raise UserError(f"{self.base_url} has no latent {latent} of {self.model}/{self.layer}")
        density, raised, explanations = (found.get(key) for key in ("frac_nonzero", "pos_str", "explanations"))
        return Feature(
            float(found["maxActApprox"]),
            float(density) if _is_number(density) else None,
            [str(token) for token in raised] if isinstance(raised, list) else [],
            [str(one.get("description")) for one in explanations if isinstance(one, dict)]
            if isinstance(explanations, list)
            else [],
        )

    def steer(
        self,
        prompt: str,
        latent: int,
        strength: float,
        maximum: float,
        seed: int = 0,
        n_tokens: int = 40,
        temperature: float = 0.7,
        frequency_penalty: float = 0.0,
    ) -> Steered:
        """Ask for a text with and without `strength * maximum` of a latent's direction added. Raises `UserError` for what
        the service does not allow, and when it is down."""
        amount = strength * maximum
        for value, limit, what in (
            (abs(amount), MAX_STRENGTH, "strength times maximum"),
            (n_tokens, MAX_TOKENS, "tokens"),
            (len(prompt), MAX_PROMPT, "characters of prompt"),
        ):
            if value > limit:
                raise UserError(f"Neuronpedia allows {limit:g} {what}, asked for {value:g}")
        if not prompt.strip():
            raise UserError("the prompt is empty")
        found = self._ask(
            "/api/steer",
            {
                "prompt": prompt,
                "modelId": self.model,
                "temperature": temperature,
                "n_tokens": n_tokens,
                "freq_penalty": frequency_penalty,
                "seed": seed,
                "strength_multiplier": 1,
                "features": [{"modelId": self.model, "layer": self.layer, "index": latent, "strength": amount}],
            },
            LOCAL_STEERING,
        )
        if not isinstance(found, dict) or not all(isinstance(found.get(key), str) for key in ("DEFAULT", "STEERED")):
            raise UserError(f"{self.base_url}: the answer holds no DEFAULT and STEERED texts")
        return Steered(strength, amount, seed, found["DEFAULT"], found["STEERED"])

    def search(self, query: str, limit: int = 20, whole_model: bool = False) -> list[Explained]:
        """Latents whose explanations come nearest to a text, best first: of this source, or of all of its model's. The
        server's order is kept. Raises `UserError` for a query that is too short, and when the service is down."""
        if len(query.strip()) < MIN_QUERY:
            raise UserError(f"Neuronpedia searches for at least {MIN_QUERY} characters")
        if limit < 1:
            raise UserError("a search needs a limit of at least 1")
        path = "/api/explanation/search" + ("-model" if whole_model else "")
        asked = {"modelId": self.model, "query": query, **({} if whole_model else {"layers": [self.layer]})}
        found: list[Explained] = []
        while len(found) < limit:  # a page at a time, of a length that the server chooses
            answer = self._ask(path, {**asked, "offset": len(found)})
            rows = answer.get("results") if isinstance(answer, dict) else None
            if not isinstance(rows, list):
                raise UserError(f"{self.base_url}: the answer holds no list of results")
            if not rows:
                break
            found += [self._explained(row) for row in rows]
        return found[:limit]

    def _explained(self, row: Any) -> Explained:
        values = row if isinstance(row, dict) else {}
        index, said, similarity = values.get("index"), values.get("description"), values.get("cosine_similarity")
        if not str(index).isdecimal() or not isinstance(said, str):
            raise UserError(f"{self.base_url}: a result of the search names no latent and explanation")
        source = f"{values.get('modelId') or self.model}/{values.get('layer') or self.layer}"
        return Explained(source, int(str(index)), said, float(similarity) if _is_number(similarity) else None)

    def _ask(self, path: str, body: dict[str, Any] | None = None, otherwise: str = "") -> Any:
        where = self.base_url + path
        headers = {"x-api-key": self._key} if self._key else {}
        try:
            method = "GET" if body is None else "POST"
            answer = self._http.request(method, self.base_url + quote(path), json=body, headers=headers)
            if answer.is_success:
                return json.loads(blotted(answer.content.decode("utf-8", "replace"), self._key))
        except (ValueError, RecursionError):
            raise UserError(f"{where}: the answer is not JSON") from None
        except httpx2.RequestError as error:
            cause = one_line(str(error) or type(error).__name__, self._key)
            raise UserError(f"{self.base_url} cannot be reached ({cause}){otherwise}") from None
        said, status = error_text(answer.text, self._key), answer.status_code
        hint = (
            f" (is ${KEY_VARIABLE} set?)"
            if status in (401, 403)
            else " (the hourly limit is used up)"
            if status == 429
            else " (a redirect; give --base-url the final address)"
            if answer.is_redirect
            else ""
        )
        raise UserError(f"{where}: HTTP {status}{f': {said}' if said else ''}{hint}")


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
