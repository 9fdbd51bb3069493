"""Before hours are spent: do the SAEs work on this model, as well as their cards say, and how long will the evaluations
take?

Prints warnings, and stops for what would make hours of evaluation worthless. Times are for the screen, never for files.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_research.config.params import Params
from sae_research.lm import LanguageModel, collect_hooks, median_activation_norm, token_mask
from sae_research.planning.costs import all_left, evaluation_seconds, host_seconds, start_seconds
from sae_research.planning.resources import activation_cache_bytes, cache_lines
from sae_research.planning.saes import PlannedSAE, described, place_in
from sae_research.planning.work import Phase, Work, phases, takes
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import round_significant
from sae_research.runtime.formatting import duration
from sae_research.saes import SAEConfig, SparseAutoencoder, encode_each
from sae_research.saes.base import OPEN_BYTES, Family, Guard, SAEInfo, check_finite
from sae_research.saes.crosscoders import normalised
from sae_research.setup.evaluated import NOTED, Evaluated, ModelIdentity
from sae_research.stats.reconstruction import ReconstructionStats
from sae_research.text.tokens import Contexts, TextRunsOut, token_contexts

TIMED_CONTEXTS = 2


def model_seconds(lm: LanguageModel, hook: str, context_size: int) -> tuple[float, float]:
    """Seconds per token of a pass up to `hook` and of a full pass, each after a short warm-up."""
    tokens = torch.arange(TIMED_CONTEXTS * context_size, device=lm.device).reshape(TIMED_CONTEXTS, -1) % lm.vocab_size
    lm.activations(tokens[:1, :8], hook)
    times = []
    for run in (lambda: lm.activations(tokens, hook), lambda: lm.logits(tokens)):
        start = time.perf_counter()
        float(run().flatten()[0])  # reading a value waits for the device
        times.append((time.perf_counter() - start) / tokens.numel())
    return times[0], max(times)


class MeasuredCosts(NamedTuple):
    """Unit costs measured here (`planning.costs.UnitCosts`)."""

    prefix: float
    above: float
    seconds_per_token: dict[str, float]
    """Encoding and decoding, by SAE."""
    widths: dict[str, int]
    """d_sae by SAE."""

    def encode(self, sae: str) -> float:
        return self.seconds_per_token[sae]

    def start(self, kind: str) -> float:
        return start_seconds(kind)

    def host(self, kind: str, sae: str, work: Work) -> float:
        return host_seconds(kind) * work.texts * self.widths[sae]


def time_lines(
    params: Params, lm: LanguageModel, saes: dict[str, SparseAutoencoder], seconds_per_token: dict[str, float]
) -> list[str]:
    """One line per evaluation: the time it will take, at the speeds just measured, less what is in the cache."""
    infos = {name: sae.info() for name, sae in saes.items()}
    planned = {name: described(name, info) for name, info in infos.items()}
    widths = {name: sae.d_sae for name, sae in planned.items()}
    costs = {}
    for hook in dict.fromkeys(sae.hook for sae in planned.values()):  # the written one of a transcoder is in the same layer
        prefix, full = model_seconds(lm, hook, params.text.context_size)
        costs[hook] = MeasuredCosts(prefix, full - prefix, seconds_per_token, widths)
    lines, rest = [], []
    for name, on in params.eval_types.model_dump().items():
        if on and (name == "meta_sae" or phases(name, params) is None):  # a meta-SAE's steps were not measured
            rest.append(name)
        elif on:
            lines.append(f"{name}: {_time_of(name, params, lm, infos, planned, costs)}")
    return lines + ([f"{', '.join(rest)}: not estimated"] if rest else [])


def _time_of(
    name: str,
    params: Params,
    lm: LanguageModel,
    infos: dict[str, SAEInfo],
    planned: dict[str, PlannedSAE],
    costs: dict[str, MeasuredCosts],
) -> str:
    """Of one evaluation, summed over the places at which its SAEs stand. costs: by hook."""
    taken = {sae: one for sae, one in planned.items() if takes(name, one.at)}
    seconds, tokens, parts, asked = 0.0, 0, [], 0
    for at in dict.fromkeys(place_in(name, one) for one in taken.values()):
        group = {sae: infos[sae] for sae, one in taken.items() if place_in(name, one) == at}
        stage = phases(name, params, at) or []
        left = left_to_score(name, stage, group, lm, params)
        openings = math.ceil(sum(info.nbytes for info in group.values()) / OPEN_BYTES)
        seconds += evaluation_seconds(stage, left, costs[planned[next(iter(group))].hook], openings).on(1)
        tokens = sum(phase.tokens for phase in stage)
        parts += [todo for by_part in left.values() for todo in by_part]
        asked += len(group) * sum(map(len, left.values()))
    return _amount(seconds, parts, asked, len(taken), tokens)


def left_to_score(
    name: str, stage: Sequence[Phase], infos: Mapping[str, SAEInfo], model: ModelIdentity, params: Params
) -> dict[str, list[Sequence[str]]]:
    """By kind and part, the SAEs whose results are not in the cache; all where an evaluation leaves no notes of that."""
    left = all_left(stage, list(infos))
    if name not in NOTED:
        return left
    notes = Evaluated(name, model, params)
    parts = params.sparse_probing.dataset_names if name == "sparse_probing" else None
    return {
        kind: [
            [sae for sae in todo if not notes.has(infos[sae], parts[number] if parts else name)]
            for number, todo in enumerate(by_part)
        ]
        for kind, by_part in left.items()
    }


def _amount(seconds: float, parts: list[Sequence[str]], asked: int, n_saes: int, tokens: int) -> str:
    """parts: the SAEs that are still to be scored on each. asked: how many are to be scored on all parts together."""
    if not n_saes:
        return "no SAE that it applies to"
    n_left = len({sae for todo in parts for sae in todo})
    if not n_left:
        return f"all {n_saes} SAEs are in the cache"
    lacking = sum(map(len, parts))
    cached = "" if lacking == asked else f"; {1 - lacking / asked:.0%} is in the cache"
    return f"up to {duration(seconds)} for {n_left} SAEs on {tokens:,} tokens{cached}"


def disk_lines(params: Params, lm: LanguageModel, saes: dict[str, SparseAutoencoder], d_sae: int) -> list[str]:
    """The activation cache's size, and a warning where the disk or the limit does not hold it."""
    if not params.activation_caching.enabled:
        return ["activation cache: off"]
    stages = [stage for name, on in params.eval_types.model_dump().items() if on and (stage := phases(name, params))]
    widths = {hook: width for sae in saes.values() for hook, width in _collected(sae.cfg, lm)}
    needed = activation_cache_bytes(params, stages, widths, lm.dtype.itemsize, d_sae)
    return cache_lines(needed, params)


