"""What either model predicts through an SAE: losses with its reconstruction in place, and its latents' logit vectors.

Losses take a second pass of both models, on fewer tokens. Logit vectors, what a latent's decoder row writes into the logits,
come from weights alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae_research.lm import LanguageModel
from sae_research.lm.generate import Unembedding, unembedding
from sae_research.saes import SparseAutoencoder
from sae_research.stats.intervals import Ratio, interval
from sae_research.stats.predictions import RECOVERED, CleanPredictions, loss_ratios, prediction_sums
from sae_research.stats.reconstruction import sums_dtype
from sae_research.transfer.loading import MODELS, Masks, Pair, masks
from sae_research.transfer.sweep import FirstPass
from sae_research.transfer.text import batches, token_bar

BLOCKS = 24
"""The text is cut into this many stretches, which intervals draw from: few numbers, however long the text."""
FILTERS = ("kept", "all")
"""Without outliers (they are neither patched nor counted), and with them."""

Sums = dict[str, np.ndarray]
"""By quantity, one number a block."""
Run = tuple[Tensor, Tensor | None]
"""(cross-entropy [rows, seq - 1], KL [rows, seq]) of every position."""


class _Totals:
    """Sums by block, made where they are first added to."""

    def __init__(self) -> None:
        self.sums: Sums = {}
        self.blocks = np.zeros(0, np.int64)
        """Of each row of the batch at hand."""

    def add(self, key: str, by_row: Tensor, rows: Tensor | slice = slice(None)) -> None:
        """by_row: one number for each of `rows`."""
        chosen = self.blocks[rows if isinstance(rows, slice) else rows.cpu().numpy()]
        np.add.at(self.sums.setdefault(key, np.zeros(BLOCKS)), chosen, by_row.double().cpu().numpy())


def patched_losses(pair: Pair, first: FirstPass, n_tokens: int, progress: str | None = None) -> dict[str, Any]:
    """Metrics by model, for every SAE and both filters; `clean_kl` compares the two models' own predictions.

    For a prediction made at a position that counts, with x replaced where tokens count: `ce_clean`, `ce_patched`, `ce_zero`
    (zeros in place), `ce_mean` (the mean activation of tokens that count in place), in nats;
    `loss_recovered` = (ce_zero - ce_patched) / (ce_zero - ce_clean), `loss_recovered_mean` the same with ce_mean;
    `kl` = KL(clean || patched). Ablations run on one context out of `ablate_every`: they are no more than a scale, and loss
    recovered takes all its three terms from those contexts. With tokenizers of their own also bits per byte of all text.
    """
    totals = {model: _Totals() for model in MODELS}
    shared = _Totals()
    config, read = pair.params.transfer, 0
    with token_bar(n_tokens, progress) as bar:
        for batch in batches(pair.base, pair.finetuned, pair.source, n_tokens, config.patched_batch_size):
            sides = batch.sides
            acts = {model: lm.activations(sides[model].tokens, pair.hook).float() for model, lm in pair.models.items()}
            found = masks(pair, batch, acts, first.limit)
            before = read + np.arange(len(batch.base.tokens)) * batch.n_tokens / len(batch.base.tokens)
            for total in (*totals.values(), shared):
                total.blocks = np.minimum(BLOCKS - 1, before * BLOCKS // n_tokens).astype(np.int64)
            clean: dict[str, CleanPredictions] = {}
            for model, lm in pair.models.items():
                tokens = sides[model].tokens
                logits = lm.resume(pair.hook, acts[model], tokens)
                if model == "finetuned" and not pair.source.own:
                    _compare_models(clean["base"], logits, found, shared)
                clean[model] = CleanPredictions(logits, tokens)
                runs = Runs(lm, pair.hook, tokens, acts[model], clean[model], found.kept[model], found.counted[model])
                _add(runs, pair, sides[model].real, first.means[model], batch.text_bytes, totals[model])
            read += batch.n_tokens
            bar.update(batch.n_tokens)
    figures = {model: _figures(totals[model].sums, pair.saes, pair.params.random_seed) for model in MODELS}
    clean_kl = None
    if shared.sums:
        clean_kl = _with_interval(Ratio(shared.sums["kl"], shared.sums["tokens"]), pair.params.random_seed)
    return _present({"models": figures, "ablate_every": config.ablate_every, "clean_kl": clean_kl})


class Runs(NamedTuple):
    """Some contexts through the layers above the hook."""

    lm: LanguageModel
    hook: str
    tokens: Tensor
    acts: Tensor
    clean: CleanPredictions
    kept: Tensor
    counted: Tensor

    def part(self, rows: Tensor) -> Runs:
        """Some of the contexts."""
        clean = copy.copy(self.clean)
        clean.batch = len(rows)
        clean.log_p_NV = self.clean.log_p_NV.view(self.clean.batch, self.clean.seq, -1)[rows].flatten(0, 1)
        clean.targets_N = self.clean.targets_N.view(self.clean.batch, self.clean.seq)[rows].flatten()
        return Runs(self.lm, self.hook, self.tokens[rows], self.acts[rows], clean, self.kept[rows], self.counted[rows])

    def both(self, put: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """(cross-entropy [rows, seq - 1], KL [rows, seq]) with `put` [rows, seq, d_in] in place at kept tokens, and at all
        that count; contexts in which these are the same tokens run once."""
        found = {"kept": self.run(put, self.kept)}
        rows = (self.kept != self.counted).any(dim=1).nonzero()[:, 0]
        ce, kl = (value.clone() for value in found["kept"])
        if len(rows):
            part = self.part(rows) if len(rows) < len(self.tokens) else self
            ce[rows], kl[rows] = part.run(put[rows], part.counted)
        return found | {"all": (ce, kl)}

    def run(self, put: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(cross-entropy [rows, seq - 1], KL [rows, seq]) with `put` in place where `mask` [rows, seq] holds."""
        acts = torch.where(mask[..., None], put, self.acts)
        return self.clean.compare(self.lm.resume(self.hook, acts, self.tokens))


