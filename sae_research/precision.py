"""Which precisions a device multiplies fast."""

from __future__ import annotations

import torch


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are any faster there: elsewhere they are emulated, and slow."""
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
