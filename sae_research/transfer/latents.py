"""Every latent of an SAE on two models: sums of its activations on the same tokens, and what follows from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from sae_research.transfer.sums import counted, sums_dtype

EPSILON = 1e-10
"""Added before a logarithm in the published error of dead latents."""


class Active(NamedTuple):
    """Activations and where they are not zero."""

    dense: Tensor
    """[n, d_sae]"""
    rows: Tensor
    """Token of each non-zero entry [entries]."""
    latents: Tensor
    values: Tensor
    """float64 (float32 on MPS)."""


def active(z: Tensor) -> Active:
    """z: [n, d_sae]."""
    rows, latents = z.nonzero(as_tuple=True)
    return Active(z, rows, latents, z[rows, latents].to(sums_dtype(z.device)))


class PairMoments:
    """Additive sums over pairs (a, b) of activations of each latent, from the non-zero ones alone.

    A latent is zero on most tokens: sums of a, a^2, b, b^2 need the non-zero entries, sums of a*b those of a, and so every
    latent is scored at the cost of the active ones.
    """

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.n = 0
        (self.a, self.b, self.aa, self.bb, self.ab, self.fires_a, self.fires_b, self.fires_both,
         self.log_error) = torch.zeros(9, d_sae, dtype=sums_dtype(device), device=device)

    @torch.no_grad()
    def update(self, a: Active, b: Active, partner: Tensor | None = None, log_error: bool = False) -> None:
        """Add tokens. partner: the row of b that each row of a goes with [n], a permutation; by default its own.
        log_error: also |log10(a + 1e-10) - log10(b + 1e-10)|, for encoders without a sign."""
        self.n += len(a.dense)
        others = b.dense[a.rows if partner is None else partner[a.rows], a.latents].to(self.a.dtype)
        one = torch.ones((), dtype=self.a.dtype, device=self.a.device)
        self._add(a.latents, a=a.values, aa=a.values.square(), ab=a.values * others, fires_a=one.expand(len(others)),
                  fires_both=(others != 0).to(others.dtype))
        self._add(b.latents, b=b.values, bb=b.values.square(), fires_b=one.expand(len(b.values)))
        if log_error:
            self._add(a.latents, log_error=_log_gap(a.values, others))
            alone = a.dense[b.rows, b.latents] == 0
            self._add(b.latents[alone], log_error=_log_gap(torch.zeros_like(b.values[alone]), b.values[alone]))

    def _add(self, latents: Tensor, **terms: Tensor) -> None:
        for name, values in terms.items():
            getattr(self, name).index_add_(0, latents, values)

    @property
    def pearson(self) -> Tensor:
        """Correlation of a and b over all tokens [d_sae]; NaN where one of them is constant."""
        n = max(self.n, 1)
        var_a, var_b = self.aa - self.a.square() / n, self.bb - self.b.square() / n
        # what is left of a constant by rounding is no variance
        varied = (var_a > 1e-12 * self.aa) & (var_b > 1e-12 * self.bb)
        r = (self.ab - self.a * self.b / n) / (var_a * var_b).clamp_min(0).sqrt()
        return torch.where(varied, r.clamp(-1, 1), torch.nan)

    @property
    def jaccard(self) -> Tensor:
        """Tokens on which both fire over tokens on which either does [d_sae]; NaN where neither ever does."""
        either = self.fires_a + self.fires_b - self.fires_both
        return torch.where(either > 0, self.fires_both / either, torch.nan)

    @property
    def mean_log_error(self) -> Tensor:
        """Mean over tokens of |log10(a + 1e-10) - log10(b + 1e-10)| [d_sae]."""
        return self.log_error / max(self.n, 1)


def _log_gap(a: Tensor, b: Tensor) -> Tensor:
    return ((a.clamp_min(0) + EPSILON).log10() - (b.clamp_min(0) + EPSILON).log10()).abs()


class LatentMoments:
    """The pairs a transfer is judged by, on one set of tokens.

    - `models`: base and finetuned model on the same token.
    - `shuffled`: the base model with the finetuned one on another token of the batch, drawn at random.
    - `halves`: the base model with itself, contexts of even number with those of odd number at the same position: what
      latents that only follow the position, or fire nearly always, reach without any relation; its counts are the two
      halves' densities, whose difference is what sampling alone makes.
    """

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.models, self.shuffled, self.halves = (PairMoments(d_sae, device) for _ in range(3))

    def update(self, a: Tensor, b: Tensor, shuffle: Tensor, signed: bool) -> None:
        """a, b: [n, d_sae] on the same tokens; shuffle: a permutation [n]."""
        one, other = active(a), active(b)
        self.models.update(one, other, log_error=not signed)
        self.shuffled.update(one, other, partner=shuffle)

    def update_halves(self, even: Tensor, odd: Tensor) -> None:
        """even, odd: the base model's activations in two contexts at the same positions [n, d_sae]."""
        self.halves.update(active(even), active(odd))


ACTIVATION_EDGES = [x / 10 for x in range(-40, 61)]
"""log10 of |activation|, from 1e-4 to 1e6."""


class ActivationHistogram:
    """Histogram of the non-zero activations' sizes of all latents together."""

    def __init__(self) -> None:
        self.counts = torch.zeros(len(ACTIVATION_EDGES) - 1, dtype=torch.float64)

    @torch.no_grad()
    def update(self, z: Tensor) -> None:
        """z: activations of any shape."""
        self.counts += counted(z[z != 0].abs().log10(), ACTIVATION_EDGES).cpu()
