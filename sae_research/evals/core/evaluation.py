"""Core evaluation: reconstruction, sparsity, and what the model loses when the reconstruction stands in.

Two definitions from the same activations. SAE Bench 0.6.0's patches every token, sinks included, and counts every
token that is not BOS, EOS or padding. Ours (`lab_v1`) neither counts nor patches tokens outside `token_mask`.

All is about what a dictionary writes: a transcoder's reconstruction is compared with the activations at its `hook_out`, put
in their place there, and measured against zeros and the mean activation in that place. For an SAE that is the hook it reads.
A crosscoder's hooks are all replaced at once; `kl@blocks.3.hook_resid_post` and the like are of one hook, with that one
alone replaced. Its activations are compared in units in which all hooks count alike (`saes.crosscoders`), and a token
that does not count stays as the run has it.

Work is shared: activations are read from the pool; clean and ablated predictions are made once for all SAEs that are open
together; the patched passes resume at the hook. Finished pieces are kept in the result cache, one per SAE and batch of
predictions, so that an interrupted run or an added SAE pays only for what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sae_research.config.params import Params
from sae_research.evals import harness
from sae_research.evals.core.metrics import (
    about_mean,
    at_hook,
    evidence,
    minus_one_for_nan,
    sae_bench_predictions,
    sums_of,
)
from sae_research.evals.harness import Group, Scores, by_hooks
from sae_research.lm import LanguageModel
from sae_research.lm.pairs import PairedActivations, PairedBatch
from sae_research.runtime.files import fingerprint
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SparseAutoencoder, encode_each
from sae_research.saes.base import Family, Guard, SAEInfo, check_finite
from sae_research.saes.crosscoders import normalised
from sae_research.setup.evaluated import Evaluated
from sae_research.stats.predictions import CleanPredictions, losses, prediction_sums, replaced_logits, total
from sae_research.stats.reconstruction import (
    Clusters,
    ReconstructionStats,
    ReconstructionSums,
    clusters_by_context,
    clusters_of,
    density_histogram,
)
from sae_research.stats.sae_bench import SaeBenchStats, feature_details, latent_weights, misc_metrics
from sae_research.text.tokens import reorder_evenly, token_contexts

Sums = dict[str, float | list[float]]
"""By quantity; lists hold one number per cluster."""


class _Text(NamedTuple):
    """What is evaluated on."""

    tokens: Tensor
    """Ids [contexts, seq]."""
    predictions: Clusters
    """Clusters of the contexts that serve predictions."""
    sparsity: Clusters
    """Clusters of the contexts that serve sparsity and variance."""
    counted: Tensor | None = None
    """Where tokens of `text.roles` stand, bool [contexts, seq]; None: everywhere."""


class _Group(PairedActivations):
    """What SAEs share that read one hook and write one hook."""

    def __init__(self, lm: LanguageModel, members: Group, text: _Text, params: Params, lab: bool) -> None:
        super().__init__(lm, members.hook, members.hook_out, text.tokens, params, text.counted)
        self.text = text
        self.lab = lab
        """Whether our own definitions are computed beside SAE Bench's."""

    @cached_property
    def mean_activation(self) -> Tensor:
        """Mean of what is written over the counted tokens of the sparsity contexts [d_out]: what mean-ablation puts in
        place."""
        total, count = torch.zeros((), device=self.lm.device), 0
        config = self.params.core_eval
        for index in self.numbers(config.n_eval_reconstruction_batches, config.n_eval_sparsity_variance_batches):
            batch = self.shown(index)
            kept = batch.written[batch.lab_mask]
            total, count = total + kept.sum(0), count + len(kept)
        return total / max(count, 1)

    def numbers(self, first: int, count: int) -> list[list[int]]:
        """Numbers of the contexts in `count` batches from batch `first` on."""
        size = self.params.core_eval.batch_size_prompts
        return [list(range(i * size, (i + 1) * size)) for i in range(first, first + count)]


