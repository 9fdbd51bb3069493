"""How the residual stream becomes logits: the unembedding and the gain of the norm before it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sae_research.errors import UserError
from sae_research.lm.model import LanguageModel

_FINAL_NORMS = ("norm", "final_layer_norm", "ln_f", "final_layernorm")


class Unembedding(NamedTuple):
    weight: Tensor
    """[vocab, d_model]"""
    gain: Tensor
    """What the final norm multiplies each dimension by [d_model]."""
    centred: bool
    """The final norm removes the mean over dimensions (LayerNorm)."""

    def logits(self, directions: Tensor) -> Tensor:
        """What directions [n, d_model] add to the logits [n, vocab], up to the norm's common scale: a logit lens."""
        rows = directions.float()
        if self.centred:
            rows = rows - rows.mean(-1, keepdim=True)
        return (rows * self.gain) @ self.weight.float().T


@torch.no_grad()
def unembedding(lm: LanguageModel) -> Unembedding:
    """A model's unembedding. The gain is asked of the norm itself, since families store it in their own ways (Gemma's
    weight is the gain less 1). Raises `UserError` for a model without output embeddings."""
    output = lm.model.get_output_embeddings()
    if output is None:
        raise UserError(f"{lm.name} has no output embedding")
    norm = next((module for name, module in lm.model.named_modules() if name.rpartition(".")[2] in _FINAL_NORMS
                 and not any(part.isdigit() for part in name.split("."))), None)
    gain = torch.ones(lm.d_model, device=lm.device)
    if norm is not None:
        signs = gain.to(lm.dtype).clone()  # of mean 0 and mean square 1, so that the norm changes no scale
        signs[1::2] = -1
        gain = ((norm(signs[None, None]) - norm(torch.zeros_like(signs)[None, None]))[0, 0] * signs).float()
    return Unembedding(output.weight, gain, isinstance(norm, nn.LayerNorm))
