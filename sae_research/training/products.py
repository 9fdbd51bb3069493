"""The dense matrix products of an SAE, in the run's precision: parameters, sums and what comes out stay float32.

bfloat16 halves what a product reads and, where processors have instructions for it, takes a third to a half of the time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function


def product(left: Tensor, right: Tensor, bfloat16: bool) -> Tensor:
    """`left right`, with autograd."""
    return (left.bfloat16() @ right.bfloat16()).float() if bfloat16 else left @ right


def linear(read_BD: Tensor, W_FD: Tensor, bias_F: Tensor | None, bfloat16: bool) -> Tensor:
    """`read W^T + bias` [B, F], without a graph."""
    if bfloat16:
        out_BF = torch.nn.functional.linear(read_BD.bfloat16(), W_FD.bfloat16()).float()
        return out_BF if bias_F is None else out_BF.add_(bias_F)
    return torch.nn.functional.linear(read_BD, W_FD, bias_F)


class _Encode(Function):
    """`read W^T + bias` with `read = x - b_dec`, x being data.

    With g the gradient [B, F]: dW = g^T read, dbias = g^T 1, and db_dec = -(g^T 1) W. Plain autograd would multiply
    out g W [B, D] for the last, a fifth of all work, only to sum it over tokens.
    """

    generate_vmap_rule = True  # `training.stack` maps recipes over SAEs

    @staticmethod
    def forward(read_BD: Tensor, W_FD: Tensor, bias_F: Tensor | None, b_dec_D: Tensor | None,
                known_BF: Tensor | None, bfloat16: bool) -> Tensor:
        return linear(read_BD, W_FD, bias_F, bfloat16) if known_BF is None else known_BF.view_as(known_BF)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        read_BD, W_FD, bias_F, b_dec_D, _, bfloat16 = inputs
        ctx.save_for_backward(read_BD, W_FD)
        ctx.bfloat16, ctx.has_bias, ctx.reads_b_dec = bfloat16, bias_F is not None, b_dec_D is not None

    @staticmethod
    def backward(ctx: Any, grad_BF: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        read_BD, W_FD = ctx.saved_tensors
        sum_F = grad_BF.sum(0) if ctx.has_bias or ctx.reads_b_dec else None
        return (None, product(grad_BF.T, read_BD, ctx.bfloat16), sum_F if ctx.has_bias else None,
                -(sum_F @ W_FD) if ctx.reads_b_dec else None, None, None)


def encode(x_BD: Tensor, W_FD: Tensor, bias_F: Tensor | None, b_dec_D: Tensor | None, bfloat16: bool,
           known_BF: Tensor | None = None) -> Tensor:
    """`(x - b_dec) W^T + bias` [B, F], or `x W^T + bias` without `b_dec_D`; gradients reach the parameters, not x.

    known_BF: the values, where they have been computed already.
    """
    read_BD = x_BD if b_dec_D is None else (x_BD - b_dec_D).detach()
    return _Encode.apply(read_BD, W_FD, bias_F, b_dec_D, known_BF, bfloat16)
