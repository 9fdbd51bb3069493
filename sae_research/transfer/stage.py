"""The stage `transfer_eval`: writes `eval_results/transfer/`, one result for the pair and one for every control.

Every part of a result (statistics, patched losses, how far the model moved, repair, crosscoder, separate SAEs) is kept in
the result cache when it is done: a run that was stopped, or that changes one part's settings, computes only what is missing.
SAEs that the stage trains are kept beside them, and go into its folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sae_research.config.params import Params
from sae_research.lm import LanguageModel
from sae_research.runtime.cache import ResultCache, cache_dir, new_entry, prune, usable
from sae_research.runtime.files import fingerprint, round_significant, write_text
from sae_research.runtime.formatting import tsv_text
from sae_research.runtime.stages import StageFolder, stage_folder
from sae_research.saes import SparseAutoencoder, load_sae, save_sae
from sae_research.saes.base import Guard
from sae_research.saes.registry import code_fingerprint
from sae_research.stats.reconstruction import ReconstructionStats, together
from sae_research.text.corpus import text_fingerprint
from sae_research.transfer.causal import crosscoder_report
from sae_research.transfer.crosscoder import trained
from sae_research.transfer.finetune import outputs_moved, perturbed_model, weights_moved
from sae_research.transfer.loading import DIGITS, MODELS, Models, Pair, hooks, load
from sae_research.transfer.losses import logit_similarity, patched_losses
from sae_research.transfer.repair import cannot_be_trained, further_trained, repair
from sae_research.transfer.separate import separate_report
from sae_research.transfer.statistics import ACTIVATION_EDGES, Similarity, known_values
from sae_research.transfer.sweep import PROMPT_EDGES, FirstPass, HookStats, SaeStats, Statistics, sweep
from sae_research.transfer.table import as_tsv, by_interval, by_sample, density_shift, latent_table, wilson
from sae_research.transfer.text import SPLIT, TextSource, batches


def similarity(statistics: Statistics) -> dict[str, Any]:
    """By hook: metrics without and with outliers, how many were removed, and what pictures are drawn from."""
    return {hook: _similarity(stats) for hook, stats in statistics.hooks.items()}


def _similarity(stats: HookStats) -> dict[str, Any]:
    everything: Similarity = together(stats.kept, stats.removed)
    return {
        "tokens": everything.n,
        "kept": stats.kept.means(),
        "all": everything.means(),
        "fraction_removed": stats.removed.n / max(everything.n, 1),
        "limit": None if stats.limit == float("inf") else stats.limit,
        "profile": stats.kept.profile(),
        "heat_map": stats.heat_map,
        "prompt_means": {"edges": PROMPT_EDGES, "counts": [int(c) for c in stats.prompt_means]},
    }


def quality(stats: SaeStats) -> dict[str, Any]:
    """By model and filter: the metrics of `ReconstructionStats`, the published R^2, and dead latents with an interval."""
    return {
        model: {
            "kept": _quality(stats.kept[model]),
            "all": _quality(together(stats.kept[model], stats.removed[model])),
            "activation_histogram": {
                "log10_edges": ACTIVATION_EDGES,
                "counts": [int(c) for c in stats.histogram[model].counts],
            },
        }
        for model in MODELS
    }


def _quality(stats: ReconstructionStats) -> dict[str, float]:
    found = stats.metrics()
    if not found:
        return {}
    dead, d_sae = int((stats.firing_F == 0).sum()), len(stats.firing_F)
    low, high = wilson(dead, d_sae)
    found |= {
        "dead_latents": float(dead),
        "fraction_dead": dead / d_sae,
        "fraction_dead_low": float(low),
        "fraction_dead_high": float(high),
        "mean_density": float(stats.density.mean()),
    }
    r2 = flattened_r2(stats)
    return found if r2 is None else found | {"r2_flattened": r2}


def flattened_r2(stats: ReconstructionStats) -> float | None:
    """The published comparison's R^2: about one mean over all tokens *and dimensions*, so that a mere constant vector
    already scores 0.3 to 0.6 and the metric is no variance explained. None without variance."""
    n = stats.tokens * len(stats.sum_D)
    total = float(stats.sum_squares_D.sum()) - float(stats.sum_D.sum()) ** 2 / n
    return None if total <= 0 else 1 - float(stats.residual_D.sum()) / total


def latents(pair: Pair, stats: SaeStats, role: str) -> tuple[dict[str, Any], pd.DataFrame]:
    """(summaries, the table of all latents) of one SAE."""
    sampling, seed = pair.params.transfer.sampling, pair.params.random_seed
    logits = logit_similarity(pair.base, pair.finetuned, pair.saes[role])
    frame = latent_table(stats, None if logits is None else logits.correlation, sampling, seed)
    tokens = {model: stats.kept[model].tokens for model in MODELS}
    found = {
        "by_interval": by_interval(frame),
        "by_sample": by_sample(frame, sampling),
        "density_shift": density_shift(frame, tokens, stats.moments_kept.halves),
        "pairs": stats.moments_kept.models.n,
        "logits": None if logits is None else logits.report(),
        "pearson_histograms": {
            name: _histogram(frame[column])
            for name, column in (("models", "pearson"), ("shuffled", "pearson_shuffled"), ("halves", "pearson_halves"))
        },
    }
    return found, frame


def _histogram(values: pd.Series) -> dict[str, Any]:
    edges = np.linspace(-1, 1, 81)
    return {
        "edges": [round(float(edge), 4) for edge in edges],
        "counts": np.histogram(values.dropna(), edges)[0].tolist(),
        "undefined": int(values.isna().sum()),
    }


def coverage(pair: Pair, statistics: Statistics) -> dict[str, Any]:
    """How much was read, and how much of it stands in the same place for both."""
    tokens = statistics.tokens
    return {
        "tokens_base": tokens["base"],
        "tokens_finetuned": tokens["finetuned"],
        "matched": tokens["aligned"],
        "matched_fraction": tokens["aligned"] / max(tokens["counted_base"], 1),
        "tokenizers": "each its own" if pair.source.own else "the base model's for both",
    }


MAIN = "finetuned"
"""The pair asked about; the others are controls, which read fewer tokens."""


def run(params: Params, stage: StageFolder) -> None:
    """Everything, into the stage's folder. Raises `UserError` in one line for what cannot be compared; a control that fails
    is skipped with its reason."""
    torch.manual_seed(params.random_seed)
    models = load(params, stage)
    cache = ResultCache("transfer")
    for name, pair in _pairs(models, params):
        with Guard(None if name == MAIN else stage.skip).on(name):
            result, tables, saes = evaluate(pair, name, models, cache)
            for file, table in tables.items():
                write_text(stage.folder / file, table)
            for folder, sae in saes.items():
                save_sae(sae, stage.folder / folder)
            stage.write_result(name, result)


Part = Callable[[str, Any, Callable[[], dict[str, Any]]], dict[str, Any]]
"""(name, settings, how it is computed) of a part of a result: the part, from the cache where it is there."""
Found = tuple[dict[str, Any], dict[str, str], dict[str, SparseAutoencoder]]
"""(result, tables by file name, trained SAEs by folder)."""


def evaluate(pair: Pair, name: str, models: Models, cache: ResultCache) -> Found:
    """All of one pair. name: `finetuned`, or a control's."""
    config, full, common = pair.params.transfer, name == MAIN, _key(pair, name)

    def part(what: str, settings: Any, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        key = fingerprint([common, what, settings])[:40]
        found = cache.get(key)
        if found is None:
            found = compute()
            cache.put(key, found)
        return found

    n_tokens = config.tokens if full else config.controls.tokens
    n_patched = config.patched_tokens if full else config.controls.patched_tokens
    read = part("statistics", n_tokens, lambda: _statistics(pair, name, n_tokens))
    first = FirstPass.from_plain(read["first"], pair.base.device)
    result = read["result"] | {
        "setting": _setting(pair),
        "losses": part(
            "losses",
            [n_tokens, n_patched, config.patched_batch_size, config.ablate_every],
            lambda: patched_losses(pair, first, n_patched, f"{name}: patched losses"),
        ),
        "moved": part(
            "moved",
            [full, models.own, config.own_finetune.moved_tokens, config.own_finetune.source, config.finetuned_model],
            lambda: _moved(pair, models, full),
        ),
    }
    tables, saes = dict(read["tables"]), {}
    if full:
        result["tokenizers"] = models.tokenizers.report()
        result["repair"] = (
            {"status": "disabled", "message": "switched off (transfer.repair.enabled)"}
            if not config.repair.enabled
            else part("repair", _of_training(pair, first, config.repair.model_dump()), lambda: repair(pair, first.limit))
        )
        for key, about in (("crosscoder", _crosscoder), ("separate", _separate)):
            if getattr(config, key) is not None:
                result[key], own_tables, own_saes = about(pair, first, common, part)
                tables |= own_tables
                saes |= own_saes
    return round_significant(result, DIGITS), tables, saes


def _of_training(pair: Pair, first: FirstPass, *settings: Any) -> list[Any]:
    """What SAEs that are trained here depend on besides what a pair's parts have in common."""
    return [*settings, pair.params.train.model_dump(), first.limit]


def _checked_on(pair: Pair) -> list[Any]:
    """What ablations depend on besides."""
    config = pair.params.transfer
    return [config.own_finetune.source, config.finetuned_model, config.patched_batch_size]


def _crosscoder(pair: Pair, first: FirstPass, common: str, part: Part) -> Found:
    settings = pair.params.transfer.crosscoder
    assert settings is not None
    measuring = {"held_out_tokens", "checked", "checked_tokens"}
    identity = _of_training(pair, first, "crosscoder", common, settings.model_dump(exclude=measuring))
    saes = kept(identity, lambda: {"crosscoder": trained(pair, first.limit, "crosscoder")}, pair.base.device)
    found = part(
        "crosscoder",
        _of_training(pair, first, settings.model_dump(), _checked_on(pair)),
        lambda: crosscoder_report(pair, saes["crosscoder"], first.limit, "crosscoder"),
    )
    return found["result"], {"crosscoder_latents.tsv": found["table"]}, saes


def _separate(pair: Pair, first: FirstPass, common: str, part: Part) -> Found:
    """Where no SAE of the finetuned model is given, it is the base SAE as `repair` trains it on."""
    config, base = pair.params.transfer, pair.saes["base"]
    assert config.separate is not None
    saes: dict[str, SparseAutoencoder] = {}
    if "finetuned" not in pair.saes:
        if why := cannot_be_trained(base):
            return {"status": "not_applicable", "message": f"no transfer.finetuned_sae, and {why}"}, {}, {}
        identity = _of_training(pair, first, "further trained", common, config.repair.model_dump(exclude={"enabled"}))
        saes = kept(identity, lambda: further_trained(pair, first.limit, "separate SAEs"), pair.base.device)
    found = part(
        "separate",
        _of_training(pair, first, config.separate.model_dump(), config.repair.model_dump(), _checked_on(pair)),
        lambda: separate_report(
            pair, pair.saes.get("finetuned") or saes["finetuned"], saes.get("base"), first.limit, "separate SAEs"
        ),
    )
    trained_on = {f"sae_trained_on_{model}": sae for model, sae in saes.items()}
    return found["result"], {"separate_latents.tsv": found["table"]}, trained_on


KEPT_GB = 2.0
"""SAEs that were trained here; the least recently used go first."""


def kept(
    identity: list[Any], make: Callable[[], dict[str, SparseAutoencoder]], device: torch.device
) -> dict[str, SparseAutoencoder]:
    """SAEs by name, made once and kept under `.cache/transfer_saes` by everything they depend on."""
    folder = cache_dir("transfer_saes") / fingerprint(identity)[:24]
    if not usable(folder):
        saes = make()
        with new_entry(folder) as temporary:
            for name, sae in saes.items():
                save_sae(sae, temporary / name)
        prune(folder.parent, KEPT_GB, keep=[folder])
    return {path.name: load_sae(path, str(device)) for path in sorted(folder.iterdir()) if path.is_dir()}


def _statistics(pair: Pair, name: str, n_tokens: int) -> dict[str, Any]:
    """The first pass: metrics, tables, and what the other parts need of it."""
    statistics = sweep(pair, n_tokens, f"{name}: statistics")
    result: dict[str, Any] = {
        "coverage": coverage(pair, statistics),
        "similarity": similarity(statistics),
        "outliers": statistics.outliers.report(),
        "latents": {},
        "quality": {role: quality(stats) for role, stats in statistics.saes.items()},
    }
    prefix = "" if name == MAIN else f"{name}_"
    tables = {"outlier_tokens.tsv": _outlier_tokens(result["outliers"]["listed"])} if name == MAIN else {}
    for role, stats in statistics.saes.items():
        result["latents"][role], frame = latents(pair, stats, role)
        tables[f"{prefix}latents.tsv" if role == "base" else f"{prefix}latents_{role}_sae.tsv"] = as_tsv(frame)
    return {"result": result, "tables": tables, "first": statistics.first.plain()}


def _outlier_tokens(listed: list[dict[str, Any]]) -> str:
    parts = ("before", "token", "after")
    rows = (
        [item["model"], f"{item['norm']:.6g}", item["position"], *(repr(item[part]) for part in parts)] for item in listed
    )
    return tsv_text(["model", "norm", "position", *parts], rows)


def _setting(pair: Pair) -> dict[str, Any]:
    sae = pair.saes["base"]
    return {
        "base_model": pair.base.name,
        "finetuned_model": pair.finetuned.name,
        "hook": pair.hook,
        "hooks": list(pair.hooks),
        "sae": sae.cfg.provenance.get("name") or sae.cfg.architecture,
        "d_in": sae.cfg.d_in,
        "d_sae": sae.cfg.d_sae,
        "dataset": pair.source.text.dataset,
        "split": pair.source.split,
        "context_size": pair.source.text.context_size,
        "dtype": str(pair.base.dtype).removeprefix("torch."),
        "outlier_rule": pair.params.transfer.outliers.rule,
        "random_seed": pair.params.random_seed,
    }


def _moved(pair: Pair, models: Models, full: bool) -> dict[str, Any]:
    """How far weights moved, and for models of one tokenizer how far outputs did, on the text read and, where the stage made
    the finetune, on held-out text of the kind it was trained on."""
    found: dict[str, Any] = {"weights": weights_moved(pair.base, pair.finetuned)}
    config = pair.params.transfer
    if models.own or not full:
        return found
    found["outputs"] = _outputs(pair, config.own_finetune.moved_tokens, None)
    source = config.own_finetune.source
    if config.finetuned_model is None and source is not None:
        found["outputs_on_finetuned_text"] = {
            "source": source,
            **(_outputs(pair, config.own_finetune.moved_tokens, source) or {}),
        }
    return found


def _outputs(pair: Pair, n_tokens: int, kind: str | None) -> dict[str, float] | None:
    source = pair.source._replace(kind=kind)
    rows = [batch.base.tokens for batch in batches(pair.base, pair.finetuned, source, n_tokens, 4)]
    return outputs_moved(pair.base, pair.finetuned, torch.cat(rows))


# --- pairs -----------------------------------------------------------------------------------


def _pairs(models: Models, params: Params) -> Iterator[tuple[str, Pair]]:
    """The pair, then the controls, each made when it is its turn."""
    yield MAIN, _pair(models, models.finetuned, params)
    config, hook = params.transfer.controls, models.saes["base"].cfg.hook_name
    for name in config.names:
        other = models.base if name == "self" else perturbed_model(models.base, config.noise, hook, params.random_seed)
        yield f"control_{name}", _pair(models, other, params)


def _pair(models: Models, finetuned: LanguageModel, params: Params) -> Pair:
    source = TextSource(models.text, SPLIT, models.own and finetuned is models.finetuned)
    return Pair(models.base, finetuned, models.saes, hooks(params, models.saes["base"].cfg.hook_name), source, params)


def _key(pair: Pair, name: str) -> str:
    """Of all that a pair's parts have in common: weights, text, masks and outliers, precision, device kind, torch, and the
    source that computes them."""
    params, config = pair.params, pair.params.transfer
    return fingerprint(
        {
            "name": name,
            "models": [pair.base.fingerprint, pair.finetuned.fingerprint, pair.finetuned.name],
            "saes": {role: sae.weights_fingerprint() for role, sae in pair.saes.items()},
            "hooks": pair.hooks,
            "text": [text_fingerprint(pair.source.text, pair.source.split), pair.source.text.model_dump(), pair.source.own],
            "outliers": [config.outliers.model_dump(), known_values(config.outliers, pair.base.name)],
            "sampling": config.sampling.model_dump(),
            "batch_size": config.batch_size,
            "mask": params.token_mask.model_dump(),
            "seed": params.random_seed,
            "dtype": str(pair.base.dtype),
            "device": pair.base.device.type,
            "code": code_fingerprint(__name__, classes=[type(sae) for sae in pair.saes.values()]),
        }
    )


RESULTS = Path("eval_results/transfer")


def run_stage(params: Params, folder: Path = RESULTS) -> None:
    """One run: results and status in `folder`. Raises `UserError` for what cannot be compared."""
    with stage_folder(folder) as stage:
        assert stage is not None  # it is where a stage may be disabled
        run(params, stage)
