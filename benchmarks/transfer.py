"""Seconds for the statistics of a transfer comparison: one sweep for all of them against one sweep for each.

Run `python -m benchmarks.transfer [--tokens 4096]`. The other side is the published notebooks' way (SAE-Transferability,
2024), with our hooks and SAE code: a pass of either model up to the hook for each figure.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from itertools import islice

import torch
from torch import Tensor

from sae_research.config.params import Params, Text, load_params
from sae_research.lm import LanguageModel, load_language_model
from sae_research.runtime.errors import run_main
from sae_research.saes import SparseAutoencoder
from sae_research.saes.sources import open_sae
from sae_research.transfer.finetune import perturbed_model
from sae_research.transfer.loading import Pair, hooks
from sae_research.transfer.sweep import sweep
from sae_research.transfer.table import latent_table
from sae_research.transfer.text import SPLIT, PairBatch, TextSource, batches

N_DENSE = 1000
"""Latents whose activations the notebooks keep."""


def compare(
    saes: dict[str, SparseAutoencoder], lm: LanguageModel, model: object, params: Params, n_tokens: int = 4096
) -> dict[str, tuple[float, float]]:
    """(our seconds, one sweep per metric's) for the statistics of one SAE on a model and a perturbed copy of it.

    Sweeps of the other side: activations of both models at each hook for cosine, distance and relative error; again for
    linear CKA; norms of the base model for outliers; then for either model L0, variance explained, histogram of activations,
    densities, and the activations of three samples of latents, whose correlations follow. Ours: one sweep that gives all of
    these for every latent, two nulls, and everything with and without outliers. Text is read and cut beforehand, models are
    loaded; patched losses, which both sides need the same passes for, are left out. `model` is not used.
    """
    sae = next((sae for sae in saes.values() if sae.form == "standard"), next(iter(saes.values())))
    other = perturbed_model(lm, 0.05, sae.cfg.hook_name, params.random_seed)
    text = Text(dataset=params.text.dataset, column_name=params.text.column_name, context_size=sae.cfg.context_size)
    pair = Pair(lm, other, {"base": sae}, hooks(params, sae.cfg.hook_name), TextSource(text, SPLIT, False), params)
    texts = list(batches(lm, other, pair.source, n_tokens, params.transfer.batch_size))
    start = time.perf_counter()
    statistics = sweep(pair, n_tokens, texts=texts)
    latent_table(statistics.saes["base"], None, params.transfer.sampling, params.random_seed)
    for stats in statistics.hooks.values():
        stats.kept.means()
    ours, start = time.perf_counter() - start, time.perf_counter()
    n_sweeps = one_sweep_per_metric(pair, texts)
    theirs = time.perf_counter() - start
    return {f"transfer statistics, {sum(b.n_tokens for b in texts):,} tokens, 2 against {n_sweeps} sweeps": (ours, theirs)}


@torch.no_grad()
def one_sweep_per_metric(pair: Pair, texts: list[PairBatch]) -> int:
    """Every statistic by a sweep of its own; returns how many sweeps that took."""
    n_sweeps = 0
    for hook in pair.hooks:
        for metric in (_token_similarity, _linear_cka):
            metric(*(torch.cat(list(_acts(lm, hook, texts))) for lm in pair.models.values()))
            n_sweeps += 2
    torch.cat([x.norm(dim=1) for x in _acts(pair.base, pair.hook, texts)]).mean()
    n_sweeps += 1
    sae = pair.saes["base"]
    samples = torch.randperm(sae.cfg.d_sae, generator=torch.Generator().manual_seed(0)).split(N_DENSE)
    metrics: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, z: (z > 1e-8).sum(1).float().mean(),
        lambda x, z: (x - sae.decode(z[None])[0]).square().sum(0),
        lambda x, z: (z.abs() + 1e-10).log10().histc(100),
        lambda x, z: (z > 1e-10).float().sum(0),
    ]
    for metric in metrics:
        for lm in pair.models.values():
            for x in _acts(lm, pair.hook, texts):
                metric(x, sae.encode(x[None])[0])
            n_sweeps += 1
    for sample in islice((*samples, samples[-1], samples[-1]), 3):  # latents dead in one or the other model, and dense ones
        kept = [
            torch.cat([sae.encode(x[None])[0][:, sample] for x in _acts(lm, pair.hook, texts)])
            for lm in pair.models.values()
        ]
        n_sweeps += 2
        a, b = (part - part.mean(0) for part in kept)
        (a * b).sum(0) / (a.norm(dim=0) * b.norm(dim=0))
    return n_sweeps


def _acts(lm: LanguageModel, hook: str, texts: list[PairBatch]) -> Iterator[Tensor]:
    """Activations [tokens, d_in], batch by batch, from one sweep."""
    for batch in texts:
        yield lm.activations(batch.base.tokens, hook).flatten(0, 1).float()


def _token_similarity(x: Tensor, y: Tensor) -> Tensor:
    return torch.stack([torch.cosine_similarity(x, y, dim=1), (x - y).norm(dim=1), (x - y).norm(dim=1) / x.norm(dim=1)])


def _linear_cka(x: Tensor, y: Tensor) -> Tensor:
    x, y = (value.double() - value.double().mean(0) for value in (x, y))
    return (y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    options = parser.parse_args()
    params = load_params()
    lm = load_language_model(params.model.name, "cpu")
    saes = {"standard": open_sae(f"prepared:{params.transfer.sae.name}")}
    for row, (ours, theirs) in compare(saes, lm, None, params, options.tokens).items():
        print(
            f"{row}: ours {ours:.1f} s, one sweep per metric {theirs:.1f} s, {theirs / ours:.1f}x, "
            f"{torch.get_num_threads()} threads"
        )


if __name__ == "__main__":
    run_main(main)
