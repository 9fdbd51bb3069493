"""Dense products of a language model on the CPU, in float32, by oneDNN.

Torch's build multiplies with MKL, which on AMD's processors leaves speed unused (measured there: 78 to 94 GFLOP/s a core
with MKL, 103 to 107 with oneDNN, on shapes of a 576-wide model).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sae_research.lm.placement import change_class

MIN_ROWS = 64
"""Fewer rows than these stay with MKL: oneDNN rearranges the weights for every product."""


class _Product(torch.autograd.Function):
    """`x weight^T + bias` by oneDNN, differentiable in x alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,), (gradient,) = ctx.saved_tensors, gradients
        return torch.ops.mkldnn._linear_pointwise(gradient.contiguous(), weight.T, None, "none", [], ""), None, None


class _Linear(nn.Linear):
    """`nn.Linear` by oneDNN where its weights are not to be differentiated."""

    def forward(self, x: Tensor) -> Tensor:  # ty: ignore[lost-keyword-for-regular-parameter]
        learns = torch.is_grad_enabled() and self.weight.requires_grad
        few = x.numel() < MIN_ROWS * x.shape[-1]
        if x.device.type != "cpu" or x.dtype != torch.float32 or self.weight.dtype != torch.float32 or few or learns:
            return super().forward(x)
        if torch.is_grad_enabled() and x.requires_grad:
            return _Product.apply(x, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def use_onednn(model: nn.Module) -> None:
    """Let the linear layers of `model` multiply with oneDNN where this torch has it. Weights stay where they are, so
    that what changes them later needs to know nothing of this."""
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        for module in model.modules():
            if type(module) is nn.Linear:
                change_class(module, _Linear)
