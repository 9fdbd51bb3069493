"""Steering by a latent: the edit, matched samples over strengths, how often the target moved, and what it cost."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from sae_research.analysis.context import AnalysisContext
from sae_research.analysis.prompt import check_lab_latents, promoted_tokens
from sae_research.lm.generate import sample, until_end
from sae_research.runtime.errors import UserError
from sae_research.saes import SparseAutoencoder
from sae_research.stats.intervals import interval, ratio
from sae_research.stats.predictions import CleanPredictions
from sae_research.text.tokens import token_contexts

Method = Literal["add", "clamp", "project"]
METHODS: dict[str, str] = {
    "add": "x + strength max d: the latent's direction on top of what is there",
    "clamp": "x + (strength max - activation) d: the latent held at one value",
    "project": "x - <x, d> d / |d|^2 + strength max d: the direction emptied (strength 0), then set",
}
NEUTRAL_BATCH = 4
N_TARGETS = 10


class Edit:
    """A steering edit of one latent, to be called on the activations of a run's passes in turn [batch, seq, d_in].

    `edited` counts positions: all of the prompt that count, and every token generated since. amount: what `strength max`
    comes to. d is the latent's decoder row.
    """

    def __init__(
        self, sae: SparseAutoencoder, latent: int, method: Method, amount: float, mask: Tensor | None = None
    ) -> None:
        """mask: which tokens of the first pass count [batch, seq] or [1, seq]; all of later passes do."""
        self.sae, self.latent, self.method, self.amount, self.mask = sae, latent, method, amount, mask
        self.edited = self._passes = 0
        self._past: list[tuple[Tensor, Tensor]] = []

    def __call__(self, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        if not self._passes and self.mask is not None:
            mask = self.mask.expand(x.shape[:2])
        wide, d = x.float(), self.sae.W_dec[self.latent].float()
        change = self.amount * d.expand_as(wide)
        if self.method == "clamp":
            change = change - self._activation(wide, mask)[..., None] * d
        elif self.method == "project":
            change = change - (wide @ d / d.square().sum())[..., None] * d
        if not self.sae.per_token:
            self._past.append((wide, mask))
        self._passes += 1
        self.edited += int(mask.sum())
        return (wide + change * mask[..., None]).to(x.dtype)

    def _activation(self, x: Tensor, mask: Tensor) -> Tensor:
        """The latent's activations [batch, seq] on this pass; an encoder that looks back is given what came before."""
        if self.sae.per_token:
            return self.sae.encode(x, mask)[..., self.latent]
        whole = [torch.cat(parts, 1) for parts in zip(*self._past, (x, mask), strict=True)]
        return self.sae.encode(*whole)[:, -x.shape[1] :, self.latent]


class Sample(NamedTuple):
    seed: int
    text: str
    target_tokens: int
    """Tokens of the text that are targets."""
    tokens: int
    latent_mean: float
    """Mean activation of the latent on the text's own tokens, read back by the unedited model."""


class Strength(NamedTuple):
    """What one strength did."""

    strength: float | None
    """In units of the latent's largest activation; None is the unsteered model."""
    amount: float
    samples: list[Sample]
    target_rate: float
    """Target tokens per token, over all samples."""
    target_low: float | None
    """95 % interval of that rate, from how it varies between seeds; None with fewer than five."""
    target_high: float | None
    moved: float | None
    """Fraction of seeds whose text holds more target tokens than without steering; None of the unsteered model."""
    moved_back: float | None
    """Fewer."""
    latent_moved: float | None
    """Fraction of seeds on whose text the latent itself is more active, read back, than without steering."""
    latent_mean: float
    kl: float
    """KL(unsteered || steered) per token of neutral text, nats."""
    ce_change: float
    """Cross-entropy per token of neutral text, steered less unsteered, nats."""
    edits: int
    """Positions edited while sampling, over all samples; each generated token that the model read on was one of them."""


class Steering(NamedTuple):
    method: str
    latent: int
    maximum: float
    """Largest activation in the statistics: what a strength of 1 stands for."""
    targets: list[str]
    neutral_tokens: int
    strengths: list[Strength]
    """The unsteered model first."""


