"""The SAEs of a comparison from `params.yaml` alone: names, forms, sizes, hooks; nothing is opened or fetched."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from sae_research.config.inputs import Controls
from sae_research.config.params import Params
from sae_research.config.recipes import PLUS, SAERecipe, hooks_at
from sae_research.config.training import FLOAT_BYTES
from sae_research.lm.hooks import parse_hook
from sae_research.planning.work import Hooks
from sae_research.runtime.files import read_json, slugify
from sae_research.runtime.packaged import packaged_place
from sae_research.saes.base import SAEInfo
from sae_research.saes.pursuit.encoders import (
    IHTPSAE,
    MPSAE,
    OMPSAE,
    NonNegativeMPSAE,
    NonNegativeOMPSAE,
    PursuitSAE,
    TopKRefitSAE,
)
from sae_research.saes.releases import saes_of
from sae_research.saes.sources import folder_names

VARIANTS: dict[str, type[PursuitSAE]] = {
    "ihtp": IHTPSAE,
    "mpsae": MPSAE,
    "omp": OMPSAE,
    "topk_refit": TopKRefitSAE,
    "nn_mpsae": NonNegativeMPSAE,
    "nn_omp": NonNegativeOMPSAE,
}
"""Sections of `sae_variants` and the encoders they make over the baseline's dictionary and those of `dictionaries`."""
PURSUIT = tuple(encoder.form for encoder in VARIANTS.values())
ASSUMED_WIDTH = 8
"""Latents for each dimension of an SAE from elsewhere whose name does not tell."""
CONTROL_PREFIX = "control_"


class PlannedSAE(NamedTuple):
    """What an SAE costs depends on."""

    name: str
    form: str
    d_in: int
    d_sae: int
    hook: str
    size: int = 0
    """Atoms or steps of a pursuit encoder."""
    own_weights: bool = True
    """False for a variant, which reads another's dictionary."""
    assumed: str = ""
    """What had to be assumed of it."""
    written: str = ""
    """The hook that a transcoder writes."""
    hooks: tuple[str, ...] = ()
    """Those that it reads, where they are several; `hook` is the last of them that the model reaches."""

    @property
    def at(self) -> Hooks:
        return Hooks(self.hooks or (self.hook,), self.written)

    @property
    def nbytes(self) -> int:
        """Of its weights, float32."""
        return (2 if self.form not in PURSUIT else 1) * self.d_in * self.d_sae * FLOAT_BYTES


def described(name: str, info: SAEInfo) -> PlannedSAE:
    """An SAE that is there."""
    cfg = info.cfg
    size = int(info.options.get("k") or info.options.get("s") or 0) if cfg.form in PURSUIT else 0
    return PlannedSAE(
        name,
        cfg.form,
        cfg.d_in,
        cfg.d_sae,
        deepest(cfg.hook_names),
        size,
        cfg.role != "variant",
        "",
        cfg.hook_out if cfg.is_transcoder else "",
        cfg.hook_names if len(cfg.hook_names) > 1 else (),
    )


def deepest(hooks: Sequence[str]) -> str:
    """The one that a pass of the model reaches last."""
    return max(hooks, key=lambda hook: parse_hook(hook)[0])


def place_in(evaluation: str, sae: PlannedSAE) -> Hooks:
    """Where that stands which it is scored together with: in core what reads and writes the same hooks, elsewhere what reads
    one."""
    return sae.at if evaluation == "core" else Hooks(sae.at.read)


def planned_saes(params: Params, width: int) -> list[PlannedSAE]:
    """The comparison in the setup stage's order; SAEs whose sizes nothing tells are taken as `ASSUMED_WIDTH` says.

    width: d_in at the baseline's hook.
    """
    baseline = _baseline(params, width)
    compared = list(_comparisons(params, baseline, width))
    named = {sae.name: sae for sae in compared}
    others = [named[name] for name in params.sae_variants.dictionaries if name in named]
    return [
        baseline,
        *_variants(params, baseline),
        *compared,
        *(variant for other in others for variant in _variants(params, other)),
        *_controls(params, baseline),
    ]


def _variants(params: Params, dictionary: PlannedSAE) -> Iterator[PlannedSAE]:
    for label, encoder in VARIANTS.items():
        section = getattr(params.sae_variants, label)
        for size in getattr(section, f"{encoder.size_name}_values") if section.enabled and not dictionary.written else ():
            name = variant_name(dictionary.name, label, size)
            yield dictionary._replace(name=name, form=encoder.form, size=size, own_weights=False, assumed="")


def variant_name(dictionary: str, label: str, size: int) -> str:
    """Of a pursuit encoder over an SAE's dictionary; label: its section of `sae_variants`."""
    return slugify(f"{dictionary}_{label}_{VARIANTS[label].size_name}{size}")


