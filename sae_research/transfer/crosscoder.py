"""A crosscoder of both models at one hook: which latents a finetune made, kept or lost.

It is trained on the two models' activations of the same tokens side by side (Lindsey et al. 2024, "Sparse Crosscoders"), and
its decoder-norm ratio says to which model a latent belongs. A latent that looks like one model's alone may be an artefact of
sparsity: *latent scaling* (Minder et al. 2025, arXiv 2504.02922) asks whether the other model has its direction as well, in
what the crosscoder leaves unexplained there (complete shrinkage) or in what other latents reconstruct (decoupling).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sae_research.config.params import Train
from sae_research.config.recipes import PLUS
from sae_research.config.transfer import PairCrosscoder
from sae_research.runtime.errors import UserError
from sae_research.saes import SAEConfig, SparseAutoencoder
from sae_research.saes.crosscoders import decoder_norm_ratios, normalised
from sae_research.stats.reconstruction import ReconstructionStats, sums_dtype
from sae_research.training.buffer import StreamBatch
from sae_research.training.crosscoders import hooks_of
from sae_research.training.training_sae import new_training_sae, start, train_step
from sae_research.transfer.loading import MODELS, Pair, masks
from sae_research.transfer.repair import TRAIN_SPLIT
from sae_research.transfer.text import PairBatch, TextSource, batches, token_bar

POOL_ROWS = 16_384
"""Rows that are shuffled together."""
NAME = "crosscoder"

ONLY, SHARED = 0.1, 0.1
"""A latent is one model's alone where the other's share of its decoder norms is below `ONLY`, shared where both shares
are within `SHARED` of one half."""
CLASSES = ("base_only", "base_leaning", "shared", "finetuned_leaning", "finetuned_only")
"""By the finetuned model's share: below `ONLY`, up to 1/2 - `SHARED`, up to 1/2 + `SHARED`, up to 1 - `ONLY`, above."""
NU_ERROR, NU_RECONSTRUCTION = 0.2, 0.5
"""Above the first a latent of one model is `shrunk`, else above the second `decoupled`, else `specific`."""
VERDICTS = ("specific", "shrunk", "decoupled")
SHARE_EDGES = np.linspace(0, 1, 51)


class MatchedRows(NamedTuple):
    """Tokens that both models read in the same place, outliers of either left out."""

    batch: PairBatch
    acts: dict[str, Tensor]
    """By model [batch, seq, d_hook], model's units."""
    index: tuple[Tensor, Tensor]
    """Their flat positions in either model [n], [n]."""

    @property
    def rows(self) -> Tensor:
        """Both models' activations side by side [n, 2 * d_hook]."""
        sides = (self.acts[model].flatten(0, 1)[index] for model, index in zip(MODELS, self.index, strict=True))
        return torch.cat(list(sides), dim=1)


def matched(pair: Pair, limit: float, n_tokens: int, source: TextSource, batch_size: int) -> Iterator[MatchedRows]:
    """Batches until `n_tokens` base tokens are read. limit: largest norm at the SAE's hook that is no outlier."""
    for batch in batches(pair.base, pair.finetuned, source, n_tokens, batch_size):
        acts = {m: lm.activations(batch.sides[m].tokens, pair.hook).float() for m, lm in pair.models.items()}
        found = masks(pair, batch, acts, limit)
        one, other = (index[found.pair_kept] for index in found.pairs)
        yield MatchedRows(batch, acts, (one, other))


# --- training --------------------------------------------------------------------------------


def side_names(hook: str) -> list[str]:
    """The crosscoder's two places: the same hook of either model."""
    return [f"{model} {hook}" for model in MODELS]


@dataclass(frozen=True)
class Made:
    """What a crosscoder says it was made for."""

    model_name: str
    hook: str
    context_size: int


