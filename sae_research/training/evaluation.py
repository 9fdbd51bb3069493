"""What is measured of SAEs once they are trained, on documents they were not trained on.

`evaluate` fills the run's report and `eval_results.json` of each SAE: reconstruction and sparsity, what the language model
loses with the reconstruction in place, and what the training curves show (`diagnose`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_research.config.params import Params, Text
from sae_research.config.recipes import ARROW, hooks_at
from sae_research.lm import LanguageModel, collect_hooks
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import round_significant
from sae_research.runtime.formatting import ABSENT, number, text_table
from sae_research.saes import SparseAutoencoder, encode_each
from sae_research.saes.crosscoders import normalised
from sae_research.saes.files import sae_lens_lacks
from sae_research.stats.predictions import CleanPredictions, losses, prediction_sums
from sae_research.stats.reconstruction import ReconstructionStats, density_histogram
from sae_research.text.tokens import Contexts, token_contexts
from sae_research.training import crosscoders, diagnose
from sae_research.training.buffer import counted_at, pca_variance_explained, side_by_side
from sae_research.training.diagnose import CurvePoint, Finding, TrainingSummary
from sae_research.training.stream import ActivationStream
from sae_research.training.training_sae import TrainingSAE

HELD_OUT_SPLIT = "core_eval"
REPORTED = (
    "tokens",
    "l0",
    "variance_explained",
    "variance_explained_per_dim",
    "cosine_similarity",
    "fraction_alive",
)
"""Which of the statistics the training report shows."""
BATCH = 1024
PCA_COMPONENTS = (16, 32, 64, 128)


class HeldOut(NamedTuple):
    """Held-out contexts and their activations at some hooks, in the model's units and precision."""

    tokens: Tensor
    """[contexts, context_size]"""
    acts: dict[str, Tensor]
    """By hook [contexts, context_size, d_in], on the CPU; may be memory-mapped. Of several (`Train.place_of`),
    what a transcoder reads and writes or what a crosscoder reads, side by side [contexts, context_size, n d_hook]."""
    mask: dict[str, Tensor]
    """By hook, or both of a transcoder, True where a token counts [contexts, context_size]."""

    def rows(self, hook: str) -> Tensor:
        """Activations of the tokens that count [n, d_in], float32."""
        return self.acts[hook][self.mask[hook]].float()


def read_held_out(lm: LanguageModel, params: Params, contexts: Contexts, medians: dict[str, list[float]]) -> HeldOut:
    """The held-out contexts at each place of `medians`, the median norms of training there, hook by hook.

    Raises `UserError` when no token of them counts.
    """
    tokens, counted = contexts.tokens, contexts.counted
    hooks = list(dict.fromkeys(hook for place in medians for hook in hooks_at(place)))
    pools = collect_hooks(lm, hooks, tokens, params.model.llm_batch_size, params.activation_caching)
    acts, mask = {}, {}
    for place, norms in medians.items():
        sides = [pools[hook].flat.view(*tokens.shape, -1) for hook in hooks_at(place)]
        mask[place] = counted_at(lm, tokens, sides, params.token_mask, norms, counted)
        acts[place] = side_by_side(sides)
    if not all(part.any() for part in mask.values()):
        raise UserError("train.held_out_tokens: no held-out token counts; raise it")
    return HeldOut(tokens, acts, mask)


@torch.no_grad()
def held_out_stats(saes: dict[str, SparseAutoencoder], rows_ND: Tensor) -> dict[str, ReconstructionStats]:
    """Statistics of every SAE on rows in the model's units; of crosscoders in units in which all hooks count alike."""
    place = next(iter(saes.values())).cfg.hooks
    stats = {name: ReconstructionStats(sae.cfg.d_out, sae.cfg.d_sae, rows_ND.device) for name, sae in saes.items()}
    for x_BD in rows_ND.split(BATCH):
        x, written = _sides(place, x_BD[None])
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        for name, z in encode_each(saes, x, mask):
            x_hat, cfg = saes[name].reconstruct(x, mask, z), saes[name].cfg
            stats[name].update(normalised(written, cfg), normalised(x_hat, cfg), z, mask)
    return stats


def _sides(place: str, acts: Tensor) -> tuple[Tensor, Tensor]:
    """What is read, and what is written, of a place's activations as `HeldOut` has them; a crosscoder's are one."""
    if ARROW not in place:
        return acts, acts
    read, written = acts.chunk(2, dim=-1)
    return read, written


EVAL_FILE = "eval_results.json"
LOGITS = 2**28
"""Logits held at a time, clean ones and as many patched: a gigabyte of float32 each."""
Report = dict[str, Any]
Results = dict[str, dict[str, Any]]


