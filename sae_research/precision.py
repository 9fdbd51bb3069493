"""Which precisions a device multiplies fast."""

from __future__ import annotations

import torch


def pass_dtype(wanted: str, device: torch.device) -> str:
    """Precision of a language model's pass: float32 where bfloat16 is wanted and the device only emulates it, which takes
    tens of times as long; said in a line."""
    if wanted != "bfloat16" or has_bfloat16(device):
        return wanted
    print(f"train.llm_dtype: bfloat16 is emulated on this {device.type} device; the model's pass stays float32", flush=True)
    return "float32"


def has_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products are any faster there: elsewhere they are emulated, and slow."""
    if device.type == "cpu":
        return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