def check_steerable(name: str, sae: SparseAutoencoder) -> None:
    """Raises `UserError` for an encoder that is not causal and for a transcoder, with the reason."""
    sae.cfg.check_one_hook("steering")
    if not sae.causal:
        instead = f"; steer with the dictionary it reads, {sae.cfg.base}" if sae.cfg.base else ""
        raise UserError(
            f"SAE {name} ({sae.cfg.form}) cannot steer: its encoder is not causal. A token's latents depend on "
            "later tokens, so each generated token would change the latents, and with them the edits, of all "
            f"tokens before it{instead}"
        )


def check_method(method: str) -> None:
    """Raises `UserError` for a method there is not."""
    if method not in METHODS:
        raise UserError(f"--method {method}: choose one of {', '.join(METHODS)}")


def steer(
    analysis: AnalysisContext,
    prompt: str,
    latent: int,
    strengths: Sequence[float] = (0.5, 1.0, 2.0),
    method: Method = "add",
    seeds: Sequence[int] = (0, 1, 2, 3),
    n_tokens: int = 40,
    targets: Sequence[str] | None = None,
    temperature: float = 0.7,
    top_p: float = 0.9,
    neutral_tokens: int = 512,
    maximum: float | None = None,
) -> Steering:
    """Sample with a latent's direction edited into every token, for each strength with the same seeds.

    maximum: what strength 1 stands for; by default the latent's largest activation in the statistics. targets: texts of
    one token each whose rate is followed; by default the ten tokens the latent promotes most. Raises `UserError` for an
    encoder that is not causal, a latent that is not there or never fired, and edits that did not fire at every token.
    """
    name, sae = analysis.only
    check_steerable(name, sae)
    check_lab_latents(sae, [latent])
    check_method(method)
    if n_tokens < 1 or not seeds or not strengths:
        raise UserError("steering needs at least one strength, one seed and one token to generate")
    tokens = analysis.tokens(prompt)
    maximum = measured_maximum(analysis, name, latent) if maximum is None else maximum
    wanted = _targets(analysis, sae, latent, targets)
    neutral = _Neutral(analysis, sae, neutral_tokens)
    rows: list[Strength] = []
    for strength in (None, *strengths):
        amount = 0.0 if strength is None else strength * maximum
        samples, edits = _samples(
            analysis,
            sae,
            tokens,
            None if strength is None else (latent, method, amount),
            list(seeds),
            n_tokens,
            temperature,
            top_p,
            set(wanted),
            latent,
        )
        kl, ce = (0.0, 0.0) if strength is None else neutral.cost(latent, method, amount)
        pairs = list(zip(samples, rows[0].samples, strict=True)) if rows else []
        rows.append(
            Strength(
                strength,
                amount,
                samples,
                sum(s.target_tokens for s in samples) / max(1, sum(s.tokens for s in samples)),
                *rate_interval(samples),
                _share([now.target_tokens > before.target_tokens for now, before in pairs]),
                _share([now.target_tokens < before.target_tokens for now, before in pairs]),
                _share([now.latent_mean > before.latent_mean for now, before in pairs]),
                statistics.fmean(s.latent_mean for s in samples),
                kl,
                ce,
                edits,
            )
        )
    return Steering(method, latent, maximum, [analysis.lm.tokenizer.decode([t]) for t in wanted], neutral.tokens, rows)


def rate_interval(samples: Sequence[Sample]) -> tuple[float, float] | tuple[None, None]:
    """95 % interval of target tokens per token; each seed's text is one cluster (`stats.intervals`)."""
    return interval(ratio([s.target_tokens for s in samples], [s.tokens for s in samples]), seed=0) or (None, None)


def _share(of: list[bool]) -> float | None:
    return sum(of) / len(of) if of else None


def measured_maximum(analysis: AnalysisContext, name: str, latent: int) -> float:
    """A latent's activation of largest magnitude in the statistics. Raises `UserError` for one that never fired."""
    stats = analysis.stats(name)
    high, low = float(stats.max[latent]), float(stats.min[latent])
    if stats.count[latent] == 0:
        raise UserError(
            f"latent {latent} of {name} fired on none of {stats.tokens:,} tokens: there is no maximum to "
            "calibrate by; raise analysis.tokens or give --maximum"
        )
    return high if abs(high) >= abs(low) else low