def evaluate(
    saes: Mapping[str, SparseAutoencoder],
    lm: LanguageModel,
    params: Params,
    stage: StageFolder | None = None,
    *,
    tokens: Tensor | None = None,
    lab: bool = True,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, result) of every SAE, the result as SAE Bench's `CoreEvalOutput` in plain data.

    tokens: [contexts, seq], by default the core_eval split of the configured text, from all over which the contexts for
    predictions are taken. The first `n_eval_reconstruction_batches` batches serve predictions, the next
    `n_eval_sparsity_variance_batches` serve sparsity and variance, as SAE Bench has it. `lab=False` leaves our own
    definitions out, for timings against SAE Bench at equal work. An SAE that fails is skipped with its reason; without a
    `stage` to list it in, its error is raised. Raises `UserError` for text that runs out.
    """
    guard = Guard(stage.skip if stage else None)
    text = _text(lm, params, tokens)
    for members in by_hooks(saes):
        group = _Group(lm, members, text, params, lab)
        keys = members.keys(lm, _inputs(params, text, lab), __name__)
        sparsity = _sparsity(group, Scores("core_sparsity", members, keys, guard))
        prediction = _predictions(group, members, keys, guard)
        if tokens is None:
            _note(guard.left(members.infos), keys, lm, params)
        for name, info in guard.left(members.infos).items():
            with guard.on(name):
                yield name, _result(name, info, group, sparsity[name], prediction[name])


def _note(saes: dict[str, SAEInfo], keys: dict[str, str], lm: LanguageModel, params: Params) -> None:
    """For estimates: where each SAE's results lie."""
    notes, batches = Evaluated("core", lm, params), range(params.core_eval.n_eval_reconstruction_batches)
    for name, sae in saes.items():
        notes.note(sae, "core", [f"core_sparsity/{keys[name]}", *(f"core_predictions/{keys[name]}-{n}" for n in batches)])


def _text(lm: LanguageModel, params: Params, tokens: Tensor | None) -> _Text:
    """The contexts of both parts, and what varies together in them."""
    config = params.core_eval
    first = config.batch_size_prompts * config.n_eval_reconstruction_batches
    last = first + config.batch_size_prompts * config.n_eval_sparsity_variance_batches
    if tokens is not None:
        tokens = tokens[:last]
        return _Text(tokens, clusters_by_context(tokens, 0, first), clusters_by_context(tokens, first, len(tokens)))
    contexts = reorder_evenly(
        token_contexts(lm.tokenizer, lm.separator_id, params.text, "core_eval", last * params.text.context_size), first
    )
    return _Text(contexts.tokens, clusters_of(contexts, 0, first), clusters_of(contexts, first, last), contexts.counted)


def _inputs(params: Params, text: _Text, lab: bool) -> list[Any]:
    return [
        params.core_eval.model_dump(),
        params.token_mask.model_dump(),
        fingerprint(text.tokens.tolist()),
        text.predictions.about,
        text.sparsity.about,
        lab,
        *([] if text.counted is None else [fingerprint(text.counted.tolist())]),
    ]


# --- sparsity and variance -------------------------------------------------------------------


def _sparsity(group: _Group, scores: Scores) -> dict[str, Any]:
    """Both definitions' statistics of reconstruction and sparsity for every SAE, family by family."""
    batches = group.params.core_eval.n_eval_sparsity_variance_batches
    with scores.progress("sparsity and variance", "SAE·batch", batches) as bar:

        def score(family: Family) -> Iterator[tuple[str, dict[str, Any]]]:
            for name, done in _sparsity_of(family, group, bar).items():
                with scores.guard.on(name):
                    check_finite(done)
                    yield name, done

        scores.fill(score, bar, step=0)
    return scores.left()


class _SparsityState:
    """Running statistics of one SAE."""

    def __init__(self, sae: SparseAutoencoder, clusters: Clusters, device: torch.device) -> None:
        self.sae_bench = SaeBenchStats(sae.cfg.d_sae, device)
        self.lab = ReconstructionStats(sae.cfg.d_out, sae.cfg.d_sae, device)
        self.by_cluster = ReconstructionSums(clusters, len(sae.cfg.hook_names) if sae.cfg.is_crosscoder else 1)
        self.support = self.interpolating = self.kept = self.total = self.sequences = 0


