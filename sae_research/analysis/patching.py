"""The model run with SAEs in place: at several hooks at once, with or without their error terms, latents edited."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sae_research.analysis.context import Lab
from sae_research.analysis.store import check_latents
from sae_research.runtime.errors import UserError
from sae_research.saes import SparseAutoencoder

LatentEdit = Callable[[Tensor], Tensor]
"""From activations of latents [batch, seq, d_sae] to those that take their place."""


class Internals(NamedTuple):
    """What an SAE did in one run. All [batch, seq, ...] in the model's units."""

    input: Tensor
    """Activations of the model at the hook [batch, seq, d_in]."""
    pre: Tensor | None
    """`(x - b_dec) W_enc + b_enc`, before the nonlinearity; None for encoders without such a map."""
    post: Tensor
    """Activations of the latents [batch, seq, d_sae], before any edit."""
    reconstruction: Tensor
    """[batch, seq, d_in], of the unedited latents."""
    error: Tensor
    """input - reconstruction; zero where a token does not count."""
    output: Tensor
    """What the model went on with [batch, seq, d_in]."""
    mask: Tensor
    """Which tokens count [batch, seq]; the others keep the model's own activations."""


class Run(NamedTuple):
    """A run with SAEs in place."""

    logits: Tensor
    """[batch, seq, vocab]"""
    saes: dict[str, Internals]
    """By SAE name."""


@torch.no_grad()
def run_with_saes(lab: Lab, tokens: Tensor, error_term: bool = True, edits: Mapping[str, LatentEdit] | None = None) -> Run:
    """Run the model with every SAE of the lab in place.

    error_term: add what each SAE leaves unexplained, so that an unedited run equals the plain one. edits: by SAE name.
    Tokens that do not count (`token_mask`) keep the model's own activations. An SAE later in the model reads what the
    earlier ones left. Raises `UserError` when two SAEs share a hook, or a hook did not fire exactly once.
    """
    edits = edits or {}
    unknown = set(edits) - set(lab.saes)
    if unknown:
        raise UserError(f"no SAE {', '.join(sorted(unknown))}; there are {', '.join(lab.saes)}")
    seen: dict[str, Internals] = {}
    hooked = {
        hook: _replacement(lab, tokens, name, sae, error_term, edits.get(name), seen)
        for (hook, sae), name in zip(lab.one_hook_each().items(), lab.saes, strict=True)
    }
    logits = lab.lm.edited_logits(tokens, hooked)
    return Run(logits, {name: seen[name] for name in lab.saes})


def _replacement(
    lab: Lab,
    tokens: Tensor,
    name: str,
    sae: SparseAutoencoder,
    error_term: bool,
    edit: LatentEdit | None,
    seen: dict[str, Internals],
) -> Callable[[Tensor], Tensor]:
    def replace(x: Tensor) -> Tensor:
        x = x.float()
        mask = lab.mask(tokens, x)
        found = inspect_sae(sae, x, mask)
        x_hat = found.reconstruction
        if edit is not None:
            edited = sae.keep(edit(found.post.clone()), mask)
            x_hat = x_hat + (sae.decode(edited) - sae.decode(found.post))
        output = torch.where(mask[..., None], x_hat + found.error if error_term else x_hat, x)
        seen[name] = found._replace(output=output)
        return output

    return replace


@torch.no_grad()
def inspect_sae(sae: SparseAutoencoder, x: Tensor, mask: Tensor) -> Internals:
    """Everything inside an SAE on activations x [batch, seq, d_in]; `output` is the reconstruction where tokens count."""
    z = sae.encode(x, mask)
    x_hat = sae.decode(z).to(x.dtype)
    return Internals(
        x, pre_activations(sae, x), z, x_hat, (x - x_hat) * mask[..., None], torch.where(mask[..., None], x_hat, x), mask
    )


def pre_activations(sae: SparseAutoencoder, x: Tensor) -> Tensor | None:
    """`(x - b_dec) W_enc + b_enc` [batch, seq, d_sae]; None where an SAE encodes otherwise."""
    if not {"W_enc", "b_enc"} <= set(sae.tensor_names):
        return None
    W_enc, b_enc = sae.encoder_weights()
    return sae.centred(x) @ W_enc + b_enc


def zeroed(latents: Sequence[int], positions: Sequence[int] | None = None) -> LatentEdit:
    """An edit that sets latents to zero, at all positions or some."""
    chosen = torch.tensor(list(latents))

    def edit(z: Tensor) -> Tensor:
        where = slice(None) if positions is None else torch.tensor(list(positions), device=z.device)[:, None]
        z[:, where, chosen.to(z.device)] = 0
        return z

    return edit


def check_positions(positions: Sequence[int] | None, tokens: Tensor) -> list[int] | None:
    """Positions counted from the front. Raises `UserError` for one outside the prompt."""
    if positions is None:
        return None
    length = tokens.shape[1]
    for position in positions:
        if not -length <= position < length:
            raise UserError(f"position {position}: the prompt has positions 0 (the separator in front) to {length - 1}")
    return [position % length for position in positions]


def check_lab_latents(sae: SparseAutoencoder, latents: Sequence[int]) -> None:
    """Raises `UserError` for no latents, or one that the SAE does not have."""
    if not latents:
        raise UserError("name at least one latent")
    check_latents(latents, sae.cfg.d_sae)
