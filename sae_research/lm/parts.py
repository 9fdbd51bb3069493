"""What a layer's attention and MLP add to the residual stream, and what its MLP reads: found by running it, and checked.

Families differ in where `hook_mlp_out` and `hook_attn_out` are to be read: the output of the attention or MLP module itself
(most), of a norm after it (Gemma 2, OLMo 2, GLM-4), of a projection inside a module that returns the sum with the stream
(BLOOM, MPT), or one of those times a number (Granite, MiniCPM 3). No family is known by name here. The layer runs on a few
tokens; a pair of modules is taken when

- what layer L adds to the stream, `resid_post - resid_pre`, is the sum of their outputs, and
- with both outputs replaced by random vectors, what it adds is the sum of those vectors,

to the rounding of the model's precision. Where no pair holds, these two hooks are refused.

What the MLP reads is found the same way. Its norm is the module that puts out what the MLP is given, taken when

- that is n g + b, where n is the norm's input over its root mean square (with or without its mean), g and b its weight (or
  1 + weight) and bias, and
- with the norm's output replaced by random vectors the MLP is given those, and attention puts out what it did.

A hook whose check fails is refused.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|feed_?forward|moe", re.IGNORECASE)
_NEITHER = re.compile(r"norm|drop|^ln|^act", re.IGNORECASE)
_ROUNDINGS = 4
"""Roundings of a sum in the model's precision, relative to the sizes of what is summed, that count as equal."""


class Part(NamedTuple):
    """The stream receives `scale` times the output of `module`."""

    module: nn.Module
    scale: float


class Parts(NamedTuple):
    """What a layer's attention and MLP add; None for one that the layer lacks or that could not be told."""

    attention: Part | None
    mlp: Part | None
    problem: str
    """Why one is None, to follow "layer L ..."."""


class Affine(NamedTuple):
    """`value weight + bias`, dimension by dimension, of one token's value [d_model]; no weight is 0."""

    weight: Tensor
    bias: Tensor

    def apply(self, value: Tensor) -> Tensor:
        return (value.float() * self.weight.to(value.device) + self.bias.to(value.device)).to(value.dtype)

    def undo(self, value: Tensor) -> Tensor:
        return ((value.float() - self.bias.to(value.device)) / self.weight.to(value.device)).to(value.dtype)


class MLPInput(NamedTuple):
    """What a layer's MLP reads; None for what the layer lacks or could not be told."""

    mlp: nn.Module | None
    norm: nn.Module | None
    """Its output is what the MLP is given, and nothing else reads it."""
    affine: Affine | None
    """What the norm does to the normalised stream."""
    problem: str
    """Why one is None, to follow "layer L ..."."""


class _Call(NamedTuple):
    path: str
    module: nn.Module
    given: Tensor | None
    """Its first input [batch, seq, d_model], where it has that shape."""
    out: Tensor
    """Its output [batch, seq, d_model]"""


class _Run(NamedTuple):
    before: Tensor
    """The stream entering the layer [batch, seq, d_model]"""
    after: Tensor
    calls: list[_Call]
    """Modules inside that ran once and gave something of the stream's shape, in the order in which they ended."""


class _Stop(Exception):
    """Raised when the layer has run: later ones need not."""


@torch.no_grad()
def find_parts(layer: nn.Module, forward: Callable[[], Any]) -> Parts:
    """The parts of one layer. forward: runs the whole model on a few tokens."""
    run = _run(layer, forward, {})
    if run is None or run.before.shape != run.after.shape or run.before.dim() != 3:
        return Parts(None, None, "has no residual stream of one vector a token")
    attention, mlp = _group(run, layer, _ATTENTION), _group(run, layer, _MLP)
    for calls, scales in _pairs(run, attention, mlp, _numbers(layer)):
        one, two = (call and Part(call.module, scale) for call, scale in zip(calls, scales, strict=True))
        added: Any = sum(call.out.float() * scale for call, scale in zip(calls, scales, strict=True) if call)
        if _equal(run, added) and _edits_reach_the_stream(layer, forward, run, [part for part in (one, two) if part]):
            return Parts(one if attention else None, two, "has no MLP" if attention else "has no attention")
    if not attention and not mlp:
        return Parts(None, None, "has neither a module of attention nor an MLP")
    return Parts(
        None,
        None,
        "adds something else to the residual stream than its attention and its MLP put out"
        + (f" (relative error {_error(run, attention[0], mlp[0]):.2g})" if attention and mlp else ""),
    )