def _collected(cfg: SAEConfig, lm: LanguageModel) -> list[tuple[str, int]]:
    """Hooks whose activations evaluations keep for an SAE, and their widths (`lm.pairs`)."""
    hooks = [(hook, cfg.d_in // len(cfg.hook_names)) for hook in cfg.hook_names]
    if cfg.is_cross_layer:
        hooks += [(hook, cfg.d_out // len(cfg.hooks_out)) for hook in cfg.hooks_out]
    elif cfg.is_transcoder:
        stream = lm.added_to(cfg.hook_out)
        hooks += [(cfg.hook_out, cfg.d_out), *([] if stream is None else [(stream, lm.d_model)])]
    return hooks


L0_TOLERANCE = 1.5
"""Factor by which the L0 seen may differ from the card's before a warning."""
VARIANCE_TOLERANCE = 0.1
BATCH_CONTEXTS = 8


class Sample(NamedTuple):
    """Contexts of the core evaluation's split at one hook, at those that a transcoder reads and writes, or at several side
    by side."""

    acts: Tensor
    """[contexts, seq, d_in], on the model's device"""
    written: Tensor
    """What reconstructions are compared with [contexts, seq, d_out]; `acts` itself where the hooks are one."""
    mask: Tensor
    """True where a token counts [contexts, seq]"""
    median_norm: float
    mean_norm: float


class Preflight(NamedTuple):
    """`report` is for preflight.json: the same inputs give the same bytes. Times are for the screen only."""

    report: dict[str, Any]
    warnings: list[str]
    seconds_per_token: dict[str, float]
    """Encoding and decoding, by SAE."""


def preflight_contexts(lm: LanguageModel, params: Params) -> Contexts:
    """The contexts that SAEs are tried on. Raises `UserError` where the text does not give them."""
    try:
        return token_contexts(lm.tokenizer, lm.separator_id, params.text, "core_eval", params.preflight.tokens)
    except TextRunsOut as error:
        raise UserError(f"preflight.tokens: {error}") from None


def preflight(
    saes: dict[str, SparseAutoencoder], baseline: str, lm: LanguageModel, params: Params, contexts: Contexts
) -> Preflight:
    """Reconstruct `contexts` with every SAE and compare with what is known of each.

    Raises `UserError` when activations have another size than an SAE's card says, and when the baseline
    explains less variance than `preflight.min_variance_explained`.
    """
    report: dict[str, Any] = {
        "model": _model_card(lm),
        "tokens": contexts.tokens.numel(),
        "hooks": {},
        "saes": {},
    }
    warnings: list[str] = []
    seconds: dict[str, float] = {}
    for hooks in dict.fromkeys(sae.cfg.hooks for sae in saes.values()):
        group = {name: sae for name, sae in saes.items() if sae.cfg.hooks == hooks}
        sample = _sample(lm, next(iter(group.values())).cfg, contexts, params)
        report["hooks"][hooks] = _hook_card(sample)
        ratios = {name: _norm_ratio(name, sae, sample, params) for name, sae in group.items()}
        failed: dict[str, str] = {}
        measured, times = measure(group, sample, Guard(failed.__setitem__))
        if baseline in failed:
            raise UserError(f"the baseline {baseline} fails: {failed[baseline]}")
        seconds.update(times)
        report["saes"] |= {name: {"failed": reason} for name, reason in failed.items()}
        warnings += [f"{name} fails, and evaluations will skip it: {reason}" for name, reason in failed.items()]
        for name, sae in group.items():
            if name in failed:
                continue
            figures: dict[str, Any] = measured[name] | ({} if ratios[name] is None else {"norm_ratio": ratios[name]})
            card = {
                key: value
                for key, value in (sae.cfg.provenance.get("held_out") or {}).items()
                if key in ("l0", "variance_explained")
            }
            report["saes"][name] = figures | ({"card": card} if card else {})
            warnings += [f"{name}: {line}" for line in compare_with_card(figures, card)]
    _check_baseline(baseline, report["saes"][baseline], params.preflight.min_variance_explained)
    return Preflight(round_significant(report | {"warnings": warnings}), warnings, seconds)


@torch.no_grad()
def measure(
    saes: dict[str, SparseAutoencoder], sample: Sample, guard: Guard | None = None
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """(metrics by SAE, seconds per token by SAE). Members of a family share their family's time evenly. Without a `guard`
    an SAE that fails raises its error."""

    def score(members: Family) -> Iterator[tuple[str, tuple[dict[str, float], float]]]:
        names = list(members)
        stats = {
            name: ReconstructionStats(sae.cfg.d_out, sae.cfg.d_sae, sample.acts.device) for name, sae in members.items()
        }
        spent = 0.0
        for _ in encode_each(members, sample.acts[:1], sample.mask[:1]):
            pass  # compiles, and fills what a family computes once
        parts = (values.split(BATCH_CONTEXTS) for values in (sample.acts, sample.written, sample.mask))
        for x, written, mask in zip(*parts, strict=True):
            start = time.perf_counter()
            encoded = encode_each(members, x, mask)
            while (item := next(encoded, None)) is not None:
                name, z = item
                hat = saes[name].reconstruct(x, mask, z)
                spent += time.perf_counter() - start  # the statistics are not the evaluation's work
                target, hat = (normalised(part, saes[name].cfg) for part in (saes[name].target(x, written), hat))
                stats[name].update(target, hat, z, mask)
                start = time.perf_counter()
        for name in names:
            values = stats[name].metrics()
            figures = {
                key: values[key]
                for key in ("l0", "variance_explained", "variance_explained_per_dim", "fraction_alive")
                if key in values
            }
            check_finite(figures)
            yield name, (figures, spent / len(names) / sample.mask.numel())

    found = dict((guard or Guard(None)).each(saes, score))
    return {name: figures for name, (figures, _) in found.items()}, {name: seconds for name, (_, seconds) in found.items()}


def compare_with_card(figures: dict[str, float], card: dict[str, float]) -> list[str]:
    """What an SAE does here against what its card says, where the two are far apart: one line each."""
    lines = []
    seen, said = figures.get("l0"), card.get("l0")
    if seen is not None and said and not 1 / L0_TOLERANCE <= seen / said <= L0_TOLERANCE:
        lines.append(f"L0 is {seen:.4g} here, its card says {said:.4g}")
    seen, said = figures.get("variance_explained"), card.get("variance_explained")
    if seen is not None and said is not None and abs(seen - said) > VARIANCE_TOLERANCE:
        lines.append(f"explains {seen:.3f} of the variance here, its card says {said:.3f}")
    return lines


def _sample(lm: LanguageModel, cfg: SAEConfig, contexts: Contexts, params: Params) -> Sample:
    tokens, counted = contexts.tokens, contexts.counted
    hooks = list(dict.fromkeys([*cfg.hook_names, *cfg.hooks_out]))
    pools = collect_hooks(lm, hooks, tokens, params.model.llm_batch_size, params.activation_caching)
    found, medians, mask = {}, {}, torch.ones_like(tokens, dtype=torch.bool)
    for hook in hooks:
        acts = found[hook] = pools[hook].flat.float().reshape(*tokens.shape, -1)
        medians[hook] = median_activation_norm(lm, tokens, acts, counted)
        mask = mask & token_mask(lm, tokens, acts, params.token_mask, medians[hook], counted)
    if not mask.any():
        raise UserError(
            f"preflight: no token counts at {cfg.hooks}; loosen token_mask"
            + ("" if counted is None else ", raise preflight.tokens or name more text.roles")
        )
    for hook, acts in found.items():
        if not torch.isfinite(acts[mask]).all():
            raise UserError(
                f"preflight: {lm.name} gives NaN or infinity at {hook} in {lm.dtype}; set model.torch_dtype: bfloat16 or "
                "float32"
            )
    read, written = (
        found[side[0]] if len(side) == 1 else torch.cat([found[hook] for hook in side], dim=-1)
        for side in (cfg.hook_names, cfg.hooks_out)
    )
    norms, acts = read[mask].norm(dim=1), read.to(lm.device)
    target = written.to(lm.device) if cfg.is_transcoder else acts
    return Sample(acts, target, mask.to(lm.device), float(norms.median()), float(norms.mean()))


def _norm_ratio(name: str, sae: SparseAutoencoder, sample: Sample, params: Params) -> float | None:
    """Mean activation norm here over the one recorded in training; None where none was recorded."""
    recorded = sae.cfg.provenance.get("activation_norm")
    if not recorded:
        return None
    ratio = sample.mean_norm / float(recorded)
    limit = params.preflight.max_norm_ratio
    if not 1 / limit <= ratio <= limit:
        raise UserError(
            f"SAE {name}: activations at {sae.cfg.hook_name} have mean norm "
            f"{sample.mean_norm:.4g}, in its "
            f"training {float(recorded):.4g}; the model, its precision or its scaling differ "
            "(preflight.max_norm_ratio)"
        )
    return ratio


def _check_baseline(name: str, figures: dict[str, Any], least: float | None) -> None:
    explained = figures.get("variance_explained")
    if least is not None and (explained is None or explained < least):
        raise UserError(
            f"the baseline {name} explains "
            f"{explained if explained is None else round(explained, 4)} of the "
            f"variance, preflight.min_variance_explained is {least}"
        )


def _model_card(lm: LanguageModel) -> dict[str, Any]:
    return {
        "name": lm.name,
        "fingerprint": lm.fingerprint,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "n_layers": lm.n_layers,
        "d_model": lm.d_model,
        "vocab_size": lm.vocab_size,
        "tokenizer": type(lm.tokenizer).__name__,
        "tokenizer_size": len(lm.tokenizer),
        "separator_id": lm.separator_id,
        "resumes": lm.can_resume,
    }


def _hook_card(sample: Sample) -> dict[str, Any]:
    return {
        "d_in": sample.acts.shape[-1],
        "median_norm": sample.median_norm,
        "mean_norm": sample.mean_norm,
        "fraction_counted": float(sample.mask.float().mean()),
    }
