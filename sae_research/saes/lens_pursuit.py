"""Matching pursuit as SAELens has it, where it is not what our own forms compute."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_research.errors import UserError
from sae_research.saes.base import SAEConfig, SparseAutoencoder
from sae_research.saes.reading import flag, number, whole


class LensPursuitSAE(SparseAutoencoder):
    """Greedy steps a token, as SAELens' `matching_pursuit` takes them: the atom of largest positive correlation with what
    is left, that correlation added to its activation.

    Atoms are used as they are: SAELens starts at unit norm and lets training change it. A token is done once a step
    leaves the set of its latents as it was (`stop_on_duplicate_support`), or once the norm of what is left, in units of
    the activations, is below `residual_threshold` (0: never). `nonnegative_matching_pursuit` is this with unit atoms and
    neither of the two, and much faster.
    """

    form = "sae_lens_matching_pursuit"
    tensor_names = ("W_dec", "b_dec")
    option_names = ("max_iterations", "residual_threshold", "stop_on_duplicate_support")

    def __init__(self, cfg: SAEConfig | None = None, *, max_iterations: int, residual_threshold: float,
                 stop_on_duplicate_support: bool, **tensors: Tensor) -> None:
        super().__init__(cfg, **tensors)
        self.max_iterations = whole(max_iterations, "max_iterations", self.form)
        self.residual_threshold = number(residual_threshold, "residual_threshold", self.form)
        self.stop_on_duplicate_support = flag(stop_on_duplicate_support, "stop_on_duplicate_support", self.form)
        if self.max_iterations > max(self.cfg.d_in, self.cfg.d_sae):
            raise UserError(f"{self.form}: max_iterations = {max_iterations} is more than it has dimensions and latents")

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        left_ND = self.centred(x).reshape(-1, self.cfg.d_in)
        z_NF = left_ND.new_zeros(len(left_ND), self.cfg.d_sae)
        open_N = torch.arange(len(left_ND), device=x.device) if mask is None else mask.reshape(-1).nonzero()[:, 0]
        left_KD = left_ND[open_N]
        for _ in range(self.max_iterations):
            if not len(open_N):
                break
            atom_K = (left_KD @ self.W_dec.T).relu().argmax(dim=1)
            value_K = (left_KD * self.W_dec[atom_K]).sum(dim=1).relu()
            new_K = (value_K > 0) & (z_NF[open_N, atom_K] == 0)
            z_NF[open_N, atom_K] += value_K
            left_KD = left_KD - value_K[:, None] * self.W_dec[atom_K]
            going_K = new_K if self.stop_on_duplicate_support else value_K > 0
            if self.residual_threshold > 0:
                going_K = going_K & (left_KD.norm(dim=1) >= self.residual_threshold)
            open_N, left_KD = open_N[going_K], left_KD[going_K]
        return z_NF.reshape(*x.shape[:-1], self.cfg.d_sae)