@torch.no_grad()
def _add(runs: Runs, pair: Pair, real: Tensor, mean: Tensor, text_bytes: Tensor | None, totals: _Totals) -> None:
    results: dict[str, dict[str, Run]] = {"clean": {name: (runs.clean.ce, None) for name in FILTERS}}
    for role, sae in pair.saes.items():
        results[f"patched_{role}"] = runs.both(sae.decode(sae.encode(runs.acts, runs.counted)).to(runs.acts.dtype))  # ty: ignore[invalid-assignment]
    rows = torch.arange(0, len(runs.tokens), pair.params.transfer.ablate_every, device=runs.tokens.device)
    part = runs.part(rows)
    ablated = {"zero": part.both(torch.zeros_like(part.acts)), "mean": part.both(mean.expand_as(part.acts))}
    for name, mask in (("kept", runs.kept), ("all", runs.counted)):
        predicted = mask[:, :-1] & real[:, 1:]
        whole = {run: by_filter[name] for run, by_filter in results.items()}
        scale = {run: (ce[rows], None if kl is None else kl[rows]) for run, (ce, kl) in whole.items()}
        scale |= {run: by_filter[name] for run, by_filter in ablated.items()}
        for key, by_row in prediction_sums(mask, whole, _summed, predicted).items():
            totals.add(f"{name}/{key}", by_row)
        for key, by_row in prediction_sums(mask[rows], scale, _summed, predicted[rows]).items():
            totals.add(f"{name}/scale/{key}", by_row, rows)
        if text_bytes is not None:
            with_bytes = real[:, 1:] & (text_bytes > 0).to(real.device)[:, None]
            for run, (ce, _) in whole.items():
                totals.add(f"{name}/nats_{run}", _summed(ce, with_bytes))
    if text_bytes is not None:
        totals.add("bytes", text_bytes)


def _summed(values: Tensor, mask: Tensor) -> Tensor:
    """Sum over the positions of each row where the mask holds [rows]."""
    return (
        torch.where(mask, values, 0.0).double().sum(1)
        if values.device.type != "mps"
        else torch.where(mask, values, 0.0).sum(1)
    )


def _compare_models(base: CleanPredictions, logits: Tensor, found: Masks, totals: _Totals) -> None:
    """KL(base || finetuned) of the two models' own predictions, over the base model's ids. logits: the finetuned model's;
    where it has fewer ids there is no such metric."""
    shared_ids = base.log_p_NV.shape[-1]
    if logits.shape[-1] < shared_ids:
        return
    kl = base.compare(logits[..., :shared_ids].contiguous())[1]
    totals.add("kl", _summed(kl, found.kept["base"]))
    totals.add("tokens", found.kept["base"].sum(1))


# --- from sums to figures --------------------------------------------------------------------


def _figures(sums: Sums, saes: dict[str, SparseAutoencoder], seed: int) -> dict[str, Any]:
    """By filter: metrics shared by all SAEs, and each SAE's by role."""
    return {
        name: {**_shared_figures(sums, name, seed), "saes": {role: _sae_figures(sums, name, role, seed) for role in saes}}
        for name in FILTERS
    }


def _shared_figures(sums: Sums, name: str, seed: int) -> dict[str, Any]:
    own, scale = _below(sums, name), _below(sums, f"{name}/scale")
    found = {"ce_clean": _with_interval(Ratio(own["ce_clean"], own["ce_tokens"]), seed)}
    found |= {f"ce_{run}": _with_interval(Ratio(scale[f"ce_{run}"], scale["ce_tokens"]), seed) for run in ("zero", "mean")}
    if "bytes" in sums:
        found["bits_per_byte_clean"] = _bits(sums, f"{name}/nats_clean", seed)
    return {"predictions": float(own["ce_tokens"].sum()), **_present(found)}


def _sae_figures(sums: Sums, name: str, role: str, seed: int) -> dict[str, Any]:
    own, scale = (loss_ratios(_below(sums, part), f"patched_{role}") for part in (name, f"{name}/scale"))
    found = {key: _with_interval(Ratio(*own[key]), seed) for key in ("ce_patched", "ce_delta", "kl")}
    for run, key in (("zero", "loss_recovered"), ("mean", "loss_recovered_mean")):
        ratio = Ratio(*scale[RECOVERED[run]])
        if ratio.denominator.sum() > 0:  # where ablation costs nothing there is nothing to recover
            found[key] = _with_interval(ratio, seed)
    if "bytes" in sums:
        found["bits_per_byte_patched"] = _bits(sums, f"{name}/nats_patched_{role}", seed)
    return _present(found)


