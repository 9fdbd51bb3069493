"""One pass of either model over the text, and from it every statistic. Nothing grows with the number of tokens.

Two sets of tokens are kept apart: outliers of either model, and the other tokens that count. Metrics without outliers come
from the second set, metrics with them from both together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_research.config.params import TokenMask
from sae_research.lm import token_mask
from sae_research.runtime.errors import UserError
from sae_research.saes import SparseAutoencoder, encode_each
from sae_research.stats.reconstruction import ReconstructionStats, counted, sums_dtype
from sae_research.transfer.loading import MODELS, Masks, Pair, masks
from sae_research.transfer.statistics import (
    ActivationHistogram,
    LatentMoments,
    Norms,
    OutlierLog,
    Similarity,
    chosen_limit,
    limits,
)
from sae_research.transfer.text import PairBatch, batches, token_bar

HEAT_MAP_PROMPTS = 40
PROMPT_EDGES = [x / 200 for x in range(-200, 201)]
MAX_REMOVED = 0.5
MIN_ALIGNED = 0.05
"""Of tokens, with a tokenizer each: fewer in the same place of the text are nothing to compare models by."""


class HookStats:
    """Similarity of activations at one hook."""

    def __init__(self, d_in: int, context_size: int, limit: float, shift: tuple[Tensor, Tensor]) -> None:
        self.limit = limit
        self.kept, self.removed = (Similarity(d_in, context_size, shift) for _ in range(2))
        self.heat_map: list[list[float | None]] = []
        """Cosine by prompt and position, of the first prompts, outliers included."""
        self.prompt_means = torch.zeros(len(PROMPT_EDGES) - 1, dtype=torch.float64)
        """Histogram of prompts' mean cosines, outliers included."""

    def update(self, acts: dict[str, Tensor], found: Masks, generator: torch.Generator) -> None:
        (one, other), kept = found.pairs, found.pair_kept
        rows, width = acts["base"].shape[:2]
        x, y = (acts[model].flatten(0, 1)[index].float() for model, index in (("base", one), ("finetuned", other)))
        cosine = torch.full((rows * width,), torch.nan, dtype=torch.float64)
        for stats, chosen in ((self.kept, kept), (self.removed, ~kept)):
            shuffle = torch.randperm(int(chosen.sum()), generator=generator).to(x.device)
            values = stats.update(x[chosen], y[chosen], one[chosen] % width, shuffle)
            cosine[one[chosen].cpu()] = values[0].double().cpu()
        by_prompt = cosine.view(rows, width)
        means = by_prompt.nanmean(dim=1)
        self.prompt_means += counted(means[~means.isnan()], PROMPT_EDGES).cpu()
        for row in by_prompt[: HEAT_MAP_PROMPTS - len(self.heat_map)].tolist():
            self.heat_map.append([None if value != value else round(value, 4) for value in row])


