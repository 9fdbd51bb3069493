"""Core statistics exactly as SAE Bench 0.6.0 defines them, from batches, quirks included, and those of an SAE's weights.

Source: sae_bench/evals/core/main.py, `get_sparsity_and_variance_metrics` and `calculate_misc_metrics`. What a reader
should know before comparing:
- `explained_variance` collapses the dimensions before squaring, so its total variance is `S - (S/d)^2` with
  S = mean |x|^2, a variance about zero; `explained_variance_legacy` averages one ratio per token.
- `mse` divides by the number of tokens in the batch, not by d_in.
- `average_max_*_cosine_sim` are means over all latents up to `EXACT_WIDTH` of them; in wider dictionaries over
  an evenly spaced sample, each against all others (standard error about 0.1 / sqrt(sample)).
- `l1` sums activations without absolute values; density and `frac_alive` count only positive ones.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from sae_research.config.evaluation_params import EXACT_WIDTH
from sae_research.saes import SparseAutoencoder
from sae_research.saes.cross_layer import CrossLayerTranscoder
from sae_research.saes.crosscoders import normalised

CHUNK_ROWS = 2048


class LatentWeights(NamedTuple):
    """One value per latent [d_sae], on the CPU."""

    encoder_bias: Tensor
    encoder_norm: Tensor
    encoder_decoder_cosine: Tensor
    max_encoder_cosine: Tensor
    """NaN where it was not looked for (`measured_rows`)."""
    max_decoder_cosine: Tensor
    """As for the encoder."""


def max_cosine(directions_FD: Tensor) -> Tensor:
    """Largest cosine of each row [d_sae, d] with any other row; memory grows with d_sae, not its square.

    Exact for every row up to `EXACT_WIDTH` rows. Beyond that the work would grow with their square: it stays that of
    `EXACT_WIDTH` rows, as exact maxima over all other rows for evenly spaced rows alone (`measured_rows`), and NaN for the
    rest, which no mean over latents may count.
    """
    unit = torch.nn.functional.normalize(directions_FD.float(), dim=1)
    rows = measured_rows(len(unit))
    best = torch.full((len(unit),), torch.nan, device=unit.device)
    for start in range(0, len(rows), CHUNK_ROWS):
        chunk = rows[start : start + CHUNK_ROWS].to(unit.device)
        cosines = unit[chunk] @ unit.T
        cosines[torch.arange(len(chunk), device=unit.device), chunk] = -torch.inf
        if len(unit) > 1:  # a single row has no other
            best[chunk] = cosines.amax(dim=1)
    return best


def measured_rows(d_sae: int) -> Tensor:
    """The latents whose nearest neighbour is looked for [rows]: all up to `EXACT_WIDTH`, else `EXACT_WIDTH`² / d_sae,
    evenly spaced from the first on."""
    if d_sae <= EXACT_WIDTH:
        return torch.arange(d_sae)
    count = max(1, EXACT_WIDTH**2 // d_sae)
    return torch.arange(count) * d_sae // count


_looked_for: dict[tuple[str, str], Tensor] = {}
_REMEMBERED = 8


def _nearest(directions_FD: Tensor) -> Tensor:
    """`max_cosine` on the CPU, remembered by content: many SAEs of a comparison stand on one dictionary."""
    key = (hashlib.sha256(directions_FD.contiguous().cpu().numpy()).hexdigest(), directions_FD.device.type)
    if key not in _looked_for:
        while len(_looked_for) >= _REMEMBERED:
            del _looked_for[next(iter(_looked_for))]
        _looked_for[key] = max_cosine(directions_FD).cpu()
    return _looked_for[key]


@torch.no_grad()
def latent_weights(sae: SparseAutoencoder) -> LatentWeights:
    """Encoder norm and bias, cosine of encoder and decoder, and nearest neighbours of both. A transcoder's encoder and
    decoder have no cosine: they lie at different hooks. A crosscoder's are those of normalised activations. A cross-layer
    transcoder's neighbours are looked for layer by layer."""
    if isinstance(sae, CrossLayerTranscoder) and sae.cfg.is_cross_layer:
        return _by_layer(sae)
    W_enc, b_enc = sae.encoder_weights()
    encoder_FD, decoder_FD = W_enc.T.float(), normalised(sae.W_dec.float(), sae.cfg)
    if sae.cfg.is_crosscoder:  # what reads x reads scale * x with its weights divided
        encoder_FD = encoder_FD / normalised(torch.ones_like(encoder_FD[:1]), sae.cfg)
    apart = torch.full((len(decoder_FD),), torch.nan)
    return LatentWeights(
        *(
            value.cpu()
            for value in (
                b_enc.float(),
                encoder_FD.norm(dim=1),
                apart if sae.cfg.is_transcoder else torch.nn.functional.cosine_similarity(encoder_FD, decoder_FD, dim=1),
                _nearest(encoder_FD),
                _nearest(decoder_FD),
            )
        )
    )


def _by_layer(sae: CrossLayerTranscoder) -> LatentWeights:
    """`latent_weights` of a cross-layer transcoder: latents of one layer read one hook, and write the same ones."""
    encoder_FD, layers = sae.W_enc.T.float(), range(len(sae.cfg.hook_names))
    nearest = (
        torch.cat([_nearest(rows_FD) for rows_FD in sides])
        for sides in (encoder_FD.split(sae.width), (sae.decoder_rows(layer).float() for layer in layers))
    )
    apart = torch.full((sae.cfg.d_sae,), torch.nan)
    return LatentWeights(*(value.cpu() for value in (sae.b_enc.float(), encoder_FD.norm(dim=1), apart, *nearest)))


