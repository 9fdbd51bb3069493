"""Crosscoders of dictionary_learning (the fork of Minder et al. 2025, arXiv 2504.02922): `ae.pt` with `config.json`, as its
trainers write them, or `model.safetensors` with `config.json`, as it publishes them on the hub.

With L models, or layers of one model: `encoder.weight` [L, d_hook, d_sae], `encoder.bias` [d_sae], `decoder.weight`
[L, d_sae, d_hook], `decoder.bias` [L, d_hook], `code_normalization_id`; of a `BatchTopKCrossCoder` also `k` and `threshold`.

    f = ReLU(sum_l x_l W_enc,l + b_enc)        x_hat_l = f W_dec,l + b_l

`BatchTopKCrossCoder` keeps f where f times a norm of its decoders is above the threshold: by `code_normalization` the sum of
norms over l (1, `CROSSCODER`), the norm of all side by side (2, `SAE`), a weighted sum of the two (3, `MIXED`), none (4),
or each norm by itself (5, `DECOUPLED`), with a threshold a layer: such a latent is read as one latent a layer.

What is read stands in no file. `hook_names` may be added to `config.json`: a list of L hooks of one model. Without, two
layers with a trainer's `layer` are a base model and its finetune at the hook of that layer, in that order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_research.config.recipes import PLUS
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import read_settings
from sae_research.saes.base import SAEConfig, SparseAutoencoder
from sae_research.saes.crosscoders import hook_by_hook, hook_norms, side_by_side
from sae_research.saes.formats.dictionary_learning import CONFIG_FILE, WEIGHTS_FILE, hook_name, trained_k
from sae_research.saes.forms import fold_decoder_norms
from sae_research.saes.reading import (
    floats,
    hook_of,
    load_safetensors,
    load_state,
    number,
    renamed,
    section,
    shown,
    text,
    whole,
)
from sae_research.saes.registry import form_class

HUB_WEIGHTS_FILE = "model.safetensors"
CLASSES = ("CrossCoder", "BatchTopKCrossCoder")
LIBRARY = "dictionary_learning"
MODELS = ("base", "finetuned")
_NORMALIZATIONS = ("CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED")
"""By `code_normalization_id`, from 1."""
_NAMES = {
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "decoder.weight": "W_dec",
    "decoder.bias": "b_dec",
}
_BUFFERS = ("code_normalization_id", "k", "threshold")
_TINY = 1e-30


def is_crosscoder_config(path: Path) -> bool:
    """Whether a `config.json` is a crosscoder's. What cannot be read as one is not."""
    if not path.is_file():
        return False
    try:
        values = read_settings(path)
    except UserError:
        return False
    trainer = values.get("trainer")
    if isinstance(trainer, dict):
        return trainer.get("dict_class") in CLASSES
    return {"activation_dim", "dict_size", "num_layers"} <= set(values)


def load_crosscoder(folder: str | Path) -> SparseAutoencoder:
    """Read one folder. Raises `UserError` for a missing or damaged file, weights and settings that do not fit, and where
    nothing says what is read."""
    folder = Path(folder)
    config = folder / CONFIG_FILE
    values = read_settings(config)
    trainer = section(values.get("trainer"), "trainer", config) or values
    weights = folder / WEIGHTS_FILE if (folder / WEIGHTS_FILE).exists() else folder / HUB_WEIGHTS_FILE
    stored = load_state(weights) if weights.suffix == ".pt" else load_safetensors(weights)
    loaded = {name.removeprefix("_orig_mod."): tensor for name, tensor in stored.items()}  # of a compiled module
    batch_top_k = "threshold" in loaded
    said = text(trainer.get("dict_class"), "dict_class", config)
    if said and (said == "BatchTopKCrossCoder") != batch_top_k:
        raise UserError(
            f"{weights}: {'holds' if batch_top_k else 'lacks'} a threshold, and dict_class is {said}; correct it"
        )
    if ("k" in loaded) != batch_top_k:
        raise UserError(f"{weights}: {'lacks k beside' if batch_top_k else 'holds k without'} a threshold; fetch it again")
    for key in ("encoder_layers", "num_decoder_layers"):
        if trainer.get(key) is not None:
            raise UserError(f"{config}: {key} is not read: a crosscoder here reads and writes the same hooks")
    buffers = {name: loaded.pop(name) for name in _BUFFERS if name in loaded}
    state = floats(renamed(loaded, _NAMES, weights), weights)
    _check_shapes(state, trainer, weights, config)
    n = len(state["W_enc"])
    tensors = side_by_side(state["W_enc"], state["W_dec"], state["b_dec"]) | {"b_enc": state["b_enc"]}
    k = trained_k(trainer, buffers, config, weights)
    kind = _normalization(buffers, trainer, weights, config)
    form = "standard"
    if batch_top_k:
        form, tensors = "jumprelu", _with_threshold(tensors, n, kind, buffers["threshold"], trainer, weights, config)
    cfg = SAEConfig(
        form=form,
        d_in=n * state["W_enc"].shape[1],
        d_sae=len(tensors["W_dec"]),
        model_name=text(trainer.get("lm_name"), "lm_name", config),
        hook_name=PLUS.join(_hooks(values, trainer, n, config)),
        hook_scales=(1.0,) * n,
        apply_b_dec_to_input=False,
        architecture="batchtopk" if batch_top_k else "",
        provenance={
            "format": LIBRARY,
            "dict_class": CLASSES[batch_top_k],
            **({} if k is None else {"held_out": {"l0": float(k)}}),
        },
    )
    try:
        return form_class(form).from_tensors(cfg, fold_decoder_norms(form, tensors))
    except UserError as error:
        raise UserError(f"{weights}: {error}") from None


