"""Hook points by their TransformerLens names, found in Hugging Face decoders.

| name | tensor |
|---|---|
| `blocks.L.hook_resid_pre`  | residual stream entering layer L  [batch, seq, d_model] |
| `blocks.L.hook_resid_post` | residual stream leaving layer L |
| `blocks.L.hook_mlp_out`    | what the MLP adds to the stream |
| `blocks.L.hook_attn_out`   | what attention adds to the stream |
| `blocks.L.attn.hook_z`     | heads' outputs before the output projection, flattened [batch, seq, n_heads * d_head] |
| `blocks.L.hook_mlp_in`     | the stream as the MLP's branch takes it, before the norm |
| `blocks.L.ln2.hook_normalized` | that, normalised, before the norm's weight and bias |
| `blocks.L.mlp.hook_in`     | what the MLP itself is given, after them (circuit-tracer's name) |

Which modules these are `lm/parts.py` finds, and checks at the first use.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from sae_research.lm.parts import Affine, MLPInput, Parts
from sae_research.runtime.errors import UserError

KINDS = (
    "hook_resid_pre",
    "attn.hook_z",
    "hook_attn_out",
    "hook_mlp_in",
    "ln2.hook_normalized",
    "mlp.hook_in",
    "hook_mlp_out",
    "hook_resid_post",
)
"""What a layer computes, in order."""
_PATTERN = re.compile(r"blocks\.(0|[1-9][0-9]{0,5})\.(" + "|".join(map(re.escape, KINDS)) + ")")
_READ_BY_MLP = ("hook_mlp_in", "ln2.hook_normalized", "mlp.hook_in")
_ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention")
_PROJECTION_NAMES = ("o_proj", "out_proj", "dense", "c_proj")


class HookPoint(NamedTuple):
    """Where a hook attaches: `module`'s input (`before`) or output, times `scale`."""

    layer: int
    kind: str
    module: nn.Module
    before: bool
    scale: float = 1.0
    affine: Affine | None = None
    """The hook's value is what an affine map made this of."""


def parse_hook(name: str) -> tuple[int, str]:
    """(layer, kind) of a hook name. Raises `UserError` for anything else."""
    match = _PATTERN.fullmatch(name)  # one spelling for a hook: SAEs at it are grouped by name
    if match is None and _PATTERN.fullmatch(name.partition(" ")[2]):
        raise UserError(
            f"hook {name!r} is that of one of two models: a crosscoder of a base model and its finetune is not evaluated on "
            "one model; transfer.crosscoder trains and studies such ones"
        )
    if match is None:
        raise UserError(f"unknown hook {name!r}; known: {', '.join(f'blocks.L.{kind}' for kind in KINDS)}")
    return int(match[1]), match[2]


def check_pair(read: str, written: str) -> None:
    """Raises `UserError` for hooks that are no transcoder's: of two layers, or the written one not after the read one."""
    (layer, kind), (layer_out, kind_out) = parse_hook(read), parse_hook(written)
    if layer != layer_out:
        raise UserError(
            f"it reads {read} and writes {written}: a transcoder's hooks belong to one layer; correct the one that is wrong"
        )
    if KINDS.index(kind) >= KINDS.index(kind_out):
        raise UserError(
            f"it reads {read}, which the model computes after {written}, which it writes; are the two exchanged?"
        )


def find_layers(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """The decoder's own list of layers: the `nn.ModuleList` of that length that holds the most parameters."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if not lists:
        raise UserError(f"{type(model).__name__}: found no list of {n_layers} decoder layers to hook")
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))


def locate(
    layers: nn.ModuleList, name: str, parts: Callable[[int], Parts], mlp_input: Callable[[int], MLPInput]
) -> HookPoint:
    """The module a hook name stands for. parts, mlp_input: give what a layer's attention and MLP add to the stream, and what
    its MLP reads. Raises `UserError` when the model has no such layer or part."""
    index, kind = parse_hook(name)
    if index >= len(layers):
        raise UserError(f"hook {name}: the model has layers 0 to {len(layers) - 1}")
    layer = layers[index]
    if kind == "hook_resid_pre":
        return HookPoint(index, kind, layer, True)
    if kind == "hook_resid_post":
        return HookPoint(index, kind, layer, False)
    if kind == "attn.hook_z":
        attention = _part(layer, _ATTENTION_NAMES, name)
        nested = getattr(attention, "attention", attention)  # GPT-Neo wraps its attention once more
        return HookPoint(index, kind, _part(nested, _PROJECTION_NAMES, name), True)
    if kind in _READ_BY_MLP:
        return _read_by_mlp(index, kind, mlp_input(index), f"hook {name}: layer {index} ({type(layer).__name__})")
    found = parts(index)
    part = found.attention if kind == "hook_attn_out" else found.mlp
    if part is None:
        raise UserError(
            f"hook {name}: layer {index} ({type(layer).__name__}) {found.problem}; use hook_resid_pre or hook_resid_post"
        )
    return HookPoint(index, kind, part.module, False, part.scale)


def _read_by_mlp(index: int, kind: str, found: MLPInput, where: str) -> HookPoint:
    if found.mlp is None:
        raise UserError(f"{where} {found.problem}; use hook_resid_pre")
    if kind == "mlp.hook_in":
        return HookPoint(index, kind, found.mlp, True)
    if found.norm is None or (kind == "ln2.hook_normalized" and found.affine is None):
        raise UserError(f"{where} {found.problem}; use mlp.hook_in")
    if kind == "hook_mlp_in":
        return HookPoint(index, kind, found.norm, True)
    return HookPoint(index, kind, found.mlp, True, affine=found.affine)


def _part(module: nn.Module, names: tuple[str, ...], hook: str) -> nn.Module:
    for name in names:
        if isinstance(getattr(module, name, None), nn.Module):
            return getattr(module, name)
    raise UserError(f"hook {hook}: {type(module).__name__} has none of {', '.join(names)}")
