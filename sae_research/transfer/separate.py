"""Separate SAEs of either model: which latents of one have a counterpart in the other, which a finetune made, kept or lost.

The finetuned model's SAE is `transfer.finetuned_sae`, trained on that model alone, or the base model's SAE trained further
on the finetuned model's activations (Bricken et al. 2024, "Stage-Wise Model Diffing"). Two latents are compared by the
cosine of their decoder rows and the correlation of their activations, each SAE's on its own model, on the same tokens. SAEs
of one model already differ by their seeds (Paulo and Belrose 2025, arXiv 2501.16615): that a latent has no counterpart is a
claim about SAEs, until an ablation shows that it matters to the one model and not to the other.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.saes import SparseAutoencoder, encode_each
from sae_research.stats.reconstruction import sums_dtype
from sae_research.transfer.causal import CheckedText, Latents, ablated
from sae_research.transfer.crosscoder import MatchedRows, matched
from sae_research.transfer.loading import MODELS, Pair
from sae_research.transfer.table import as_tsv
from sae_research.transfer.text import token_bar

SAME, NONE = 0.7, 0.4
"""A latent is kept where one latent of the other SAE has at least `SAME` in both cosine and correlation; it has no
counterpart where none has `NONE` in either."""
ALONE = {"base": "lost", "finetuned": "made"}
"""What a latent without a counterpart is, by the model whose SAE it is of."""
CLASSES = {model: ("kept", "changed", ALONE[model]) for model in MODELS}
GROUPS = {"base": ("lost", "base_end"), "finetuned": ("made", "kept", "finetuned_end")}
"""By SAE what is checked; an end: the latents that are least matched, whatever their class."""
LARGEST = 2**27
"""Pairs of latents whose correlations are kept, a gigabyte."""
EDGES = np.linspace(-1, 1, 41)


class SeparateLatents(Latents):
    """Those of one model's own SAE: ablated in its own model, and in the other as they are active there."""

    def __init__(self, sae: SparseAutoencoder, own: str) -> None:
        self.sae, self.own = sae, own
        self.other = next(model for model in MODELS if model != own)
        self.decoders = dict.fromkeys(MODELS, sae.W_dec)

    def activations(self, found: MatchedRows) -> dict[str, Tensor]:
        return {model: activations(self.sae, found, model) for model in MODELS}

    def change(self, z: Any, latents: list[int]) -> Tensor:
        return (z["finetuned"][:, latents] - z["base"][:, latents]) @ self.sae.W_dec[latents]


@torch.no_grad()
def activations(sae: SparseAutoencoder, found: MatchedRows, model: str) -> Tensor:
    """Of the matched tokens, as the model has them [n, d_sae]; other tokens are masked."""
    x, index = found.acts[model], found.index[MODELS.index(model)]
    mask = torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device)
    mask.view(-1)[index] = True
    ((_, z),) = encode_each({"sae": sae}, x, mask)
    return z.flatten(0, 1)[index]


# --- matching --------------------------------------------------------------------------------


class CrossMoments:
    """Sums over tokens from which the correlation of every latent of one SAE with every latent of another comes."""

    def __init__(self, one: SparseAutoencoder, other: SparseAutoencoder) -> None:
        sizes, device = (one.cfg.d_sae, other.cfg.d_sae), one.W_dec.device
        if sizes[0] * sizes[1] > LARGEST:
            raise UserError(
                f"transfer.separate: {sizes[0]:,} latents with {sizes[1]:,} are more than {LARGEST:,} pairs; compare "
                "narrower SAEs"
            )
        wide = sums_dtype(device)
        self.tokens = 0
        self.firing = [torch.zeros(size, dtype=torch.long, device=device) for size in sizes]
        self.sums = [torch.zeros(size, dtype=wide, device=device) for size in sizes]
        self.squares = [torch.zeros(size, dtype=wide, device=device) for size in sizes]
        self.products = torch.zeros(*sizes, dtype=wide, device=device)

    def update(self, one: Tensor, other: Tensor) -> None:
        """Activations of the same tokens [n, d_sae] of either."""
        self.tokens += len(one)
        for side, z in enumerate((one, other)):
            self.firing[side] += (z != 0).sum(0)
            self.sums[side] += z.sum(0, dtype=self.sums[side].dtype)
            self.squares[side] += z.square().sum(0, dtype=self.sums[side].dtype)
        self.products += one.T @ other

    def correlations(self) -> Tensor:
        """Pearson [d_sae of one, d_sae of other]; NaN where either never varies."""
        n = max(self.tokens, 1)
        variances = [squares / n - (sums / n).square() for sums, squares in zip(self.sums, self.squares, strict=True)]
        spread = [torch.where(own > 0, own, torch.nan).sqrt() for own in variances]
        covariance = self.products / n - torch.outer(self.sums[0] / n, self.sums[1] / n)
        return (covariance / spread[0][:, None] / spread[1]).clamp(-1, 1)


