"""SAEs published as one torch checkpoint each, without a library of their own: Goodfire's, qresearch's, Qwen Scope and the
attention SAEs of Kissane and others. The tensors tell which it is; what they leave open stands in the file's name and its
repository's, as published.

| publisher | file | form | subtracts `b_dec` |
|---|---|---|---|
| Goodfire | `Llama-3.1-8B-Instruct-SAE-l19.pth` | `standard` | no |
| qresearch | `DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt` | `standard` | no |
| Qwen | `SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer0.sae.pt` | `topk` | no |
| Kissane | `gpt2-small_L5_Hcat_z_....pt` with `..._cfg.json` | `standard` | yes |
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.runtime.files import read_settings
from sae_research.saes.base import SparseAutoencoder
from sae_research.saes.formats.sae_lens import from_parts
from sae_research.saes.reading import check_shapes, hook_of, load_state, renamed, text, whole

CONFIG_ENDING = "_cfg.json"


class Publisher(NamedTuple):
    """One publisher's layout: their tensors -> ours, and how files and repositories are named."""

    library: str
    names: dict[str, str]
    file_name: re.Pattern[str]
    """With groups `layer` and, where the file's name says it, `model`."""
    organisation: str
    example: str
    repository: re.Pattern[str] | None = None
    """Where the repository's name has more: with groups `model`, `width` (in 1024) and `k`."""
    context_size: int | None = 1024
    """Tokens of a training context; None where nobody says."""


_LINEAR = {"encoder.weight": "W_enc.T", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T", "decoder.bias": "b_dec"}
_OUR_NAMES = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
PUBLISHERS = (
    Publisher(
        "goodfire",
        {key.replace(".", "_linear."): ours for key, ours in _LINEAR.items()},
        re.compile(r"(?P<model>Llama-[\w.-]+?)-SAE-l(?P<layer>[0-9]{1,3})\.pth?"),
        "meta-llama",
        "Llama-3.1-8B-Instruct-SAE-l19.pth",
        context_size=None,
    ),
    Publisher(
        "qresearch",
        _LINEAR,
        re.compile(r"(?P<model>DeepSeek-R1[\w.-]+?)-SAE-l(?P<layer>[0-9]{1,3})\.pth?"),
        "deepseek-ai",
        "DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt",
    ),
    Publisher(
        "qwen_scope",
        {"W_enc": "W_enc.T", "b_enc": "b_enc", "W_dec": "W_dec.T", "b_dec": "b_dec"},
        re.compile(r"layer(?P<layer>[0-9]{1,3})\.sae\.pt"),
        "Qwen",
        "SAE-Res-Qwen3-1.7B-Base-W32K-L0_50/layer0.sae.pt",
        re.compile(r"(?:.*/)?SAE-Res-(?P<model>.+)-W(?P<width>[0-9]{1,5})K-L0_(?P<k>[0-9]{1,5})"),
    ),
    Publisher(
        "kissane",
        _OUR_NAMES,
        re.compile(r"(?P<model>gpt2-small)_L(?P<layer>[0-9]{1,3})_Hcat_z_.+\.pt"),
        "",
        "gpt2-small_L5_Hcat_z_lr1.20e-03_l11.80e+00_ds24576_v9.pt",
        context_size=128,
    ),
)


class Place(NamedTuple):
    """What names say: whose it is, of which model and layer, and k where the repository's name has it."""

    publisher: Publisher
    model_name: str
    layer: int
    k: int | None = None


def place_of(names: Sequence[str], where: object) -> Place:
    """Read off the names of a file and of the folders that lead to it. Raises `UserError` for other names."""
    for publisher in PUBLISHERS:
        match = publisher.file_name.fullmatch(names[-1])
        if match is None:
            continue
        found = match.groupdict()
        if publisher.repository is not None:
            above = [said for name in names[:-1] if (said := publisher.repository.fullmatch(name))]
            if not above:
                raise UserError(
                    f"{where}: no folder above says of which model; keep the repository's name: {publisher.example}"
                )
            found |= above[-1].groupdict()
        model = "/".join(part for part in (publisher.organisation, found["model"]) if part)
        return Place(publisher, model, int(found["layer"]), int(found["k"]) if "k" in found else None)
    raise UserError(
        f"{where}: not the name of a checkpoint that is known; known are such as "
        f"{', '.join(publisher.example for publisher in PUBLISHERS)}, and OpenAI's resid_post_mlp_v5_32k/autoencoders/8.pt"
    )


def is_checkpoint(path: Path) -> bool:
    """Whether a file has a name that one of them is published under."""
    return any(publisher.file_name.fullmatch(path.name) for publisher in PUBLISHERS)


def load_published(path: str | Path, names: Sequence[str]) -> SparseAutoencoder:
    """Read one file. names: of the folders that lead to it and its own (`reading.names_on_path`)."""
    path = Path(path)
    place = place_of(names, path)
    state = renamed(load_state(path), place.publisher.names, path)
    hook = f"blocks.{place.layer}.hook_resid_post"
    keys: dict[str, Any] = {"apply_b_dec_to_input": False}
    if place.publisher.library == "kissane":
        config = path.with_name(path.name.removesuffix(".pt") + CONFIG_ENDING)
        hook, keys["apply_b_dec_to_input"] = _of_kissane(config, state, place, path), True
    if place.k is not None:
        keys["k"] = place.k
    metadata = {"model_name": place.model_name, "hook_name": hook, "context_size": place.publisher.context_size}
    architecture = "standard" if place.k is None else "topk"
    return from_parts(place.publisher.library, architecture, state, metadata, str(path), **keys)


def _of_kissane(config: Path, state: dict[str, Tensor], place: Place, where: Path) -> str:
    """The hook of its settings, which must be of the layer that the file's name says, and of the weights' sizes."""
    settings = read_settings(config)
    hook = hook_of(text(settings.get("act_name"), "act_name", config), config)
    if hook != f"blocks.{place.layer}.attn.hook_z":
        raise UserError(
            f"{config}: act_name is {hook or 'missing'}, the file's name says layer {place.layer}; correct one of them"
        )
    sizes = [whole(settings.get(key), key, config) for key in ("act_size", "dict_size")]
    check_shapes(state, sizes[0], sizes[1], where)
    return hook