class SaeStats:
    """One SAE on both models."""

    def __init__(self, sae: SparseAutoencoder, device: torch.device) -> None:
        self.sae = sae
        self.signed = type(sae).signed
        shape = sae.cfg.d_in, sae.cfg.d_sae, device
        self.kept, self.removed = ({model: ReconstructionStats(*shape) for model in MODELS} for _ in range(2))
        self.histogram = {model: ActivationHistogram() for model in MODELS}
        self.moments_kept, self.moments_removed = (LatentMoments(sae.cfg.d_sae, device) for _ in range(2))

    @torch.no_grad()
    def update(self, acts: dict[str, Tensor], found: Masks, generator: torch.Generator) -> None:
        z = {}
        for model in MODELS:
            x, mask = acts[model].float(), found.counted[model]
            z[model] = dict(encode_each({"sae": self.sae}, x, mask))["sae"]
            target, x_hat = self.sae.target(x), self.sae.decode(z[model])
            kept = found.kept[model]
            self.kept[model].update(target, x_hat, z[model], kept)
            self.removed[model].update(target, x_hat, z[model], mask & ~kept)
            self.histogram[model].update(z[model][kept])
        (one, other), kept = found.pairs, found.pair_kept
        flat = {model: z[model].flatten(0, 1) for model in MODELS}
        for moments, chosen in ((self.moments_kept, kept), (self.moments_removed, ~kept)):
            shuffle = torch.randperm(int(chosen.sum()), generator=generator).to(one.device)
            moments.update(flat["base"][one[chosen]], flat["finetuned"][other[chosen]], shuffle, self.signed)
        self._halves(z["base"], found)

    def _halves(self, z: Tensor, found: Masks) -> None:
        """Contexts of even number against those of odd number."""
        pairs = len(z) // 2
        counts, kept = (
            (mask[0 : 2 * pairs : 2], mask[1 : 2 * pairs : 2]) for mask in (found.counted["base"], found.kept["base"])
        )
        both_kept = kept[0] & kept[1]
        even, odd = z[0 : 2 * pairs : 2], z[1 : 2 * pairs : 2]
        for moments, chosen in ((self.moments_kept, both_kept), (self.moments_removed, counts[0] & counts[1] & ~both_kept)):
            moments.update_halves(even[chosen], odd[chosen])


class FirstPass(NamedTuple):
    """What the later passes need of the first."""

    limit: float
    """Largest norm at the SAE's hook that is no outlier."""
    means: dict[str, Tensor]
    """Mean activation of kept tokens [d_in] by model."""

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "limit": None if math.isinf(self.limit) else self.limit,
            "means": {model: mean.tolist() for model, mean in self.means.items()},
        }

    @classmethod
    def from_plain(cls, values: dict[str, Any], device: torch.device) -> FirstPass:
        """What `plain` wrote."""
        means = {model: torch.tensor(mean, dtype=torch.float32, device=device) for model, mean in values["means"].items()}
        return cls(math.inf if values["limit"] is None else values["limit"], means)


@dataclass
class Statistics:
    """What the pass leaves."""

    hooks: dict[str, HookStats]
    saes: dict[str, SaeStats]
    outliers: OutlierLog
    norms: dict[str, Norms]
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys((*MODELS, "aligned", "counted_base"), 0))
    """Tokens read by either model, matched ones, and the base model's that count."""

    @property
    def first(self) -> FirstPass:
        kept = self.saes["base"].kept
        return FirstPass(
            self.outliers.limit, {model: (kept[model].sum_D / max(kept[model].tokens, 1)).float() for model in MODELS}
        )


def sweep(pair: Pair, n_tokens: int, progress: str | None = None, texts: Iterable[PairBatch] | None = None) -> Statistics:
    """Read `n_tokens` base tokens with both models. texts: their batches, by default the pair's own text.

    Raises `UserError` for text that runs out, activations that are not finite, an outlier rule that removes more than half,
    and tokenizers that hardly ever agree on a token.
    """
    config = pair.params.transfer
    statistics: Statistics | None = None
    generator = torch.Generator().manual_seed(pair.params.random_seed)
    with token_bar(n_tokens, progress) as bar:
        for batch in texts or batches(pair.base, pair.finetuned, pair.source, n_tokens, config.batch_size):
            acts = {model: lm.activations_at(batch.sides[model].tokens, pair.hooks) for model, lm in pair.models.items()}
            _check_finite(pair, acts)
            first = statistics is None
            if statistics is None:
                statistics = _start(pair, batch, acts)
            _add(pair, statistics, batch, acts, generator)
            if first:  # what stops here must not wait for the last batch
                _check(pair, statistics)
            bar.update(batch.n_tokens)
    assert statistics is not None  # n_tokens is positive, so there was a batch
    _check(pair, statistics)
    return statistics