def train_crosscoder(
    parts: Iterable[tuple[int, Tensor]], config: PairCrosscoder, train: Train, made: Made, seed: int
) -> SparseAutoencoder:
    """A crosscoder of rows [n, 2 * d_hook], both models' activations side by side, that come in `parts` of (tokens read,
    rows): each is trained on once, shuffled among `POOL_ROWS`. A last part batch is left out.

    Each model's activations are normalised to a mean square norm of 1 over the first pool. A latent starts as the same
    token's activations in both models, less the mean. Raises `UserError` where there is less than a batch, a side is all
    zero, or the loss is not finite.
    """
    recipe, names = config.training_recipe(side_names(made.hook)), side_names(made.hook)
    train = train.model_copy(
        update={"saes": {NAME: recipe}, "batch_size": config.batch_size, "accumulation_steps": 1, "tokens": config.tokens}
    )
    generator = torch.Generator().manual_seed(seed)
    sae, scales, before = None, torch.ones(2), 0
    for read, pool in _pools(parts, config.batch_size):
        if sae is None:
            scales = _scales(pool, names)
            sae = new_training_sae(NAME, train, pool.shape[1], pool.device)
            start(sae, _scaled(pool, scales), seed)
        order = torch.randperm(len(pool), generator=generator).to(pool.device)
        steps = order.split(config.batch_size)
        for number, index in enumerate(steps):
            progress = (before + (number + 0.5) / len(steps) * (read - before)) / config.tokens
            train_step(sae, StreamBatch(_scaled(pool[index], scales), min(progress, 1.0)))
        before = read
    if sae is None:
        raise UserError(
            f"transfer.crosscoder: {config.tokens:,} tokens hold less than a batch of {config.batch_size} that count in "
            "both models; ask for more tokens"
        )
    if int(sae.bad_step):
        raise UserError(f"transfer.crosscoder: the loss at step {int(sae.bad_step)} is not finite; lower its learning_rate")
    cfg = SAEConfig(
        form=sae.recipe.form,
        d_in=sae.recipe.d_in,
        d_sae=config.d_sae,
        model_name=made.model_name,
        hook_name=PLUS.join(names),
        hook_scales=tuple(scales.tolist()),
        context_size=made.context_size,
        options=sae.recipe.options(),
    )
    return sae.recipe.export(1.0, cfg).to(sae.recipe.W_dec.device)


