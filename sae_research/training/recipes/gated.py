"""Recipe `gated`: the gated SAE of SAE-Interpretability."""

from __future__ import annotations

from sae_research.training.recipes.gated_rajamanoharan import GatedRajamanoharan


class Gated(GatedRajamanoharan):
    """The loss of `gated_rajamanoharan` under that framework's optimiser: Adam with momentum, gradients clipped to a
    norm of 1.

    Two things there are mended. It leaves decoder rows free and charges `ReLU(gate)` unweighted, so that growing a
    row and shrinking its gate lowers the penalty for nothing; rows have unit norm here. And it takes the mean over
    dimensions of the errors but not of the penalty, so that coefficients do not compare with its other recipes; here
    all are sums over dimensions, and `l1_coefficient` means what it does in `standard`.
    """

    betas = (0.9, 0.999)
    clip_norm = 1.0