def _targets(analysis: AnalysisContext, sae: SparseAutoencoder, latent: int, texts: Sequence[str] | None) -> list[int]:
    if texts:
        return [analysis.token(text) for text in texts]
    if sae.cfg.d_out != analysis.lm.d_model or not sae.cfg.in_stream:
        raise UserError(
            f"{sae.cfg.hook_out} is not in the residual stream, so the latent promotes no tokens directly: "
            "name target tokens"
        )
    promoted = promoted_tokens(analysis, sae, [latent], N_TARGETS)[0].raised_ids
    return list(promoted)


def _samples(
    analysis: AnalysisContext,
    sae: SparseAutoencoder,
    tokens: Tensor,
    how: tuple[int, Method, float] | None,
    seeds: list[int],
    n_tokens: int,
    temperature: float,
    top_p: float,
    wanted: set[int],
    latent: int,
) -> tuple[list[Sample], int]:
    """(samples, positions edited). how: latent, method, amount; None samples the model as it is."""
    hook = sae.cfg.hook_name
    edit, hooks = None, {}
    if how is not None:
        mask = analysis.mask(tokens, analysis.lm.activations(tokens, hook))
        edit = Edit(sae, *how, mask)
        hooks = {hook: edit}
    ids = sample(analysis.lm, tokens, n_tokens, seeds, temperature, top_p, hooks)
    if edit is not None and edit.mask is not None:
        expected = len(seeds) * (int(edit.mask.sum()) + n_tokens - 1)
        if edit.edited != expected:
            raise UserError(f"steering at {hook} edited {edit.edited} positions where {expected} were due")
    found = []
    for seed, row in zip(seeds, ids, strict=True):
        kept = until_end(analysis.lm, row)
        found.append(
            Sample(
                seed,
                analysis.lm.tokenizer.decode(kept),
                sum(int(t) in wanted for t in kept),
                len(kept),
                _read_back(analysis, sae, tokens, kept, latent),
            )
        )
    return found, 0 if edit is None else edit.edited


@torch.no_grad()
def _read_back(analysis: AnalysisContext, sae: SparseAutoencoder, prompt: Tensor, ids: list[int], latent: int) -> float:
    if not ids:
        return 0.0
    whole = torch.cat([prompt[0].cpu(), torch.tensor(ids)])[None].to(analysis.lm.device)
    acts = analysis.lm.activations(whole, sae.cfg.hook_name).float()
    return float(sae.encode(acts, analysis.mask(whole, acts))[0, prompt.shape[1] :, latent].mean())


class _Neutral:
    """Text that has nothing to do with the target: what an edit costs there."""

    def __init__(self, analysis: AnalysisContext, sae: SparseAutoencoder, n_tokens: int) -> None:
        self.analysis, self.sae = analysis, sae
        text = token_contexts(analysis.lm.tokenizer, analysis.lm.separator_id, analysis.params.text, "core_eval", n_tokens)
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for start in range(0, len(text.tokens), NEUTRAL_BATCH):
            tokens = text.tokens[start : start + NEUTRAL_BATCH].to(analysis.lm.device)
            counted = None if text.counted is None else text.counted[start : start + NEUTRAL_BATCH]
            acts = analysis.lm.activations(tokens, sae.cfg.hook_name)
            self.parts.append((tokens, acts, analysis.mask(tokens, acts, counted)))
        self.tokens = sum(int(mask.sum()) for *_, mask in self.parts)
        self._clean: list[CleanPredictions] | None = None

    @torch.no_grad()
    def cost(self, latent: int, method: Method, amount: float) -> tuple[float, float]:
        """(KL, change of cross-entropy) per counted token, nats."""
        if self._clean is None:
            self._clean = [CleanPredictions(self.analysis.lm.logits(tokens), tokens) for tokens, *_ in self.parts]
        kl = ce = 0.0
        predicted = 0
        for (tokens, acts, mask), clean in zip(self.parts, self._clean, strict=True):
            edited = Edit(self.sae, latent, method, amount, mask)(acts)
            ce_BT, kl_BT = clean.compare(self.analysis.lm.resume(self.sae.cfg.hook_name, edited, tokens))
            kl += float(kl_BT[mask].sum())
            ce += float((ce_BT - clean.ce)[mask[:, :-1]].sum())
            predicted += int(mask[:, :-1].sum())
        return kl / max(1, self.tokens), ce / max(1, predicted)


def as_rows(found: Steering) -> list[dict[str, Any]]:
    """One row a strength, without the texts."""
    return [{key: value for key, value in row._asdict().items() if key != "samples"} for row in found.strengths]
