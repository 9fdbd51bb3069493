"""Recipes `hard_concrete` and `gated_hard_concrete`: gates drawn at random whose expected L0 has a gradient.

Louizos et al. 2018, arXiv 1712.01312; the second puts them on the gated SAE's shared pre-activation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sae_research.config.params import Train
from sae_research.config.recipes import HardConcreteRecipe
from sae_research.saes.forms import stretched_gate
from sae_research.training import products
from sae_research.training.recipes.base import Recipe, StepOutput, length_factor
from sae_research.training.recipes.l1 import INITIAL_DENSITY

INITIAL_SHARPNESS = 3.0
"""Standard deviation of `log_alpha` at the start, over tokens and latents; that of the noise is 1.8. Below it gates are
a coin's toss, far above it few of them get a gradient."""
GATE_LENGTH = 0.2
"""Length of a gate's row at the start. Adam moves each weight by about the learning rate: rows many times as long hardly
turn in a run of some hundred steps."""
INITIAL_OPEN = 0.3
"""Probability of an open gate at the start where gates ignore the input."""


class HardConcrete(Recipe):
    """Minimises `mean over tokens of |x - x_hat|^2 + l0_coefficient * E[L0]` (arXiv 1712.01312).

    `magnitude = ReLU(x W_enc^T + b_enc)`; `log_alpha = exp(s) (x W_gate^T + b_gate)`, or `exp(s) b_gate` with
    `input_dependent_gates: false`; s, a learned scalar, is the sharpness of the gates. In training a gate is
    `clip(sigmoid((log_alpha + logit u) / beta) (r - l) + l, 0, 1)` with u uniform, and
    `P(gate > 0) = sigmoid(log_alpha - beta log(-l / r))`, whose sum is E[L0]. At inference u = 1/2: the median gate, open
    exactly where P > 1/2, for every beta. With `beta_annealing`, beta goes geometrically from `initial_beta` to
    `last_beta` after the learning rate's warm-up.

    Without exp(s), a gate's bias moves by a learning rate a step on a scale where one is nothing: gates stay where
    they started. Gates far below zero get no gradient at all: a gate that depends on the input and was open (u = 1/2) on
    no token for `dead_fraction` of the run pays no more and has its `log_alpha` raised, by the term
    `-l0_coefficient * exp(s) b_gate`, until it opens on some token.

    SAE-Interpretability lets magnitudes be negative (then counts only positive ones), drops beta at inference, so that
    its test gates agree with training at beta = 1 alone, ignores `input_dependent_gates`, and divides error and
    penalty by d_in, which scales both alike. Decoder rows have unit norm here.
    """

    form = "hard_concrete"
    reads_b_dec = False
    clip_norm = 1.0
    config: HardConcreteRecipe

    def __init__(self, d_in: int, config: HardConcreteRecipe, train: Train) -> None:
        super().__init__(d_in, config, train)
        if config.input_dependent_gates:
            self.W_gate = torch.nn.Parameter(torch.zeros(config.d_sae, d_in))
        self.b_gate = torch.nn.Parameter(torch.zeros(config.d_sae))
        self.log_sharpness = torch.nn.Parameter(torch.zeros(()))
        self.register_buffer("beta", torch.tensor(float(config.initial_beta)))

    @torch.no_grad()
    def fit_encoder(self, rows_ND: Tensor) -> None:
        """Gates half open where the decoder row's product with x is among its `INITIAL_DENSITY` largest."""
        pre_NF = self.read(rows_ND[:512]) @ self.W_enc.T
        sharpness = INITIAL_SHARPNESS / pre_NF.std().clamp_min(1e-6)
        if self.config.input_dependent_gates:
            self.W_gate.copy_(GATE_LENGTH * self.W_enc)
            threshold = GATE_LENGTH * self.sparsify_start(rows_ND, INITIAL_DENSITY)
            sharpness = sharpness / GATE_LENGTH
            self.b_gate.fill_(self.half_open() / sharpness - threshold)
        else:
            self.b_gate.fill_((self.half_open() + math.log(INITIAL_OPEN / (1 - INITIAL_OPEN))) / sharpness)
        self.log_sharpness.copy_(sharpness.log())
        z_NF = self.magnitudes(rows_ND) * stretched_gate(self.log_alpha(rows_ND), self.beta, self.config.stretch)
        if z_NF.any():
            factor = length_factor(z_NF @ self.W_dec, self.written(rows_ND) - self.b_dec)
            self.W_enc.mul_(factor)
            self.b_enc.mul_(factor)

    def magnitudes(self, x_BD: Tensor) -> Tensor:
        return torch.relu(self.encode(x_BD))

    def log_alpha(self, x_BD: Tensor) -> Tensor:
        """[B, F], or [F] where gates do not depend on the input."""
        if not self.config.input_dependent_gates:
            return self.log_sharpness.exp() * self.b_gate
        return self.log_sharpness.exp() * products.encode(self.read(x_BD), self.W_gate, self.b_gate, None, self.bfloat16)

    def half_open(self) -> Tensor:
        """The `log_alpha` at which `P(gate > 0)` is one half: above it the median gate is open."""
        low, high = self.config.stretch
        return self.beta * math.log(-low / high)

    def prepare(self, progress: float) -> None:
        """Anneal beta."""
        config, start = self.config, self.train_config.warmup_fraction
        if config.beta_annealing:
            done = min(1.0, max(0.0, (progress - start) / max(1 - start, 1e-9)))
            self.beta.fill_(config.initial_beta * (config.last_beta / config.initial_beta) ** done)

    def expected_l0(self, log_alpha: Tensor) -> Tensor:
        """Expected number of open gates: a mean over tokens."""
        open_F = torch.sigmoid(log_alpha - self.half_open())
        return open_F.sum() / (len(open_F) if open_F.dim() == 2 else 1)

    def log_alpha_of_dead(self, progress: float) -> Tensor:
        """Sum over dead latents of what their biases add to `log_alpha`, with a graph to the biases alone."""
        dead_F = progress - self.last_fired_F >= self.train_config.dead_fraction
        return (self.log_sharpness.exp().detach() * self.b_gate * dead_F).sum()

    def fired(self, log_alpha: Tensor, magnitude_BF: Tensor) -> Tensor:
        """Latents that inference would find active on some token [F]."""
        return ((log_alpha.detach() > self.half_open()) & (magnitude_BF.detach() > 0)).any(0)

    def draw_noise(self, n_rows: int) -> Tensor:
        """Logistic noise [B, F], from this SAE's own generator; on a GPU from one there that it seeds, for speed."""
        device, generator = self.b_enc.device, self.generator
        if device.type != "cpu":
            seed = torch.randint(2**62, (), generator=generator)
            generator = torch.Generator(device).manual_seed(int(seed))
        u_BF = torch.rand(n_rows, len(self.b_enc), generator=generator, device=device)
        return torch.logit(u_BF.clamp_(1e-6, 1 - 1e-6))

    def sample(self, log_alpha: Tensor, noise_BF: Tensor) -> Tensor:
        """Gates [B, F] in [0, 1]."""
        return stretched_gate(log_alpha + noise_BF, self.beta, self.config.stretch)

    def forward(self, x_BD: Tensor, progress: float, noise: Tensor | None) -> StepOutput:
        magnitude_BF, log_alpha = self.magnitudes(x_BD), self.log_alpha(x_BD)
        z_BF = magnitude_BF * self.sample(log_alpha, noise)  # ty: ignore[invalid-argument-type]
        residual_BD = self.target(x_BD) - (self.decode(z_BF, self.W_dec) + self.b_dec)
        penalty = self.config.l0_coefficient * self.sparsity_warmup(progress)
        loss = residual_BD.square().sum() / len(x_BD) + penalty * self.expected_l0(log_alpha)
        if self.config.input_dependent_gates:
            loss = loss - penalty * self.log_alpha_of_dead(progress)
        active_BF = z_BF.detach() > 0
        return StepOutput(loss, residual_BD.detach(), active_BF.sum() / len(x_BD), self.fired(log_alpha, magnitude_BF))

    def options(self) -> dict[str, Any]:
        return {"beta": float(self.beta), "stretch": list(self.config.stretch)}

    def own_tensors(self, scale: float) -> dict[str, Tensor]:
        sharpness = self.log_sharpness.exp()
        W_gate_FD = self.W_gate * (sharpness * scale) if self.config.input_dependent_gates else torch.zeros_like(self.W_enc)
        return {**super().own_tensors(scale), "W_gate": W_gate_FD.T, "b_gate": self.b_gate * sharpness}


