"""SAEs and transcoders of Llamascopium (before: Language-Model-SAEs) and of its Llama Scope releases.

| version | configuration | weights |
|---|---|---|
| first (Llama Scope) | `hyperparams.json` | `checkpoints/final.safetensors` |
| later | `config.json` | `sae_weights.safetensors` (or `.pt`), else `checkpoints/pruned` or `final` |

With f the factor sqrt(d_in) / (mean norm of the data) that activations are multiplied by (`dataset-wise`):
`pre = f_in x W_enc + b_enc`, `x_hat = (z W_dec + b_dec) / f_out`; latents are chosen by `pre |W_dec|` where
`sparsity_include_decoder_norm` says so. The factors stand with the weights, or in `hyperparams.json`; they are folded in. Of
the first version `jump_relu_threshold` is in units of the activations themselves, without f_in, as SAELens reads it.

Of a *crosscoder* every tensor has its hooks first: `W_E` [n_hooks, d_model, d_sae], `b_E` [n_hooks, d_sae] (they are added
up), `W_D` [n_hooks, d_sae, d_model], `b_D` [n_hooks, d_model], one factor a hook. JumpReLU holds `pre |W_D|` of each hook
against the threshold by itself, so that a latent may fire at one hook and not at another: it is read as one latent a hook,
which is encoded from all and writes that one. TopK chooses k latents at each hook, which no form here does.

Cross-layer transcoders are read by `llamascopium_cross_layer.py`. Its other types are refused: they are no SAE and no
transcoder of one layer.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_research.config.recipes import PLUS
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import read_settings
from sae_research.saes.base import SAEConfig, SparseAutoencoder
from sae_research.saes.crosscoders import hook_by_hook, side_by_side
from sae_research.saes.forms import fold_decoder_norms
from sae_research.saes.reading import (
    check_shapes,
    flag,
    floats,
    hook_of,
    load_checkpoint,
    load_safetensors,
    number,
    renamed,
    section,
    shown,
    text,
    whole,
)
from sae_research.saes.registry import form_class

FIRST_CONFIG, CONFIG_FILE = "hyperparams.json", "config.json"
WEIGHTS_FILES = (
    "sae_weights.safetensors",
    "sae_weights.pt",
    "checkpoints/pruned.safetensors",
    "checkpoints/pruned.pt",
    "checkpoints/final.safetensors",
    "checkpoints/final.pt",
)
"""In the order in which the library itself looks for them."""
LIBRARY = "llamascopium"
_NORM = "dataset_average_activation_norm"
NAMES = {
    "W_E": "W_enc",
    "b_E": "b_enc",
    "W_D": "W_dec",
    "b_D": "b_dec",
    "activation_function.log_jumprelu_threshold": "log_threshold",
}
_FIRST_NAMES = {
    "encoder.weight": "W_enc.T",
    "encoder.bias": "b_enc",
    "decoder.weight": "W_dec.T",
    "decoder.bias": "b_dec",
    "log_jumprelu_threshold": "log_threshold",
}
_FORMS = {"relu": "standard", "jumprelu": "jumprelu", "topk": "topk"}
PRESENT_KEYS = frozenset(
    "sae_type d_model expansion_factor use_decoder_bias act_fn norm_activation sparsity_include_decoder_norm top_k "
    "use_triton_kernel sparsity_threshold_for_triton_spmm_kernel jumprelu_threshold_window hook_point_in hook_point_out "
    "use_glu_encoder device dtype".split()
)
"""What a configuration of the present version holds."""
_REFUSED = ("use_glu_encoder", "apply_decoder_bias_to_pre_encoder", "apply_decoder_bias_to_pre_encoder_post_norm")
_EARLIER = frozenset({"d_sae", "jump_relu_threshold", _NORM, *_REFUSED})
_UNREAD = {
    "token-wise": "every token is scaled by its own norm",
    "batch-wise": "activations are scaled by the norms of the batch they stand in",
}


def load_llamascopium(
    folder: str | Path, model_name: str = "", factor: float | None = None, published: bool = False
) -> SparseAutoencoder:
    """Read one folder of either version. model_name: which its files do not say; factor: f_in, for weights that do not hold
    it; published: of a release, whose settings of training are those of its day. Raises `UserError` for a missing or damaged
    file, for what cannot be reproduced, and for a setting that is not known."""
    folder = Path(folder)
    path = folder / (FIRST_CONFIG if (folder / FIRST_CONFIG).exists() else CONFIG_FILE)
    values = read_settings(path)
    kind = text(values.get("sae_type"), "sae_type", path) or "sae"
    if kind == "crosscoder" and path.name == CONFIG_FILE:
        return _crosscoder(values, model_name, folder, path)
    if kind != "sae":
        raise UserError(f"{path}: sae_type {shown(kind)} is not read: it is no SAE and no transcoder of one layer")
    if not published and path.name != FIRST_CONFIG:
        check_keys(values, PRESENT_KEYS | _EARLIER, path)
    for key in _REFUSED:
        if flag(values.get(key) or False, key, path):
            raise UserError(f"{path}: {key} is not read; ask for it with such a file")
    weights, norms, state = loaded_weights(folder)
    hooks = [hook_of(text(values.get(key), key, path), path) for key in ("hook_point_in", "hook_point_out")]
    if not hooks[0]:
        raise UserError(f"{path}: hook_point_in is missing; add the hook that it reads")
    scales = factors(values, norms, hooks, factor, path, weights)
    return _built(values, state, hooks, scales, model_name, path, weights)


def loaded_weights(folder: Path) -> tuple[Path, dict[str, float], dict[str, Tensor]]:
    """(the weights file of a folder, norms of the data by hook, its other tensors)."""
    weights = next((folder / name for name in WEIGHTS_FILES if (folder / name).exists()), folder / WEIGHTS_FILES[0])
    loaded = load_safetensors(weights) if weights.suffix == ".safetensors" else _in_checkpoint(weights)
    return weights, *_split(loaded, weights)


def check_keys(values: dict[str, Any], known: frozenset[str], path: Path) -> None:
    """Raises `UserError` for a setting that is not known, unless it is off."""
    unknown = sorted(key for key, value in values.items() if key not in known and value not in (None, False))
    if unknown:
        raise UserError(f"{path}: holds {', '.join(unknown)[:120]}, which is not known; remove what changes no activation")


def _in_checkpoint(path: Path) -> dict[str, Tensor]:
    state = load_checkpoint(path).get("sae")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no state dict under `sae`, as Llamascopium writes it")
    return state


def _split(loaded: dict[str, Tensor], weights: Path) -> tuple[dict[str, float], dict[str, Tensor]]:
    """(norms of the data by hook, the other tensors)."""
    norms = {}
    for name in [name for name in loaded if name.startswith(f"{_NORM}.")]:
        tensor = loaded[name]
        if tensor.numel() != 1 or not tensor.is_floating_point():
            raise UserError(f"{weights}: {name} is not one number")
        norms[name.removeprefix(f"{_NORM}.")] = float(tensor)
    return norms, {name: tensor for name, tensor in loaded.items() if not name.startswith(f"{_NORM}.")}


def factors(
    values: dict[str, Any],
    norms: dict[str, float],
    hooks: list[str],
    factor: float | None,
    path: Path,
    weights: Path,
) -> tuple[float, float]:
    """(f_in, f_out) of one layer's hooks, read and written: 1 where activations are read as they are."""
    kind = text(values.get("norm_activation"), "norm_activation", path) or "dataset-wise"
    if kind in ("inference", "no-norm"):
        return 1.0, 1.0
    if kind != "dataset-wise":
        raise UserError(
            f"{path}: norm_activation {shown(kind)} cannot be folded into the weights: {_UNREAD.get(kind, 'unknown')}"
        )
    said = section(values.get(_NORM), _NORM, path)
    norms = norms | {hook: said[key] for hook, key in zip(hooks, ("in", "out"), strict=True) if hook and key in said}
    if factor is not None and hooks[1] in ("", hooks[0]) and hooks[0] not in norms:
        return factor, factor
    found = []
    for hook in (hooks[0], hooks[1] or hooks[0]):
        if hook not in norms or not number(norms[hook], _NORM, weights) > 0:
            raise UserError(
                f"{weights}: {_NORM} of {hook} is missing or not positive, by which activations are scaled; fetch the file "
                "again, or save it for inference in Llamascopium (save_pretrained(..., fold_activation_scale=True))"
            )
        found.append(math.sqrt(whole(values.get("d_model"), "d_model", path)) / float(norms[hook]))
    return found[0], found[1]


