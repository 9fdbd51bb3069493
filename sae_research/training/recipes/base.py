"""What every recipe shares: parameters, initialisation, encoding and decoding, unit decoder rows, schedules, export.

A recipe is one file beside this one that reads from top to bottom: its loss (in the docstring), its parameters, their
initialisation, the loss as code, what happens between steps, and the SAE that comes out. What it needs besides (kernels with
gradients of their own, the auxiliary loss of dead latents) stands below it in the same file, and here. Its settings are a
class of `sae_research.config.recipes`, which its annotation `config` names: `params.yaml` is read by commands that must not
import torch.

Schedules (`training.schedules`) are functions of progress, the fraction of the run that is done: literature gives warm-ups
and decays in steps for runs of 10^5 steps, which a short run would never leave.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from sae_research.config.params import Train
from sae_research.config.recipes import SAERecipe
from sae_research.saes import SAEConfig, SparseAutoencoder, form_class
from sae_research.saes.crosscoders import hook_norms
from sae_research.saes.forms import scale_latents
from sae_research.training import products
from sae_research.training.products import MAX_DENSITY, Support, decode_at, encode_at, products_at
from sae_research.training.schedules import warmup, warmup_then_decay
from sae_research.training.whitening import Whitening


class StepOutput(NamedTuple):
    """One recipe on one batch."""

    loss: Tensor
    """What is minimised: a scalar with a graph."""
    residual: Tensor
    """`x - x_hat`, detached [B, D]."""
    l0: Tensor
    """Active latents a token, mean over the batch."""
    fired: Tensor
    """Latents active on any token: indices, with repeats, or a mask [F]."""
    tracked: Tensor | None = None
    """What the recipe keeps track of from batch to batch, see `Recipe.track`."""


class Reconstruction(NamedTuple):
    """A batch encoded and decoded; the graph reaches every parameter."""

    x_hat: Tensor
    """[B, D]"""
    activations: Tensor
    """Activations of latents: [N] at the support, or [B, F]."""
    l0: Tensor
    fired: Tensor
    """As in `StepOutput`."""
    centred: Tensor
    """What the encoder read, without a graph [B, D]."""
    support: Support | None
    """Where `activations` stand, on the sparse path."""


class Recipe(nn.Module):
    """An SAE in training, on activations normalised to a mean square norm of 1.

    `z = ReLU(pre)` where `select` says so, `pre = (x - b_dec) W_enc^T + b_enc`; `x_hat = z W_dec + b_dec`. A
    subclass sets `form` (what it is at inference), and defines `select` and `forward`.

    A transcoder's batch holds what is read and beside it what is written, each normalised by itself [B, 2 D]: `read` and
    `target` tell them apart, and give an SAE its batch. It encodes what it reads, without `b_dec`.

    A crosscoder is an SAE of the activations of its hooks side by side [B, D], D = n_hooks * d_hook, each hook's normalised
    by itself; its squared error is the sum over hooks. What a recipe weighs by decoder norms it weighs by their sum over
    hooks (`norm_sums`).

    `forward` is a function of the parameters, the batch and `draw_noise`'s numbers alone: what a recipe remembers changes in
    `prepare` and `track`. So one call can serve a whole stack of SAEs (`training.stack`).
    """

    if TYPE_CHECKING:  # of parameters and buffers torch only says "Tensor or Module"

        def __getattr__(self, name: str) -> Any: ...

    form: ClassVar[str]
    unit_rows: ClassVar[bool] = True
    """Decoder rows have unit norm throughout: the gradient's part along a row is removed before a step and the row
    renormalised after (Bricken et al. 2023)."""
    reads_b_dec: ClassVar[bool] = True
    """`b_dec` is subtracted before encoding."""
    clip_norm: ClassVar[float | None] = None
    """Largest norm of all gradients together."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's; `betas` of its settings takes their place."""
    stackable: ClassVar[bool] = True
    """`forward` can be mapped over many SAEs at once."""

    def __init__(self, d_in: int, config: SAERecipe, train: Train) -> None:
        super().__init__()
        self.d_in, self.is_transcoder = d_in, config.written is not None
        if self.is_transcoder:
            self.reads_b_dec = False  # ty: ignore[invalid-attribute-access]
        if config.betas is not None:
            self.betas = config.betas
        self.n_hooks = len(config.hook_names or [""])
        self.config, self.train_config = config, train
        self.in_stack = False
        """This is a stack's template: `forward` sees many SAEs at once."""
        self.plain_state: dict[str, Any] = {}
        """Plain values a resumed run needs beside parameters, buffers and `generator`, such as counters."""
        F, D = config.d_sae, d_in
        self.W_enc = nn.Parameter(torch.zeros(F, D))
        self.b_enc = nn.Parameter(torch.zeros(F))
        self.W_dec = nn.Parameter(torch.zeros(F, D))
        self.b_dec = nn.Parameter(torch.zeros(D))
        self.W_skip = nn.Parameter(torch.zeros(D, D)) if config.skip else None
        self.whitening = Whitening(D) if config.whiten else None
        """What its batches go through first: all that a recipe computes is of whitened activations then."""
        self.register_buffer("last_fired_F", torch.zeros(F))
        self.register_buffer("_scratch_FD", torch.empty(F, D), persistent=False)

    # --- what a recipe defines ---

    def select(self, pre_BF: Tensor) -> Support | None:
        """The latents active on each token, or None to go the dense way. Called on CPU, without a graph."""
        raise NotImplementedError

    def forward(self, x_BD: Tensor, progress: float, noise: Tensor | None) -> StepOutput:
        """Loss and metrics of one batch at `progress` through the run; `noise` is what `draw_noise` gave."""
        raise NotImplementedError

    def prepare(self, progress: float) -> None:
        """What changes with the run's progress, before a batch; nothing by default."""

    def draw_noise(self, n_rows: int) -> Tensor | None:
        """The random numbers a batch of so many tokens needs; none by default."""
        return None

    def track(self, output: StepOutput, progress: float) -> None:
        """Remember what later batches need of this one; by default which latents fired."""
        self.last_fired_F[output.fired] = progress

    def compute(self, x_BD: Tensor, progress: float) -> StepOutput:
        """One batch: `prepare`, `forward`, `track`."""
        self.prepare(progress)
        output = self.forward(x_BD, progress, self.draw_noise(len(x_BD)))
        self.track(output, progress)
        return output

    def options(self) -> dict[str, Any]:
        """Scalars of the inference form."""
        return {}

    def learning_rate(self, progress: float) -> float:
        train, config = self.train_config, self.config
        return config.learning_rate * warmup_then_decay(
            progress, train.warmup_fraction, train.decay_fraction, config.schedule, config.min_lr_factor or 0.0
        )

    def sparsity_warmup(self, progress: float) -> float:
        """Factor of the sparsity penalty, linear over the first `sparsity_warmup_fraction` of the run."""
        return warmup(progress, self.train_config.sparsity_warmup_fraction)

    # --- start ---

    @torch.no_grad()
    def initialise(self, rows_ND: Tensor, generator: torch.Generator) -> None:
        """Start from normalised activations `rows_ND`: `b_dec` their mean, `W_dec` unit rows.

        Decoder rows are data rows less the mean (`init: data_rows`), random directions, or the rows of a random matrix of
        orthonormal columns (`orthogonal`; of orthonormal rows where there are no more latents than dimensions); their norm
        is 1, or `init_norm`. The encoder is the decoder times the factor that fits the reconstruction to the data by least
        squares: rows are far from orthogonal, so that a factor of 1 overshoots several times. `generator` also draws
        whatever randomness the recipe needs later.
        """
        self.generator = generator
        if self.is_transcoder:
            self._initialise_transcoder(rows_ND, generator)
            return
        self.b_dec.copy_(rows_ND.mean(0))
        F, D = self.W_dec.shape
        if self.config.init == "data_rows":
            # with replacement only where there are fewer rows than latents; noise then keeps copies from being equal
            index = torch.randperm(len(rows_ND), generator=generator).repeat(-(-F // len(rows_ND)))[:F]
            W_FD = rows_ND[index.to(rows_ND.device)] - self.b_dec
            if F > len(rows_ND):
                noise = torch.randn(F, D, generator=generator).to(W_FD.device)
                W_FD = W_FD + 0.1 * W_FD.norm(dim=1, keepdim=True) * noise / D**0.5
        else:
            W_FD = self._random_rows(generator).to(rows_ND.device)
        self.W_dec.copy_(W_FD)
        self.normalise_rows()
        self._take_init_norm()
        self.W_enc.copy_(self.W_dec)
        self.fit_encoder(rows_ND[:4096])

    def _initialise_transcoder(self, rows_ND: Tensor, generator: torch.Generator) -> None:
        """As `initialise`: with `data_rows` a latent's encoder and decoder are what one token has at either hook, less the
        mean, both of unit norm before the fit."""
        read_ND, written_ND = self.read(rows_ND), self.written(rows_ND)
        mean_D, F = read_ND.mean(0), len(self.W_dec)
        self.b_dec.copy_(written_ND.mean(0))
        if self.config.init == "data_rows":
            index = torch.randperm(len(rows_ND), generator=generator).repeat(-(-F // len(rows_ND)))[:F].to(rows_ND.device)
            sides = read_ND[index] - mean_D, written_ND[index] - self.b_dec
        else:
            sides = tuple(self._random_rows(generator).to(rows_ND.device) for _ in range(2))
        for rows, parameter in zip(sides, (self.W_enc, self.W_dec), strict=True):
            noise = torch.randn(rows.shape, generator=generator).to(rows.device)
            parameter.copy_(
                rows + (0.1 * rows.norm(dim=1, keepdim=True) * noise / self.d_in**0.5 if F > len(rows_ND) else 0)
            )
            unit_rows(parameter)
        self._take_init_norm()
        self.b_enc.copy_(-(self.W_enc @ mean_D))
        self.fit_encoder(rows_ND[:4096])

    def _random_rows(self, generator: torch.Generator) -> Tensor:
        """[F, D], on the CPU, so that a run draws the same on every device."""
        rows_FD = torch.randn(self.W_dec.shape, generator=generator)
        return orthonormal(rows_FD) if self.config.init == "orthogonal" else rows_FD

    def _take_init_norm(self) -> None:
        """Of decoder rows that have unit norm."""
        if self.config.init_norm is not None:
            self.W_dec.mul_(self.config.init_norm)

    @torch.no_grad()
    def fit_encoder(self, rows_ND: Tensor) -> None:
        """Scale encoder weights and biases so that reconstructions have the right length on these rows."""
        code = self.reconstruct(rows_ND)
        factor = length_factor(code.x_hat - self.b_dec, self.written(rows_ND) - self.b_dec)
        self.W_enc.mul_(factor)
        self.b_enc.mul_(factor)

    @torch.no_grad()
    def sparsify_start(self, rows_ND: Tensor, density: float) -> Tensor:
        """The pre-activation that a fraction `density` of them exceeds, with biases of zero: from half of the latents
        active, a short run spends itself on switching latents off."""
        pre_NF = self.encoder_input(rows_ND[:512]) @ self.W_enc.T
        n = max(1, int(pre_NF.numel() * density))
        return pre_NF.flatten().topk(n, sorted=True).values[-1]

    # --- forward ---

    def read(self, x_BD: Tensor) -> Tensor:
        """What of a batch is encoded [B, D]."""
        return x_BD[:, : self.d_in] if self.is_transcoder else x_BD

    def written(self, x_BD: Tensor) -> Tensor:
        """What of a batch is to be reconstructed [B, D]."""
        return x_BD[:, self.d_in :] if self.is_transcoder else x_BD

    def target(self, x_BD: Tensor) -> Tensor:
        """What latents and `b_dec` are to reconstruct [B, D]: what is written, less what a skip makes of what is read."""
        y_BD = self.written(x_BD)
        return y_BD if self.W_skip is None else y_BD - products.product(self.read(x_BD), self.W_skip.T, self.bfloat16)

    def encoder_input(self, x_BD: Tensor) -> Tensor:
        x_BD = self.read(x_BD)
        return x_BD - self.b_dec if self.reads_b_dec else x_BD

    @property
    def bfloat16(self) -> bool:  # ty: ignore[incompatible-property-override]
        return self.train_config.precision == "bfloat16"

    def encode(self, x_BD: Tensor, known_BF: Tensor | None = None) -> Tensor:
        """Pre-activations [B, F]; `known_BF` are their values where they have been computed already."""
        return products.encode(
            self.read(x_BD), self.W_enc, self.b_enc, self.b_dec if self.reads_b_dec else None, self.bfloat16, known_BF
        )

    def directions(self, x_BD: Tensor) -> Tensor:
        """Products with the encoder's rows [B, F], without a bias."""
        return products.encode(self.read(x_BD), self.W_enc, None, self.b_dec if self.reads_b_dec else None, self.bfloat16)

    def decode(self, z_BF: Tensor, W_FD: Tensor) -> Tensor:
        """`z W` [B, D]; `b_dec` is not added."""
        return products.product(z_BF, W_FD, self.bfloat16)

    def decoder(self) -> Tensor:
        """The decoder rows that reconstruct [F, D]."""
        return self.W_dec

    def reconstruct(self, x_BD: Tensor) -> Reconstruction:
        """Encode and decode, over active latents only where `select` returned a support."""
        read_BD = self.encoder_input(x_BD).detach()
        if x_BD.device.type != "cpu" or self.in_stack:
            # dense products are cheap there, and a support's size would stop the GPU
            return self._reconstruct_densely(x_BD, read_BD)
        with torch.no_grad():
            pre_BF = products.linear(read_BD, self.W_enc, self.b_enc, self.bfloat16)
            support = self.select(pre_BF)
        if support is None:
            return self._reconstruct_densely(x_BD, read_BD, pre_BF)
        pre_N = encode_at(
            support,
            self._values_at(support, pre_BF, read_BD),
            read_BD,
            self.W_enc,
            self.b_enc,
            self.b_dec if self.reads_b_dec else None,
        )
        z_N = self.activate(pre_N)
        active_N = z_N.detach() != 0
        x_hat_BD = decode_at(support, z_N, self.decoder()) + self.b_dec
        return Reconstruction(x_hat_BD, z_N, active_N.sum() / len(x_BD), support.col[active_N], read_BD, support)

    @torch.no_grad()
    def _values_at(self, support: Support, pre_BF: Tensor, read_BD: Tensor) -> Tensor:
        """Pre-activations at the support [N], in float32 whatever chose it."""
        if self.bfloat16:
            return products_at(support, read_BD, self.W_enc) + self.b_enc[support.col]
        rows_N = torch.repeat_interleave(support.crow.diff(), output_size=len(support.col))
        return pre_BF[rows_N, support.col]

    def _reconstruct_densely(self, x_BD: Tensor, read_BD: Tensor, pre_BF: Tensor | None = None) -> Reconstruction:
        z_BF = self.dense_activations(self.encode(x_BD, pre_BF))
        active_BF = z_BF.detach() != 0
        x_hat_BD = self.decode(z_BF, self.decoder()) + self.b_dec
        return Reconstruction(x_hat_BD, z_BF, active_BF.sum() / len(x_BD), active_BF.any(0), read_BD, None)

    def dense_activations(self, pre_BF: Tensor) -> Tensor:
        """The activations [B, F] by plain autograd: the reference, and the path of GPUs."""
        return torch.relu(pre_BF)

    def activate(self, pre: Tensor) -> Tensor:
        """What a selected latent's activation is, of its pre-activation."""
        return torch.relu(pre)

    def use_sparse(self, density: float) -> bool:
        """Whether this fraction of active latents is small enough for the sparse path."""
        return density <= MAX_DENSITY

    def norm_sums(self) -> Tensor:
        """Of every latent the sum over hooks of its decoders' norms [F], with a graph; its row's norm where the hook is
        one."""
        if self.n_hooks == 1:
            return torch.linalg.vector_norm(self.W_dec, dim=1)
        return hook_norms(self.W_dec, self.n_hooks).sum(0)

    # --- unit rows ---

    @torch.no_grad()
    def project_gradient(self) -> None:
        """Remove from each decoder row's gradient its part along the row, which renormalising would undo."""
        project_rows(self.W_dec.grad, self.W_dec, self._scratch_FD)  # ty: ignore[invalid-argument-type]

    @torch.no_grad()
    def normalise_rows(self) -> None:
        unit_rows(self.W_dec)

    def after_step(self, optimiser: torch.optim.Adam, x_BD: Tensor, output: StepOutput, progress: float) -> None:
        """What a recipe does to itself between steps; nothing by default."""

    # --- stacks: one `forward` for many SAEs of a shape (`training.stack`) ---

    @classmethod
    def shared_inputs(cls, recipes: Sequence[Recipe]) -> dict[str, Tensor]:
        """What `forward` reads besides parameters, buffers and settings, one entry an SAE along the first dimension."""
        return {}

    def take_inputs(self, inputs: dict[str, Tensor]) -> None:
        """Take one SAE's share of `shared_inputs`."""

    # --- checkpoints ---

    generator: torch.Generator
    """Of whatever randomness the recipe needs on the way."""

    def extra_state(self) -> dict[str, Any]:
        """What a resumed run needs beside parameters, buffers and `generator`, as plain values."""
        return dict(self.plain_state)

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take back what `extra_state` gave."""
        self.plain_state = {key: state[key] for key in self.plain_state}

    # --- end ---

    def own_tensors(self, scale: float) -> dict[str, Tensor]:
        """Tensors of the inference form in the model's own units, `scale` the factor of normalisation.

        `scale * x = z' W_dec + b_dec` with unit rows gives `z = z' / scale`: only the biases change.
        """
        return {"W_enc": self.W_enc.T, "b_enc": self.b_enc / scale, "W_dec": self.W_dec, "b_dec": self.b_dec / scale}

    @torch.no_grad()
    def export(self, scale: float, cfg: SAEConfig, read_scale: float | None = None) -> SparseAutoencoder:
        """The SAE in the model's own units; `scale` is the factor its training data were normalised by. read_scale: that of
        what a transcoder reads, `scale` then being that of what it writes. A crosscoder's are `cfg.hook_scales`."""
        if cfg.is_crosscoder:
            return self._export_crosscoder(cfg)
        own = self.own_tensors(scale if self.whitening is None else 1.0)
        if self.W_skip is not None:
            own["W_skip"] = self.W_skip
        if read_scale is not None:  # it read `scale * (read_scale / scale) x`
            own |= {name: own[name] * (read_scale / scale) for name in ("W_enc", "W_gate", "W_skip") if name in own}
        tensors = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in own.items()}
        cfg = cfg.replace(form=self.form, options=self.options(), apply_b_dec_to_input=self.reads_b_dec)
        sae = form_class(self.form)(cfg=cfg, **tensors, **self.options())
        return sae if self.whitening is None else self.whitening.folded(sae, scale)

    def _export_crosscoder(self, cfg: SAEConfig) -> SparseAutoencoder:
        """Activations come out in the units in which sparsity is weighed: on normalised activations the sum over hooks of a
        latent's decoder norms is 1."""
        scale_D = torch.tensor(cfg.hook_scales).repeat_interleave(self.d_in // self.n_hooks)
        own = {name: tensor.detach().cpu().clone() for name, tensor in self.own_tensors(1.0).items()}
        sums_F = self.norm_sums().detach().cpu()
        own = scale_latents(self.form, own, torch.where(sums_F > 0, sums_F, 1.0))
        own |= {
            "W_enc": own["W_enc"] * scale_D[:, None],
            "W_dec": own["W_dec"] / scale_D,
            "b_dec": own["b_dec"] / scale_D,
        }
        tensors = {name: tensor.contiguous() for name, tensor in own.items()}
        cfg = cfg.replace(form=self.form, options=self.options(), apply_b_dec_to_input=self.reads_b_dec)
        return form_class(self.form)(cfg=cfg, **tensors, **self.options())


def orthonormal(rows_FD: Tensor) -> Tensor:
    """Orthonormal columns that span those of a matrix [F, D]; orthonormal rows where F is no more than D."""
    if len(rows_FD) > rows_FD.shape[1]:
        return torch.linalg.qr(rows_FD).Q
    return torch.linalg.qr(rows_FD.T).Q.T


def length_factor(shape_ND: Tensor, wanted_ND: Tensor) -> Tensor:
    """The factor by which `shape` comes nearest to `wanted` in least squares."""
    return (wanted_ND * shape_ND).sum() / shape_ND.square().sum().clamp_min(1e-12)


def project_rows(gradient: Tensor, rows: Tensor, scratch: Tensor | None = None) -> None:
    """Remove in place the part of a gradient [..., F, D] that lies along unit rows."""
    along = torch.mul(gradient, rows, out=scratch).sum(-1, keepdim=True)
    gradient.addcmul_(rows, along, value=-1)


def unit_rows(rows: Tensor) -> None:
    """Rows [..., F, D] to unit norm, in place."""
    rows.div_(torch.linalg.vector_norm(rows, dim=-1, keepdim=True).clamp_min_(1e-12))
