"""Which latents are clamped, what the model then answers, and the score.

Latents are chosen by how often each fires on the forget and on the retain corpus. Where a chosen latent is active it is set
to -multiplier; what the SAE does not reconstruct stays. So the stream changes by `decode(edited) - decode(latents)` at
those tokens and nowhere else, as in SAE Bench 0.6.0. In ours (`lab_v1`) a latent that is active below zero is set to
+multiplier: the same edit whichever sign a latent carries.

Only what changes is run: layers above the hook, prompts in which a chosen latent is active, and once for all
configurations that make the same edit. The score follows from the questions that are still answered rightly; ours has an
interval, and a score on questions that had no part in choosing the configuration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_research.evals.unlearning.prompts import Prompt, answers, last_positions
from sae_research.lm import Batch
from sae_research.lm.activations import HookActivations
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
    return {
        name: {
            d: Firing((count[name][d] / max(tokens[d], 1)).numpy(), (total[name][d] / max(tokens[d], 1)).numpy())
            for d in DEFINITIONS
        }
        for name in saes
    }


def choose_latents(forget: Firing, retain: Firing, retain_threshold: float, n: int) -> list[int]:
    """The at most `n` latents that fire most often on the forget corpus, of those that fire there at all and on less
    than `retain_threshold` of the retain corpus.

    Of equally frequent latents the stronger goes first, so that no choice depends on the order of latents; SAE Bench
    leaves ties to its sort.
    """
    eligible = np.flatnonzero((retain.density < retain_threshold) & (forget.density > 0))
    order = np.lexsort((eligible, -forget.strength[eligible], -forget.density[eligible]))
    return [int(latent) for latent in eligible[order][:n]]


_HALVINGS = 20


def unlearning_score(forget: np.ndarray, retain: np.ndarray, min_retain_accuracy: float) -> float:
    """1 - the least accuracy on the forget questions over configurations that keep at least `min_retain_accuracy` on the
    others; 0 where none does. SAE Bench 0.6.0 (evals/unlearning/main.py).

    forget: bool [configurations, questions]; retain: bool [configurations, other questions].
    """
    return float(_scores(forget.mean(axis=1), retain.mean(axis=1), min_retain_accuracy))


def _scores(forget: np.ndarray, retain: np.ndarray, min_retain_accuracy: float) -> np.ndarray:
    """Scores [...] from accuracies [configurations, ...]. Never below 0: not intervening is always open."""
    return 1.0 - np.where(retain >= min_retain_accuracy - 1e-12, forget, 1.0).min(axis=0, initial=1.0)


def best_configuration(forget: np.ndarray, retain: np.ndarray, min_retain_accuracy: float) -> int | None:
    """The configuration behind the score (the first of equals), None where not intervening does as well."""
    allowed = np.where(retain.mean(axis=1) >= min_retain_accuracy - 1e-12, forget.mean(axis=1), 1.0)
    best = int(allowed.argmin()) if len(allowed) else -1
    return None if best < 0 or allowed[best] >= 1.0 else best


def interval(
    forget: np.ndarray, retain: np.ndarray, min_retain_accuracy: float, seed: int, n_resamples: int = 2000
) -> list[float]:
    """95 % bootstrap interval of the score over questions, [low, high].

    Both sets of questions are drawn anew, and the best configuration is chosen anew in each draw. The draws depend on the
    seed and the numbers of questions only: those of two SAEs are paired.
    """
    rng = np.random.default_rng([seed, forget.shape[1], retain.shape[1]])
    means = [
        values[:, rng.integers(values.shape[1], size=(n_resamples, values.shape[1]))].mean(axis=2)
        for values in (forget, retain)
    ]
    scores = _scores(means[0], means[1], min_retain_accuracy)
    return [float(value) for value in np.quantile(scores, [0.025, 0.975])]


def held_out(forget: np.ndarray, retain: np.ndarray, min_retain_accuracy: float, seed: int) -> tuple[float, float]:
    """(score, retained accuracy) on the questions that did not choose the configuration.

    The score of `unlearning_score` is the best of many configurations on the very questions it is measured on. Here one
    random half of the questions chooses and the other measures: the mean over 20 halvings, both ways. Where no
    configuration qualifies nothing is done: score 0, accuracy 1.
    """
    rng = np.random.default_rng([seed, forget.shape[1], retain.shape[1], 1])
    figures = []
    for _ in range(_HALVINGS):
        first, second = (
            [values[:, half] for values, half in zip((forget, retain), halves, strict=True)]
            for halves in zip(*(_halves(values.shape[1], rng) for values in (forget, retain)), strict=True)
        )
        for choosing, measuring in ((first, second), (second, first)):
            best = best_configuration(choosing[0], choosing[1], min_retain_accuracy)
            figures.append((0.0, 1.0) if best is None else (1.0 - measuring[0][best].mean(), measuring[1][best].mean()))
    score, kept = np.mean(figures, axis=0)
    return float(score), float(kept)


def _halves(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    order = rng.permutation(n)
    return order[: n // 2], order[n // 2 :]


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
def correct_answers(
    questions: HookActivations, prompts: Sequence[Prompt], saes: dict[str, SparseAutoencoder], plans: dict[str, Plans]
) -> dict[str, dict[str, np.ndarray]]:
    """Name -> definition -> which prompts are still answered rightly, bool [configurations, prompts].

    For SAEs of one family. prompts: known questions, in the order of `questions`.
    """
    right = {name: {d: np.ones((len(plans[name][d]), len(prompts)), dtype=bool) for d in DEFINITIONS} for name in saes}
    for batch in questions.batches():
        asked = [prompts[i] for i in batch.index]
        for name, by_definition in codes(saes, batch, questions.lab_mask(batch)):
            _ask(questions, batch, asked, saes[name], by_definition, plans[name], right[name])
    return right


def _ask(
    questions: HookActivations,
    batch: Batch,
    asked: Sequence[Prompt],
    sae: SparseAutoencoder,
    by_definition: dict[str, Tensor],
    plans: Plans,
    right: dict[str, np.ndarray],
) -> None:
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
        chunk = keys[start : start + size]
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


def edited_logits(
    questions: HookActivations,
    batch: Batch,
    prompts: Sequence[Prompt],
    sae: SparseAutoencoder,
    by_definition: dict[str, Tensor],
    jobs: Sequence[Job],
) -> Tensor:
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
