"""Whitening of what an SAE is trained on (Saraswatula and Klindt 2025, "Data Whitening Improves Sparse Autoencoder
Learning", arXiv 2511.13981).

With mu and Sigma the mean and covariance of the run's first activations, normalised as all are, an SAE trains on

    x' = (x - mu) Z,    Z = ((1 - s) Sigma + s v I)^(-1/2) / sqrt(D),    v = trace(Sigma) / D,    s = SHRINKAGE

whose covariance is the identity over D, so that its mean square norm is 1 as that of all activations in training. Z is
symmetric (ZCA): of all maps that whiten it moves activations least; the paper's and SAELens' E diag(lambda)^(-1/2) is Z up
to a rotation. Where they add a constant to the eigenvalues, Sigma is drawn towards a multiple of the identity here: that
depends on no unit, and leaves white activations as they are. The loss is taken of whitened activations, as SAELens takes it.

The map is affine, so that it goes into the weights of the SAE that comes out (`Whitening.folded`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sae_research.runtime.errors import UserError
from sae_research.saes import SparseAutoencoder, form_class
from sae_research.saes.forms import as_subtracting, scale_latents
from sae_research.training.buffer import StreamingPCA

SHRINKAGE = 1e-3
"""Weight of the identity. Some directions have hardly any variance: their noise must not become as loud as the rest."""
RANKED = ("topk", "abs_topk")
"""Forms whose latents compete by their activations: only one factor for all of them leaves the winners as they are."""


class Whitening(nn.Module):
    """The map of one SAE, as buffers, so that checkpoints hold it. `fit` it once, before the SAE starts."""

    mean_D: Tensor
    matrix_DD: Tensor
    """Z above."""
    inverse_DD: Tensor

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.register_buffer("mean_D", torch.zeros(d_in))
        self.register_buffer("matrix_DD", torch.eye(d_in))
        self.register_buffer("inverse_DD", torch.eye(d_in))

    @torch.no_grad()
    def fit(self, rows_ND: Tensor) -> Tensor:
        """Measure on normalised activations [n, d_in]; returns them whitened. Raises `UserError` where there are no more
        rows than dimensions, or they do not vary."""
        n, d_in = rows_ND.shape
        if n <= d_in:
            raise UserError(
                f"train.saes: whiten measures a covariance of {d_in} dimensions on the first chunk of text, in which {n:,} "
                "tokens count; raise train.tokens or train.buffer_tokens"
            )
        sums = StreamingPCA(d_in, rows_ND.device)
        sums.update(rows_ND)
        mean_D, covariance_DD = sums.moments()
        variance = covariance_DD.diagonal().mean()
        if not variance > 0:
            raise UserError("train.saes: whiten: the first activations are all equal")
        values_D, vectors_DD = torch.linalg.eigh(covariance_DD)
        values_D = (1 - SHRINKAGE) * values_D.clamp_min(0) + SHRINKAGE * variance
        roots_D = (d_in * values_D).sqrt()
        self.mean_D.copy_(mean_D)
        self.matrix_DD.copy_((vectors_DD / roots_D) @ vectors_DD.T)
        self.inverse_DD.copy_((vectors_DD * roots_D) @ vectors_DD.T)
        return self(rows_ND)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Normalised activations [..., d_in], whitened."""
        return (x_BD - self.mean_D) @ self.matrix_DD

    def undone(self, difference_BD: Tensor) -> Tensor:
        """What a difference of whitened activations [..., d_in] is in normalised ones."""
        return difference_BD @ self.inverse_DD

    @torch.no_grad()
    def folded(self, sae: SparseAutoencoder, scale: float) -> SparseAutoencoder:
        """The SAE of activations in the model's units that does what `sae`, of a form with an encoder, does on whitened
        ones: the same latents on every token, the same reconstruction. scale: the factor of normalisation.

        It subtracts `b_dec`, which holds the mean. Its decoder rows have unit norm, as those of other trained SAEs; in forms
        of `RANKED` a mean norm of 1.
        """
        own = {name: tensor.double() for name, tensor in as_subtracting(sae, True).items()}
        matrix_DD, inverse_DD = (self.matrix_DD.cpu().double() * scale, self.inverse_DD.cpu().double() / scale)
        own |= {name: matrix_DD @ own[name] for name in ("W_enc", "W_gate") if name in own}
        own |= {"W_dec": own["W_dec"] @ inverse_DD, "b_dec": own["b_dec"] @ inverse_DD + self.mean_D.cpu().double() / scale}
        norms_F = own["W_dec"].norm(dim=1)
        factors_F = norms_F.mean().expand_as(norms_F) if sae.form in RANKED else norms_F
        own = scale_latents(sae.form, own, torch.where(norms_F > 0, factors_F, 1.0))
        tensors = {name: tensor.float().contiguous() for name, tensor in own.items()}
        cfg = sae.cfg.replace(apply_b_dec_to_input=True)
        return form_class(sae.form)(cfg=cfg, **tensors, **sae.options())
