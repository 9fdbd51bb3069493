"""SAELens' `temporal` architecture, and the checkpoints it comes from: `conf.yaml` with `latest_ckpt.safetensors`."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.saes.reading import floats, number, shown, whole

_PARTS = {"k_ctx": "key", "q_target": "query", "v_ctx": "value", "c_proj": "out"}
_ATTENTION = re.compile(r"attn_layers\.([0-9]{1,3})\.(k_ctx|q_target|v_ctx|c_proj)\.(weight|bias)")
_EPSILON = 1e-6


def temporal(values: dict[str, Any], tensors: dict[str, Tensor], where: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(options, tensors) of our form from SAELens' settings and weights, with the factors on what it reads folded in: it
    multiplies activations by `activation_normalization_factor`, and encodes 1 / (4 d_in) of them."""
    d_in, d_sae = values["d_in"], values["d_sae"]
    normalisation = values.get("normalize_activations") or "none"
    if normalisation not in ("none", "constant_scalar_rescale"):
        raise UserError(
            f"{where}: normalize_activations = {shown(normalisation)} of a temporal SAE is not supported; SAELens' releases "
            "have constant_scalar_rescale"
        )
    scale = number(values.get("activation_normalization_factor", 1.0), "activation_normalization_factor", where)
    scale = 1.0 if normalisation == "none" else scale
    if not scale > 0:
        raise UserError(f"{where}: activation_normalization_factor must be positive, not {scale:g}")
    state = floats(tensors, where)
    attention = _attention(state, values, where)
    tied = values.get("tied_weights", True)
    missing = [name for name in ("W_dec", "b_dec", *(() if tied else ("W_enc",))) if name not in state]
    if missing:
        raise UserError(f"{where}: weights lack {', '.join(missing)} for the architecture temporal")
    if tied and "W_enc" in state:
        raise UserError(f"{where}: the weights hold W_enc, and the configuration says tied_weights; correct one of them")
    W_enc = state["W_dec"].T if tied else state["W_enc"]
    if tuple(state["W_dec"].shape) != (d_sae, d_in) or tuple(W_enc.shape) != (d_in, d_sae):
        raise UserError(
            f"{where}: W_enc has shape {tuple(W_enc.shape)} and W_dec {tuple(state['W_dec'].shape)}, expected "
            f"{(d_in, d_sae)} and {(d_sae, d_in)}"
        )
    b_dec = state["b_dec"]
    if tied and not values.get("apply_b_dec_to_input", True):  # it then adds none either
        b_dec = torch.zeros_like(b_dec)
    kind, k = values.get("sae_diff_type", "topk"), values.get("kval_topk")
    if kind not in ("relu", "topk"):
        raise UserError(f"{where}: sae_diff_type {shown(kind)} is not known; known: relu, topk")
    options = {
        "k": 0 if kind == "relu" or k is None else whole(k, "kval_topk", where),
        "heads": whole(values.get("n_heads", 8), "n_heads", where),
        "epsilon": _EPSILON / scale,
    }
    folded = {
        "W_enc": (W_enc * (scale / (4 * d_in))).contiguous(),
        "W_dec": state["W_dec"] / scale,
        "b_dec": b_dec / scale,
    }
    return options, {**folded, **attention}


def _attention(state: dict[str, Tensor], values: dict[str, Any], where: str) -> dict[str, Tensor]:
    """The layers of attention, one tensor a part; all of them, and nothing else beside the matrices and `b_dec`."""
    layers = whole(values.get("n_attn_layers", 1), "n_attn_layers", where)
    parts: dict[str, dict[int, Tensor]] = {}
    for name, tensor in state.items():
        if match := _ATTENTION.fullmatch(name):
            parts.setdefault(f"{_PARTS[match[2]]}_{match[3]}", {})[int(match[1])] = tensor
        elif name not in ("W_enc", "W_dec", "b_dec"):
            raise UserError(f"{where}: the weights also hold {name[:60]}, which the architecture temporal does not use")
    wanted = {f"{part}_{kind}" for part in _PARTS.values() for kind in ("weight", "bias")}
    if set(parts) != wanted or any(sorted(found) != list(range(layers)) for found in parts.values()):
        raise UserError(
            f"{where}: weights lack a part of attn_layers, of which n_attn_layers says {layers}; fetch them again"
        )
    width = parts["key_weight"][0].shape[0]
    factor = whole(values.get("bottleneck_factor", 64), "bottleneck_factor", where)
    if width != values["d_sae"] // factor:
        raise UserError(
            f"{where}: bottleneck_factor {factor} makes {values['d_sae'] // factor} dimensions of keys, the weights have "
            f"{width}"
        )
    try:
        return {name: torch.stack([found[layer] for layer in range(layers)]) for name, found in parts.items()}
    except RuntimeError:
        raise UserError(f"{where}: its attn_layers are not of one shape") from None