def _built(
    values: dict[str, Any],
    loaded: dict[str, Tensor],
    hooks: list[str],
    factors: tuple[float, float],
    model_name: str,
    path: Path,
    weights: Path,
) -> SparseAutoencoder:
    act = (text(values.get("act_fn"), "act_fn", path) or "relu").lower()
    if act not in _FORMS:
        mend = "; save it as JumpReLU in Llamascopium" if "batch" in act else ""
        raise UserError(f"{path}: act_fn {shown(act)} is not read: known are {', '.join(_FORMS)}{mend}")
    form, (f_in, f_out) = _FORMS[act], factors
    names = _FIRST_NAMES if "encoder.weight" in loaded else NAMES
    bias = flag(values.get("use_decoder_bias", True), "use_decoder_bias", path)
    left_out = {"log_threshold"} | ({"b_dec"} if not bias else set())
    optional = [theirs for theirs, ours in names.items() if ours in left_out]
    state = floats(renamed(loaded, names, weights, optional), weights)
    state.setdefault("b_dec", torch.zeros(state["W_dec"].shape[-1]))
    d_in = whole(values.get("d_model"), "d_model", path)
    d_sae = d_in * number(values.get("expansion_factor"), "expansion_factor", path)
    if "d_sae" in values and whole(values["d_sae"], "d_sae", path) != int(d_sae):
        raise UserError(f"{path}: d_sae is {values['d_sae']}, d_model times expansion_factor {d_sae:g}; correct one of them")
    check_shapes(state, d_in, int(d_sae), weights)
    state |= _threshold(state.pop("log_threshold", None), values, act, f_in, int(d_sae), path, weights)
    by_norm = flag(values.get("sparsity_include_decoder_norm", True), "sparsity_include_decoder_norm", path)
    state = _folded(form, state, by_norm and path.name != FIRST_CONFIG, f_in, f_out)
    transcoder = hooks[1] not in ("", hooks[0])
    cfg = SAEConfig(
        form=form,
        d_in=d_in,
        d_sae=int(d_sae),
        model_name=model_name,
        hook_name=hooks[0],
        hook_out=hooks[1] if transcoder else "",
        context_size=1024,
        apply_b_dec_to_input=False,
        options={"k": whole(values.get("top_k"), "top_k", path)} if form == "topk" else {},
        provenance={"format": LIBRARY},
    )
    try:
        return form_class(form).from_tensors(cfg, state)
    except UserError as error:
        raise UserError(f"{weights}: {error}") from None