def trained_sae(name: str, config: SAERecipe, hook: str, width: int) -> PlannedSAE:
    """An SAE of `train.saes`. What has several hooks has the width of all of them."""
    pursuit = config.recipe == "matching_pursuit"
    size = getattr(config, "s", 0) if pursuit else 0
    hooks = hooks_at(hook)
    sae = PlannedSAE(name, config.recipe, width, config.d_sae, deepest(hooks), size, written=config.written or "")
    return sae._replace(hooks=tuple(hooks)) if len(hooks) > 1 else sae


def _baseline(params: Params, width: int) -> PlannedSAE:
    block = params.baseline_sae
    hook = f"blocks.{block.hook_layer}.hook_resid_post"
    if block.source == "trained" and block.name in params.train.saes:
        config = params.train.saes[block.name]
        return trained_sae(block.name, config, params.train.hook_of(block.name), width * len(config.hook_names or [""]))
    if block.source == "packaged":
        return _saved(packaged_place(block.name), block.name, hook, width)
    told = re.search(r"width_(\d+)(k|m)", block.sae_id or "")
    if told:
        return PlannedSAE(block.name, "standard", width, int(told[1]) * (2**10 if told[2] == "k" else 2**20), hook)
    return _assumed(block.name, hook, width)


def _saved(path: Path, name: str, hook: str, width: int) -> PlannedSAE:
    """An SAE of a folder, as far as a `cfg.json` of SAELens' layout tells."""
    values = read_json(path / "cfg.json") if (path / "cfg.json").is_file() else {}
    if not isinstance(values, dict) or not isinstance(values.get("d_sae"), int):
        return _assumed(name, hook, width)
    found = PlannedSAE(name, "standard", width, values["d_sae"], hook)
    metadata = values["metadata"] if isinstance(values.get("metadata"), dict) else {}
    written = metadata.get("hook_name_out")
    if isinstance(written, str) and PLUS not in written:
        return found._replace(hook=str(metadata.get("hook_name") or hook), written=written)
    return found


def _assumed(name: str, hook: str, width: int) -> PlannedSAE:
    wide = ASSUMED_WIDTH * width
    return PlannedSAE(name, "standard", width, wide, hook, assumed=f"{name}: taken to have {wide:,} latents")


def _comparisons(params: Params, baseline: PlannedSAE, width: int) -> Iterator[PlannedSAE]:
    chosen, train = params.comparison_saes, params.train
    names = [name for name in train.saes if name != baseline.name] if chosen.trained == ["all"] else chosen.trained
    for name in names:
        if name in train.saes:
            yield trained_sae(name, train.saes[name], train.hook_of(name), width * len(train.saes[name].hook_names or [""]))
        else:
            yield _assumed(name, baseline.hook, baseline.d_in)
    packaged = {packaged_place(name): slugify(name) for name in chosen.packaged}
    for path, name in (packaged | folder_names(chosen.folders)).items():
        yield _saved(path, name, baseline.hook, baseline.d_in)
    for place in chosen.python:
        yield baseline._replace(name=place, form="standard", size=0, own_weights=True)
    if chosen.release is not None:
        for item in saes_of(chosen.release, chosen.match, "comparison_saes.match"):
            yield _assumed(slugify(f"{item.release}_{item.sae_id}"), baseline.hook, baseline.d_in)
    if chosen.sae_regex_pattern is not None:
        yield _assumed(f"SAEs of {chosen.sae_regex_pattern} (counted as one)", baseline.hook, baseline.d_in)


def _controls(params: Params, baseline: PlannedSAE) -> Iterator[PlannedSAE]:
    for name, kind, size in control_names(params.controls):
        if kind == "pca" and PLUS in baseline.written:  # a cross-layer transcoder has none
            continue
        sae = baseline._replace(name=name, own_weights=True, assumed="")
        yield (
            sae._replace(form="linear", d_sae=size, size=0)
            if kind == "pca"
            else sae._replace(form="matching_pursuit", size=size)
        )
    if baseline.written and params.controls.names:
        yield baseline._replace(name=f"{CONTROL_PREFIX}linear_map", form="standard", d_sae=1, size=0, assumed="")


def control_names(controls: Controls) -> list[tuple[str, str, int]]:
    """(name, kind, size) of every control, in table order; a kind of one size is called by the kind alone."""
    found = []
    for kind in controls.names:
        sizes, unit = (controls.pca_components, "n") if kind == "pca" else (controls.s, "s")
        found += [
            (f"{CONTROL_PREFIX}{kind}" + (f"_{unit}{size}" if len(sizes) > 1 else ""), kind, size)
            for size in dict.fromkeys(sizes)
        ]
    return found
