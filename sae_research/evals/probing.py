"""Labelled texts as vectors, for sparse probing, SCR and TPP, and the binary probes on them.

A vector is the mean over a text's tokens of the latents, or of the raw activations. SAE Bench 0.6.0's definition counts
every token but BOS, EOS and padding and shows sequence-level encoders the zeroed padding; ours (`lab_v1`) counts tokens
inside `token_mask` only and hides everything else from the encoder. Means are kept under `.cache/activations`, so that an
SAE encodes a set of texts once for all three evaluations.

Source of the probes: SAE Bench 0.6.0, sae_bench/evals/sparse_probing/probe_training.py, and arXiv 2305.01610 for the top-k
rule.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_research.config.params import ActivationCaching, Params
from sae_research.evals.harness import result_key
from sae_research.lm import Batch, LanguageModel
from sae_research.lm.activations import SAMPLE, HookActivations
from sae_research.runtime.cache import cache_dir, new_entry, prune, usable
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import fingerprint
from sae_research.saes import SparseAutoencoder, encode_each
from sae_research.stats.logistic import fit_by_adamw, scikit_learn

_MEANS = "means.safetensors"
_LARGEST_SHARE = 0.1
"""Means that take more than this share of the cache's limit are not kept: they would push activations out of it."""


def tokenise(lm: LanguageModel, texts: Sequence[str], context_length: int) -> list[Tensor]:
    """Ids of every text, cut to `context_length`, each opening with the separator (BOS), as in training and in SAE
    Bench. Raises `UserError` for a text without tokens."""
    encoded = (
        lm.tokenizer(list(texts), add_special_tokens=False, truncation=True, max_length=context_length - 1)["input_ids"]
        if texts
        else []
    )
    empty = next((text for text, ids in zip(texts, encoded, strict=True) if not ids), None)
    if empty is not None:
        raise UserError(f"the text {empty[:40]!r} has no tokens; remove it from its task")
    return [torch.tensor([lm.separator_id, *ids]) for ids in encoded]


class Means(NamedTuple):
    """One vector per text in both definitions [texts, d], float32 on the CPU."""

    sae_bench: Tensor
    lab: Tensor
    everywhere: Tensor
    """As `sae_bench`, but summed over the zeroed special and padding positions too, up to the context length; divided
    by the counted tokens alone. Latents of these positions enter where SAE Bench ablates."""


def text_numbers(parts: Iterable[Iterable[Sequence[str]]]) -> dict[str, int]:
    """text -> its row, every text once, in the order of `parts` (train and test parts of tasks, class by class)."""
    row_of: dict[str, int] = {}
    for part in parts:
        for class_texts in part:
            for text in class_texts:
                row_of.setdefault(text, len(row_of))
    return row_of


def brought_in(row_of: dict[str, int], tasks: Iterable[Iterable[Iterable[Sequence[str]]]], start: int = 0) -> list[int]:
    """How many of the texts from row `start` on each task is the first to have. tasks: of each its parts, class by class."""
    ends = accumulate(
        (max((row_of[text] + 1 for part in parts for texts in part for text in texts), default=0) for parts in tasks),
        max,
        initial=start,
    )
    return [end - start for start, end in pairwise(ends)]