class Best(NamedTuple):
    """Of every latent of one SAE the best of the other's [d_sae]; -1 for an index where nothing is defined."""

    cosine: Tensor
    cosine_latent: Tensor
    correlation: Tensor
    correlation_latent: Tensor
    match: Tensor
    """The largest, over the other's latents, of the smaller of cosine and correlation."""
    match_latent: Tensor


def best(cosines: Tensor, correlations: Tensor) -> Best:
    """Of every row. Both [d_sae, d_sae of the other], NaN where not defined."""
    found: list[Tensor] = []
    for values in (cosines, correlations, torch.minimum(cosines, correlations)):
        top = values.nan_to_num(nan=-torch.inf).max(dim=1)
        defined = top.values.isfinite()
        found += [torch.where(defined, top.values, torch.nan), torch.where(defined, top.indices, -1)]
    return Best(*(part.cpu() for part in found))


def decoder_cosines(one: SparseAutoencoder, other: SparseAutoencoder) -> Tensor:
    """[d_sae of one, d_sae of other]; NaN where a latent has no decoder."""
    rows = [sae.W_dec.float() / sae.W_dec.float().norm(dim=1, keepdim=True) for sae in (one, other)]
    return (rows[0] @ rows[1].T).clamp(-1, 1)


def class_of(own: str, cosine: float, correlation: float, match: float) -> str:
    """One of `CLASSES[own]`, from the best values of a latent that fires; NaN counts as none."""
    if match >= SAME:
        return "kept"
    return "changed" if cosine >= NONE or correlation >= NONE else ALONE[own]


@torch.no_grad()
def compared(moments: CrossMoments, saes: dict[str, SparseAutoencoder]) -> pd.DataFrame:
    """A row a latent of either SAE. saes: by model, in the order of `moments`."""
    cosines, correlations = decoder_cosines(saes["base"], saes["finetuned"]), moments.correlations()
    parts = []
    for side, model in enumerate(MODELS):
        found = best(cosines, correlations) if side == 0 else best(cosines.T, correlations.T)
        firings = moments.firing[side].cpu()
        columns: dict[str, Any] = {
            "sae": model,
            "latent": range(len(firings)),
            "firings": firings.numpy(),
            "density": (firings.double() / max(moments.tokens, 1)).numpy(),
            **{key: values.numpy() for key, values in found._asdict().items()},
        }
        frame = pd.DataFrame(columns)
        frame["class"] = [
            class_of(model, *row[:3]) if row[3] else ""
            for row in zip(frame.cosine, frame.correlation, frame.match, frame.firings, strict=True)
        ]
        parts.append(frame)
    return pd.concat(parts, ignore_index=True)


