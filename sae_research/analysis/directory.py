"""SAEs there are: SAELens' directory of releases and the SAEs of this project."""

from __future__ import annotations

import difflib
import re
from typing import Any

from sae_research.analysis.sources import PREPARED, TRAINED, open_sae
from sae_research.errors import UserError
from sae_research.saes.sae_lens import release_directory
from sae_research.store import read_json

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
    rows = [{"model": value.get("model", ""), "release": name, "repo_id": value["repo_id"], "saes": len(value["saes"]),
             "neuronpedia": any(entry.get("neuronpedia") for entry in value["saes"])}
            for name, value in release_directory().items()
            if any(wanted.search(str(text)) for text in (name, value.get("model", ""), value["repo_id"]))]
    if not rows:
        raise UserError(f"no release of SAELens matches {pattern!r} in its name, model or repository")
    return sorted(rows, key=lambda row: (row["model"], row["release"]))


def list_saes(release: str, pattern: str = "") -> list[dict[str, Any]]:
    """One row an SAE of a release: id, path, Neuronpedia id, and the figures its card gives. Raises `UserError` for an
    unknown release, with those that look alike."""
    known = release_directory()
    if release not in known:
        close = difflib.get_close_matches(release, known, 3)
        raise UserError(f"SAELens has no release {release!r}" + (f"; did you mean {', '.join(close)}?" if close else
                                                                 "; `analyze saes --search TEXT` finds releases"))
    return [{"sae_id": str(entry["id"]), "path": str(entry.get("path", entry["id"])),
             "neuronpedia": entry.get("neuronpedia"), "l0": entry.get("l0"),
             "variance_explained": entry.get("variance_explained")}
            for entry in known[release]["saes"] if re.search(pattern, str(entry["id"]), re.IGNORECASE)]


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
    return f"https://www.neuronpedia.org/{source}/{latent}" + (EMBED if embed else "")


def list_local() -> list[dict[str, Any]]:
    """One row an SAE that the pipeline wrote: folder, form, sizes, model, hook."""
    rows = []
    for root in (PREPARED, TRAINED):
        for path in sorted(root.glob("*/cfg.json")):
            values = read_json(path)
            metadata = values.get("metadata") or {}
            rows.append({"folder": str(path.parent), "form": values.get("architecture"), "d_in": values.get("d_in"),
                         "d_sae": values.get("d_sae"), "model": metadata.get("model_name"),
                         "hook": metadata.get("hook_name")})
    return rows


def describe(reference: str) -> dict[str, Any]:
    """Everything an SAE's configuration says. Downloads a release that is not in the hub's cache."""
    name, sae = open_sae(reference)
    cfg = sae.cfg
    return {"name": name, "form": cfg.form, "d_in": cfg.d_in, "d_sae": cfg.d_sae, "model_name": cfg.model_name,
            "hook_name": cfg.hook_name, "dtype": cfg.dtype, "context_size": cfg.context_size,
            "prepend_bos": cfg.prepend_bos, "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
            "center_input": cfg.center_input, **sae.options(), "architecture": cfg.architecture, "role": cfg.role,
            "base": cfg.base, "per_token": sae.per_token, "causal": sae.causal, "signed": sae.signed,
            "parameters": sum(tensor.numel() for tensor in sae.tensors().values()), "provenance": cfg.provenance}