class TextActivations(HookActivations):
    """Texts' activations at one hook, and their means."""

    def __init__(
        self,
        lm: LanguageModel,
        hook: str,
        tokens: Sequence[Tensor],
        params: Params,
        context_length: int,
        norm_of: TextActivations | None = None,
    ) -> None:
        """norm_of: texts whose median norm the outlier rule compares with; None: these."""
        super().__init__(lm, hook, tokens, params)
        self._norm_of = norm_of or self
        self.context_length = context_length
        """What SAE Bench pads every text to: sequence-level encoders see that padding in its definition."""

        self._kept = _KeptMeans(params.activation_caching)

    @cached_property
    def median_norm(self) -> float:
        return super().median_norm if self._norm_of is self else self._norm_of.median_norm

    @cached_property
    def key(self) -> str:
        """Of the texts, and of those that the median norm is measured on."""
        return fingerprint([[row.tolist() for row in tokens] for tokens in (self.tokens, self._norm_of.tokens[:SAMPLE])])

    @torch.no_grad()
    def raw_means(self) -> Means:
        """Mean activation of every text."""
        means = self._empty([self.d_in])[0]
        for batch in self.batches():
            means.sae_bench[batch.index] = masked_mean(batch.acts, self.sae_bench_mask(batch))
            means.lab[batch.index] = masked_mean(batch.acts, self.lab_mask(batch))
        return means._replace(everywhere=means.sae_bench)  # SAE Bench zeroes the activations it does not count

    def latent_means(self, saes: dict[str, SparseAutoencoder]) -> Iterator[tuple[str, Means]]:
        """(name, mean latents of every text) for SAEs of one family, which encode together; those kept come first."""
        keys = {name: self._key(sae) for name, sae in saes.items()}
        missing = {}
        for name, sae in saes.items():
            means = self._kept.get(keys[name], (len(self), sae.cfg.d_sae))
            if means is None:
                missing[name] = sae
            else:
                yield name, means
        if missing:
            for name, means in self._encoded(missing):
                self._kept.put(keys[name], means)
                yield name, means

    @torch.no_grad()
    def _encoded(self, saes: dict[str, SparseAutoencoder]) -> Iterator[tuple[str, Means]]:
        means = dict(zip(saes, self._empty([sae.cfg.d_sae for sae in saes.values()]), strict=True))
        per_token = all(sae.per_token for sae in saes.values())
        at_zero = self._at_zero(saes) if per_token else {}
        for batch in self.batches():
            bench, lab = self.sae_bench_mask(batch), self.lab_mask(batch)
            if per_token:
                for name, z in encode_each(saes, batch.acts, None):
                    means[name].sae_bench[batch.index] = masked_mean(z, bench)
                    means[name].lab[batch.index] = masked_mean(z, lab)
                counted = bench.sum(dim=1).cpu()
                zeroed = ((self.context_length - counted) / counted.clamp_min(1))[:, None]
                for name, own in means.items():
                    own.everywhere[batch.index] = own.sae_bench[batch.index] + zeroed * at_zero[name]
                continue
            for name, z in encode_each(saes, batch.acts, lab):
                means[name].lab[batch.index] = masked_mean(z, lab)
            x_padded, bench = self._as_sae_bench_shows(batch, bench)
            for name, z in encode_each(saes, x_padded, None):
                means[name].sae_bench[batch.index] = masked_mean(z, bench)
                counted = bench.sum(dim=1, keepdim=True).clamp_min(1)
                means[name].everywhere[batch.index] = (z.sum(dim=1) / counted).float().cpu()
        yield from means.items()

    def _at_zero(self, saes: dict[str, SparseAutoencoder]) -> dict[str, Tensor]:
        """Latents of a zeroed position [d_sae], on the CPU: not always zero."""
        zero = torch.zeros(1, 1, self.d_in, device=self.lm.device)
        return {name: z[0, 0].float().cpu() for name, z in encode_each(saes, zero, None)}

    def _as_sae_bench_shows(self, batch: Batch, bench: Tensor) -> tuple[Tensor, Tensor]:
        """Activations zeroed at special tokens and padded with zeros to the context length, and their mask."""
        pad = self.context_length - bench.shape[1]
        x = batch.acts * bench[..., None]
        return torch.nn.functional.pad(x, (0, 0, 0, pad)), torch.nn.functional.pad(bench, (0, pad))

    def _empty(self, widths: Sequence[int]) -> list[Means]:
        return [Means(*(torch.zeros(len(self), width) for _ in Means._fields)) for width in widths]

    def _key(self, sae: SparseAutoencoder) -> str:
        return result_key(
            sae, self.lm, [self.hook, self.key, self.context_length, self.params.token_mask.model_dump()], __name__
        )


class TextsByTask:
    """The texts of several tasks, each task's run, encoded and kept by themselves: a task more changes nothing of the
    others, and costs its own texts alone. Where tasks share texts, the first has them. The outlier rule compares with the
    first task's median norm: a task put before it changes them all."""

    def __init__(
        self,
        lm: LanguageModel,
        hook: str,
        tokens: Sequence[Tensor],
        sizes: Sequence[int],
        params: Params,
        context_length: int,
    ) -> None:
        """sizes: of `brought_in`."""
        self.n, self.d_in = len(tokens), lm.d_in(hook)
        self.parts: dict[tuple[int, int], TextActivations] = {}
        for start, end in pairwise(accumulate(sizes, initial=0)):
            if end > start:
                first = next(iter(self.parts.values()), None)
                self.parts[start, end] = TextActivations(lm, hook, tokens[start:end], params, context_length, first)

    def raw_means(self, rows: Tensor) -> Means:
        """Mean activations [texts, d_in] of `rows` at least; other rows may be zero."""
        return self._joined(self.d_in, {place: part.raw_means() for place, part in self._holding(rows).items()})

    def latent_means(self, saes: dict[str, SparseAutoencoder], rows: Tensor) -> Iterator[tuple[str, Means]]:
        """(name, mean latents [texts, d_sae] of `rows` at least) for SAEs of one family."""
        found: dict[str, dict[tuple[int, int], Means]] = {name: {} for name in saes}
        holding = self._holding(rows)
        for place, part in holding.items():
            for name, means in part.latent_means(saes):
                found[name][place] = means
                if len(found[name]) == len(holding):
                    yield name, self._joined(saes[name].cfg.d_sae, found.pop(name))

    def key(self, rows: Tensor) -> str:
        """What decides the means of `rows` beside model and SAE: their tokens and those of the texts run with them."""
        return fingerprint([part.key for part in self._holding(rows).values()])

    def _holding(self, rows: Tensor) -> dict[tuple[int, int], TextActivations]:
        return {(start, end): part for (start, end), part in self.parts.items() if ((rows >= start) & (rows < end)).any()}

    def _joined(self, width: int, parts: dict[tuple[int, int], Means]) -> Means:
        # numpy's zeros cost nothing until they are written: most rows may be other tasks'
        joined = Means(*(torch.from_numpy(np.zeros((self.n, width), np.float32)) for _ in Means._fields))
        for (start, end), means in parts.items():
            for whole, part in zip(joined, means, strict=True):
                whole[start:end] = part
        return joined


