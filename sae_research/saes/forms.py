"""Inference forms of SAEs with an encoder of their own: ReLU, gated, JumpReLU, TopK and its kin, linear, hard concrete, and
SAELens' matching pursuit. Those that scale each token are in `token_scaled.py`. Each class names the paper or library that
defines it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.saes.base import SAEConfig, SparseAutoencoder
from sae_research.saes.reading import flag, number, whole

ENCODER_SCALES: dict[str, tuple[str, ...]] = {
    "standard": ("W_enc", "b_enc"),
    "topk": ("W_enc", "b_enc"),
    "abs_topk": ("W_enc", "b_enc"),
    "jumprelu": ("W_enc", "b_enc", "threshold"),
    "gated": ("W_enc", "b_gate", "b_mag"),
    "hard_concrete": ("W_enc", "b_enc"),
    "gated_hard_concrete": ("W_enc", "b_mag"),
}
"""What grows with a latent's activation in each form. `r_mag` of gated SAEs multiplies and stays; `sharpness` shrinks."""
UNIT_TOLERANCE = 1e-6


def fold_decoder_norms(form: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same SAE with unit rows in `W_dec` [d_sae, d_in]: same support, same reconstruction, rescaled
    activations.

    Exact for ReLU-like forms. For TopK it changes which latents win, so call it only where the SAE ranked its
    latents by activation times norm to begin with. Weights that are unit already come back untouched; zero
    rows stay zero.
    """
    norms_F = tensors["W_dec"].norm(dim=1)
    norms_F = torch.where(norms_F > 0, norms_F, torch.ones_like(norms_F))
    return tensors if (norms_F - 1).abs().max() <= UNIT_TOLERANCE else scale_latents(form, tensors, norms_F)


def scale_latents(form: str, tensors: dict[str, Tensor], factors_F: Tensor) -> dict[str, Tensor]:
    """The same SAE with activations times positive factors [d_sae], and decoder rows divided by them."""
    scaled = {name: tensors[name] * factors_F for name in ENCODER_SCALES[form]}
    if "sharpness" in tensors:  # the gates' logits stay what they were
        scaled["sharpness"] = tensors["sharpness"] / factors_F
    return {**tensors, **scaled, "W_dec": tensors["W_dec"] / factors_F[:, None]}


def as_subtracting(sae: SparseAutoencoder, theirs: bool) -> dict[str, Tensor]:
    """Tensors on the CPU in float32, with biases for a library that subtracts `b_dec` before encoding (`theirs`), or does
    not."""
    tensors = {name: tensor.detach().cpu().float() for name, tensor in sae.tensors().items()}
    if sae.cfg.apply_b_dec_to_input == theirs:
        return tensors
    sign = 1 if theirs else -1
    shift_F = sign * (tensors["b_dec"] @ tensors["W_enc"])
    moved = {}
    if "b_enc" in tensors:
        moved["b_enc"] = tensors["b_enc"] + shift_F
    if "b_mag" in tensors:
        moved["b_mag"] = tensors["b_mag"] + shift_F * tensors["r_mag"].exp()
    if "W_gate" in tensors:
        moved["b_gate"] = tensors["b_gate"] + sign * (tensors["b_dec"] @ tensors["W_gate"])
    elif "b_gate" in tensors:
        moved["b_gate"] = tensors["b_gate"] + shift_F * tensors.get("sharpness", torch.ones(()))
    return {**tensors, **moved}


class StandardSAE(SparseAutoencoder):
    """`z = ReLU((x - b_dec) W_enc + b_enc)`."""

    form = "standard"

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.keep(torch.relu(self.centred(x) @ self.W_enc + self.b_enc), mask)


class GatedSAE(SparseAutoencoder):
    """`z = 1[pi + b_gate > 0] * ReLU(exp(r_mag) * pi + b_mag)`, with `pi = (x - b_dec) W_enc`."""

    form = "gated"
    tensor_names = ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag")

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        shared = self.centred(x) @ self.W_enc
        magnitude = torch.relu(shared * self.r_mag.exp() + self.b_mag)
        return self.keep(magnitude * (shared + self.b_gate > 0), mask)

    def encoder_weights(self) -> tuple[Tensor, Tensor]:
        return self.W_enc, self.b_mag


class JumpReLUSAE(SparseAutoencoder):
    """`z = ReLU(pre) where pre > threshold`, with `pre = (x - b_dec) W_enc + b_enc`."""

    form = "jumprelu"
    tensor_names = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        pre = self.centred(x) @ self.W_enc + self.b_enc
        return self.keep(torch.relu(pre) * (pre > self.threshold), mask)


class TopKSAE(SparseAutoencoder):
    """`z = TopK(ReLU((x - b_dec) W_enc + b_enc))`, exactly k or fewer positive latents a token."""

    form = "topk"
    option_names = ("k",)

    def __init__(self, cfg: SAEConfig | None = None, *, k: int, **tensors: Tensor) -> None:
        super().__init__(cfg, **tensors)
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= self.cfg.d_sae:
            raise UserError(f"topk: k = {k!r} must be a whole number between 1 and d_sae = {self.cfg.d_sae}")
        self.k = k

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        positive = torch.relu(self.centred(x) @ self.W_enc + self.b_enc)
        values, indices = positive.topk(self.k, dim=-1, sorted=False)
        return self.keep(torch.zeros_like(positive).scatter_(-1, indices, values), mask)


class AbsTopKSAE(TopKSAE):
    """`z` keeps the k entries of largest absolute value of `(x - b_dec) W_enc + b_enc` (arXiv 2510.00404; SAELens'
    `abstopk`, sparsify's `signed`)."""

    form = "abs_topk"
    signed = True

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        pre = self.centred(x) @ self.W_enc + self.b_enc
        indices = pre.abs().topk(self.k, dim=-1, sorted=False).indices
        return self.keep(torch.zeros_like(pre).scatter_(-1, indices, pre.gather(-1, indices)), mask)


class GroupMaxSAE(TopKSAE):
    """Latents stand in k groups of neighbours; of each group `z = ReLU((x - b_dec) W_enc + b_enc)` keeps the largest, the
    first of equals (sparsify's `groupmax`)."""

    form = "groupmax"

    def __init__(self, cfg: SAEConfig | None = None, *, k: int, **tensors: Tensor) -> None:
        super().__init__(cfg, k=k, **tensors)
        if self.cfg.d_sae % k:
            raise UserError(f"groupmax: d_sae = {self.cfg.d_sae} latents do not make k = {k} groups of one size")

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        groups = torch.relu(self.centred(x) @ self.W_enc + self.b_enc).unflatten(-1, (self.k, -1))
        values, indices = groups.max(dim=-1, keepdim=True)
        return self.keep(torch.zeros_like(groups).scatter_(-1, indices, values).flatten(-2), mask)


class TanhReLUSAE(SparseAutoencoder):
    """`z = tanh(ReLU((x - b_dec) W_enc + b_enc))` (SAELens before version 6). Activations stay below 1, so that decoder rows
    keep their norms."""

    form = "tanh_relu"

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.keep(torch.tanh(torch.relu(self.centred(x) @ self.W_enc + self.b_enc)), mask)


class LinearSAE(SparseAutoencoder):
    """`z = (x - b_dec) W_enc + b_enc`; activations are signed and dense."""

    form = "linear"
    signed = True

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.keep(self.centred(x) @ self.W_enc + self.b_enc, mask)


def stretched_gate(logits: Tensor, beta: Tensor | float, stretch: Sequence[float]) -> Tensor:
    """`clip(sigmoid(logits / beta) (r - l) + l, 0, 1)`, (l, r) = `stretch`; elementwise."""
    low, high = stretch
    return (torch.sigmoid(logits / beta) * (high - low) + low).clamp(0, 1)


class _Gates(SparseAutoencoder):
    """What both forms have: the temperature and the limits of their gates."""

    option_names = ("beta", "stretch")

    def __init__(self, cfg: SAEConfig | None = None, *, beta: float, stretch: Sequence[float], **tensors: Tensor) -> None:
        super().__init__(cfg, **tensors)
        self.beta = number(beta, "beta", self.form)
        if not isinstance(stretch, Sequence) or len(stretch) != 2 or not self.beta:
            raise UserError(f"{self.form}: beta must not be 0, and stretch two numbers (got {beta!r}, {stretch!r})")
        self.stretch = [number(limit, "stretch", self.form) for limit in stretch]


class HardConcreteSAE(_Gates):
    """`z = gate * ReLU(x W_enc + b_enc)`, `gate = clip(sigmoid((x W_gate + b_gate) / beta) (r - l) + l, 0, 1)`.

    In training the gate is random; this is its median, positive exactly where a random one is with a probability above
    one half.
    """

    form = "hard_concrete"
    tensor_names = ("W_enc", "b_enc", "W_dec", "b_dec", "W_gate", "b_gate")

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.centred(x)
        gate = stretched_gate(x @ self.W_gate + self.b_gate, self.beta, self.stretch)
        return self.keep(gate * torch.relu(x @ self.W_enc + self.b_enc), mask)


class SignedHardConcreteSAE(HardConcreteSAE):
    """`z = gate * (x W_enc + b_enc)`: magnitudes without a ReLU, as SAE-Interpretability trains them."""

    form = "signed_hard_concrete"
    signed = True

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.centred(x)
        gate = stretched_gate(x @ self.W_gate + self.b_gate, self.beta, self.stretch)
        return self.keep(gate * (x @ self.W_enc + self.b_enc), mask)


class GatedHardConcreteSAE(_Gates):
    """`z = gate * ReLU(exp(r_mag) pi + b_mag)`, `pi = (x - b_dec) W_enc`, the gate's logits `sharpness * pi + b_gate`."""

    form = "gated_hard_concrete"
    tensor_names = ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag", "sharpness")

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        shared = self.centred(x) @ self.W_enc
        gate = stretched_gate(self.sharpness * shared + self.b_gate, self.beta, self.stretch)
        return self.keep(gate * torch.relu(shared * self.r_mag.exp() + self.b_mag), mask)

    def encoder_weights(self) -> tuple[Tensor, Tensor]:
        return self.W_enc, self.b_mag


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

    def __init__(
        self,
        cfg: SAEConfig | None = None,
        *,
        max_iterations: int,
        residual_threshold: float,
        stop_on_duplicate_support: bool,
        **tensors: Tensor,
    ) -> None:
        super().__init__(cfg, **tensors)
        if self.cfg.is_transcoder:
            raise UserError(f"{self.form}: its atoms explain what it reads: it writes no other hook ({self.cfg.hooks})")
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
