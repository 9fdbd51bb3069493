"""What the report says of a crosscoder of both models (`transfer.crosscoder`), and the metrics of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from sae_research.runtime.formatting import ABSENT, markdown_table, number, with_interval

MODELS = ("base", "finetuned")
CLASSES = {
    "base_only": "base model only",
    "base_leaning": "leans to the base model",
    "shared": "shared",
    "finetuned_leaning": "leans to the finetuned model",
    "finetuned_only": "finetuned model only",
}
GROUPS = {
    "base_only": "base model only",
    "shared": "shared",
    "finetuned_only": "finetuned model only",
    "base_end": "smallest shares",
    "finetuned_end": "largest shares",
}


def at(values: dict[str, Any] | None, *path: str) -> Any:
    """The value at a path of keys; None where any part is missing or the value is not finite."""
    found: Any = values
    for key in path:
        if not isinstance(found, dict) or key not in found:
            return None
        found = found[key]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def crosscoder_metrics(found: dict[str, Any] | None) -> dict[str, Any]:
    """Nothing where none was trained."""
    values = {f"crosscoder_{key}": at(found, key) for key in ("l0", "dead")}
    values["crosscoder_kl_base"] = at(found, "ablations", "kl_base")
    for model in MODELS:
        values[f"crosscoder_variance_explained_{model}"] = at(found, "models", model, "variance_explained")
    for name in CLASSES:
        values[f"crosscoder_{name}"] = at(found, "classes", name, "latents")
    for name in GROUPS:
        for key in ("kl", "kl_matched", "kl_direction", "kl_patched_base", "kl_patched_base_matched"):
            values[f"crosscoder_{name}_{key}"] = at(found, "ablations", "groups", name, key)
    return values


def crosscoder_section(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the template reads; None where none was trained."""
    if found is None:
        return None
    alone = sum(found["classes"][name]["latents"] for name in ("base_only", "finetuned_only"))
    return {
        **found,
        "alone": alone,
        "class_table": _class_table(found["classes"]),
        "ablation_table": _ablation_table(found["ablations"]["groups"]),
    }


def _class_table(classes: Mapping[str, dict[str, Any]]) -> str:
    columns = {
        "finetuned_share_median": "share",
        "decoder_cosine_median": "cosine of decoders",
        "nu_error_median": "ν error",
        "nu_reconstruction_median": "ν reconstruction",
    }
    body = [
        [
            title,
            f"{classes[name]['latents']:,}",
            *numbers(classes[name], columns),
            *(str(classes[name].get(verdict, ABSENT)) for verdict in ("specific", "shrunk", "decoupled")),
        ]
        for name, title in CLASSES.items()
    ]
    header = ["Latents that fire, by the finetuned model's share", "number", *columns.values()]
    return markdown_table([*header, "specific", "shrunk", "decoupled"], body)


def _ablation_table(groups: Mapping[str, dict[str, Any]]) -> str:
    columns = {
        "finetuned_share": "share",
        "kl": "KL",
        "kl_matched": "random shared latent",
        "kl_direction": "random direction",
        "kl_patched_base": "base patched",
        "kl_patched_base_matched": "base patched, random shared",
    }
    bounds = {"over_matched": "KL over the latent's [95 %]", "patch_gain": "KL taken off by patching [95 %]"}
    body = [
        [
            title,
            str(len(groups[name]["latents"])),
            *numbers(groups[name], columns),
            *(bounded(groups[name].get(key)) for key in bounds),
            *(str(groups[name].get(key, ABSENT)) for key in ("above_matched", "above_direction")),
        ]
        for name, title in GROUPS.items()
    ]
    header = ["Ablated", "latents", *columns.values(), *bounds.values(), "above the latent", "above the direction"]
    return markdown_table(header, body)


def numbers(values: dict[str, Any] | None, keys: Iterable[str]) -> list[str]:
    return [number(at(values, key)) for key in keys]


def bounded(found: dict[str, Any] | None) -> str:
    """A value with its interval, where it has one."""
    if not found:
        return ABSENT
    return with_interval(found["value"], (found["low"], found["high"]) if found.get("low") is not None else None)
