"""How wide and how large a model's activations are at a hook: what settings made for raw activations translate by."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from sae_research.errors import UserError
from sae_research.params import Params

TOKENS = 4_096
"""Tokens that norms are measured on."""


class Scale(NamedTuple):
    """Activations at one hook."""

    d_in: int
    rms_norm: float
    """Root of the mean squared norm over tokens that count, model units."""


def measure(params: Params, hooks: Iterable[str]) -> dict[str, Scale]:
    """Width and norm at each hook, on the first training text. Runs the model on some thousand tokens.

    Raises `UserError` for a model, hook or text that is not there, and where no token counts.
    """
    from sae_research.lm import load_language_model, median_activation_norm, pick_device, token_mask
    from sae_research.precision import pass_dtype
    from sae_research.text.stream import token_contexts

    dtype = pass_dtype(params.train.llm_dtype, pick_device(params.model.device))
    lm = load_language_model(params.model.name, params.model.device, dtype)
    contexts = token_contexts(lm.tokenizer, lm.separator_id, params.text, "sae_train", min(TOKENS, params.train.tokens))
    scales = {}
    for hook in hooks:
        d_in, squares, count = lm.d_in(hook), 0.0, 0
        for tokens in contexts.tokens.split(params.model.llm_batch_size):
            acts = lm.activations(tokens.to(lm.device), hook).float().cpu()
            median = median_activation_norm(lm, tokens, acts)
            rows = acts[token_mask(lm, tokens, acts, params.token_mask, median)]
            squares, count = squares + float(rows.double().square().sum()), count + len(rows)
        if not count or not squares > 0:
            raise UserError(f"{hook} of {params.model.name}: no token of the first {contexts.tokens.numel():,} counts, or "
                            "all activations are zero")
        scales[hook] = Scale(d_in, (squares / count) ** 0.5)
    return scales