def summary(frame: pd.DataFrame) -> dict[str, Any]:
    """By SAE: latents that fire, the silent ones, classes, medians and histograms of the best values."""
    found = {}
    for model in MODELS:
        own = frame[frame.sae == model]
        fires = own[own.firings > 0]
        found[model] = {
            "fire": len(fires),
            "dead": len(own) - len(fires),
            "classes": {name: int((fires["class"] == name).sum()) for name in CLASSES[model]},
            **{
                f"{key}_median": float(fires[key].median())
                for key in ("cosine", "correlation", "match")
                if fires[key].notna().any()
            },
            "histograms": {
                key: {"edges": EDGES.round(4).tolist(), "counts": np.histogram(fires[key].dropna(), EDGES)[0].tolist()}
                for key in ("cosine", "correlation", "match")
            },
        }
    return found


# --- report ----------------------------------------------------------------------------------


def separate_report(
    pair: Pair, other: SparseAutoencoder, control: SparseAutoencoder | None, limit: float, progress: str | None = None
) -> dict[str, Any]:
    """{`result`: everything as JSON, `table`: all latents as text}. other: the finetuned model's SAE; control: an SAE of the
    base model that was trained as `other` was, compared with the base SAE on the base model; limit: largest norm at the
    SAEs' hook that is no outlier."""
    config, params = pair.params.transfer.separate, pair.params
    assert config is not None
    saes = {"base": pair.saes["base"], "finetuned": other}
    moments = CrossMoments(*saes.values())
    alike = None if control is None else CrossMoments(pair.saes["base"], control)
    with token_bar(config.tokens, progress) as bar:
        for found in matched(pair, limit, config.tokens, pair.source, params.transfer.batch_size):
            z = activations(saes["base"], found, "base")
            moments.update(z, activations(other, found, "finetuned"))
            if alike is not None and control is not None:
                alike.update(z, activations(control, found, "base"))
            bar.update(found.batch.n_tokens)
    frame = compared(moments, saes)
    result = {
        "status": "ok",
        "setting": config.model_dump(),
        "finetuned_sae": "given" if control is None else "the base SAE, trained further on the finetuned model",
        "tokens": moments.tokens,
        "limits": {"same": SAME, "none": NONE},
        "saes": summary(frame),
        "ablations": {model: ablations(pair, saes[model], model, frame, limit, progress) for model in MODELS},
    }
    if alike is not None and control is not None:
        result["control"] = summary(compared(alike, {"base": pair.saes["base"], "finetuned": control}))
    return {"result": result, "table": as_tsv(frame)}


def ablations(
    pair: Pair, sae: SparseAutoencoder, own: str, frame: pd.DataFrame, limit: float, progress: str | None = None
) -> dict[str, Any]:
    """What `causal.measured` gives of one SAE's latents of every group, with a random kept latent as the control of each."""
    config = pair.params.transfer.separate
    assert config is not None
    frame = frame[frame.sae == own].reset_index(drop=True)
    text = CheckedText(pair, limit, config.checked_tokens)
    return ablated(
        SeparateLatents(sae, own),
        text,
        partial(chosen, frame, own=own, number=config.checked),
        (frame["class"] == "kept").to_numpy(),
        partial(_about, frame),
        progress and f"{progress}, {own}",
    )


def chosen(frame: pd.DataFrame, energy: Tensor, own: str, number: int) -> dict[str, list[int]]:
    """By group the latents of one SAE to check: those that fire on either text, of a class those that write most into their
    model, of the end the least matched. energy: as `causal.energies`."""
    fires = frame.assign(energy=energy.numpy())
    fires = fires[(fires.energy > 0) & (fires["class"] != "")]
    found = {}
    for name in GROUPS[own]:
        if name == f"{own}_end":
            part = fires.assign(match=fires.match.fillna(-1.0)).sort_values(["match", "latent"])
        else:
            part = fires[fires["class"] == name].sort_values(["energy", "latent"], ascending=[False, True])
        found[name] = [int(latent) for latent in part.latent.head(number)]
    return found


def _about(frame: pd.DataFrame, latent: int) -> dict[str, Any]:
    row = frame.iloc[latent]
    values = {key: float(row[key]) for key in ("cosine", "correlation", "match") if pd.notna(row[key])}
    return {"class": row["class"], "density": float(row.density), **values}