def _threshold(
    log: Tensor | None, values: dict[str, Any], act: str, f_in: float, d_sae: int, path: Path, weights: Path
) -> dict[str, Tensor]:
    """The thresholds, in units of what the encoder gives for scaled activations; none where there is no JumpReLU."""
    said = values.get("jump_relu_threshold")
    if act != "jumprelu":
        if log is not None:
            raise UserError(f"{weights}: holds thresholds, and act_fn is {act}; correct the one that is wrong")
        return {}
    if log is not None:
        return {"threshold": log.exp()}
    if said is None:
        raise UserError(f"{weights}: lacks log_jumprelu_threshold, and {path.name} jump_relu_threshold; fetch it again")
    return {"threshold": torch.full((d_sae,), number(said, "jump_relu_threshold", path) * f_in)}


def _folded(form: str, state: dict[str, Tensor], by_norm: bool, f_in: float, f_out: float) -> dict[str, Tensor]:
    """Activations in the model's own units. by_norm: latents are chosen by activation times norm of the decoder's row, so
    that thresholds are of that."""
    norms_F = state["W_dec"].norm(dim=1)
    norms_F = torch.where(norms_F > 0, norms_F, torch.ones_like(norms_F))
    if by_norm:
        state = {
            **state,
            "W_enc": state["W_enc"] * norms_F,
            "b_enc": state["b_enc"] * norms_F,
            "W_dec": state["W_dec"] / norms_F[:, None],
        }
    state = {**state, "W_enc": state["W_enc"] * f_in, "W_dec": state["W_dec"] / f_out, "b_dec": state["b_dec"] / f_out}
    # without norms in its ranking, a TopK SAE with rescaled rows would choose other latents
    return state if form == "topk" and not by_norm else fold_decoder_norms(form, state)


