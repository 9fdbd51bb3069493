"""Clamp chosen latents and ask again.

Where a chosen latent is active it is set to -multiplier; what the SAE does not reconstruct stays. So the stream changes
by `decode(edited) - decode(latents)` at those tokens and nowhere else, as in SAE Bench 0.6.0. In ours (`lab_v1`) a latent
that is active below zero is set to +multiplier: the same edit whichever sign a latent carries.

Only what changes is run: layers above the hook, prompts in which a chosen latent is active, and once for all
configurations that make the same edit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_research.evals.pool import HookActivations
from sae_research.evals.unlearning.densities import DEFINITIONS, codes, fires
from sae_research.evals.unlearning.prompts import Prompt, answers, last_positions
from sae_research.lm import Batch
from sae_research.saes import SparseAutoencoder


class Configuration(NamedTuple):
    """One way to intervene."""

    retain_threshold: float
    n_features: int
    multiplier: int
    latents: tuple[int, ...]
    """What was chosen by the first two: fewer than `n_features` where no more qualify."""


class Edit(NamedTuple):
    """Latents [n] set to `values` [n] at `positions` [n] of one prompt."""

    positions: Tensor
    latents: Tensor
    values: Tensor

    def key(self) -> bytes:
        return b"|".join(part.cpu().numpy().tobytes() for part in self)


class Job(NamedTuple):
    """One prompt under one edit."""

    row: int
    """Which of the batch's prompts."""
    definition: str
    """Whose activations are edited; encoders that read whole sequences have two kinds."""
    edit: Edit


Plans = dict[str, list[Configuration]]
"""Definition -> configurations."""


@torch.no_grad()
def correct_answers(questions: HookActivations, prompts: Sequence[Prompt], saes: dict[str, SparseAutoencoder],
                    plans: dict[str, Plans]) -> dict[str, dict[str, np.ndarray]]:
    """Name -> definition -> which prompts are still answered rightly, bool [configurations, prompts].

    For SAEs of one family. prompts: known questions, in the order of `questions`.
    """
    right = {name: {d: np.ones((len(plans[name][d]), len(prompts)), dtype=bool) for d in DEFINITIONS} for name in saes}
    for batch in questions.batches():
        asked = [prompts[i] for i in batch.index]
        for name, by_definition in codes(saes, batch, questions.lab_mask(batch)):
            _ask(questions, batch, asked, saes[name], by_definition, plans[name], right[name])
    return right


def _ask(questions: HookActivations, batch: Batch, asked: Sequence[Prompt], sae: SparseAutoencoder,
         by_definition: dict[str, Tensor], plans: Plans, right: dict[str, np.ndarray]) -> None:
    """Fill in `right` for one batch of prompts and one SAE."""
    jobs: dict[object, Job] = {}
    users: dict[object, list[tuple[str, int, int]]] = {}
    for definition, z in by_definition.items():
        may_edit = batch.real.clone()
        may_edit[:, 0] = False  # SAE Bench never edits the first token; ours has no latents there anyway
        for number, configuration in enumerate(plans[definition]):
            for row, edit in edits(z, may_edit, configuration, definition):
                key = (row, edit.key(), "" if sae.per_token else definition)
                jobs.setdefault(key, Job(row, definition, edit))
                users.setdefault(key, []).append((definition, number, row))
    keys, size = list(jobs), questions.params.model.llm_batch_size
    for start in range(0, len(keys), size):
        chunk = keys[start:start + size]
        prompts = [asked[jobs[key].row] for key in chunk]
        logits = edited_logits(questions, batch, prompts, sae, by_definition, [jobs[key] for key in chunk])
        for key, prompt, chosen in zip(chunk, prompts, answers(logits, prompts), strict=True):
            for definition, number, row in users[key]:
                right[definition][number, int(batch.index[row])] = chosen == prompt.answer


def edits(z: Tensor, may_edit: Tensor, configuration: Configuration, definition: str) -> Iterator[tuple[int, Edit]]:
    """(row, edit) of every prompt that a configuration changes. z: [batch, seq, d_sae]; may_edit: bool [batch, seq]."""
    latents = torch.tensor(configuration.latents, dtype=torch.long, device=z.device)
    chosen = z[..., latents]
    active = fires(chosen, definition) & may_edit[..., None]
    for row in active.any(dim=2).any(dim=1).nonzero()[:, 0].tolist():
        positions, columns = active[row].nonzero(as_tuple=True)
        values = -configuration.multiplier * chosen[row, positions, columns].sign()
        order = torch.argsort(positions * z.shape[-1] + latents[columns])
        yield row, Edit(positions[order], latents[columns][order], values[order])


def edited_logits(questions: HookActivations, batch: Batch, prompts: Sequence[Prompt], sae: SparseAutoencoder,
                  by_definition: dict[str, Tensor], jobs: Sequence[Job]) -> Tensor:
    """Logits [jobs, vocab] at the last token of each job's prompt."""
    rows = torch.tensor([job.row for job in jobs])
    positions, own = last_positions(prompts)
    longest = int(positions[-1]) + 1
    stream = batch.acts[rows][:, :longest].clone()
    for number, job in enumerate(jobs):
        where, change = edited(sae, by_definition[job.definition][job.row], job.edit)
        stream[number, where] += change
    logits = questions.lm.resume(questions.hook, stream, batch.tokens[rows][:, :longest], positions)
    return logits[torch.arange(len(jobs)), own.to(logits.device)]


def edited(sae: SparseAutoencoder, z: Tensor, edit: Edit) -> tuple[Tensor, Tensor]:
    """Positions [n] that an edit changes, and what it adds to the stream there [n, d_in], float32. z: [seq, d_sae]."""
    where, slot = edit.positions.unique(return_inverse=True)
    before = z[where]
    after = before.clone()
    after[slot, edit.latents] = edit.values.to(after.dtype)
    return where, (sae.decode(after[None]) - sae.decode(before[None]))[0].float()
