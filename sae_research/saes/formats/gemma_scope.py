"""Gemma Scope, `params.npz`, and Gemma Scope 2, `params.safetensors` with `config.json` (either name of weights is read of
either): JumpReLU SAEs and transcoders of Google's Gemma 2 and 3. All of them leave `b_dec` out of what they encode.

Model and hook stand in the names of the folders that the repositories have, and are read off them:

| repository | folder | reads | writes |
|---|---|---|---|
| `gemma-scope-9b-pt-res` | `layer_L/width_16k/average_l0_71` | `hook_resid_post` | |
| `gemma-scope-9b-pt-mlp` | likewise | `hook_mlp_out` | |
| `gemma-scope-9b-pt-att` | likewise | `attn.hook_z` | |
| `gemma-scope-2b-pt-res` | `embedding/...` | `blocks.0.hook_resid_pre` | |
| `gemma-scope-2b-pt-transcoders` | `layer_L/...` | `ln2.hook_normalized` | `hook_mlp_out` |
| `gemma-scope-2-4b-it` | `resid_post/layer_L_...`, `mlp_out/...`, `attn_out/...` | as above | |
| | `transcoder/layer_L_...`, with a skip `..._affine` | `mlp.hook_in` | `hook_mlp_out` |

SAEs of the embedding were trained on its rows, of which the model takes sqrt(d_in) times: that factor is folded in, into
`b_dec` too, which SAELens forgets.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.runtime.files import read_settings
from sae_research.saes.base import SparseAutoencoder
from sae_research.saes.formats.sae_lens import from_parts
from sae_research.saes.reading import flag, load_npz, load_safetensors, renamed, shown, text

WEIGHTS_FILES = ("params.npz", "params.safetensors")
CONFIG_FILE = "config.json"
LIBRARY = "gemma_scope"
_FIRST = re.compile(r"(?:.*/)?gemma-scope-(2b|9b|27b)-(pt|it)-(res|mlp|att|transcoders)(?:-canonical)?")
_SECOND = re.compile(r"(?:.*/)?gemma-scope-2-(270m|1b|4b|12b|27b)-(pt|it)")
_LAYER = re.compile(r"layer_([0-9]{1,3})(?:_.*)?")
_SITES = {
    "res": ("hook_resid_post", ""),
    "mlp": ("hook_mlp_out", ""),
    "att": ("attn.hook_z", ""),
    "transcoders": ("ln2.hook_normalized", "hook_mlp_out"),
    "resid_post": ("hook_resid_post", ""),
    "mlp_out": ("hook_mlp_out", ""),
    "attn_out": ("attn.hook_z", ""),
    "transcoder": ("mlp.hook_in", "hook_mlp_out"),
}
"""(kind of hook read, kind written) by the name of a repository's last part or, in the second release, of a folder."""
_MODULES = {
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
    "pre_feedforward_layernorm.output": "mlp.hook_in",
    "post_feedforward_layernorm.output": "hook_mlp_out",
}
"""Kind of hook by what the second release's `config.json` calls it, after `model.layers.L.`."""
NAMES = {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
SKIP = "affine_skip_connection"
CLT = "clt"
"""The folder of cross-layer transcoders (`formats.gemma_scope_cross_layer`); their place is layer 0's."""


class Place(NamedTuple):
    """What the names of folders say: the model, hooks, and whether it is its embedding."""

    model_name: str
    hook_name: str
    hook_out: str = ""
    embedding: bool = False


def place_of(names: Sequence[str], where: object) -> Place:
    """Read off names of folders, the repository's among them. Raises `UserError` where they say too little."""
    for number, name in enumerate(names):
        inside = names[number + 1 :]
        if match := _FIRST.fullmatch(name):
            size, kind, site = match.groups()
            model = f"gemma-2-{size}" + ("-it" if kind == "it" else "")
            if "embedding" in inside and site == "res":
                return Place(model, "blocks.0.hook_resid_pre", embedding=True)
            return Place(model, *_hooks(site, inside, where))
        if model := second_model(name):
            sites = [part.removesuffix("_all") for part in inside]
            if CLT in sites:
                read, written = _SITES["transcoder"]
                return Place(model, f"blocks.0.{read}", f"blocks.0.{written}")
            found = [part for part in sites if part in _SITES]
            if found:
                return Place(model, *_hooks(found[0], inside, where))
    raise UserError(
        f"{where}: weights as Gemma Scope has them, and no folder above them says of which model and hook; keep the "
        "repository's own names, such as gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82"
    )


def second_model(name: str) -> str:
    """The model of a repository of the second release, by the repository's name; empty for any other name."""
    match = _SECOND.fullmatch(name)
    if match is None:
        return ""
    size, kind = match.groups()
    return f"google/gemma-3-{size}" + ("" if (size, kind) == ("270m", "pt") else f"-{kind}")


def _hooks(site: str, inside: Sequence[str], where: object) -> tuple[str, str]:
    layers = [match[1] for part in inside if (match := _LAYER.fullmatch(part))]
    if len(layers) != 1:
        raise UserError(
            f"{where}: no folder above the weights says which layer; keep the repository's own names (layer_12/...)"
        )
    read, written = (f"blocks.{int(layers[0])}.{kind}" if kind else "" for kind in _SITES[site])
    return read, written


def load_gemma_scope(folder: str | Path, names: Sequence[str]) -> SparseAutoencoder:
    """Read the weights of one folder. names: of the folders that lead to it, its own last (`reading.names_on_path`)."""
    folder = Path(folder)
    found = [name for name in WEIGHTS_FILES if (folder / name).exists()] or [WEIGHTS_FILES[-1]]
    if len(found) > 1:
        raise UserError(f"{folder}: holds both {' and '.join(found)}; remove the one that is not meant")
    weights = folder / found[0]
    place = place_of(names, folder)
    if CLT in [name.removesuffix("_all") for name in names]:
        raise UserError(
            f"{weights}: a cross-layer transcoder of Gemma Scope 2 has a file a layer, params_layer_L.safetensors"
        )
    tensors = load_npz(weights) if weights.suffix == ".npz" else load_safetensors(weights)
    if (folder / CONFIG_FILE).exists():
        place = checked(read_settings(folder / CONFIG_FILE), place, SKIP in tensors, folder / CONFIG_FILE)
    return read(tensors, place, str(weights))


def read(tensors: dict[str, Tensor], place: Place, where: str) -> SparseAutoencoder:
    """The SAE or transcoder of these tensors, which the two releases spell differently."""
    spelt = {"W_" + key[2:] if key.startswith("w_") else key: tensor for key, tensor in tensors.items()}
    names = NAMES if not place.hook_out else {**NAMES, SKIP: "W_skip.T"}
    state = renamed(spelt, names, where, optional=(SKIP,))
    if state["W_dec"].dim() == 3:
        raise UserError(f"{where}: its decoder writes several layers or models, which is not read yet")
    if place.embedding:
        factor = math.sqrt(state["W_enc"].shape[0])
        state |= {
            "W_enc": state["W_enc"] / factor,
            "W_dec": state["W_dec"] * factor,
            "b_dec": state["b_dec"] * factor,
        }
    architecture = "jumprelu"
    if place.hook_out:
        architecture = "jumprelu_skip_transcoder" if "W_skip" in state else "jumprelu_transcoder"
    metadata = {
        "model_name": place.model_name,
        "hook_name": place.hook_name,
        "hook_name_out": place.hook_out or None,
        "context_size": 1024,
    }
    return from_parts(LIBRARY, architecture, state, metadata, where, apply_b_dec_to_input=False)


def checked(values: dict[str, Any], place: Place, has_skip: bool, path: Path) -> Place:
    """The place, where `config.json` agrees with it. Raises `UserError` naming what does not."""
    architecture = text(values.get("architecture"), "architecture", path)
    if architecture not in ("", "jump_relu"):
        raise UserError(f"{path}: architecture {shown(architecture)} is not known; known: jump_relu")
    skip = values.get("affine_connection")
    if skip is not None and flag(skip, "affine_connection", path) != has_skip:
        raise UserError(f"{path}: affine_connection is {skip}, the weights say the opposite; fetch them again")
    for key, hook in (("hf_hook_point_in", place.hook_name), ("hf_hook_point_out", place.hook_out or place.hook_name)):
        said = text(values.get(key), key, path)
        match = re.fullmatch(r"model\.layers\.([0-9]{1,3})\.(.+)", said)
        if said and (match is None or match[2] not in _MODULES):
            raise UserError(f"{path}: {key} {shown(said)} is not known; known: model.layers.L. with {', '.join(_MODULES)}")
        if match and f"blocks.{int(match[1])}.{_MODULES[match[2]]}" != hook:
            raise UserError(f"{path}: {key} is {shown(said)}, the folder's name says {hook}; correct the one that is wrong")
    check_model(values, place.model_name, path)
    return place


def check_model(values: dict[str, Any], model_name: str, path: Path) -> None:
    """Raises `UserError` where `config.json` names another model than the folder; a `-pt` more or less is the same."""
    name = text(values.get("model_name"), "model_name", path).rpartition("/")[2].replace("-v3", "-3")
    expected = model_name.rpartition("/")[2]
    if name and name.removesuffix("-pt") != expected.removesuffix("-pt"):
        raise UserError(
            f"{path}: model_name is {shown(name)}, the folder's name says {expected}; correct the one that is wrong"
        )
