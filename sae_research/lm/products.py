"""Dense float32 products on the CPU by oneDNN in place of MKL.

The CPU build of torch multiplies float32 matrices with MKL, which on AMD's processors leaves a part of their speed
unused: seen there, 78 to 94 GFLOP/s a core with MKL and 103 to 107 with oneDNN on the shapes of a 576-wide model.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MIN_ROWS = 64
"""Fewer rows than these stay with MKL: oneDNN rearranges the weights for every product."""


class _Linear(nn.Linear):
    """`nn.Linear` by oneDNN where nothing is to be differentiated."""

    def forward(self, x: Tensor) -> Tensor:
        if (x.device.type != "cpu" or x.dtype != torch.float32 or self.weight.dtype != torch.float32
                or x.numel() < MIN_ROWS * x.shape[-1]
                or torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)):
            return super().forward(x)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def use_onednn(model: nn.Module) -> None:
    """Let the linear layers of `model` multiply with oneDNN where this torch has it. Weights stay where they are, so
    that what changes them later needs to know nothing of this."""
    if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = _Linear