class GatedHardConcrete(HardConcrete):
    """Minimises `mean over tokens of |x - x_hat|^2 + l0_coefficient * E[L0] + aux * |x - x_hat_gate|^2`.

    `pi = (x - b_dec) W_enc^T`; `log_alpha = exp(s) (pi + b_gate)`; `z = gate * ReLU(exp(r_mag) pi + b_mag)`, gates as in
    `hard_concrete`; `x_hat_gate = ReLU(pi + b_gate) sg(W_dec) + sg(b_dec)`: the gate's own reconstruction in the units of
    pi, as in the gated SAE. s, a learned scalar, is the sharpness of the gates: activations of unit mean square norm alone
    would leave them near a coin's toss. Dead latents are left alone: raising their gates, as `hard_concrete` does, moves
    what the gate reconstructs, and cost more variance explained than it brought latents back.

    SAE-Interpretability reconstructs with the gates themselves, numbers in [0, 1] with no bearing on how much of a
    direction is present, and never anneals beta here; both are mended. `b_enc` stands for `b_gate`.
    """

    form = "gated_hard_concrete"
    reads_b_dec = True

    def __init__(self, d_in: int, config: HardConcreteRecipe, train: Train) -> None:
        Recipe.__init__(self, d_in, config, train)
        self.r_mag = torch.nn.Parameter(torch.zeros(config.d_sae))
        self.b_mag = torch.nn.Parameter(torch.zeros(config.d_sae))
        self.log_sharpness = torch.nn.Parameter(torch.zeros(()))
        self.register_buffer("beta", torch.tensor(float(config.initial_beta)))

    @torch.no_grad()
    def fit_encoder(self, rows_ND: Tensor) -> None:
        """Gates half open where pi is among its `INITIAL_DENSITY` largest."""
        pi_NF = self.encoder_input(rows_ND[:512]) @ self.W_enc.T
        sharpness = INITIAL_SHARPNESS / pi_NF.std().clamp_min(1e-6)
        self.log_sharpness.copy_(sharpness.log())
        self.b_enc.fill_(self.half_open() / sharpness - self.sparsify_start(rows_ND, INITIAL_DENSITY))
        log_alpha_NF, z_NF = self._gate_and_magnitude(rows_ND)
        z_NF = z_NF * stretched_gate(log_alpha_NF, self.beta, self.config.stretch)
        if z_NF.any():
            factor = length_factor(z_NF @ self.W_dec, self.written(rows_ND) - self.b_dec).clamp_min(1e-6)
            self.W_enc.mul_(factor)
            self.b_enc.mul_(factor)
            self.log_sharpness.sub_(factor.log())

    def _gate_and_magnitude(self, x_BD: Tensor) -> tuple[Tensor, Tensor]:
        pi_BF = self.directions(x_BD)
        return (self.log_sharpness.exp() * (pi_BF + self.b_enc), torch.relu(self.r_mag.exp() * pi_BF + self.b_mag))

    def forward(self, x_BD: Tensor, progress: float, noise: Tensor | None) -> StepOutput:
        log_alpha_BF, magnitude_BF = self._gate_and_magnitude(x_BD)
        z_BF = magnitude_BF * self.sample(log_alpha_BF, noise)  # ty: ignore[invalid-argument-type]
        target_BD = self.target(x_BD)
        residual_BD = target_BD - (self.decode(z_BF, self.W_dec) + self.b_dec)
        gate_BF = torch.relu(log_alpha_BF) * torch.exp(-self.log_sharpness)
        gate_error_BD = target_BD.detach() - (self.decode(gate_BF, self.W_dec.detach()) + self.b_dec.detach())
        penalty = self.config.l0_coefficient * self.sparsity_warmup(progress)
        loss = (residual_BD.square().sum() + self.config.aux_coefficient * gate_error_BD.square().sum()) / len(
            x_BD
        ) + penalty * self.expected_l0(log_alpha_BF)
        active_BF = z_BF.detach() > 0
        return StepOutput(loss, residual_BD.detach(), active_BF.sum() / len(x_BD), self.fired(log_alpha_BF, magnitude_BF))

    def own_tensors(self, scale: float) -> dict[str, Tensor]:
        sharpness = self.log_sharpness.exp()
        return {
            "W_enc": self.W_enc.T,
            "W_dec": self.W_dec,
            "b_dec": self.b_dec / scale,
            "b_gate": self.b_enc * sharpness,
            "b_mag": self.b_mag / scale,
            "r_mag": self.r_mag,
            "sharpness": (sharpness * scale).expand_as(self.b_enc),
        }