def evaluate(
    report: Report,
    in_training: Sequence[TrainingSAE],
    saes: dict[str, SparseAutoencoder],
    stream: ActivationStream,
    held_out_contexts: Contexts,
    lm: LanguageModel,
    params: Params,
) -> Results:
    """Add every SAE's held-out metrics to the report, PCA's at every hook, and what they show; returns what
    `eval_results.json` of each SAE holds."""
    held_out = read_held_out(
        lm, params, held_out_contexts, {hook: b.calibration.median_norms for hook, b in stream.buffers.items()}
    )
    stats: dict[str, ReconstructionStats] = {}
    for hook, buffer in stream.buffers.items():
        rows_ND = held_out.rows(hook).to(buffer.device)
        here = [sae for sae in in_training if sae.hook == hook]
        stats |= held_out_stats({sae.name: saes[sae.name].to(buffer.device) for sae in here}, rows_ND)
        for sae in here:
            config = params.train.saes[sae.name]
            report["saes"][sae.name] = {
                "recipe": config.recipe,
                "hook_name": hook,
                "tokens": sae.tokens,
                "hyper_parameters": params.train.hyper_parameters(sae.name),
                "fraction_silent_at_end": sae.fraction_silent,
                "held_out": {key: value for key, value in stats[sae.name].metrics().items() if key in REPORTED},
            }
            if len((trained := saes[sae.name]).cfg.hooks_out) > 1:
                report["saes"][sae.name]["by_hook"] = crosscoders.hooks_of(trained, stats[sae.name])
        explained = pca_variance_explained(buffer.pca, buffer.written(rows_ND), PCA_COMPONENTS) if buffer.pca.n else {}
        report["hooks"][hook] = {
            "fraction_tokens_kept": buffer.fraction_kept,
            "pca_reference": {str(n): value for n, value in explained.items()},
        }
    return after_training(report, stats, saes, in_training, held_out, lm, params)


def after_training(
    report: Report,
    stats: Mapping[str, ReconstructionStats],
    saes: Mapping[str, SparseAutoencoder],
    in_training: Sequence[TrainingSAE],
    held_out: HeldOut,
    lm: LanguageModel,
    params: Params,
) -> Results:
    """`eval_results.json` of every SAE; adds `diagnose` to the report and prints what it found.

    report: as the run wrote it, with every SAE's entry and PCA's at every hook.
    """
    predictions = loss_recovered(saes, held_out, lm, params)
    results = {
        name: _result(report["saes"][name], stats[name], sae, predictions.get(name, {})) for name, sae in saes.items()
    }
    found = {sae.name: diagnose.diagnose(sae.name, _summary(sae, report, stats[sae.name], params)) for sae in in_training}
    ce = next((figures["ce_clean"] for figures in predictions.values()), None)
    if ce is not None:
        elsewhere = _ce_elsewhere(lm, params) if diagnose.needs_comparison(ce, lm.vocab_size) else None
        found[""] = diagnose.diagnose_text(ce, elsewhere, lm.vocab_size, params.text.dataset)
    report["diagnose"] = {
        "saes": {name: [diagnose.as_json(finding) for finding in found[name]] for name in saes},
        "text": [diagnose.as_json(finding) for finding in found.get("", [])],
    }
    _print(found, saes)
    return results


def finding_lines(report: Report) -> dict[str, list[str]]:
    """What was found of each SAE, in words."""
    return {
        name: [f"{finding['what']}: {finding['says']}; {finding['change']}" for finding in findings]
        for name, findings in report.get("diagnose", {}).get("saes", {}).items()
    }


# --- predictions -------------------------------------------------------------------------------


