"""Predictions with reconstructions in place: clean and ablated runs that all SAEs share, one patched run for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_research.evals.core.group import CoreGroup, Sums, encodings, lab_reconstruction
from sae_research.evals.core.metrics import at_hook
from sae_research.evals.harness import Group, Scores
from sae_research.lm.pairs import PairedBatch
from sae_research.saes import SparseAutoencoder
from sae_research.saes.base import Family, Guard, check_finite
from sae_research.saes.cross_layer import CrossLayerTranscoder
from sae_research.stats.predictions import CleanPredictions, prediction_sums, replaced_logits, replacement_logits, total


def predictions_of(group: CoreGroup, members: Group, keys: dict[str, str], guard: Guard) -> dict[str, Sums]:
    """Sums of cross-entropy and KL over all batches of predictions, for every SAE."""
    batches = group.numbers(0, group.params.core_eval.n_eval_reconstruction_batches)
    by_batch = {name: {number: f"{key}-{number}" for number in range(len(batches))} for name, key in keys.items()}
    scores, shared = Scores("core_predictions", members, by_batch, guard), SharedPredictions(group, batches)

    def score(number: int, family: Family) -> Iterator[tuple[str, Sums]]:
        return _patched(shared.of(number), family)

    with scores.progress("patched predictions", "SAE·batch") as bar:
        scores.fill(score, bar, range(len(batches)))
    return {name: _total(by_number.values()) for name, by_number in scores.left().items()}


def _total(parts: Iterable[Sums]) -> Sums:
    total: Sums = {}
    for sums in parts:
        for key, value in sums.items():
            total[key] = np.add(total.get(key, 0.0), value).tolist()
    return total


class _Predictions(NamedTuple):
    """Of one batch, what all SAEs share."""

    group: CoreGroup
    batch: PairedBatch
    clean: CleanPredictions
    sums: Sums
    """Clean, zero-ablated and mean-ablated, in both definitions."""

    def run(self, put: Tensor, mask: Tensor | None = None, hook: str = "") -> tuple[Tensor, Tensor]:
        """Predictions with `put` [batch, seq, d_out] in place of what the model has at the written hook, where `mask`
        [batch, seq] holds; everywhere without one. hook: of several that one alone."""
        return self.clean.compare(_resumed(self.group, self.batch, put, mask, hook))


def _resumed(group: CoreGroup, batch: PairedBatch, put: Tensor, mask: Tensor | None = None, hook: str = "") -> Tensor:
    if len(group.hooks_out) > 1:
        sides = put.expand_as(batch.written).chunk(len(group.hooks_out), dim=-1)
        chosen = {name: side for name, side in zip(group.hooks_out, sides, strict=True) if hook in ("", name)}
        return replaced_logits(group.lm, batch.tokens, chosen, mask)
    written = put if mask is None else torch.where(mask[..., None], put, batch.written)
    return group.lm.resume(group.hook_out, written, batch.tokens, rest=batch.rest)


class SharedPredictions:
    """Those of the batch that was asked for last."""

    def __init__(self, group: CoreGroup, batches: Sequence[list[int]]) -> None:
        self._group, self._batches = group, batches
        self._zero_logits: Tensor | None = None
        self._last: tuple[int, _Predictions] | None = None

    def of(self, number: int) -> _Predictions:
        if self._last is None or self._last[0] != number:
            self._last = None  # its logits go before those of the next batch come
            self._last = number, self._made(self._group.shown(self._batches[number], resumed=True))
        return self._last[1]

    @torch.no_grad()
    def _made(self, batch: PairedBatch) -> _Predictions:
        group, x = self._group, batch.written
        clean = CleanPredictions(_resumed(group, batch, x), batch.tokens)
        made = _Predictions(group, batch, clean, {})
        zeroed = self._zeroed(batch, made)
        made.sums.update(_sums(group, batch, {"sae_bench": batch.sae_bench_mask}, ablated=zeroed, clean=(clean.ce, None)))
        if group.lab:
            lab_mask, zero, mean = batch.lab_mask, torch.zeros_like(x), group.mean_activation
            made.sums.update(
                _sums(
                    group,
                    batch,
                    {"lab": lab_mask, "cluster": lab_mask},
                    zero=made.run(zero, lab_mask),
                    clean=(clean.ce, None),
                    mean=made.run(mean, lab_mask),
                )
            )
            for hook in group.hooks_out if len(group.hooks_out) > 1 else ():
                runs = {"zero": made.run(zero, lab_mask, hook), "mean": made.run(mean, lab_mask, hook)}
                made.sums.update(_sums(group, batch, at_both(hook, lab_mask), clean=(clean.ce, None), **runs))
        return made

    def _zeroed(self, batch: PairedBatch, made: _Predictions) -> tuple[Tensor, Tensor]:
        """Predictions with every activation zeroed. Resumed at a residual hook the model sees no tokens any more, so that
        one sequence [1, seq, vocab] stands for all of all batches; elsewhere each batch needs its own."""
        group = self._group
        if not (group.lm.can_resume and "hook_resid" in group.hook_out and len(group.hooks_out) == 1):
            return made.run(torch.zeros_like(batch.written))
        if self._zero_logits is None:
            self._zero_logits = group.lm.resume(group.hook_out, torch.zeros_like(batch.written[:1]), batch.tokens[:1])
        return made.clean.compare(self._zero_logits)


@torch.no_grad()
def _patched(shared: _Predictions, family: Family) -> Iterator[tuple[str, Sums]]:
    """(name, sums) over one batch with each SAE's reconstruction in place of the activations, in both definitions."""
    group, batch, own = shared.group, shared.batch, shared.batch.written
    mask = batch.lab_mask
    for name, z_all, z_lab in encodings(family, batch.acts, mask if group.lab else None):
        sae = family[name]
        x_hat = sae.reconstruct(batch.acts, z=z_all)
        replaced = _replaced(shared, sae, x_hat, None)
        sums = shared.sums | _sums(group, batch, {"sae_bench": batch.sae_bench_mask}, patched=replaced)
        if z_lab is not None:
            x_hat = lab_reconstruction(sae, batch, x_hat, z_lab).to(own.dtype)
            sums |= _sums(group, batch, {"lab": mask, "cluster": mask}, patched=_replaced(shared, sae, x_hat, mask))
            for hook in group.hooks_out if len(group.hooks_out) > 1 else ():
                sums |= _sums(group, batch, at_both(hook, mask), patched=shared.run(x_hat, mask, hook))
        check_finite(sums)
        yield name, sums


def at_both(hook: str, mask: Tensor) -> dict[str, Tensor]:
    return {at_hook(name, hook): mask for name in ("lab", "cluster")}


def _replaced(shared: _Predictions, sae: SparseAutoencoder, x_hat: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Predictions with all that an SAE writes replaced; x_hat: its reconstruction, from the clean run."""
    if isinstance(sae, CrossLayerTranscoder) and sae.cfg.is_cross_layer:
        return shared.clean.compare(replacement_logits(shared.group.lm, shared.batch.tokens, sae, mask))
    return shared.run(x_hat, mask)


def _sums(group: CoreGroup, batch: PairedBatch, masks: dict[str, Tensor], **runs: tuple[Tensor, Tensor | None]) -> Sums:
    """`prediction_sums` under each definition's mask, and by cluster of contexts under `cluster`, at a hook too."""

    def by_cluster(values: Tensor, mask: Tensor) -> list[float]:
        return group.text.predictions.sums(batch.index, mask, values).tolist()

    return {
        f"{name}/{key}": value
        for name, mask in masks.items()
        for key, value in prediction_sums(mask, runs, by_cluster if name.startswith("cluster") else total).items()
    }