class SaeBenchStats:
    """Accumulates batches of (x, x_hat, z, mask) and yields SAE Bench's metrics."""

    def __init__(self, d_sae: int, device: torch.device | str) -> None:
        self.per_token: dict[str, list[Tensor]] = {}
        self.per_batch: dict[str, list[Tensor]] = {}
        self.fired_F = torch.zeros(d_sae, device=device)
        self.prompts_F = torch.zeros(d_sae, device=device)
        self.tokens = 0

    @torch.no_grad()
    def update(self, x: Tensor, x_hat: Tensor, z: Tensor, mask: Tensor) -> None:
        """x, x_hat: [batch, seq, d_in]; z: [batch, seq, d_sae]; mask: bool [batch, seq]."""
        x_TD, hat_TD, z_TF = x[mask], x_hat[mask], z[mask]
        norm_T, hat_norm_T = x_TD.norm(dim=-1), hat_TD.norm(dim=-1)
        residual_T = (x_TD - hat_TD).square().sum(-1)
        squares_TD = x_TD.square()
        dot_T = (x_TD * hat_TD).sum(-1)
        self._tokens(
            l2_norm_in=norm_T,
            l2_norm_out=hat_norm_T,
            l2_ratio=hat_norm_T / torch.where(norm_T < 1e-4, 1.0, norm_T),
            l0=torch.linalg.vector_norm(z_TF, 0, dim=-1, dtype=torch.float32),
            l1=z_TF.sum(-1),
            mse=residual_T / len(x_TD),
            explained_variance_legacy=1 - residual_T / (x_TD - x_TD.mean(0)).square().sum(-1),
            cossim=dot_T / (norm_T * hat_norm_T),
        )
        self._batch(
            bias=hat_norm_T.square().mean() / dot_T.mean(),
            squares=squares_TD.sum(-1).mean(),
            mean_square=squares_TD.mean(),
            residual=residual_T.mean(),
        )
        positive = ((z > 0) & mask[..., None]).float()  # sums of booleans are slow
        self.fired_F += positive.sum((0, 1))
        self.prompts_F += positive.amax(1).sum(0)
        self.tokens += int(mask.sum())

    def metrics(self) -> dict[str, dict[str, float]]:
        """SAE Bench's categories shrinkage, sparsity and reconstruction_quality."""
        mean = {name: torch.cat(values).mean().item() for name, values in self.per_token.items()}
        batch = {name: torch.stack(values).mean() for name, values in self.per_batch.items()}
        explained = (1 - batch["residual"] / (batch["squares"] - batch["mean_square"] ** 2)).item()
        return {
            "shrinkage": {
                "l2_norm_in": mean["l2_norm_in"],
                "l2_norm_out": mean["l2_norm_out"],
                "l2_ratio": mean["l2_ratio"],
                "relative_reconstruction_bias": batch["bias"].item(),
            },
            "sparsity": {"l0": mean["l0"], "l1": mean["l1"]},
            "reconstruction_quality": {
                "explained_variance": explained,
                "explained_variance_legacy": mean["explained_variance_legacy"],
                "mse": mean["mse"],
                "cossim": mean["cossim"],
            },
        }

    def density(self) -> Tensor:
        """Share of tokens with a positive activation [d_sae]."""
        return (self.fired_F / self.tokens).cpu()

    def consistent_activation(self) -> Tensor:
        """Positive tokens per prompt that has any [d_sae]; NaN for latents that never fire."""
        return (self.fired_F / self.prompts_F).cpu()

    def _tokens(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.per_token.setdefault(name, []).append(value.cpu())

    def _batch(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.per_batch.setdefault(name, []).append(value.cpu())


def misc_metrics(density_F: Tensor, weights: LatentWeights) -> dict[str, float]:
    """SAE Bench's `misc_metrics` category from densities and weights [d_sae]."""
    total = density_F.sum()

    def share(limit: float) -> float:
        return (density_F[density_F > limit].sum() / total).item() if total > 0 else 0.0

    return {
        "average_max_encoder_cosine_sim": _mean_of_measured(weights.max_encoder_cosine),
        "average_max_decoder_cosine_sim": _mean_of_measured(weights.max_decoder_cosine),
        "frac_alive": (density_F > 0).float().mean().item(),
        "freq_over_1_percent": (density_F > 0.01).float().mean().item(),
        "freq_over_10_percent": (density_F > 0.1).float().mean().item(),
        "normalized_freq_over_1_percent": share(0.01),
        "normalized_freq_over_10_percent": share(0.1),
    }


def _mean_of_measured(cosines_F: Tensor) -> float:
    """Over the latents that were looked at: all of them but in very wide dictionaries."""
    return cosines_F[~cosines_F.isnan()].mean().item()


def feature_details(density_F: Tensor, consistent_F: Tensor, weights: LatentWeights) -> list[dict[str, float]]:
    """SAE Bench's one record per latent, rounded to its 10 decimals; a NaN becomes its -1, as does a nearest neighbour that
    was not looked for (`max_cosine`)."""
    columns = {
        "feature_density": density_F,
        "consistent_activation_heuristic": consistent_F,
        "encoder_bias": weights.encoder_bias,
        "encoder_norm": weights.encoder_norm,
        "encoder_decoder_cosine_sim": weights.encoder_decoder_cosine,
        "max_decoder_cosine_sim": weights.max_decoder_cosine,
        "max_encoder_cosine_sim": weights.max_encoder_cosine,
    }
    lists = {name: torch.where(values.isnan(), -1.0, values).tolist() for name, values in columns.items()}
    return [{"index": i, **{name: round(values[i], 10) for name, values in lists.items()}} for i in range(len(density_F))]