def _below(sums: Sums, name: str) -> Sums:
    """The sums under `name/`, by the last part of their keys."""
    return {key.removeprefix(f"{name}/"): value for key, value in sums.items() if key.rpartition("/")[0] == name}


def _bits(sums: Sums, nats: str, seed: int) -> dict[str, float] | None:
    return _with_interval(Ratio(sums[nats] / math.log(2), sums["bytes"]), seed)


def _with_interval(figure: Ratio, seed: int) -> dict[str, float] | None:
    """{value, low, high}; bounds only where there are blocks enough, None where the metric is not defined."""
    kept = figure.denominator != 0
    figure = Ratio(figure.numerator[kept], figure.denominator[kept])
    if not math.isfinite(figure.value):
        return None
    bounds = interval(figure, seed)
    return {"value": figure.value} | ({} if bounds is None else {"low": bounds[0], "high": bounds[1]})


def _present(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


CHUNK_ROWS = 8192


class LogitSimilarity(NamedTuple):
    correlation: Tensor
    """Pearson over shared tokens of `W_dec[f] W_U` in both models [d_sae]; NaN where one is constant."""
    shared_tokens: int
    shared_fraction: float
    """Of the base vocabulary."""
    base_norm: float
    """|W_U| over shared tokens, Frobenius."""
    finetuned_norm: float
    difference_norm: float

    def report(self) -> dict[str, Any]:
        """Without the latents, as JSON."""
        return {key: value for key, value in self._asdict().items() if key != "correlation"}


@torch.no_grad()
def logit_similarity(base: LanguageModel, finetuned: LanguageModel, sae: SparseAutoencoder) -> LogitSimilarity | None:
    """Compare every latent's logit vectors over the strings that both vocabularies hold.

    W_U carries the final norm's gain, as TransformerLens folds it; the mean over the vocabulary drops out of a
    correlation. With C_bf = sum over tokens of w_b w_f' (centred), the correlation of latent d is d C_bf d' over the root
    of (d C_bb d')(d C_ff d'): the logit vectors themselves, [d_sae, vocabulary], are never made. None where the SAE's rows
    do not lie in the residual stream's space (heads' outputs) or a model has no output embedding.
    """
    if not sae.cfg.in_stream or any(lm.model.get_output_embeddings() is None for lm in (base, finetuned)):
        return None
    ids = _shared_ids(base, finetuned)
    if len(ids) < 2:
        return None
    sides = [unembedding(lm) for lm in (base, finetuned)]
    wide = sums_dtype(base.device)
    means = [sum(rows.sum(0) for rows in _chunks(side, ids[:, which], wide)) / len(ids) for which, side in enumerate(sides)]
    size = base.d_model
    bb, ff, bf = torch.zeros(3, size, size, dtype=wide, device=base.device)
    norms = torch.zeros(3, dtype=wide, device=base.device)
    for one, other in zip(_chunks(sides[0], ids[:, 0], wide), _chunks(sides[1], ids[:, 1], wide), strict=True):
        norms += torch.stack([one.square().sum(), other.square().sum(), (one - other).square().sum()])
        one, other = one - means[0], other - means[1]
        bb.addmm_(one.T, one)
        ff.addmm_(other.T, other)
        bf.addmm_(one.T, other)
    rows = sae.W_dec.to(wide)
    cross, base_part, other_part = (torch.linalg.vecdot(rows @ matrix, rows) for matrix in (bf, bb, ff))
    below = (base_part.clamp_min(0) * other_part.clamp_min(0)).sqrt()
    correlation = torch.where(below > 0, (cross / below.clamp_min(1e-300)).clamp(-1, 1), torch.nan)
    return LogitSimilarity(
        correlation.cpu(), len(ids), len(ids) / max(len(base.tokenizer.get_vocab()), 1), *norms.sqrt().tolist()
    )


def _shared_ids(base: LanguageModel, finetuned: LanguageModel) -> Tensor:
    """(base id, finetuned id) of every string that both vocabularies hold and both embeddings reach [n, 2]."""
    ours, theirs = base.tokenizer.get_vocab(), finetuned.tokenizer.get_vocab()
    found = sorted(
        (ours[token], theirs[token])
        for token in ours.keys() & theirs.keys()
        if ours[token] < base.vocab_size and theirs[token] < finetuned.vocab_size
    )
    return torch.tensor(found, dtype=torch.long).reshape(-1, 2)


def _chunks(found: Unembedding, ids: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """Rows of W_U with the final norm's gain folded in [tokens, d_model], for these ids."""
    for part in ids.split(CHUNK_ROWS):
        rows = found.weight[part.to(found.weight.device)].to(dtype) * found.gain.to(dtype)
        yield rows - rows.mean(1, keepdim=True) if found.centred else rows