def _check_finite(pair: Pair, acts: dict[str, dict[str, Tensor]]) -> None:
    for model, by_hook in acts.items():
        for hook, x in by_hook.items():
            if not torch.isfinite(x.sum(dtype=torch.float32)):  # a sum is a quarter of the work of looking at each
                lm = pair.models[model]
                raise UserError(
                    f"transfer: {lm.name} gives NaN or infinity at {hook} in {lm.dtype}; set model.torch_dtype: "
                    "bfloat16 or float32, or mend its weights"
                )


def _start(pair: Pair, batch: PairBatch, acts: dict[str, dict[str, Tensor]]) -> Statistics:
    """Limits and shifts from the first batch."""
    config, context_size = pair.params.transfer.outliers, pair.source.text.context_size
    norms, hooks, log = {}, {}, None
    for hook in pair.hooks:
        here = {model: acts[model][hook].float() for model in MODELS}
        norms[hook] = _norms(pair, batch, here["base"])
        found = limits(config, pair.base.name, pair.base.d_in(hook), norms[hook])
        limit = chosen_limit(config, found, pair.base.name)
        shift: Any = tuple(
            here[model][side.real].mean(0).to(sums_dtype(side.real.device)) for model, side in batch.sides.items()
        )
        hooks[hook] = HookStats(pair.base.d_in(hook), context_size, limit, shift)
        if hook == pair.hook:
            log = OutlierLog(found, limit, config.listed, pair.base.device)
    assert log is not None
    return Statistics(hooks, {role: SaeStats(sae, pair.base.device) for role, sae in pair.saes.items()}, log, norms)


def _norms(pair: Pair, batch: PairBatch, x: Tensor) -> Norms:
    """x: the base model's activations [batch, seq, d_in]."""
    tokens, real = batch.base
    counts = token_mask(pair.base, tokens, x, TokenMask(outlier_norm_multiple=None)) & real
    if not counts.any():
        raise UserError("transfer: no token of the first contexts counts; give more text or longer contexts")
    norms = x.norm(dim=-1)
    return Norms(float(norms[counts].median()), float(norms[real].mean()))


def _add(
    pair: Pair, statistics: Statistics, batch: PairBatch, acts: dict[str, dict[str, Tensor]], generator: torch.Generator
) -> None:
    sides = batch.sides
    for hook, stats in statistics.hooks.items():
        here = {model: acts[model][hook] for model in MODELS}
        found = masks(pair, batch, here, stats.limit)
        stats.update(here, found, generator)
        if hook != pair.hook:
            continue
        for model, lm in pair.models.items():
            tokenizer = lm.tokenizer if pair.source.own else pair.base.tokenizer
            statistics.outliers.update(
                model, here[model].float().norm(dim=-1), found.counted[model], sides[model].tokens, tokenizer
            )
            statistics.tokens[model] += int(sides[model].real.sum())
        statistics.tokens["aligned"] += len(found.pairs[0])
        statistics.tokens["counted_base"] += int(found.counted["base"].sum())
        for sae_stats in statistics.saes.values():
            sae_stats.update(here, found, generator)


def _check(pair: Pair, statistics: Statistics) -> None:
    config, tokens = pair.params.transfer, statistics.tokens
    if tokens["counted_base"] == 0:
        raise UserError("transfer: no token counts; give more text or longer contexts")
    aligned = tokens["aligned"] / tokens["counted_base"]
    if pair.source.own and aligned < MIN_ALIGNED:
        raise UserError(
            f"transfer: only {100 * aligned:.3g} % of tokens stand in the same place for both tokenizers "
            f"(at least {MIN_ALIGNED:.0%} are needed); these models cannot be compared "
            "token by token"
        )
    for hook, stats in statistics.hooks.items():
        removed = stats.removed.n / max(stats.removed.n + stats.kept.n, 1)
        if removed > MAX_REMOVED:
            raise UserError(
                f"transfer.outliers: the rule {config.outliers.rule} removes {100 * removed:.3g} % of tokens at "
                f"{hook} (norms above {stats.limit:.4g}); raise its limit or choose another rule"
            )
