"""Recipe `matching_pursuit`: a dictionary trained through the greedy steps that encode with it (Costa et al. 2025)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from sae_research.config.params import Train
from sae_research.config.recipes import MatchingPursuitRecipe
from sae_research.saes import SAEConfig, SparseAutoencoder
from sae_research.saes.pursuit import matching
from sae_research.saes.pursuit.dictionary import Dictionary, unit_atoms
from sae_research.saes.pursuit.encoders import MPSAE
from sae_research.training.recipes.base import Recipe, StepOutput


class MatchingPursuit(Recipe):
    """Minimises `mean over tokens of |x - x_hat|^2`, x_hat by s steps of matching pursuit (arXiv 2506.03093).

    The choice of atoms has no gradient; coefficients and residuals do, through all steps. Unit rows. There is no
    encoder: `W_enc` and `b_enc` stay unused.
    """

    form = "matching_pursuit"
    clip_norm = 1.0
    stackable = False
    config: MatchingPursuitRecipe

    def __init__(self, d_in: int, config: MatchingPursuitRecipe, train: Train) -> None:
        super().__init__(d_in, config, train)
        del self.W_enc, self.b_enc

    @torch.no_grad()
    def initialise(self, rows_ND: Tensor, generator: torch.Generator) -> None:
        self.W_enc = self.W_dec  # what the base class writes to; an alias, gone again below
        try:
            super().initialise(rows_ND, generator)
        finally:
            del self.W_enc

    def fit_encoder(self, rows_ND: Tensor) -> None:
        """Nothing to fit."""

    def forward(self, x_BD: Tensor, progress: float, noise: Tensor | None) -> StepOutput:
        with torch.no_grad():
            # as MPSAE would choose, but for what it needs to be shared and kept: a hash of the dictionary's bytes
            dictionary = Dictionary(*unit_atoms(self.W_dec.detach(), signed=True))
            atoms_BS, _ = matching.pursue(x_BD - self.b_dec, dictionary, self.config.s)
        residual_BD = _Pursue.apply(x_BD - self.b_dec, self.W_dec, atoms_BS)
        l0 = torch.nn.functional.one_hot(atoms_BS[:64], len(self.W_dec)).amax(1).sum() / len(atoms_BS[:64])
        return StepOutput(residual_BD.square().sum() / len(x_BD), residual_BD.detach(), l0, atoms_BS.flatten())

    @torch.no_grad()
    def export(self, scale: float, cfg: SAEConfig, read_scale: float | None = None) -> SparseAutoencoder:
        cfg = cfg.replace(form=self.form, options={"s": self.config.s})
        return MPSAE(self.W_dec.detach().cpu().clone(), self.b_dec.detach().cpu() / scale, self.config.s, cfg)


# --- gradients through the pursuit -------------------------------------------------------------


class _Pursue(Function):
    """The residual after taking given atoms in turn: `r <- r - (r . w) w`, unrolled.

    With g the gradient after a step and c = r . w the coefficient: dw = -c g - (g . w) r, and before the step the
    gradient is g - (g . w) w. Residuals are not kept but rebuilt backwards: r = r' + c w.
    """

    @staticmethod
    def forward(ctx: Any, x_BD: Tensor, W_FD: Tensor, atoms_BS: Tensor) -> Tensor:
        residual_BD, coefficients = x_BD.clone(), []
        for atoms_B in atoms_BS.T:
            w_BD = W_FD[atoms_B]
            c_B1 = (residual_BD * w_BD).sum(1, keepdim=True)
            residual_BD.addcmul_(c_B1, w_BD, value=-1)
            coefficients.append(c_B1)
        ctx.save_for_backward(residual_BD, W_FD, atoms_BS, torch.stack(coefficients))
        return residual_BD.clone()

    @staticmethod
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Any, ...]:  # type: ignore[override]  # ty: ignore[incompatible-method-override]
        residual_BD, W_FD, atoms_BS, coefficients_SB1 = ctx.saved_tensors
        residual_BD, grad_BD, grad_W_FD = residual_BD.clone(), grad_BD.clone(), torch.zeros_like(W_FD)
        for atoms_B, c_B1 in zip(reversed(atoms_BS.T.unbind()), reversed(coefficients_SB1.unbind()), strict=True):
            w_BD = W_FD[atoms_B]
            residual_BD.addcmul_(c_B1, w_BD)
            along_B1 = (grad_BD * w_BD).sum(1, keepdim=True)
            grad_W_FD.index_add_(0, atoms_B, torch.addcmul(c_B1 * grad_BD, along_B1, residual_BD), alpha=-1)
            grad_BD.addcmul_(along_B1, w_BD, value=-1)
        return grad_BD, grad_W_FD, None
