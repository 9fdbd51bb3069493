"""Cross-layer transcoders of Llamascopium: `config.json` with `sae_type: clt`, weights as for its SAEs (`llamascopium.py`).

| tensor | shape | |
|---|---|---|
| `W_E`, `b_E` | [layers, d_in, d_sae], [layers, d_sae] | |
| `W_D.m` | [m + 1, d_sae, d_out] | into layer m from each layer up to it |
| `b_D.m` | [d_out] | |
| `activation_function.log_jumprelu_threshold` | [layers, d_sae] | JumpReLU |

With f the factor sqrt(d_model) / (mean norm of the data at a hook) (`dataset-wise`): `pre = f_l x_l W_E,l + b_E,l`, latents
are chosen by `pre` times the norm of all their decoders together where `sparsity_include_decoder_norm` says so, and what is
decoded into layer m is divided by f_m. All of it is folded in.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.runtime.files import read_settings
from sae_research.saes.base import SparseAutoencoder
from sae_research.saes.cross_layer import LayerWeights, of_layers
from sae_research.saes.formats.llamascopium import (
    CONFIG_FILE,
    FIRST_CONFIG,
    LIBRARY,
    NAMES,
    PRESENT_KEYS,
    check_keys,
    factors,
    load_llamascopium,
    loaded_weights,
)
from sae_research.saes.reading import flag, floats, hook_of, number, renamed, shown, text, whole

CLT = "clt"
CROSS_LAYER_KEYS = frozenset(
    "init_cross_layer_decoder_all_zero hook_points_in hook_points_out decode_with_csr sparsity_threshold_for_csr".split()
) | (PRESENT_KEYS - {"hook_point_in", "hook_point_out", "use_glu_encoder"})
"""What a configuration of the present version holds."""
_ACTIVATIONS = ("relu", "jumprelu", "topk")


def load_any(folder: str | Path) -> SparseAutoencoder:
    """Read one folder of Llamascopium, a cross-layer transcoder or what `load_llamascopium` reads."""
    path = Path(folder) / CONFIG_FILE
    if not (Path(folder) / FIRST_CONFIG).exists() and read_settings(path).get("sae_type") == CLT:
        return load_cross_layer(folder)
    return load_llamascopium(folder)


def load_cross_layer(folder: str | Path, model_name: str = "") -> SparseAutoencoder:
    """Read one folder. model_name: which its files do not say. Raises `UserError` for a missing or damaged file, for what
    cannot be reproduced, and for a setting that is not known."""
    path = Path(folder) / CONFIG_FILE
    values = read_settings(path)
    check_keys(values, CROSS_LAYER_KEYS, path)
    act = (text(values.get("act_fn"), "act_fn", path) or "relu").lower()
    if act not in _ACTIVATIONS:
        raise UserError(
            f"{path}: act_fn {shown(act)} is not read: it chooses among the latents of all layers or of a whole batch, of "
            "which a running model knows some alone; save it as JumpReLU in Llamascopium"
        )
    hooks = _hooks(values, path)
    weights, norms, tensors = loaded_weights(Path(folder))
    scales = [factors(values, norms, list(pair), None, path, weights) for pair in hooks]
    state = _state(values, act, tensors, len(hooks), weights)
    k = whole(values.get("top_k"), "top_k", path) if act == "topk" else None
    by_norm = flag(values.get("sparsity_include_decoder_norm", True), "sparsity_include_decoder_norm", path)
    layers = [_layer(state, layer, scales, by_norm) for layer in range(len(hooks))]
    sizes = (whole(values.get("d_model"), "d_model", path), number(values.get("expansion_factor"), "expansion_factor", path))
    expected = (sizes[0], int(sizes[0] * sizes[1]))
    if tuple(layers[0].W_enc.shape) != expected:
        raise UserError(
            f"{weights}: W_E of a layer has shape {tuple(layers[0].W_enc.shape)}, expected {expected} of {path.name}"
        )
    return of_layers(layers, hooks, weights, model_name, LIBRARY, k=k, context_size=1024)


def _hooks(values: dict[str, Any], path: Path) -> list[tuple[str, str]]:
    found = []
    for key in ("hook_points_in", "hook_points_out"):
        names = values.get(key)
        if not isinstance(names, list) or not names:
            raise UserError(f"{path}: {key} must be a list of hooks, one a layer, not {shown(names)}")
        found.append([hook_of(text(name, key, path), path) for name in names])
    if len(found[0]) != len(found[1]):
        raise UserError(f"{path}: {len(found[0])} hooks are read and {len(found[1])} written; one a layer each")
    return list(zip(*found, strict=True))


def _state(values: dict[str, Any], act: str, tensors: dict[str, Tensor], n: int, where: Path) -> dict[str, Tensor]:
    """The tensors in float32 by the library's names, thresholds as they compare with."""
    decoders = [f"{name}.{layer}" for name in ("W_D", "b_D") for layer in range(n)]
    if not flag(values.get("use_decoder_bias", True), "use_decoder_bias", where.parent / CONFIG_FILE):
        tensors = {
            **{f"b_D.{m}": torch.zeros(tensors[f"W_D.{m}"].shape[-1]) for m in range(n) if f"W_D.{m}" in tensors},
            **tensors,
        }
    log = next(theirs for theirs, ours in NAMES.items() if ours == "log_threshold")
    names = {name: name for name in ("W_E", "b_E", *decoders, *([log] if act == "jumprelu" else []))}
    state = floats(renamed(tensors, names, where), where)
    if log in state:
        state["threshold"] = state.pop(log).exp()
    d_sae, d_in = state["b_E"].shape[-1], state["W_E"].shape[1] if state["W_E"].dim() == 3 else 0
    expected: dict[str, tuple[int, ...]] = {"W_E": (n, d_in, d_sae), "b_E": (n, d_sae), "threshold": (n, d_sae)}
    expected |= {f"W_D.{m}": (m + 1, d_sae, state["b_D.0"].numel()) for m in range(n)}
    for name, shape in expected.items():
        if name in state and tuple(state[name].shape) != shape:
            raise UserError(f"{where}: {name} has shape {tuple(state[name].shape)}, expected {shape} for {n} layers")
    return state


def _layer(state: dict[str, Tensor], layer: int, scales: list[tuple[float, float]], by_norm: bool) -> LayerWeights:
    """One layer in the model's own units. by_norm: latents are chosen by activation times the norm of all their decoders, so
    that thresholds are of that."""
    W_enc, b_enc = state["W_E"][layer], state["b_E"][layer]
    decoders = [state[f"W_D.{m}"][layer] for m in range(layer, len(scales))]
    threshold = state["threshold"][layer] if "threshold" in state else None
    if by_norm:
        norms = torch.stack([rows.square().sum(1) for rows in decoders]).sum(0).sqrt()
        norms = torch.where(norms > 0, norms, 1.0)
        W_enc, b_enc, decoders = W_enc * norms, b_enc * norms, [rows / norms[:, None] for rows in decoders]
    f_in = scales[layer][0]
    return LayerWeights(
        W_enc,
        b_enc / f_in,
        [rows * f_in / f_out for rows, (_, f_out) in zip(decoders, scales[layer:], strict=True)],
        state[f"b_D.{layer}"] / scales[layer][1],
        None if threshold is None else threshold / f_in,
    )