def _pools(parts: Iterable[tuple[int, Tensor]], batch_size: int) -> Iterator[tuple[int, Tensor]]:
    """(tokens read, rows) of whole batches each; what is left over waits for the next."""
    held: list[Tensor] = []
    count = read = 0
    size = max(POOL_ROWS // batch_size, 1) * batch_size
    for n_tokens, rows in parts:
        read += n_tokens
        held.append(rows)
        count += len(rows)
        if count >= size:
            joined = torch.cat(held)
            whole = count // batch_size * batch_size
            yield read, joined[:whole]
            held, count = [joined[whole:]], count - whole
    if count >= batch_size:
        yield read, torch.cat(held)[: count // batch_size * batch_size]


def _scales(rows: Tensor, names: list[str]) -> Tensor:
    squares = torch.stack([side.double().square().sum(1).mean().cpu() for side in rows.chunk(2, dim=1)])
    for name, square in zip(names, squares.tolist(), strict=True):
        if not square > 0:
            raise UserError(f"transfer.crosscoder: activations at {name} are all zero")
    return squares.rsqrt().float()


def _scaled(rows: Tensor, scales: Tensor) -> Tensor:
    return torch.cat([side * float(scale) for side, scale in zip(rows.chunk(2, dim=1), scales, strict=True)], dim=1)


def trained(pair: Pair, limit: float, progress: str | None) -> SparseAutoencoder:
    """The crosscoder that `transfer.crosscoder` asks for."""
    config, params = pair.params.transfer.crosscoder, pair.params
    assert config is not None
    source = pair.source._replace(split=TRAIN_SPLIT)

    def parts(bar: Any) -> Iterator[tuple[int, Tensor]]:
        for found in matched(pair, limit, config.tokens, source, params.transfer.batch_size):
            yield found.batch.n_tokens, found.rows
            bar.update(found.batch.n_tokens)

    made = Made(f"{pair.base.name} | {pair.finetuned.name}", pair.hook, pair.source.text.context_size)
    with token_bar(config.tokens, progress) as bar:
        return train_crosscoder(parts(bar), config, params.train, made, params.random_seed)


# --- statistics ------------------------------------------------------------------------------


class LatentSums:
    """Sums over tokens that latent scaling and densities need, in units in which both models count alike.

    Memory is 4 * d_sae * d_hook numbers, however many tokens are added.
    """

    def __init__(self, sae: SparseAutoencoder) -> None:
        self.sae, device = sae, sae.W_dec.device
        d_sae, width = sae.W_dec.shape
        wide = sums_dtype(device)
        self.tokens = 0
        self.firing_F = torch.zeros(d_sae, dtype=torch.long, device=device)
        self.squares_F = torch.zeros(d_sae, dtype=wide, device=device)
        """Of activations."""
        self.with_error = torch.zeros(d_sae, width, dtype=wide, device=device)
        """Activations times what is left of x, and below times the reconstruction; both models' side by side."""
        self.with_reconstruction = torch.zeros(d_sae, width, dtype=wide, device=device)
        self.reconstruction = ReconstructionStats(width, d_sae, device)

    @torch.no_grad()
    def update(self, rows: Tensor) -> None:
        """rows: [n, 2 * d_hook], models' units."""
        if not len(rows):
            return
        z = self.sae.encode(rows[None])
        x, x_hat = (normalised(acts, self.sae.cfg) for acts in (rows[None], self.sae.decode(z)))
        self.reconstruction.update(x, x_hat, z, torch.ones(x.shape[:2], dtype=torch.bool, device=x.device))
        z, x, x_hat = z[0], x[0], x_hat[0]
        self.tokens += len(rows)
        self.firing_F += (z > 0).sum(0)
        self.squares_F += z.square().sum(0, dtype=self.squares_F.dtype)
        self.with_error += z.T @ (x - x_hat)
        self.with_reconstruction += z.T @ x_hat


class Scaling(NamedTuple):
    """Of every latent [d_sae], NaN where it is not defined."""

    nu_error: Tensor
    nu_reconstruction: Tensor
    betas: dict[str, dict[str, Tensor]]
    """By `error` and `reconstruction`, then by model."""


@torch.no_grad()
def latent_scaling(sums: LatentSums) -> Scaling:
    """How much of a latent is in the model that it does *not* belong to, over how much is in its own (Minder et al. 2025).

    With f(t) the latent's activation and v its decoder in the model in which that is the longer, normalised units, least
    squares give for either model m

        beta = argmin sum_t |beta f(t) v - y_m(t)|^2 = sum_t f(t) <v, y_m(t)> / (|v|^2 sum_t f(t)^2)

    `error`: y_m is m's activation less what all *other* latents and the bias reconstruct; `reconstruction`: y_m is m's whole
    reconstruction. nu = beta of the other model / beta of its own. A nu_error near 1 means that the other model has the
    direction, unexplained (complete shrinkage); a nu_reconstruction near 1 that other latents write it there (decoupling).
    Not defined for a latent that never fired, or whose own beta is not positive.
    """
    sae = sums.sae
    wide = sums.squares_F.dtype
    decoders = normalised(sae.W_dec[None], sae.cfg)[0].to(wide).chunk(2, dim=1)
    own = _own_side(sae)
    v = torch.where(own[:, None] == 1, decoders[1], decoders[0])
    below = v.square().sum(1) * sums.squares_F
    betas: dict[str, list[Tensor]] = {"error": [], "reconstruction": []}
    sides = zip(decoders, sums.with_error.chunk(2, dim=1), sums.with_reconstruction.chunk(2, dim=1), strict=True)
    for decoder, error, reconstruction in sides:
        with_own = error + sums.squares_F[:, None] * decoder  # the latent's own part put back
        for key, target in (("error", with_own), ("reconstruction", reconstruction)):
            betas[key].append(torch.where(below > 0, (target * v).sum(1) / below, torch.nan))
    nus = {}
    for key, (base, finetuned) in betas.items():
        own_beta, other = torch.where(own == 1, finetuned, base), torch.where(own == 1, base, finetuned)
        nus[key] = torch.where(own_beta > 0, other / own_beta, torch.nan)
    by_model = {key: dict(zip(MODELS, values, strict=True)) for key, values in betas.items()}
    return Scaling(nus["error"], nus["reconstruction"], by_model)


def finetuned_share(sae: SparseAutoencoder) -> Tensor:
    """The finetuned model's share of a latent's decoder norms [d_sae]: 0 to 1, NaN for a latent without a decoder."""
    return decoder_norm_ratios(sae)[1]


def _own_side(sae: SparseAutoencoder) -> Tensor:
    """Index of the model in which a latent's decoder is the longer [d_sae]."""
    return (finetuned_share(sae) >= 0.5).long()


def class_of(share: float) -> str:
    """One of `CLASSES`, or nothing for NaN."""
    if math.isnan(share):
        return ""
    edges = (ONLY, 0.5 - SHARED, 0.5 + SHARED, 1 - ONLY)
    return CLASSES[sum(share > edge for edge in edges)]


def verdict(name: str, nu_error: float, nu_reconstruction: float) -> str:
    """One of `VERDICTS` for a latent of one model alone whose scaling is defined, else nothing. name: its class."""
    if name not in ("base_only", "finetuned_only") or math.isnan(nu_error) or math.isnan(nu_reconstruction):
        return ""
    if nu_error > NU_ERROR:
        return "shrunk"
    return "decoupled" if nu_reconstruction > NU_RECONSTRUCTION else "specific"


def latent_frame(sums: LatentSums) -> pd.DataFrame:
    """A row a latent: its share, class, density, scaling and verdict."""
    scaling, sae = latent_scaling(sums), sums.sae
    shares = finetuned_share(sae).double().cpu()
    columns: dict[str, Any] = {
        "latent": range(len(shares)),
        "finetuned_share": shares.numpy(),
        "class": [class_of(share) for share in shares.tolist()],
        "firings": sums.firing_F.cpu().numpy(),
        "density": (sums.firing_F.double() / max(sums.tokens, 1)).cpu().numpy(),
        "decoder_cosine": _decoder_cosine(sae).cpu().numpy(),
        "nu_error": scaling.nu_error.double().cpu().numpy(),
        "nu_reconstruction": scaling.nu_reconstruction.double().cpu().numpy(),
    }
    for key, betas in scaling.betas.items():
        columns |= {f"beta_{key}_{model}": beta.double().cpu().numpy() for model, beta in betas.items()}
    frame = pd.DataFrame(columns)
    frame["verdict"] = [verdict(*row) for row in zip(frame["class"], frame.nu_error, frame.nu_reconstruction, strict=True)]
    return frame


def _decoder_cosine(sae: SparseAutoencoder) -> Tensor:
    """Between a latent's decoders in the two models [d_sae]; NaN where one is zero."""
    one, other = sae.W_dec.double().chunk(2, dim=1)
    return (one * other).sum(1) / (one.norm(dim=1) * other.norm(dim=1))


def summary(sums: LatentSums, frame: pd.DataFrame) -> dict[str, Any]:
    """How well both models are reconstructed on held-out text, and the classes of latents."""
    whole = sums.reconstruction.metrics()
    sides = hooks_of(sums.sae, sums.reconstruction).values()
    return {
        "held_out_tokens": sums.tokens,
        "variance_explained": whole.get("variance_explained"),
        "l0": whole.get("l0"),
        "dead": int((frame.firings == 0).sum()),
        "models": dict(zip(MODELS, sides, strict=True)),
        "limits": {"only": ONLY, "shared": SHARED, "nu_error": NU_ERROR, "nu_reconstruction": NU_RECONSTRUCTION},
        "share_histogram": {
            "edges": SHARE_EDGES.round(4).tolist(),
            "counts": np.histogram(frame.finetuned_share[frame.firings > 0].dropna(), SHARE_EDGES)[0].tolist(),
        },
        "classes": {name: _class(frame[(frame["class"] == name) & (frame.firings > 0)]) for name in CLASSES},
    }


def _class(part: pd.DataFrame) -> dict[str, Any]:
    """Of latents that fire."""
    found: dict[str, Any] = {"latents": len(part)}
    for column in ("finetuned_share", "density", "decoder_cosine", "nu_error", "nu_reconstruction"):
        if part[column].notna().any():
            found[f"{column}_median"] = float(part[column].median())
    verdicts = {name: int((part.verdict == name).sum()) for name in VERDICTS}
    return found | (verdicts if any(verdicts.values()) else {})