# --- crosscoders -----------------------------------------------------------------------------

CROSSCODER_KEYS = PRESENT_KEYS - {"hook_point_in", "hook_point_out", "use_glu_encoder"} | {"hook_points"}
"""What a crosscoder's configuration holds."""


def _crosscoder(values: dict[str, Any], model_name: str, folder: Path, path: Path) -> SparseAutoencoder:
    check_keys(values, CROSSCODER_KEYS, path)
    for key in ("sparsity_include_decoder_norm", "use_decoder_bias"):
        if not flag(values.get(key, True), key, path):
            raise UserError(f"{path}: {key} must be true for a crosscoder")
    act = (text(values.get("act_fn"), "act_fn", path) or "relu").lower()
    if act not in ("relu", "jumprelu"):
        mend = "save it as JumpReLU in Llamascopium (its runners.topk_to_jumprelu_conversion)"
        raise UserError(f"{path}: act_fn {shown(act)} of a crosscoder chooses latents at each hook; {mend}")
    points = values.get("hook_points")
    if not isinstance(points, list) or len(points) < 2:
        raise UserError(f"{path}: hook_points must be a list of two or more hooks, not {shown(points)}")
    hooks = [hook_of(text(point, "hook_points", path), path) for point in points]
    weights, norms, loaded = loaded_weights(folder)
    names = {theirs: ours for theirs, ours in NAMES.items() if act == "jumprelu" or ours != "log_threshold"}
    state = floats(renamed(loaded, names, weights), weights)
    d_hook = whole(values.get("d_model"), "d_model", path)
    d_sae = int(d_hook * number(values.get("expansion_factor"), "expansion_factor", path))
    n = len(hooks)
    shapes = {"W_enc": (n, d_hook, d_sae), "b_enc": (n, d_sae), "W_dec": (n, d_sae, d_hook), "b_dec": (n, d_hook)}
    for name, shape in {**shapes, "log_threshold": (d_sae,)}.items():
        if name in state and state[name].shape != shape:
            raise UserError(f"{weights}: {name} has shape {tuple(state[name].shape)}, expected {shape} for {n} hooks")
    scales = tuple(factors(values, norms, [hook, ""], None, path, weights)[0] for hook in hooks)
    scale_H11 = torch.tensor(scales)[:, None, None]
    tensors = side_by_side(state["W_enc"] * scale_H11, state["W_dec"] / scale_H11, state["b_dec"] / scale_H11[:, 0])
    tensors["b_enc"] = state["b_enc"].sum(0)
    form = "standard"
    if act == "jumprelu":
        form, tensors = "jumprelu", hook_by_hook(tensors, n)
        norms_HF = state["W_dec"].norm(dim=2).clamp_min(_TINY)
        tensors["threshold"] = (state["log_threshold"].exp() / norms_HF).flatten()
    cfg = SAEConfig(
        form=form,
        d_in=n * d_hook,
        d_sae=len(tensors["W_dec"]),
        model_name=model_name,
        hook_name=PLUS.join(hooks),
        hook_scales=scales,
        context_size=1024,
        apply_b_dec_to_input=False,
        provenance={"format": LIBRARY},
    )
    try:
        return form_class(form).from_tensors(cfg, fold_decoder_norms(form, tensors))
    except UserError as error:
        raise UserError(f"{weights}: {error}") from None


_TINY = 1e-30
