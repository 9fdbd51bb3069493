"""Core evaluation: reconstruction, sparsity, and what the model loses when the reconstruction stands in.

Two definitions from the same activations. SAE Bench 0.6.0's patches every token, sinks included, and counts every
token that is not BOS, EOS or padding. Ours (`lab_v1`) neither counts nor patches tokens outside `token_mask`.

All is about what a dictionary writes: a transcoder's reconstruction is compared with the activations at its `hook_out`, put
in their place there, and measured against zeros and the mean activation in that place. For an SAE that is the hook it reads.
A crosscoder's hooks are all replaced at once; `kl@blocks.3.hook_resid_post` and the like are of one hook, with that one
alone replaced. Its activations are compared in units in which all hooks count alike (`saes.crosscoders`), and a token
that does not count stays as the run has it.
A cross-layer transcoder's MLP outputs are all replaced in one run, in which each layer's encoder reads what that run gives
it: the replacement model of circuit tracing. Its values at one hook are of that layer's output replaced alone, by what the
clean run's latents make of it.

Work is shared: activations are read from the pool; clean and ablated predictions are made once for all SAEs that are open
together; the patched passes resume at the hook. Finished pieces are kept in the result cache, one per SAE and batch of
predictions, so that an interrupted run or an added SAE pays only for what is missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from sae_research.config.params import Params
from sae_research.evals import harness
from sae_research.evals.core.group import CoreGroup, CoreText, Sums, core_text, encodings, lab_reconstruction
from sae_research.evals.core.metrics import (
    about_mean,
    at_hook,
    evidence,
    minus_one_for_nan,
    sae_bench_predictions,
    sums_of,
)
from sae_research.evals.core.predictions import predictions_of
from sae_research.evals.harness import Scores, by_hooks
from sae_research.lm import LanguageModel
from sae_research.runtime.files import fingerprint
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SparseAutoencoder
from sae_research.saes.base import Family, Guard, SAEInfo, check_finite
from sae_research.saes.crosscoders import normalised
from sae_research.setup.evaluated import Evaluated
from sae_research.stats.predictions import (
    losses,
)
from sae_research.stats.reconstruction import (
    Clusters,
    ReconstructionStats,
    ReconstructionSums,
    density_histogram,
)
from sae_research.stats.sae_bench import SaeBenchStats, feature_details, latent_weights, misc_metrics


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
    text = core_text(lm, params, tokens)
    for members in by_hooks(saes):
        group = CoreGroup(lm, members, text, params, lab)
        keys = members.keys(lm, _inputs(params, text, lab), __name__)
        sparsity = _sparsity(group, Scores("core_sparsity", members, keys, guard))
        prediction = predictions_of(group, members, keys, guard)
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


def _inputs(params: Params, text: CoreText, lab: bool) -> list[Any]:
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


def _sparsity(group: CoreGroup, scores: Scores) -> dict[str, Any]:
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
        self.by_cluster = ReconstructionSums(clusters, len(sae.cfg.hooks_out))
        self.support = self.interpolating = self.kept = self.total = self.sequences = 0


@torch.no_grad()
def _sparsity_of(saes: dict[str, SparseAutoencoder], group: CoreGroup, bar: tqdm) -> dict[str, dict[str, Any]]:
    config = group.params.core_eval
    states = {name: _SparsityState(sae, group.text.sparsity, group.lm.device) for name, sae in saes.items()}
    for index in group.numbers(config.n_eval_reconstruction_batches, config.n_eval_sparsity_variance_batches):
        batch = group.shown(index)
        x, mask = batch.acts, batch.lab_mask
        for name, z_all, z_lab in encodings(saes, x, mask if group.lab else None):
            state, sae = states[name], saes[name]
            target, x_hat = normalised(sae.target(x, batch.written), sae.cfg), sae.reconstruct(x, z=z_all)
            state.sae_bench.update(target, normalised(x_hat, sae.cfg), z_all, batch.sae_bench_mask)
            if z_lab is not None:
                x_hat, mean = normalised(lab_reconstruction(sae, batch, x_hat, z_lab), sae.cfg), group.mean_activation
                state.lab.update(target, x_hat, z_lab, mask)
                mean = normalised(sae.target(mean, mean), sae.cfg)
                state.by_cluster.update(batch.index, target, x_hat, z_lab, mask, mean)
                _count_support(state, sae, z_lab, mask)
            bar.update()
    return {name: _sparsity_result(state, saes[name]) for name, state in states.items()}


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
    hooks = sae.cfg.hooks_out if len(sae.cfg.hooks_out) > 1 else ()
    explained = zip(hooks, state.lab.variance_explained_by_part(len(hooks)) if hooks else (), strict=True)
    return {at_hook("variance_explained", hook): value for hook, value in explained if math.isfinite(value)}


# --- results ---------------------------------------------------------------------------------


def _lab_losses(hooks: Sequence[str], sums: Sums) -> dict[str, float]:
    """What the model loses, and at each of a crosscoder's hooks, with that one alone replaced."""
    lost = losses(sums_of(sums, "lab"))
    for hook in hooks:
        lost |= {at_hook(key, hook): value for key, value in losses(sums_of(sums, at_hook("lab", hook))).items()}
    return lost


def _result(name: str, info: SAEInfo, group: CoreGroup, sparsity: dict[str, Any], sums: Sums) -> dict[str, Any]:
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
    hooks = info.cfg.hooks_out if len(info.cfg.hooks_out) > 1 else ()
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
