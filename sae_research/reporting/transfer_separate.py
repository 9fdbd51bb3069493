"""What the report says of separate SAEs of either model (`transfer.separate`), the metrics of it, and which pictures of
whose latents are whose a run has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sae_research.reporting.transfer_crosscoder import MODELS, at, bounded, numbers
from sae_research.runtime.formatting import ABSENT, markdown_table

ALONE = {"base": "lost", "finetuned": "made"}
MEDIANS = {"cosine_median": "best cosine", "correlation_median": "best correlation", "match_median": "best match"}
GROUPS = {
    "base": {"lost": "lost", "base_end": "least matched, base SAE"},
    "finetuned": {"made": "made", "kept": "kept", "finetuned_end": "least matched, finetuned SAE"},
}
FIGURES = ("kl", "kl_other", "kl_matched", "kl_direction", "kl_patched_base", "kl_patched_base_matched")

OPTIONAL = {
    "crosscoder": (
        "crosscoder_shares",
        "Latents of the crosscoder",
        "Those that fire on held-out text; dotted: the limits of the classes.",
    ),
    "separate": (
        "separate_matches",
        "Latents of separate SAEs",
        "Those that fire; the best of the other SAE's latents. Dotted: the limits of the classes.",
    ),
}
"""By the part of a result that it shows: name, title and caption of a picture that not every run has."""


def optional_parts(result: dict[str, Any]) -> list[str]:
    """The parts of `OPTIONAL` that a result has."""
    return [part for part in OPTIONAL if part in result and at(result, part, "status") in (None, "ok")]


def separate_metrics(found: dict[str, Any] | None) -> dict[str, Any]:
    """Nothing where SAEs were not compared."""
    values: dict[str, Any] = {}
    for model in MODELS:
        own = at(found, "saes", model)
        for name in ("kept", "changed", ALONE[model]):
            values[f"separate_{model}_{name}"] = at(own, "classes", name)
            values[f"separate_control_{model}_{name}"] = at(found, "control", model, "classes", name)
        values |= {f"separate_{model}_{key}": at(own, key) for key in MEDIANS}
        for name in GROUPS[model]:
            values |= {f"separate_{name}_{key}": at(found, "ablations", model, "groups", name, key) for key in FIGURES}
    return values


def separate_section(found: dict[str, Any] | None) -> dict[str, Any] | None:
    """What the template reads; None where SAEs were not compared."""
    if found is None:
        return None
    if found["status"] != "ok":
        return {"message": found["message"]}
    return {
        **found,
        "message": "",
        "says": " ".join(_claims(found)),
        "class_table": _class_table(found),
        "ablation_table": _ablation_table(found["ablations"]),
        "checked": found["ablations"]["finetuned"],
    }


def _claims(found: Mapping[str, Any]) -> list[str]:
    """In words: what has no counterpart, and what its ablations say."""
    lines = []
    for model, name in ALONE.items():
        number, fire = found["saes"][model]["classes"][name], found["saes"][model]["fire"]
        control = at(dict(found), "control", model, "classes", name)
        if not number:
            lines.append(f"No latent of the {model} model's SAE is {name}: each has a counterpart, if a distant one.")
            continue
        beside = "" if control is None else f" (the control: {control:,})"
        lines.append(f"{number:,} of {fire:,} latents of the {model} model's SAE are {name}{beside}.")
        group = found["ablations"][model]["groups"][name]
        if "over_matched" not in group:
            lines.append("None of them could be set against a kept latent on the text of the ablations.")
            continue
        low, high = (group["over_matched"].get(key) for key in ("low", "high"))
        verdict = (
            "the text is too short to say whether they matter more or less than kept latents of equal contribution"
            if low is None or low <= 0 <= high
            else f"they matter {'more' if low > 0 else 'less'} to it than kept latents of equal contribution"
        )
        lines.append(f"Ablated, {verdict}.")
    return lines


def _class_table(found: Mapping[str, Any]) -> str:
    rows = [(f"{model} model's SAE", model, found["saes"][model]) for model in MODELS]
    if "control" in found:
        titles = {"base": "control: base SAE", "finetuned": "control: base SAE, trained on as long on the base model"}
        rows += [(titles[model], model, found["control"][model]) for model in MODELS]
    body = [
        [
            title,
            f"{values['fire']:,}",
            *(f"{values['classes'][name]:,}" for name in ("kept", "changed", ALONE[model])),
            *numbers(values, MEDIANS),
        ]
        for title, model, values in rows
    ]
    return markdown_table(["Latents of the", "fire", "kept", "changed", "lost / made", *MEDIANS.values()], body)


def _ablation_table(ablations: Mapping[str, Any]) -> str:
    body = []
    for model, titles in GROUPS.items():
        for name, title in titles.items():
            group = ablations[model]["groups"][name]
            body.append(
                [
                    title,
                    model,
                    str(len(group["latents"])),
                    *numbers(group, ("match", "kl", "kl_other", "kl_matched")),
                    bounded(group.get("over_matched")),
                    *numbers(group, ("kl_direction", "kl_patched_base")),
                    bounded(group.get("patch_gain")),
                    *(str(group.get(key, ABSENT)) for key in ("above_matched", "above_direction")),
                ]
            )
    header = [
        "Ablated",
        "in the model",
        "latents",
        "best match",
        "KL",
        "in the other model",
        "kept latent",
        "KL over it [95 %]",
    ]
    header += ["random direction", "base patched", "KL taken off [95 %]", "above the latent", "above the direction"]
    return markdown_table(header, body, left=2)