class _KeptMeans:
    """Means by key, as safetensors files among the activations, under their limit."""

    def __init__(self, caching: ActivationCaching) -> None:
        self.caching, self.folder = caching, cache_dir("activations")

    def _entry(self, key: str) -> Path:
        return self.folder / f"means_{key}"

    def get(self, key: str, shape: tuple[int, int]) -> Means | None:
        """Means of `shape` [texts, d], if they are kept."""
        entry = self._entry(key)
        if not self.caching.enabled or not usable(entry):
            return None
        found = load_file(entry / _MEANS)
        if {name: tuple(tensor.shape) for name, tensor in found.items()} != dict.fromkeys(Means._fields, shape):
            print(f"{os.path.relpath(entry)}: of another shape; computed again", flush=True)
            return None
        return Means(**found)

    def put(self, key: str, means: Means) -> None:
        size = sum(tensor.nbytes for tensor in means)
        if not self.caching.enabled or size > _LARGEST_SHARE * self.caching.max_gb * 1e9:
            return
        with new_entry(self._entry(key)) as folder:
            save_file(means._asdict(), folder / _MEANS)
        prune(self.folder, self.caching.max_gb, keep=[self._entry(key)])


def masked_mean(values: Tensor, keep: Tensor) -> Tensor:
    """Mean over counted tokens [batch, d], zero where none counts, on the CPU. values: [batch, seq, d]."""
    weight = keep / keep.sum(dim=1, keepdim=True).clamp_min(1)
    return torch.einsum("bs,bsd->bd", weight.to(values.dtype), values).float().cpu()


class Draw(NamedTuple):
    """Rows of one binary task, as (class, row within the class) pairs packed into row numbers of the pool."""

    rows: Tensor
    """Positives first, then as many negatives [2 * n]."""
    labels: Tensor
    """1 for the class, 0 for the others [2 * n]."""


def draw(rows_of: Mapping[str, Tensor], positive: str, seed: int, split: str) -> Draw:
    """All texts of class `positive`, and as many negatives spread evenly over the other classes.

    SAE Bench draws anew at each call from a global generator; here the draw depends on seed, class and split alone,
    so that every SAE and every k meets the same texts. rows_of: pool rows of each class.
    """
    digest = fingerprint([seed, positive, split, {name: len(rows) for name, rows in rows_of.items()}])
    generator = torch.Generator().manual_seed(int(digest[:12], 16))
    positives = rows_of[positive]
    others = [name for name in rows_of if name != positive]
    each = math.ceil(len(positives) / len(others))
    pool = torch.cat([rows_of[name][torch.randperm(len(rows_of[name]), generator=generator)[:each]] for name in others])
    negatives = pool[torch.randperm(len(pool), generator=generator)[: len(positives)]]
    labels = torch.cat([torch.ones(len(positives)), torch.zeros(len(negatives))])
    return Draw(torch.cat([positives, negatives]), labels)


class ProbeTask(NamedTuple):
    """One class against the others: what a probe is fitted on and what it is scored on."""

    train: Draw
    test: Draw


def top_dimensions(x: Tensor, labels: Tensor, k: int) -> Tensor:
    """The k dimensions whose class means differ most [k]. x: [texts, d]; labels: [texts] of 0 and 1."""
    difference = (x[labels == 1].mean(0) - x[labels == 0].mean(0)).abs()
    return torch.argsort(difference, descending=True)[:k]


def top_k_accuracy(features: Tensor, train: Draw, test: Draw, k: int) -> float:
    """Test accuracy of scikit-learn's logistic regression on k dimensions of `features` [pool, d], as SAE Bench fits it.

    They are those whose class means differ most on the training rows alone.
    """
    x_train = features[train.rows]
    chosen = top_dimensions(x_train, train.labels, k)
    probe = scikit_learn(x_train[:, chosen].float().cpu().numpy(), train.labels.numpy())
    predicted = probe.predict(features[test.rows[:, None], chosen].float().cpu().numpy())
    return float((predicted == test.labels.numpy()).mean())


def sae_bench_full_accuracy(features: Tensor, task: ProbeTask, seed: int) -> float:
    """SAE Bench's accuracy of a probe on all of `features` [pool, d]: the best epoch on the test texts themselves."""
    (x, y), test = _read(features, task.train), _read(features, task.test)
    return fit_by_adamw(x, y, *test, seed)[1]


def _read(features: Tensor, draw: Draw) -> tuple[np.ndarray, np.ndarray]:
    return features[draw.rows].float().numpy(), draw.labels.numpy()
