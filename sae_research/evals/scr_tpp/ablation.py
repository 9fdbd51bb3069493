"""Linear probes on mean activations, and what they read once some latents are set to zero.

Probes follow SAE Bench 0.6.0 (sae_bench/evals/scr_and_tpp, sae_bench/evals/sparse_probing/probe_training.py): one linear
layer on all dimensions, binary cross-entropy with an L1 penalty on the weights, AdamW, batches of 16. All probes of a run
are trained side by side: a step is a few thousand multiplications, so one numpy step over all of them replaces one
framework step per probe.

Ablation needs no encoding or decoding. With a linear decoder a text's mean activation loses exactly `mean(f_A) W_A` when the
latents A are ablated (the reconstruction error stays in place), so a probe's logit loses `mean(f_A) (W_A w)`. The text's
mean latents and one number per latent and probe are enough for every threshold.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.special import expit
from torch import Tensor

from sae_research.evals.probing import Draw, ProbeTask
from sae_research.runtime.errors import UserError
from sae_research.saes import SparseAutoencoder
from sae_research.stats.logistic import adamw_step

BATCH_SIZE = 16
LEARNING_RATE = 1e-3
L1_PENALTY = 1e-3


class Probes(NamedTuple):
    weight: np.ndarray
    """[probes, d]"""
    bias: np.ndarray
    """[probes]"""

    def logits(self, features: np.ndarray) -> np.ndarray:
        """[texts, probes]"""
        return features @ self.weight.T + self.bias


class Start(NamedTuple):
    """Everything random in the training of one probe."""

    theta: np.ndarray
    """Weights and bias at the start [d + 1]."""
    orders: np.ndarray
    """The training texts' order in each epoch [epochs, texts]."""


def start(seed: int, number: int, d: int, texts: int, epochs: int) -> Start:
    """Weights as torch initialises a linear layer, and shuffled epochs; they depend on `seed` and `number` alone."""
    generator = np.random.default_rng([seed, number])
    bound = d**-0.5
    theta = generator.uniform(-bound, bound, d + 1).astype(np.float32)
    return Start(theta, np.stack([generator.permutation(texts) for _ in range(epochs)]))


def fit(features: np.ndarray, tasks: Sequence[ProbeTask], starts: Sequence[Start], pick_on_test: bool) -> Probes:
    """One probe per task, in order.

    With `pick_on_test` each probe keeps the epoch of highest accuracy on its own *test* texts, as SAE Bench does;
    without it, the last epoch, and test texts are never looked at. features: [texts, d] float32.
    """
    theta = np.stack([start.theta for start in starts])
    sizes = [len(task.train.rows) for task in tasks]
    for size in sorted(set(sizes)):
        members = [i for i, n in enumerate(sizes) if n == size]
        theta[members] = _fit_alike(features, [tasks[i] for i in members], [starts[i] for i in members], pick_on_test)
    return Probes(theta[:, :-1].copy(), theta[:, -1].copy())


def _fit_alike(features: np.ndarray, tasks: Sequence[ProbeTask], starts: Sequence[Start], pick_on_test: bool) -> np.ndarray:
    """Probes with equally many training texts. Returns weights and biases [probes, d + 1]."""
    theta = np.stack([start.theta for start in starts])
    orders = np.stack([start.orders for start in starts])  # [probes, epochs, texts]
    rows = np.stack([task.train.rows.numpy() for task in tasks])
    labels = np.stack([task.train.labels.numpy() for task in tasks]).astype(np.float32)
    first, second = np.zeros_like(theta), np.zeros_like(theta)
    best, most = theta.copy(), np.full(len(tasks), -1)
    step = 0
    for epoch in range(orders.shape[1]):
        order = orders[:, epoch]
        shuffled, y = np.take_along_axis(rows, order, 1), np.take_along_axis(labels, order, 1)
        for at in range(0, rows.shape[1], BATCH_SIZE):
            step += 1
            gradient = _gradient(features[shuffled[:, at : at + BATCH_SIZE]], y[:, at : at + BATCH_SIZE], theta)
            adamw_step(theta, gradient, first, second, step, LEARNING_RATE)
        if pick_on_test:
            correct = np.array([_correct(features, task, own) for task, own in zip(tasks, theta, strict=True)])
            better = correct > most
            best[better], most[better] = theta[better], correct[better]
    return best if pick_on_test else theta


def _gradient(x: np.ndarray, y: np.ndarray, theta: np.ndarray) -> np.ndarray:
    """Of mean binary cross-entropy plus the L1 penalty [probes, d + 1]. x: [probes, batch, d]; y: [probes, batch]."""
    weight = theta[:, :-1]
    logits = (x @ weight[:, :, None])[..., 0] + theta[:, -1:]
    error = (expit(logits) - y) / np.float32(y.shape[1])
    slope = (error[:, None, :] @ x)[:, 0] + np.float32(L1_PENALTY) * np.sign(weight)
    return np.concatenate([slope, error.sum(axis=1, keepdims=True)], axis=1)


def _correct(features: np.ndarray, task: ProbeTask, theta: np.ndarray) -> int:
    """How many of the task's test texts the probe gets right."""
    logits = features[task.test.rows.numpy()] @ theta[:-1] + theta[-1]
    return int(((logits > 0) == (task.test.labels.numpy() > 0)).sum())


