"""Controls: dictionaries nobody trained, as rows of every table, so that a metric can be read against
nothing.

`random` and `data_rows` are read by matching pursuit, since they have no encoder; `pca` is linear. All three
share one sample of activations of the SAE-training split.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sae_research.config.params import Params
from sae_research.lm import LanguageModel, collect, median_activation_norm, token_mask
from sae_research.runtime.errors import UserError
from sae_research.saes import SAEConfig, SparseAutoencoder
from sae_research.saes.forms import LinearSAE
from sae_research.saes.pursuit.encoders import MPSAE
from sae_research.text.tokens import token_contexts


def sample_activations(lm: LanguageModel, hook: str, params: Params, n_tokens: int) -> Tensor:
    """Activations of counted tokens of the SAE-training split [tokens, d_in], float32 on the CPU."""
    contexts = token_contexts(lm.tokenizer, lm.separator_id, params.text, "sae_train", n_tokens)
    pool = collect(lm, hook, contexts.tokens, params.model.llm_batch_size, params.activation_caching)
    acts = pool.flat.float().reshape(*contexts.tokens.shape, -1)
    median = median_activation_norm(lm, contexts.tokens, acts, contexts.counted)
    mask = token_mask(lm, contexts.tokens, acts, params.token_mask, median, contexts.counted)
    return acts[mask]


def make_control(kind: str, size: int, x_TD: Tensor, base: SAEConfig, params: Params) -> SparseAutoencoder:
    """One control (`random`, `data_rows` or `pca`) for the baseline's width, hook and model. size: matching-pursuit steps,
    or components.

    x_TD: activations [tokens, d_in] as `sample_activations` gives them.
    """
    if base.center_input:
        x_TD = x_TD - x_TD.mean(dim=1, keepdim=True)
    mean_D = x_TD.double().mean(dim=0).float()
    seed = params.random_seed
    cfg = base.replace(
        apply_b_dec_to_input=True,
        architecture="control",
        role="control",
        base=None,
        options={},
        provenance={"source": "control", "kind": kind, "seed": seed, "sample_tokens": len(x_TD)},
    )
    if kind == "pca":
        return pca(x_TD, mean_D, size, cfg)
    rows = random_rows(base.d_sae, base.d_in, seed) if kind == "random" else data_rows(x_TD, mean_D, base.d_sae, seed)
    return MPSAE(rows, mean_D, size, cfg.replace(form=MPSAE.form, options={"s": size}))


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
    centred = (x_TD - mean_D).double()
    # numpy's solver was seen to be five to ten times faster than torch's on a busy machine
    _, vectors = np.linalg.eigh((centred.T @ centred).numpy())  # ascending
    rows = torch.from_numpy(vectors).T.flip(0)[:components]
    # An eigenvector's sign is free; fixed so that its largest entry is positive, the same on every machine.
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    rows = (rows * largest.sign()).float().contiguous()
    return LinearSAE(
        cfg.replace(form=LinearSAE.form, d_sae=components),
        W_enc=rows.T.contiguous(),
        W_dec=rows,
        b_enc=torch.zeros(components),
        b_dec=mean_D,
    )
