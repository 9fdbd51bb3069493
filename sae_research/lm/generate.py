"""Text sampled from a model whose activations are edited at every step, and how the residual stream becomes logits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sae_research.lm.model import LanguageModel
from sae_research.lm.placement import weight
from sae_research.runtime.errors import UserError


@torch.no_grad()
def sample(
    lm: LanguageModel,
    tokens: Tensor,
    n_tokens: int,
    seeds: Sequence[int],
    temperature: float = 0.7,
    top_p: float = 0.9,
    edits: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
    top_k: int | None = None,
) -> Tensor:
    """Continuations [len(seeds), n_tokens] of one prompt [1, seq], each from its own seed.

    `edits` pass the prompt's activations [batch, seq, d_in] and then, at every step, those of the token just generated
    [batch, 1, d_in]; each is checked to have happened exactly once in every pass. Equal seeds meet equal noise whatever
    the edits (one uniform number a step, read off the cumulated probabilities), so that texts differ by the edit alone.
    temperature 0 takes the likeliest token. What follows an end-of-text token means nothing: the caller cuts there.
    """
    from transformers import DynamicCache

    noise = torch.stack([torch.rand(n_tokens, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    past = DynamicCache(config=lm.model.config.get_text_config())
    step, ids = tokens.expand(len(seeds), -1).to(lm.device), []
    for number in range(n_tokens):
        last = torch.tensor([step.shape[1] - 1])
        logits = lm.edited_logits(step, edits or {}, last, past)[:, -1]
        ids.append(choose(logits.float(), noise[:, number].to(logits.device), temperature, top_p, top_k))
        step = ids[-1][:, None]
    return torch.stack(ids, dim=1)


def until_end(lm: LanguageModel, ids: Tensor) -> list[int]:
    """Generated ids [seq] up to the first that ends the text."""
    ends = {lm.separator_id, lm.tokenizer.eos_token_id}
    return list(itertools.takewhile(lambda token: token not in ends, ids.tolist()))


def choose(logits: Tensor, noise: Tensor, temperature: float, top_p: float, top_k: int | None = None) -> Tensor:
    """A token for each row [batch] of logits [batch, vocab], by one number in [0, 1) each: nucleus sampling, of the `top_k`
    likeliest tokens where it is given."""
    if temperature == 0:
        return logits.argmax(-1)
    p, order = (logits / temperature).softmax(-1).sort(descending=True)
    if top_k is not None:
        p = p[:, :top_k] / p[:, :top_k].sum(-1, keepdim=True)
    before = p.cumsum(-1) - p
    p = torch.where(before < top_p, p, 0)
    p[:, 0] = p[:, 0].clamp_min(1e-30)
    cumulated = p.cumsum(-1)
    place = (cumulated < (noise * cumulated[:, -1])[:, None]).sum(-1)
    return order.gather(1, place[:, None])[:, 0]


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
    norm = next(
        (
            module
            for name, module in lm.model.named_modules()
            if name.rpartition(".")[2] in _FINAL_NORMS and not any(part.isdigit() for part in name.split("."))
        ),
        None,
    )
    gain = torch.ones(lm.d_model, device=lm.device)
    if norm is not None:
        signs = gain.to(lm.dtype).clone()  # of mean 0 and mean square 1, so that the norm changes no scale
        signs[1::2] = -1
        gain = ((norm(signs[None, None]) - norm(torch.zeros_like(signs)[None, None]))[0, 0] * signs).float()
    return Unembedding(weight(output, lm.device), gain.to(lm.device), isinstance(norm, nn.LayerNorm))