def _check_shapes(state: dict[str, Tensor], trainer: dict[str, Any], weights: Path, config: Path) -> None:
    if state["W_enc"].dim() != 3 or len(state["W_enc"]) < 2:
        raise UserError(
            f"{weights}: encoder.weight has shape {tuple(state['W_enc'].shape)}, expected [layers, d_hook, d_sae]"
        )
    n, d_hook, d_sae = state["W_enc"].shape
    sizes = {"num_layers": n, "activation_dim": d_hook, "dict_size": d_sae}
    for key, size in sizes.items():
        if key in trainer and whole(trainer[key], key, config) != size:
            raise UserError(f"{weights}: encoder.weight has {size} for {key}, {config.name} says {trainer[key]}; correct it")
    for name, shape in {"b_enc": (d_sae,), "W_dec": (n, d_sae, d_hook), "b_dec": (n, d_hook)}.items():
        if state[name].shape != shape:
            raise UserError(f"{weights}: {name} has shape {tuple(state[name].shape)}, expected {shape}")


def _with_threshold(
    tensors: dict[str, Tensor],
    n: int,
    kind: str,
    threshold: Tensor,
    trainer: dict[str, Any],
    weights: Path,
    config: Path,
) -> dict[str, Tensor]:
    """With the threshold of each latent's own activation; a negative one was never learnt and lets all pass."""
    threshold = floats({"threshold": threshold}, weights)["threshold"].clamp_min(0)
    if threshold.shape != ((n,) if kind == "DECOUPLED" else ()):
        raise UserError(f"{weights}: threshold has shape {tuple(threshold.shape)}, which is not {kind}'s")
    norms = hook_norms(tensors["W_dec"], n)
    if kind == "DECOUPLED":
        per_layer = threshold[:, None] / norms.clamp_min(_TINY)
        return hook_by_hook(tensors, n) | {"threshold": per_layer.flatten()}
    summed, whole_norm = norms.sum(0), tensors["W_dec"].norm(dim=1)
    if kind == "MIXED":
        alphas = {"sae": 1.0, "cc": 0.1}  # the library's own
        for name in alphas:
            key = f"code_normalization_alpha_{name}"
            alphas[name] = number(trainer.get(key, alphas[name]), key, config)
        weight = alphas["sae"] * whole_norm + alphas["cc"] * summed
    else:
        weight = {"CROSSCODER": summed, "SAE": whole_norm, "NONE": torch.ones_like(summed)}[kind]
    return tensors | {"threshold": threshold / weight.clamp_min(_TINY)}


def _normalization(buffers: dict[str, Tensor], trainer: dict[str, Any], weights: Path, config: Path) -> str:
    """The name, of the weights or, in older files without it, of the configuration; `CROSSCODER` where neither says."""
    said = text(trainer.get("code_normalization"), "code_normalization", config).upper()
    if said and said not in _NORMALIZATIONS:
        raise UserError(f"{config}: code_normalization {shown(said)} is not known; known: {', '.join(_NORMALIZATIONS)}")
    if "code_normalization_id" not in buffers:
        return said or "CROSSCODER"
    if buffers["code_normalization_id"].numel() != 1:
        raise UserError(f"{weights}: code_normalization_id is not one number")
    index = whole(buffers["code_normalization_id"].item(), "code_normalization_id", weights)
    if index > len(_NORMALIZATIONS):
        raise UserError(f"{weights}: code_normalization_id {index} is not known; known: 1 to {len(_NORMALIZATIONS)}")
    kept = _NORMALIZATIONS[index - 1]
    if said and said != kept:
        raise UserError(f"{weights}: code_normalization_id is {kept}'s, {config.name} says {said}; correct it")
    return kept


def _hooks(values: dict[str, Any], trainer: dict[str, Any], n: int, config: Path) -> list[str]:
    given = values.get("hook_names")
    if given is not None:
        if not isinstance(given, list) or len(given) != n:
            raise UserError(
                f"{config}: hook_names must be a list of {n} hooks, one a layer of the weights, not {shown(given)}"
            )
        return [hook_of(text(name, "hook_names", config), config) for name in given]
    if n != len(MODELS) or "layer" not in trainer:
        raise UserError(
            f"{config}: does not say what its {n} layers are; add hook_names, a list of their hooks in one model, such as "
            '"hook_names": ["blocks.8.hook_resid_post", ...]'
        )
    hook = hook_name(trainer, config)
    return [f"{model} {hook}" for model in MODELS]
