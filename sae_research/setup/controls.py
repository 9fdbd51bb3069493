"""Controls: dictionaries nobody trained, as rows of every table, so that a metric can be read against
nothing.

`random` and `data_rows` are read by matching pursuit, since they have no encoder; `pca` is linear. All share one sample of
activations of the SAE-training split.

Those of a transcoder go through a linear map that least squares fits on that sample. With M [d_in, d_out] from what it reads
to what it writes, `pca` has the leading principal components of x M, which of all maps of that rank have the least squared
error (reduced-rank regression). `random` and `data_rows` are rows of the read hook, each standing for what the map from
their own reconstructions to what is written makes of it: M itself blows up what pursuit leaves out. Two more have no latents
at all: `linear_map` is M, as a skip, and `skip` is the transcoder's own skip. What a transcoder explains beyond them is what
its latents are for.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sae_research.config.params import Params
from sae_research.config.recipes import PLUS
from sae_research.lm import LanguageModel, collect_hooks, median_activation_norm, token_mask
from sae_research.runtime.errors import UserError
from sae_research.saes import SAEConfig, SparseAutoencoder
from sae_research.saes.forms import LinearSAE, StandardSAE
from sae_research.saes.pursuit.encoders import MPSAE
from sae_research.saes.pursuit.mapped import MappedMPSAE
from sae_research.text.tokens import token_contexts

ENCODED_AT_ONCE = 2048
"""Tokens."""


def sample_activations(lm: LanguageModel, hook: str, params: Params, n_tokens: int) -> Tensor:
    """Activations of counted tokens of the SAE-training split [tokens, d_in], float32 on the CPU."""
    return sample_pairs(lm, hook, hook, params, n_tokens)[0]


def sample_pairs(lm: LanguageModel, read: str, written: str, params: Params, n_tokens: int) -> tuple[Tensor, Tensor]:
    """As `sample_activations`, of tokens that count at both hooks: [tokens, d_in] and [tokens, d_out]; several hooks joined
    by `PLUS` lie side by side."""
    contexts = token_contexts(lm.tokenizer, lm.separator_id, params.text, "sae_train", n_tokens)
    sides = read.split(PLUS), written.split(PLUS)
    hooks = list(dict.fromkeys([*sides[0], *sides[1]]))
    pools = collect_hooks(lm, hooks, contexts.tokens, params.model.llm_batch_size, params.activation_caching)
    mask, found = torch.ones_like(contexts.tokens, dtype=torch.bool), {}
    for hook in hooks:
        acts = found[hook] = pools[hook].flat.float().reshape(*contexts.tokens.shape, -1)
        median = median_activation_norm(lm, contexts.tokens, acts, contexts.counted)
        mask = mask & token_mask(lm, contexts.tokens, acts, params.token_mask, median, contexts.counted)
    x_TD = torch.cat([found[hook][mask] for hook in sides[0]], dim=1)
    return x_TD, x_TD if read == written else torch.cat([found[hook][mask] for hook in sides[1]], dim=1)


def make_control(
    kind: str,
    size: int,
    x_TD: Tensor,
    base: SAEConfig,
    params: Params,
    y_TO: Tensor | None = None,
    skip: Tensor | None = None,
) -> SparseAutoencoder:
    """One control (`random`, `data_rows` or `pca`; of a transcoder also `linear_map` or `skip`) for the baseline's width,
    hooks and model. size: matching-pursuit steps, or components.

    x_TD: activations [tokens, d_in] as `sample_activations` gives them; y_TO: those that a transcoder writes [tokens,
    d_out]; skip: its own `W_skip` [d_out, d_in].
    """
    if base.center_input:
        x_TD = x_TD - x_TD.mean(dim=1, keepdim=True)
    mean_D = x_TD.double().mean(dim=0).float()
    seed = params.random_seed
    cfg = control_config(kind, base, params, len(x_TD))
    if y_TO is not None:
        return _of_transcoder(kind, size, x_TD, y_TO, skip, cfg, seed)
    if kind == "pca":
        return pca(x_TD, mean_D, size, cfg)
    rows = _rows(kind, x_TD, mean_D, base, seed)
    return MPSAE(rows, mean_D, size, cfg.replace(form=MPSAE.form, options={"s": size}))


def control_config(kind: str, base: SAEConfig, params: Params, n_tokens: int) -> SAEConfig:
    """The baseline's configuration as a control's, made of a sample of so many tokens."""
    return base.replace(
        apply_b_dec_to_input=not base.is_transcoder,
        architecture="control",
        role="control",
        base=None,
        options={},
        provenance={"source": "control", "kind": kind, "seed": params.random_seed, "sample_tokens": n_tokens},
    )


def _rows(kind: str, x_TD: Tensor, mean_D: Tensor, cfg: SAEConfig, seed: int) -> Tensor:
    return random_rows(cfg.d_sae, cfg.d_in, seed) if kind == "random" else data_rows(x_TD, mean_D, cfg.d_sae, seed)


def _of_transcoder(
    kind: str, size: int, x_TD: Tensor, y_TO: Tensor, skip: Tensor | None, cfg: SAEConfig, seed: int
) -> SparseAutoencoder:
    mean_D, mean_O = (values.double().mean(dim=0) for values in (x_TD, y_TO))
    if kind == "skip":
        assert skip is not None
        return skip_alone(skip.double().T, mean_D, mean_O, cfg)
    map_DO = linear_map(x_TD, y_TO)
    if kind == "linear_map":
        return skip_alone(map_DO, mean_D, mean_O, cfg)
    if kind == "pca":
        vectors_ON = _leading((x_TD.double() - mean_D) @ map_DO, size).T
        W_enc = map_DO @ vectors_ON
        return LinearSAE(
            cfg.replace(form=LinearSAE.form, d_sae=size),
            W_enc=W_enc.float(),
            b_enc=-(mean_D @ W_enc).float(),
            W_dec=vectors_ON.T.float().contiguous(),
            b_dec=mean_O.float(),
        )
    rows_FD = _rows(kind, x_TD, mean_D.float(), cfg, seed)
    read_TD = _pursued(rows_FD, mean_D.float(), size, x_TD)
    map_DO = linear_map(read_TD, y_TO)
    return MappedMPSAE(
        cfg.replace(form=MappedMPSAE.form, options={"s": size}),
        s=size,
        W_enc=rows_FD.T.contiguous(),
        b_in=mean_D.float(),
        W_dec=(rows_FD.double() @ map_DO).float(),
        b_dec=(mean_O + (mean_D - read_TD.double().mean(dim=0)) @ map_DO).float(),
    )


@torch.no_grad()
def _pursued(rows_FD: Tensor, mean_D: Tensor, steps: int, x_TD: Tensor) -> Tensor:
    """Reconstructions by matching pursuit over unit rows [tokens, d_in]."""
    sae = MPSAE(rows_FD, mean_D, steps)
    return torch.cat([sae.reconstruct(part[None])[0] for part in x_TD.split(ENCODED_AT_ONCE)])


def linear_map(x_TD: Tensor, y_TO: Tensor) -> Tensor:
    """Least squares from `x - mean(x)` to `y - mean(y)`, [d_in, d_out], float64; of least norm where x has no variance."""
    x, y = (values.double() - values.double().mean(dim=0) for values in (x_TD, y_TO))
    inverse = np.linalg.pinv((x.T @ x).numpy(), rcond=1e-10, hermitian=True)
    return torch.from_numpy(inverse) @ (x.T @ y)


def skip_alone(map_DO: Tensor, mean_D: Tensor, mean_O: Tensor, cfg: SAEConfig) -> StandardSAE:
    """A transcoder that is nothing but a skip, right on average. It has one latent, since every dictionary has, which never
    fires."""
    nothing = torch.zeros(cfg.d_in, 1), torch.zeros(1, cfg.d_out)
    return StandardSAE(
        cfg.replace(form=StandardSAE.form, d_sae=1),
        W_enc=nothing[0],
        b_enc=torch.zeros(1),
        W_dec=nothing[1],
        b_dec=(mean_O - mean_D @ map_DO).float(),
        W_skip=map_DO.T.float().contiguous(),
    )


def random_rows(d_sae: int, d_in: int, seed: int) -> Tensor:
    """Directions drawn uniformly from the sphere: unit rows [d_sae, d_in]."""
    rows = torch.randn(d_sae, d_in, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.normalize(rows, dim=1)


def data_rows(x_TD: Tensor, mean_D: Tensor, d_sae: int, seed: int) -> Tensor:
    """Unit rows [d_sae, d_in]: activations of different random tokens, less the mean. Nothing is trained."""
    centred_TD = x_TD - mean_D
    norms_T = centred_TD.norm(dim=1)
    usable = (norms_T > 0).nonzero()[:, 0]
    if len(usable) < d_sae:
        raise UserError(
            f"control data_rows: only {len(usable)} counted tokens for {d_sae} rows; give more text or loosen token_mask"
        )
    order = torch.randperm(len(usable), generator=torch.Generator().manual_seed(seed))
    chosen = usable[order[:d_sae]]
    return centred_TD[chosen] / norms_T[chosen, None]


def pca(x_TD: Tensor, mean_D: Tensor, components: int, cfg: SAEConfig) -> LinearSAE:
    """Projection on the leading principal components of the sample, in float64."""
    rows = _leading((x_TD - mean_D).double(), components).float().contiguous()
    return LinearSAE(
        cfg.replace(form=LinearSAE.form, d_sae=components),
        W_enc=rows.T.contiguous(),
        W_dec=rows,
        b_enc=torch.zeros(components),
        b_dec=mean_D,
    )


def _leading(centred_TD: Tensor, components: int) -> Tensor:
    """Unit rows [components, d]: the leading principal components of what has mean zero, float64."""
    # numpy's solver was seen to be five to ten times faster than torch's on a busy machine
    _, vectors = np.linalg.eigh((centred_TD.T @ centred_TD).numpy())  # ascending
    rows = torch.from_numpy(vectors).T.flip(0)[:components]
    # An eigenvector's sign is free; fixed so that its largest entry is positive, the same on every machine.
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    return rows * largest.sign()