Definition = Literal["sae_bench", "lab"]

_CODES = 4
_CHUNK = 1024


class NotLinear(UserError):
    """The decoder is not linear in the latents, so that ablation cannot be computed from means."""


class View(NamedTuple):
    """One SAE and the probes of one task, in one definition. Texts are rows of the pool of all texts."""

    logits: Tensor
    """What the probes read of the model's own activations [texts, probes]."""
    latents: Tensor
    """Mean latents that effects are measured on [texts, d_sae]."""
    removed: Tensor
    """Mean latents that ablation takes away [texts, d_sae]."""
    pull: Tensor
    """How much one unit of a latent adds to each probe's logit [d_sae, probes]."""


@torch.no_grad()
def decoder_matrix(sae: SparseAutoencoder) -> Tensor:
    """What one unit of each latent adds to the reconstruction of its own token [d_sae, d_in], float32 on the CPU.

    `W_dec` for most; read off `decode` where that scales it. Raises `NotLinear` when `decode` is not linear, or mixes
    tokens: checked on random sparse codes of several magnitudes.
    """
    codes = _random_codes(sae)
    offset = sae.decode(torch.zeros_like(codes[:1, :1]))
    added = (sae.decode(codes) - offset).float().cpu()
    matrix = sae.W_dec.float().cpu()
    if _agree(added, codes.float().cpu() @ matrix, sae.W_dec.dtype):
        return matrix
    matrix = torch.cat(
        [(sae.decode(_units(sae, start)) - offset)[:, 0].float().cpu() for start in range(0, sae.cfg.d_sae, _CHUNK)]
    )
    if _agree(added, codes.float().cpu() @ matrix, sae.W_dec.dtype):
        return matrix
    raise NotLinear(
        "its decoder is not linear in the latents of each token, so that the effect of an ablation cannot "
        "be had from mean activations"
    )


def _units(sae: SparseAutoencoder, start: int) -> Tensor:
    """One unit of each of some latents, as sequences of one token [latents, 1, d_sae]."""
    some = torch.arange(start, min(start + _CHUNK, sae.cfg.d_sae), device=sae.W_dec.device)
    return torch.nn.functional.one_hot(some, sae.cfg.d_sae)[:, None].to(sae.W_dec.dtype)


def _random_codes(sae: SparseAutoencoder) -> Tensor:
    """[codes, tokens, d_sae]: sparse, of both signs where the SAE's are, magnitudes from 0.1 to 100."""
    generator = torch.Generator().manual_seed(0)
    shape = (_CODES, 3, sae.cfg.d_sae)
    codes = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.2)
    codes = (codes if sae.signed else codes.abs()) * torch.logspace(-1, 2, _CODES)[:, None, None]
    return codes.to(sae.W_dec.device, sae.W_dec.dtype)


def _agree(got: Tensor, want: Tensor, dtype: torch.dtype) -> bool:
    """Within rounding, relative to each code's own scale."""
    scale = want.abs().amax(dim=(1, 2), keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return bool(((got - want).abs() <= (1e-4 if dtype in (torch.float32, torch.float64) else 5e-2) * scale).all())


# --- which latents ---------------------------------------------------------------------------


def effects(view: View, train: Draw, probe: int, kind: Literal["scr", "tpp"], definition: Definition) -> Tensor:
    """How much each latent helps a probe to tell its classes apart [d_sae].

    The latents' difference of class means over `train`, times what one unit adds to the probe's logit. SCR takes the
    absolute value. TPP wants the latents of the positive class: SAE Bench drops negative differences, which for
    signed latents depends on the arbitrary sign of a dictionary row; ours drops latents whose mean is larger in
    magnitude among the negatives, which for latents that are never negative is the same.
    """
    positive = view.latents[train.rows[train.labels == 1]].mean(dim=0)
    negative = view.latents[train.rows[train.labels == 0]].mean(dim=0)
    difference = positive - negative
    if kind == "scr":
        return (difference * view.pull[:, probe]).abs()
    if definition == "sae_bench":
        return difference.clamp_min(0) * view.pull[:, probe]
    return torch.where(positive.abs() > negative.abs(), difference, 0.0) * view.pull[:, probe]


def strongest(effect: Tensor, n: int, definition: Definition) -> Tensor:
    """Up to `n` latents of largest effect.

    Ours never takes one without a positive effect. SAE Bench counts the latents whose effect is not zero, and takes as
    many of the largest: where only some of those are positive, latents without any effect come before the negative.
    """
    useful = int((effect > 0).sum() if definition == "lab" else (effect != 0).sum())
    return torch.topk(effect, min(n, useful)).indices


# --- what it does ----------------------------------------------------------------------------


def ablated_logits(view: View, rows: Tensor, chosen: Sequence[Tensor]) -> Tensor:
    """Logits after ablating each of the sets `chosen` of latents [sets, rows, probes]."""
    logits, removed = view.logits[rows], view.removed[rows]
    return torch.stack([logits - removed[:, latents] @ view.pull[latents] for latents in chosen])