@torch.no_grad()
def _sparsity_of(saes: dict[str, SparseAutoencoder], group: _Group, bar: tqdm) -> dict[str, dict[str, Any]]:
    config = group.params.core_eval
    states = {name: _SparsityState(sae, group.text.sparsity, group.lm.device) for name, sae in saes.items()}
    for index in group.numbers(config.n_eval_reconstruction_batches, config.n_eval_sparsity_variance_batches):
        batch = group.shown(index)
        x, mask = batch.acts, batch.lab_mask
        for name, z_all, z_lab in _encodings(saes, x, mask if group.lab else None):
            state, sae = states[name], saes[name]
            target, x_hat = normalised(sae.target(x, batch.written), sae.cfg), sae.reconstruct(x, z=z_all)
            state.sae_bench.update(target, normalised(x_hat, sae.cfg), z_all, batch.sae_bench_mask)
            if z_lab is not None:
                x_hat, mean = normalised(_lab_reconstruction(sae, batch, x_hat, z_lab), sae.cfg), group.mean_activation
                state.lab.update(target, x_hat, z_lab, mask)
                mean = normalised(sae.target(mean, mean), sae.cfg)
                state.by_cluster.update(batch.index, target, x_hat, z_lab, mask, mean)
                _count_support(state, sae, z_lab, mask)
            bar.update()
    return {name: _sparsity_result(state, saes[name]) for name, state in states.items()}


