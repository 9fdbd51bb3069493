"""How often each latent fires on a corpus, and which latents are chosen to be clamped."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_research.evals.pool import HookActivations
from sae_research.lm import Batch
from sae_research.saes import SparseAutoencoder, encode_each

DEFINITIONS = ("sae_bench", "lab")
"""SAE Bench 0.6.0: a latent fires where it is above zero, at every token but BOS, EOS and padding. Ours: where it is not
zero, at tokens inside `token_mask`."""


class Firing(NamedTuple):
    """Per latent [d_sae], in float64: the fraction of counted tokens it fires on, and its mean absolute activation."""

    density: np.ndarray
    strength: np.ndarray


def codes(sae_group: dict[str, SparseAutoencoder], batch: Batch, lab: Tensor) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(name, definition -> activations [batch, seq, d_sae]) of SAEs of one family. lab: [batch, seq], what counts in ours.

    SAE Bench hides nothing but padding from an encoder. (Its own batches do show padding to encoders that read the whole
    sequence; what is computed here is what it computes for one sequence at a time.)
    """
    if all(sae.per_token for sae in sae_group.values()):
        for name, z in encode_each(sae_group, batch.acts, None):
            yield name, {"sae_bench": z, "lab": z * lab[..., None]}
        return
    both = zip(encode_each(sae_group, batch.acts, batch.real), encode_each(sae_group, batch.acts, lab), strict=True)
    for (name, bench), (_, own) in both:
        yield name, {"sae_bench": bench, "lab": own}


def fires(z: Tensor, definition: str) -> Tensor:
    """Where latents are active. bool, the shape of `z`."""
    return z > 0 if definition == "sae_bench" else z != 0


@torch.no_grad()
def firing(corpus: HookActivations, saes: dict[str, SparseAutoencoder]) -> dict[str, dict[str, Firing]]:
    """Name -> definition -> densities on a corpus, for SAEs of one family."""
    count = {name: {d: torch.zeros(sae.cfg.d_sae, dtype=torch.float64) for d in DEFINITIONS} for name, sae in saes.items()}
    total = {name: {d: torch.zeros(sae.cfg.d_sae, dtype=torch.float64) for d in DEFINITIONS} for name, sae in saes.items()}
    tokens = dict.fromkeys(DEFINITIONS, 0)
    for batch in corpus.batches():
        masks = {"sae_bench": corpus.sae_bench_mask(batch), "lab": corpus.lab_mask(batch)}
        for definition, mask in masks.items():
            tokens[definition] += int(mask.sum())
        for name, by_definition in codes(saes, batch, masks["lab"]):
            for definition, z in by_definition.items():
                kept = z[masks[definition]]
                active = fires(kept, definition)
                count[name][definition] += active.sum(dim=0).double().cpu()
                total[name][definition] += (kept.abs() * active).sum(dim=0).double().cpu()
    return {name: {d: Firing((count[name][d] / max(tokens[d], 1)).numpy(), (total[name][d] / max(tokens[d], 1)).numpy())
                   for d in DEFINITIONS} for name in saes}


def choose_latents(forget: Firing, retain: Firing, retain_threshold: float, n: int) -> list[int]:
    """The at most `n` latents that fire most often on the forget corpus, of those that fire there at all and on less
    than `retain_threshold` of the retain corpus.

    Of equally frequent latents the stronger goes first, so that no choice depends on the order of latents; SAE Bench
    leaves ties to its sort.
    """
    eligible = np.flatnonzero((retain.density < retain_threshold) & (forget.density > 0))
    order = np.lexsort((eligible, -forget.strength[eligible], -forget.density[eligible]))
    return [int(latent) for latent in eligible[order][:n]]