@torch.no_grad()
def loss_recovered(
    saes: Mapping[str, SparseAutoencoder], held_out: HeldOut, lm: LanguageModel, params: Params
) -> dict[str, dict[str, Any]]:
    """What the language model loses with each SAE's reconstruction in place of the tokens that count.

    On `train.evaluate_tokens` held-out tokens in whole contexts, spread evenly over the split. Per predicted token, in
    nats, as core evaluation's own definition (lab_v1): `ce_clean`, `ce_zero_ablated`, `ce_patched`, `ce_delta`, `kl`;
    `loss_recovered` is `(ce_zero - ce_patched) / (ce_zero - ce_clean)`, left out where that is 0/0. One clean pass
    serves all SAEs, one ablated pass all SAEs of a hook. Empty when `train.evaluate_tokens` is 0.

    Of what writes several hooks these are with all replaced; `by_hook` has them with one replaced alone.
    """
    n = min(len(held_out.tokens), -(-params.train.evaluate_tokens // held_out.tokens.shape[1]))
    if n == 0:
        return {}
    index = torch.linspace(0, len(held_out.tokens) - 1, n).round().long()
    sums: dict[str, dict[str, dict[str, float]]] = {name: {"": {}} for name in saes}
    of_place = {place: {name: sae for name, sae in saes.items() if sae.cfg.hooks == place} for place in held_out.acts}
    deepest = max(held_out.acts, key=_layer)  # the fewest layers are left to run from there
    for chosen in index.split(_contexts_at_once(lm, held_out.tokens.shape[1], params)):
        tokens = held_out.tokens[chosen].to(lm.device)
        acts = held_out.acts[deepest][chosen].chunk(len(hooks_at(deepest)), dim=-1)[-1].to(lm.device)
        clean = CleanPredictions(lm.resume(hooks_at(deepest)[-1], acts, tokens), tokens)
        for hook in held_out.acts:
            for name, replaced, own in _sums_at(hook, of_place[hook], held_out, chosen, clean, lm):
                before = sums[name].get(replaced, {})
                sums[name][replaced] = {key: before.get(key, 0.0) + value for key, value in own.items()}
    return {name: _losses(own) for name, own in sums.items() if own[""].get("ce_tokens")}


def _losses(sums: Mapping[str, dict[str, float]]) -> dict[str, Any]:
    """The metrics from sums over all contexts, by which hook alone is replaced, "" for all that it writes."""
    found = {
        replaced: {key: value for key, value in losses(own).items() if not math.isnan(value)}
        for replaced, own in sums.items()
    }
    whole = found.pop("") | {"prediction_tokens": sums[""]["ce_tokens"]}
    return whole | ({"by_hook": found} if found else {})


def _sums_at(
    place: str,
    saes: Mapping[str, SparseAutoencoder],
    held_out: HeldOut,
    chosen: Tensor,
    clean: CleanPredictions,
    lm: LanguageModel,
) -> Iterator[tuple[str, str, dict[str, float]]]:
    """(name, "", sums of `prediction_sums`) of the contexts `chosen`, for SAEs of one place; of several hooks also
    (name, hook, sums) with that one alone replaced."""
    tokens = held_out.tokens[chosen].to(lm.device)
    mask = held_out.mask[place][chosen].to(lm.device)
    acts, written = _sides(place, held_out.acts[place][chosen].to(lm.device).float())

    def run(put: Tensor | float) -> tuple[Tensor, Tensor]:
        return clean.compare(lm.resume(place.split(ARROW)[-1], torch.where(mask[..., None], put, written), tokens))

    first = next(iter(saes.values()))
    x, counted = acts.to(first.W_dec.device), mask.to(first.W_dec.device)
    if len(first.cfg.hooks_out) > 1:
        zero = crosscoders.zeroed(written, first, mask, tokens, clean, lm)
        for name, z in encode_each(saes, x, counted):
            x_hat = saes[name].reconstruct(x, counted, z).to(lm.device, acts.dtype)
            for replaced, sums in crosscoders.replaced_sums(saes[name], x_hat, mask, tokens, clean, lm, zero):
                yield name, replaced, sums
        return
    shared = {"clean": (clean.ce, None), "zero": run(0.0)}
    for name, z in encode_each(saes, x, counted):
        x_hat = saes[name].reconstruct(x, counted, z).to(lm.device, acts.dtype)
        yield name, "", prediction_sums(mask, {**shared, "patched": run(x_hat)})


def _contexts_at_once(lm: LanguageModel, context_size: int, params: Params) -> int:
    """Contexts whose logits fit into `LOGITS`."""
    return max(1, min(params.model.llm_batch_size, LOGITS // (context_size * lm.vocab_size)))


def _layer(place: str) -> int:
    return next(int(part) for part in hooks_at(place)[-1].split(".") if part.isdigit())


def _ce_elsewhere(lm: LanguageModel, params: Params) -> float | None:
    """The model's cross-entropy on the packaged text, on as many tokens; None where that is the text anyway."""
    if params.text.dataset == "packaged":
        return None
    text = Text(dataset="packaged", context_size=params.text.context_size)
    try:
        contexts = token_contexts(lm.tokenizer, lm.separator_id, text, HELD_OUT_SPLIT, params.train.evaluate_tokens)
    except UserError as error:
        print(f"no comparison with the packaged text: {error}", flush=True)
        return None
    total = count = 0.0
    for tokens in contexts.tokens.split(_contexts_at_once(lm, params.text.context_size, params)):
        tokens = tokens.to(lm.device)
        ce = CleanPredictions(lm.logits(tokens), tokens).ce[:, 1:]  # what follows the separator alone counts nowhere
        total, count = total + float(ce.cpu().double().sum()), count + ce.numel()
    return total / count


# --- results -----------------------------------------------------------------------------------


def _result(
    entry: dict[str, Any], stats: ReconstructionStats, sae: SparseAutoencoder, predictions: Mapping[str, Any]
) -> dict[str, Any]:
    provenance = sae.cfg.provenance
    figures = dict(predictions)
    if len(sae.cfg.hooks_out) > 1:
        lost = figures.pop("by_hook", {})
        figures["by_hook"] = {hook: of_hook | lost.get(hook, {}) for hook, of_hook in entry["by_hook"].items()}
    return round_significant(
        {
            "recipe": entry["recipe"],
            "form": sae.cfg.form,
            "architecture": sae.cfg.architecture,
            "model_name": sae.cfg.model_name,
            "hook_name": sae.cfg.hook_name,
            **({"decoder_norm_ratios": crosscoders.ratios_by_hook(sae)} if sae.cfg.is_crosscoder else {}),
            **({"hook_out": sae.cfg.hook_out} if sae.cfg.is_transcoder else {}),
            "d_in": sae.cfg.d_in,
            "d_sae": sae.cfg.d_sae,
            "training_tokens": entry["tokens"],
            "seed": provenance.get("seed"),
            "text": provenance.get("text"),
            "split": HELD_OUT_SPLIT,
            **stats.metrics(),
            **figures,
            "density_histogram": density_histogram(stats.density),
            "hyper_parameters": entry["hyper_parameters"],
        }
    )


def _summary(sae: TrainingSAE, report: Report, stats: ReconstructionStats, params: Params) -> TrainingSummary:
    entry = report["saes"][sae.name]
    density_F = stats.density
    total = float(density_F.sum())
    dense = float(density_F[density_F > diagnose.DENSE_FROM].sum())
    end = sae.curve[-1].tokens if sae.curve else 1
    return TrainingSummary(
        config=params.train.saes[sae.name],
        curve=[CurvePoint(row.tokens / end, row.loss, row.variance_explained) for row in sae.curve],
        d_in=stats.sum_D.shape[0],
        l0=entry["held_out"]["l0"],
        variance_explained=entry["held_out"].get("variance_explained", 0.0),
        fraction_silent=fraction_silent(sae),
        dense_share=dense / total if total else 0.0,
        pca={int(n): value for n, value in report["hooks"][sae.hook]["pca_reference"].items()},
        decay_fraction=0.0 if params.train.saes[sae.name].schedule == "constant" else params.train.decay_fraction,
        sparsity_warmup_fraction=params.train.sparsity_warmup_fraction,
    )


def fraction_silent(sae: TrainingSAE) -> float:
    """Fraction of latents that did not fire in the last `diagnose.DEAD_TOKENS` tokens, or the last half of the run."""
    window = min(diagnose.DEAD_TOKENS / max(sae.tokens, 1), 0.5)
    last_F = sae.recipe.last_fired_F
    return float((last_F < last_F.max() - window).float().mean())


def held_out_table(report: Report) -> str:
    """The held-out metrics as a plain table, by hook, PCA below each."""
    parts = [f"\nheld-out text, {report['model_name']}, {report['tokens']:,} training tokens"]
    keys = ("l0", "variance_explained", "fraction_alive")
    for hook, at_hook in report["hooks"].items():
        saes = {name: entry["held_out"] for name, entry in report["saes"].items() if entry["hook_name"] == hook}
        rows = [[name, *(number(figures[key]) for key in keys)] for name, figures in saes.items()]
        pca = at_hook["pca_reference"].items()
        rows += [[f"PCA, {n} components", n, number(value), ABSENT] for n, value in pca]
        parts.append(text_table([(hook, "L0", "variance explained", "alive"), *rows]))
    if by_hook := crosscoders.table(report):
        parts.append(by_hook)
    return "\n".join(parts)


def _print(found: Mapping[str, list[Finding]], saes: Mapping[str, SparseAutoencoder]) -> None:
    """What was found, and which SAEs SAELens cannot read, one line each."""
    named = {name or "text": findings for name, findings in found.items()}
    lines = diagnose.lines(named)
    for name, sae in saes.items():
        if lacks := sae_lens_lacks(sae):
            lines.append(f"{name}: {lacks}")
    if lines:
        print("\nwhat the curves and held-out metrics say (docs/training.md):")
        print("\n".join(f"  {line}" for line in lines), flush=True)