def _encodings(
    saes: dict[str, SparseAutoencoder], x: Tensor, mask: Tensor | None
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """(name, activations with every token counted, activations under the mask, or None without one).

    Token by token the second follows from the first; an encoder that sees the sequence must run twice.
    """
    masked = encode_each({n: s for n, s in saes.items() if not s.per_token}, x, mask)
    for name, z in encode_each(saes, x, None):
        sae = saes[name]
        if mask is None:
            yield name, z, None
        elif sae.per_token:
            yield name, z, sae.keep(z, mask)
        else:
            masked_name, z_masked = next(masked)
            if masked_name != name:
                raise RuntimeError(f"families came in another order: {masked_name} for {name}")
            yield name, z, z_masked


def _lab_reconstruction(sae: SparseAutoencoder, batch: PairedBatch, x_hat: Tensor, z_lab: Tensor) -> Tensor:
    """For our definition, read where tokens count alone: encoded token by token it is there `x_hat` of all tokens."""
    return x_hat if sae.per_token else sae.reconstruct(batch.acts, batch.lab_mask, z_lab)


def _count_support(state: _SparsityState, sae: SparseAutoencoder, z: Tensor, mask: Tensor) -> None:
    """How many latents a sequence uses at all, and whether least squares on them can reproduce anything."""
    support_B = (z != 0).any(dim=1).sum(dim=-1)
    kept_B = mask.sum(dim=1)
    limit_B = kept_B.clamp(max=sae.cfg.d_out)
    state.support += int(support_B.sum())
    if sae.per_token:  # as many latents as dimensions solve each token by themselves
        state.interpolating += int(((torch.linalg.vector_norm(z, 0, dim=-1) >= sae.cfg.d_out) & mask).sum())
    else:
        state.interpolating += int(((support_B >= limit_B) & (kept_B > 0)).sum())
    state.kept += int(kept_B.sum())
    state.total += mask.numel()
    state.sequences += len(mask)


def _sparsity_result(state: _SparsityState, sae: SparseAutoencoder) -> dict[str, Any]:
    latent, sequences = latent_weights(sae), max(state.sequences, 1)
    bench_density, density = state.sae_bench.density(), state.lab.density
    return {
        "sae_bench": minus_one_for_nan({**state.sae_bench.metrics(), "misc_metrics": misc_metrics(bench_density, latent)}),
        "details": feature_details(bench_density, state.sae_bench.consistent_activation(), latent),
        "lab": {
            **state.lab.metrics(),
            **about_mean(state.by_cluster.as_lists()),
            **_explained_by_hook(state, sae),
            "support": state.support / sequences,
            "fraction_tokens_kept": state.kept / max(state.total, 1),
        },
        "clusters": state.by_cluster.as_lists(),
        "interpolating_fraction": state.interpolating / (max(state.kept, 1) if sae.per_token else sequences),
        "density_histogram": density_histogram(density),
    }


def _explained_by_hook(state: _SparsityState, sae: SparseAutoencoder) -> dict[str, float]:
    hooks = sae.cfg.hook_names if sae.cfg.is_crosscoder else ()
    explained = zip(hooks, state.lab.variance_explained_by_part(len(hooks)) if hooks else (), strict=True)
    return {at_hook("variance_explained", hook): value for hook, value in explained if math.isfinite(value)}


# --- predictions -----------------------------------------------------------------------------


def _predictions(group: _Group, members: Group, keys: dict[str, str], guard: Guard) -> dict[str, Sums]:
    """Sums of cross-entropy and KL over all batches of predictions, for every SAE."""
    batches = group.numbers(0, group.params.core_eval.n_eval_reconstruction_batches)
    by_batch = {name: {number: f"{key}-{number}" for number in range(len(batches))} for name, key in keys.items()}
    scores, shared = Scores("core_predictions", members, by_batch, guard), _SharedPredictions(group, batches)

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

    group: _Group
    batch: PairedBatch
    clean: CleanPredictions
    sums: Sums
    """Clean, zero-ablated and mean-ablated, in both definitions."""

    def run(self, put: Tensor, mask: Tensor | None = None, hook: str = "") -> tuple[Tensor, Tensor]:
        """Predictions with `put` [batch, seq, d_out] in place of what the model has at the written hook, where `mask`
        [batch, seq] holds; everywhere without one. hook: of a crosscoder's that one alone."""
        return self.clean.compare(_resumed(self.group, self.batch, put, mask, hook))


def _resumed(group: _Group, batch: PairedBatch, put: Tensor, mask: Tensor | None = None, hook: str = "") -> Tensor:
    if len(group.hooks) > 1:
        sides = put.expand_as(batch.written).chunk(len(group.hooks), dim=-1)
        chosen = {name: side for name, side in zip(group.hooks, sides, strict=True) if hook in ("", name)}
        return replaced_logits(group.lm, batch.tokens, chosen, mask)
    written = put if mask is None else torch.where(mask[..., None], put, batch.written)
    return group.lm.resume(group.hook_out, written, batch.tokens, rest=batch.rest)


class _SharedPredictions:
    """Those of the batch that was asked for last."""

    def __init__(self, group: _Group, batches: Sequence[list[int]]) -> None:
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
            for hook in group.hooks if len(group.hooks) > 1 else ():
                runs = {"zero": made.run(zero, lab_mask, hook), "mean": made.run(mean, lab_mask, hook)}
                made.sums.update(_sums(group, batch, _at(hook, lab_mask), clean=(clean.ce, None), **runs))
        return made

    def _zeroed(self, batch: PairedBatch, made: _Predictions) -> tuple[Tensor, Tensor]:
        """Predictions with every activation zeroed. Resumed at a residual hook the model sees no tokens any more, so that
        one sequence [1, seq, vocab] stands for all of all batches; elsewhere each batch needs its own."""
        group = self._group
        if not (group.lm.can_resume and "hook_resid" in group.hook_out and len(group.hooks) == 1):
            return made.run(torch.zeros_like(batch.written))
        if self._zero_logits is None:
            self._zero_logits = group.lm.resume(group.hook_out, torch.zeros_like(batch.written[:1]), batch.tokens[:1])
        return made.clean.compare(self._zero_logits)


@torch.no_grad()
def _patched(shared: _Predictions, family: Family) -> Iterator[tuple[str, Sums]]:
    """(name, sums) over one batch with each SAE's reconstruction in place of the activations, in both definitions."""
    group, batch, own = shared.group, shared.batch, shared.batch.written
    mask = batch.lab_mask
    for name, z_all, z_lab in _encodings(family, batch.acts, mask if group.lab else None):
        sae = family[name]
        x_hat = sae.reconstruct(batch.acts, z=z_all)
        sums = shared.sums | _sums(group, batch, {"sae_bench": batch.sae_bench_mask}, patched=shared.run(x_hat))
        if z_lab is not None:
            x_hat = _lab_reconstruction(sae, batch, x_hat, z_lab).to(own.dtype)
            sums |= _sums(group, batch, {"lab": mask, "cluster": mask}, patched=shared.run(x_hat, mask))
            for hook in group.hooks if len(group.hooks) > 1 else ():
                sums |= _sums(group, batch, _at(hook, mask), patched=shared.run(x_hat, mask, hook))
        check_finite(sums)
        yield name, sums


def _at(hook: str, mask: Tensor) -> dict[str, Tensor]:
    return {at_hook(name, hook): mask for name in ("lab", "cluster")}


def _sums(group: _Group, batch: PairedBatch, masks: dict[str, Tensor], **runs: tuple[Tensor, Tensor | None]) -> Sums:
    """`prediction_sums` under each definition's mask, and by cluster of contexts under `cluster`, at a hook too."""

    def by_cluster(values: Tensor, mask: Tensor) -> list[float]:
        return group.text.predictions.sums(batch.index, mask, values).tolist()

    return {
        f"{name}/{key}": value
        for name, mask in masks.items()
        for key, value in prediction_sums(mask, runs, by_cluster if name.startswith("cluster") else total).items()
    }


# --- results ---------------------------------------------------------------------------------


def _lab_losses(hooks: Sequence[str], sums: Sums) -> dict[str, float]:
    """What the model loses, and at each of a crosscoder's hooks, with that one alone replaced."""
    lost = losses(sums_of(sums, "lab"))
    for hook in hooks:
        lost |= {at_hook(key, hook): value for key, value in losses(sums_of(sums, at_hook("lab", hook))).items()}
    return lost


def _result(name: str, info: SAEInfo, group: _Group, sparsity: dict[str, Any], sums: Sums) -> dict[str, Any]:
    params, config = group.params, group.params.core_eval
    tokens = config.batch_size_prompts * group.text.tokens.shape[1]
    metrics = {
        **sparsity["sae_bench"],
        **sae_bench_predictions(sums),
        "token_stats": {
            "total_tokens_eval_reconstruction": tokens * config.n_eval_reconstruction_batches,
            "total_tokens_eval_sparsity_variance": tokens * config.n_eval_sparsity_variance_batches,
        },
    }
    hooks = info.cfg.hook_names if info.cfg.is_crosscoder else ()
    figures = {**sparsity["lab"], **_lab_losses(hooks, sums)} if group.lab else {}
    lab = {key: value for key, value in figures.items() if math.isfinite(value)}
    unstructured = {
        harness.LAB: {
            "metrics": lab,
            "interpolating": sparsity["interpolating_fraction"] >= 0.5,
            "interpolating_fraction": sparsity["interpolating_fraction"],
            "density_histogram": sparsity["density_histogram"],
            **(
                evidence(
                    sparsity["clusters"],
                    sums,
                    group.text.sparsity.about,
                    group.text.predictions.about,
                    params.random_seed,
                    hooks,
                )
                if group.lab
                else {}
            ),
        }
    }
    bench_config = {
        "model_name": group.lm.name,
        "llm_dtype": params.model.torch_dtype,
        "batch_size_prompts": config.batch_size_prompts,
        "dataset": params.text.dataset,
        "n_eval_reconstruction_batches": config.n_eval_reconstruction_batches,
        "n_eval_sparsity_variance_batches": config.n_eval_sparsity_variance_batches,
        "context_size": group.text.tokens.shape[1],
        "compute_kl": True,
        "compute_ce_loss": True,
        "compute_l2_norms": True,
        "compute_sparsity_metrics": True,
        "compute_variance_metrics": True,
        "compute_featurewise_density_statistics": True,
        "compute_featurewise_weight_based_metrics": True,
    }
    return harness.output(
        "core",
        name,
        info,
        config=bench_config,
        metrics=minus_one_for_nan(metrics),
        details=sparsity["details"],
        unstructured=unstructured,
        sae_bench="core:CoreEvalOutput",
    )
