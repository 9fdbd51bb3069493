"""Crosscoders of Gemma Scope 2: `crosscoder/layer_7_13_17_22_width_65k_l0_medium/` with `config.json` and one
`params_layer_N.safetensors` for each of its layers, N from 0.

They are *weakly causal* (Lindsey et al. 2024): a latent reads one layer of the stream and writes that one and later ones.
File N holds the latents that read the N-th layer: `w_enc` [d_hook, d_sae_N], `b_enc`, `threshold` [d_sae_N], `w_dec`
[d_sae_N, layers, d_hook], and the layer's own `b_dec` [d_hook]. Side by side they are one JumpReLU crosscoder whose
encoders are zero but for one layer's.

Activations were normalised layer by layer in training. The factors are folded into the weights and stand nowhere: hooks
count in the model's units.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_research.config.recipes import PLUS
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import read_settings
from sae_research.saes.base import SAEConfig, SparseAutoencoder
from sae_research.saes.crosscoders import side_by_side
from sae_research.saes.formats.gemma_scope import CONFIG_FILE, LIBRARY, check_model, second_model
from sae_research.saes.forms import fold_decoder_norms
from sae_research.saes.reading import flag, floats, load_safetensors, number, renamed, shown, text, whole
from sae_research.saes.registry import form_class

FOLDER = "crosscoder"
"""Of a repository."""
_FILE = re.compile(r"params_layer_([0-9]{1,3})\.safetensors")
_LAYERS = re.compile(r"layer((?:_[0-9]{1,3}){2,})_width_.*")
_STREAMS = re.compile(r"model\.layers\.\{([0-9]{1,3}(?:,[0-9]{1,3})+)\}\.output")
_NAMES = {name: name for name in ("w_enc", "b_enc", "w_dec", "b_dec", "threshold")}


def files_in(path: Path) -> list[str]:
    """Names of the weights, where it is a folder of them below one that is called `crosscoder`."""
    if not path.is_dir() or FOLDER not in path.absolute().parts:
        return []
    return sorted(inside.name for inside in path.iterdir() if _FILE.fullmatch(inside.name))


def load_crosscoder(folder: str | Path, names: Sequence[str]) -> SparseAutoencoder:
    """Read one folder. names: of the folders that lead to it, its own last (`reading.names_on_path`). Raises `UserError`
    for a missing or damaged file, a setting that contradicts the weights or the folder's name, and tensors that do not
    fit."""
    folder = Path(folder)
    model = next((model for name in names if (model := second_model(name))), "")
    if not model:
        raise UserError(
            f"{folder}: no folder above it says of which model; keep the repository's own name, such as gemma-scope-2-1b-pt"
        )
    match = _LAYERS.fullmatch(names[-1])
    layers = [int(layer) for layer in match[1].split("_")[1:]] if match else []
    config = folder / CONFIG_FILE
    values = read_settings(config) if config.exists() else {}
    layers = _checked(values, layers, model, config) or layers
    if not layers:
        raise UserError(f"{folder}: neither its name (layer_7_13_..._width_...) nor config.json says of which layers it is")
    parts = [_part(folder / f"params_layer_{index}.safetensors", len(layers)) for index in range(len(layers))]
    beyond = sorted(set(files_in(folder)) - {f"params_layer_{index}.safetensors" for index in range(len(layers))})
    if beyond:
        raise UserError(f"{folder / beyond[0]}: one more file than the {len(layers)} layers that it is of; remove it")
    tensors = _joined(parts, folder)
    if "width" in values and whole(values["width"], "width", config) != len(tensors["W_dec"]):
        raise UserError(
            f"{config}: width is {values['width']}, the weights have {len(tensors['W_dec'])} latents; fetch them again"
        )
    l0 = values.get("l0")
    cfg = SAEConfig(
        form="jumprelu",
        d_in=len(tensors["b_dec"]),
        d_sae=len(tensors["W_dec"]),
        model_name=model,
        hook_name=PLUS.join(f"blocks.{layer}.hook_resid_post" for layer in layers),
        hook_scales=(1.0,) * len(layers),
        context_size=1024,
        apply_b_dec_to_input=False,
        provenance={"format": LIBRARY, **({} if l0 is None else {"held_out": {"l0": number(l0, "l0", config)}})},
    )
    try:
        return form_class("jumprelu").from_tensors(cfg, fold_decoder_norms("jumprelu", tensors))
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def _part(weights: Path, n: int) -> dict[str, Tensor]:
    state = floats(renamed(load_safetensors(weights), _NAMES, weights), weights)
    if state["w_enc"].dim() != 2:
        raise UserError(f"{weights}: w_enc is no matrix (shape {tuple(state['w_enc'].shape)})")
    d_hook, d_sae = state["w_enc"].shape
    shapes = {"b_enc": (d_sae,), "threshold": (d_sae,), "w_dec": (d_sae, n, d_hook), "b_dec": (d_hook,)}
    for name, shape in shapes.items():
        if state[name].shape != shape:
            raise UserError(f"{weights}: {name} has shape {tuple(state[name].shape)}, expected {shape} for {n} layers")
    return state


def _joined(parts: Sequence[dict[str, Tensor]], folder: Path) -> dict[str, Tensor]:
    widths = {len(part["b_dec"]) for part in parts}
    if len(widths) > 1:
        raise UserError(f"{folder}: its files are of layers of {' and '.join(map(str, sorted(widths)))} dimensions")
    W_dec = torch.cat([part["w_dec"] for part in parts]).transpose(0, 1)
    W_enc = W_dec.new_zeros(len(parts), widths.pop(), W_dec.shape[1])
    first = 0
    for layer, part in enumerate(parts):
        last = first + len(part["b_enc"])
        W_enc[layer, :, first:last], first = part["w_enc"], last
    own = {name: torch.cat([part[name] for part in parts]) for name in ("b_enc", "threshold")}
    return side_by_side(W_enc, W_dec, torch.stack([part["b_dec"] for part in parts])) | own


def _checked(values: dict[str, Any], layers: list[int], model: str, path: Path) -> list[int]:
    """The layers that `config.json` says; none where it does not. Raises `UserError` naming what contradicts the folder."""
    for key, known in (("architecture", "jump_relu"), ("type", FOLDER)):
        said = text(values.get(key), key, path)
        if said not in ("", known):
            raise UserError(f"{path}: {key} {shown(said)} is not read of a crosscoder; known: {known}")
    if values.get("affine_connection") is not None and flag(values["affine_connection"], "affine_connection", path):
        raise UserError(f"{path}: affine_connection of a crosscoder is not read; ask for it with such a file")
    check_model(values, model, path)
    found: list[int] = []
    for key in ("hf_hook_point_in", "hf_hook_point_out"):
        said = text(values.get(key), key, path)
        match = _STREAMS.fullmatch(said)
        if said and match is None:
            raise UserError(f"{path}: {key} {shown(said)} is not known; known: model.layers.{{7,13,...}}.output")
        if match:
            own = [int(layer) for layer in match[1].split(",")]
            if own != (found or layers or own):
                raise UserError(
                    f"{path}: {key} is {shown(said)}, the folder's name or the other hook says otherwise; correct it"
                )
            found = own
    return found