def _run(layer: nn.Module, forward: Callable[[], Any], replaced: dict[nn.Module, Tensor]) -> _Run | None:
    """Run the model up to the end of the layer, the outputs of the modules `replaced` being given tensors. None where the
    layer takes or returns no tensor."""
    stream: list[Tensor] = []
    calls: list[_Call] = []

    def entered(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        stream.extend(value.clone() for value in [_first((*args, *kwargs.values()))] if value is not None)

    def left(_: nn.Module, __: Any, output: Any) -> None:
        stream.extend(value.clone() for value in [_first(output)] if value is not None)
        raise _Stop

    def like_stream(value: Tensor | None) -> Tensor | None:
        """A copy in the stream's shape of what has it, or has its tokens one after another [batch * seq, d_model]."""
        shapes = (stream[0].shape, stream[0].flatten(0, -2).shape) if stream else ()
        return value.clone().view(stream[0].shape) if value is not None and value.shape in shapes else None

    def ended(path: str) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            first = _first(output)
            out = like_stream(first)
            if out is not None:
                calls.append(_Call(path, module, like_stream(_first((*args, *kwargs.values()))), out))
            if module not in replaced:
                return output
            value = replaced[module].view(first.shape).to(first.device, copy=True)  # Falcon adds to it in place
            return (value, *output[1:]) if isinstance(output, tuple) else value

        return hook

    with ExitStack() as stack:
        stack.callback(layer.register_forward_pre_hook(entered, with_kwargs=True).remove)
        for path, module in layer.named_modules():
            if path:
                stack.callback(module.register_forward_hook(ended(path), with_kwargs=True).remove)
        stack.callback(layer.register_forward_hook(left).remove)
        with suppress(_Stop):
            forward()
    once = [call for call in calls if sum(call.module is other.module for other in calls) == 1]
    return _Run(stream[0].to(stream[1].device), stream[1], once) if len(stream) == 2 else None


def _first(value: Any) -> Any:
    """The first tensor of what a module takes or returns; None where there is none."""
    if isinstance(value, tuple | list):
        return next((item for item in value if isinstance(item, Tensor)), None)
    return value if isinstance(value, Tensor) else None


def _kind(name: str, child: nn.Module) -> re.Pattern[str] | None:
    """`_ATTENTION` or `_MLP`: by the child's own name, else by its class's. Classes of a family carry its name, so that
    `Qwen3MoeAttention` would be both."""
    return next((kind for text in (name, type(child).__name__) for kind in (_ATTENTION, _MLP) if kind.search(text)), None)


def _group(run: _Run, layer: nn.Module, names: re.Pattern[str]) -> list[_Call]:
    """The layer's modules of one kind, then those that take over what these put out (norms), then those inside."""
    children = [name for name, child in layer.named_children() if not _NEITHER.search(name) and _kind(name, child) is names]
    roots = [call for call in run.calls if call.path in children]
    followers: list[_Call] = []
    for root in roots:
        last = root
        for call in run.calls[run.calls.index(root) + 1 :]:
            if call.given is not None and torch.equal(call.given, last.out):
                followers.append(call)
                last = call
    inside = [call for call in reversed(run.calls) if call.path.partition(".")[0] in children and "." in call.path]
    return [*roots, *followers, *inside]


def _numbers(layer: nn.Module) -> list[float]:
    """Numbers a layer holds that may scale what its parts put out."""
    values = (float(value) for value in vars(layer).values() if isinstance(value, float))
    return sorted({value for value in values if math.isfinite(value) and value not in (0.0, 1.0)})


def _pairs(
    run: _Run, attention: list[_Call], mlp: list[_Call], numbers: list[float]
) -> Iterator[tuple[tuple[_Call | None, _Call | None], tuple[float, float]]]:
    """Which modules might be the two parts, and their scales, the plainest first. Where a layer names no attention (a
    state space layer) or no MLP (OPT's two matrices), any other module may be that part, or none."""
    known = {call.path for call in (*attention, *mlp)}
    others = [call for call in reversed(run.calls) if call.path not in known]
    ones: list[_Call | None] = [*attention] if attention else [None, *others]
    twos: list[_Call | None] = [*mlp] if mlp else [None, *others]
    scales = [
        (1.0, 1.0),
        *((number, number) for number in numbers),
        *(pair for number in numbers for pair in ((number, 1.0), (1.0, number))),
    ]
    if attention or mlp:
        yield from ((pair, scale) for scale in scales for pair in itertools.product(ones, twos) if pair[0] is not pair[1])


def _equal(run: _Run, added: Tensor) -> bool:
    """Whether the layer added `added` [batch, seq, d_model] to every token, to rounding."""
    before, after = run.before.float(), run.after.float()
    gap = (after - before - added).norm(dim=-1)
    size = before.norm(dim=-1) + after.norm(dim=-1) + added.norm(dim=-1)
    return bool((gap <= _ROUNDINGS * torch.finfo(run.after.dtype).eps * size).all())


def _edits_reach_the_stream(layer: nn.Module, forward: Callable[[], Any], run: _Run, parts: list[Part]) -> bool:
    """Whether random vectors of the stream's own size, put in place of what the parts put out, are what the layer adds.

    In 16 bits this is what tells parts apart: their own outputs may be less than the rounding of a large stream.
    """
    generator = torch.Generator().manual_seed(0)
    size = run.before.float().norm(dim=-1, keepdim=True)
    replaced = {}
    for part in parts:
        noise = torch.randn(run.before.shape, generator=generator).to(size.device)
        replaced[part.module] = (noise / noise.norm(dim=-1, keepdim=True) * size / part.scale).to(run.before.dtype)
    edited, given = _run(layer, forward, replaced), [replaced[part.module].float() * part.scale for part in parts]
    return edited is not None and _equal(edited, torch.stack(given).sum(0))


def _error(run: _Run, one: _Call, two: _Call) -> float:
    added = (run.after.float() - run.before.float()).norm()
    return float((run.after.float() - run.before.float() - one.out.float() - two.out.float()).norm() / added)


@torch.no_grad()
def find_mlp_input(layer: nn.Module, forward: Callable[[], Any], parts: Parts) -> MLPInput:
    """What one layer's MLP reads. forward: runs the whole model on a few tokens; parts: of the layer."""
    run = _run(layer, forward, {})
    if run is None or parts.mlp is None or parts.attention is None:
        return MLPInput(None, None, None, parts.problem or "has no residual stream of one vector a token")
    mlp = next(iter(_group(run, layer, _MLP)), None)
    if mlp is None or "." in mlp.path or mlp.given is None:
        return MLPInput(None, None, None, "has no one module for its MLP that is given one vector a token")
    given = mlp.given
    norm = next((call for call in run.calls if call.given is not None and torch.equal(call.out, given)), None)
    if norm is None:
        return MLPInput(mlp.module, None, None, "hands no norm's output to its MLP")
    affine = _affine(norm)
    if affine is None:
        return MLPInput(mlp.module, None, None, "hands its MLP the output of something else than a norm with a weight")
    if not _feeds_the_mlp_alone(layer, forward, run, norm, mlp, parts.attention):
        return MLPInput(mlp.module, None, affine, "has one norm for attention and MLP")
    if not affine.weight.abs().min() > 0:
        return MLPInput(mlp.module, norm.module, None, "has a norm whose weight is 0 somewhere, so what it scaled is lost")
    return MLPInput(mlp.module, norm.module, affine, "")


def _affine(norm: _Call) -> Affine | None:
    """The weight and bias of a norm, checked: what it put out is made of its input by them."""
    assert norm.given is not None
    x = norm.given.float()
    own = getattr(norm.module, "weight", None)
    weight = own.float() if isinstance(own, Tensor) and own.shape == x.shape[-1:] else torch.ones_like(x[0, 0])
    own = getattr(norm.module, "bias", None)
    bias = own.float() if isinstance(own, Tensor) and own.shape == x.shape[-1:] else torch.zeros_like(weight)
    eps = next((float(value) for key, value in vars(norm.module).items() if "eps" in key and isinstance(value, float)), 0.0)
    rounding = _ROUNDINGS * torch.finfo(norm.out.dtype).eps
    for centred in (x, x - x.mean(dim=-1, keepdim=True)):
        normalised = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
        for scale in (weight, 1 + weight):
            if (normalised * scale + bias - norm.out.float()).norm() <= rounding * norm.out.float().norm():
                return Affine(scale, bias)
    return None


def _feeds_the_mlp_alone(
    layer: nn.Module, forward: Callable[[], Any], run: _Run, norm: _Call, mlp: _Call, attention: Part
) -> bool:
    """Whether random vectors in place of the norm's output are what the MLP is given, and attention puts out what it did."""
    noise = torch.randn(norm.out.shape, generator=torch.Generator().manual_seed(0)).to(norm.out)
    edited = _run(layer, forward, {norm.module: noise})
    if edited is None:
        return False
    now, before = ({call.module: call for call in one.calls} for one in (edited, run))
    given = now[mlp.module].given if mlp.module in now else None
    same = attention.module in now and torch.equal(now[attention.module].out, before[attention.module].out)
    return same and given is not None and torch.equal(given, noise)
