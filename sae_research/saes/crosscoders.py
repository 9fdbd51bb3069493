"""Crosscoders: dictionaries that read and write several hooks of one model (Lindsey et al. 2024, "Sparse Crosscoders").

With x_i the activations at hook i, `z = act(sum_i x_i W_enc,i + b_enc)` and `x_hat_i = z W_dec,i + b_dec,i`. Side by side
these are the formulas of an SAE on [x_1, ..., x_n], so that every form of encoder serves: `W_enc` [n * d_hook, d_sae],
`W_dec` [d_sae, n * d_hook], `b_dec` [n * d_hook], in the order of `cfg.hook_names`.

A latent belongs to the hooks in which its decoders are long. Hooks differ in the length of their activations, so that norms
are taken in units in which every hook's mean square norm is 1 (`cfg.hook_scales`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.saes.base import SparseAutoencoder
from sae_research.saes.config import SAEConfig


def hook_norms(W_dec: Tensor, n_hooks: int) -> Tensor:
    """Norm of every latent's decoder at each hook [n_hooks, d_sae], with a graph. W_dec: [d_sae, n_hooks * d_hook]."""
    rows = W_dec.reshape(len(W_dec) * n_hooks, -1)  # the gradient of norms of matrix rows takes half the time of others
    return torch.linalg.vector_norm(rows, dim=1).reshape(-1, n_hooks).T


@torch.no_grad()
def decoder_norms(sae: SparseAutoencoder) -> Tensor:
    """Norm of every latent's decoder at each hook, in normalised units [n_hooks, d_sae]. Raises `UserError` for anything but
    a crosscoder."""
    cfg = sae.cfg
    if not cfg.is_crosscoder:
        raise UserError(f"decoder norms are compared between the hooks of a crosscoder; this has one ({cfg.hooks})")
    scales = torch.tensor(cfg.hook_scales, device=sae.W_dec.device)
    return hook_norms(sae.W_dec.float(), len(cfg.hook_names)) * scales[:, None]


@torch.no_grad()
def decoder_norm_ratios(sae: SparseAutoencoder) -> Tensor:
    """`|W_dec,i| / sum_j |W_dec,j|` in normalised units [n_hooks, d_sae]: each hook's share in a latent. Shares add up to 1;
    of a latent without a decoder they are NaN."""
    norms = decoder_norms(sae)
    return norms / norms.sum(0)


def side_by_side(W_enc: Tensor, W_dec: Tensor, b_dec: Tensor) -> dict[str, Tensor]:
    """Tensors of a crosscoder from those of its hooks. W_enc: [n_hooks, d_hook, d_sae]; W_dec: [n_hooks, d_sae, d_hook];
    b_dec: [n_hooks, d_hook]."""
    return {"W_enc": W_enc.flatten(0, 1), "W_dec": W_dec.transpose(0, 1).flatten(1), "b_dec": b_dec.flatten()}


def hook_by_hook(tensors: dict[str, Tensor], n_hooks: int) -> dict[str, Tensor]:
    """The same crosscoder with each latent as `n_hooks` latents, hook after hook, that are encoded alike and write one hook
    each: for those whose hooks have thresholds of their own. tensors: W_enc [n_hooks * d_hook, d_sae], b_enc [d_sae], W_dec
    [d_sae, n_hooks * d_hook], b_dec."""
    W_dec = tensors["W_dec"].new_zeros(n_hooks, *tensors["W_dec"].shape)
    for hook, own in enumerate(tensors["W_dec"].chunk(n_hooks, dim=1)):
        W_dec[hook].chunk(n_hooks, dim=1)[hook].copy_(own)
    repeated = {"W_enc": tensors["W_enc"].repeat(1, n_hooks), "b_enc": tensors["b_enc"].repeat(n_hooks)}
    return tensors | repeated | {"W_dec": W_dec.flatten(0, 1)}


def by_hook(acts: Tensor, cfg: SAEConfig) -> dict[str, Tensor]:
    """Activations at what is written, side by side [..., n * d_hook], by hook [..., d_hook]."""
    return dict(zip(cfg.hooks_out, acts.chunk(len(cfg.hooks_out), dim=-1), strict=True))


def normalised(acts: Tensor, cfg: SAEConfig) -> Tensor:
    """Activations side by side, in the model's units, in those in which all hooks count alike [..., n * d_hook]. Of anything
    but a crosscoder as they are."""
    if not cfg.is_crosscoder:
        return acts
    sides = by_hook(acts, cfg).values()
    return torch.cat([side * scale for side, scale in zip(sides, cfg.hook_scales, strict=True)], dim=-1)
