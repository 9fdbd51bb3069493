"""Hook points by their TransformerLens names, found in Hugging Face decoders.

| name | tensor |
|---|---|
| `blocks.L.hook_resid_pre`  | residual stream entering layer L  [batch, seq, d_model] |
| `blocks.L.hook_resid_post` | residual stream leaving layer L |
| `blocks.L.hook_mlp_out`    | what the MLP adds to the stream |
| `blocks.L.hook_attn_out`   | what attention adds to the stream |
| `blocks.L.attn.hook_z`     | heads' outputs before the output projection, flattened [batch, seq, n_heads * d_head] |

Where a layer's attention and MLP hand over what they add is `parts.py`'s to find and to check.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

from torch import nn

from sae_research.lm.parts import Parts
from sae_research.runtime.errors import UserError

_PATTERN = re.compile(r"blocks\.(0|[1-9][0-9]{0,5})\.(hook_(?:resid_pre|resid_post|mlp_out|attn_out)|attn\.hook_z)")
_ATTENTION_NAMES = ("self_attn", "attention", "attn", "self_attention")
_PROJECTION_NAMES = ("o_proj", "out_proj", "dense", "c_proj")


class HookPoint(NamedTuple):
    """Where a hook attaches: `module`'s input (`before`) or output, times `scale`."""

    layer: int
    kind: str
    module: nn.Module
    before: bool
    scale: float = 1.0


def parse_hook(name: str) -> tuple[int, str]:
    """(layer, kind) of a hook name. Raises `UserError` for anything else."""
    match = _PATTERN.fullmatch(name)  # one spelling for a hook: SAEs at it are grouped by name
    if match is None:
        raise UserError(
            f"unknown hook {name!r}; known: blocks.L.hook_resid_pre, blocks.L.hook_resid_post, "
            "blocks.L.hook_mlp_out, blocks.L.hook_attn_out, blocks.L.attn.hook_z"
        )
    return int(match[1]), match[2]


def find_layers(model: nn.Module, n_layers: int) -> nn.ModuleList:
    """The decoder's own list of layers: the `nn.ModuleList` of that length that holds the most parameters."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if not lists:
        raise UserError(f"{type(model).__name__}: found no list of {n_layers} decoder layers to hook")
    return max(lists, key=lambda m: sum(p.numel() for p in m.parameters()))


def locate(layers: nn.ModuleList, name: str, parts: Callable[[int], Parts]) -> HookPoint:
    """The module a hook name stands for. parts: gives what a layer's attention and MLP add to the stream. Raises
    `UserError` when the model has no such layer or part."""
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
    found = parts(index)
    part = found.attention if kind == "hook_attn_out" else found.mlp
    if part is None:
        raise UserError(
            f"hook {name}: layer {index} ({type(layer).__name__}) {found.problem}; use hook_resid_pre or hook_resid_post"
        )
    return HookPoint(index, kind, part.module, False, part.scale)


def _part(module: nn.Module, names: tuple[str, ...], hook: str) -> nn.Module:
    for name in names:
        if isinstance(getattr(module, name, None), nn.Module):
            return getattr(module, name)
    raise UserError(f"hook {hook}: {type(module).__name__} has none of {', '.join(names)}")
