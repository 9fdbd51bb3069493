"""The stage `transfer_eval`: writes `eval_results/transfer/`, one result for the pair and one for every control.

Every part of a result (statistics, patched losses, how far the model moved, repair) is kept in the result cache when it is
done: a run that was stopped, or that changes one part's settings, computes only what is missing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from sae_research.lm import LanguageModel
from sae_research.params import Params
from sae_research.saes.guard import Guard
from sae_research.saes.registry import code_fingerprint
from sae_research.store import fingerprint, round_significant, write_text
from sae_research.store_cache import ResultCache
from sae_research.store_stages import StageFolder
from sae_research.text.corpus import text_fingerprint
from sae_research.transfer import results
from sae_research.transfer.finetune import outputs_moved, perturbed_model, weights_moved
from sae_research.transfer.loading import DIGITS, Models, hooks, load
from sae_research.transfer.losses import patched_losses
from sae_research.transfer.outliers import known_values
from sae_research.transfer.pair import Pair
from sae_research.transfer.repair import repair
from sae_research.transfer.sweep import FirstPass, sweep
from sae_research.transfer.table import as_tsv
from sae_research.transfer.text import SPLIT, TextSource, batches

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
            result, tables = evaluate(pair, name, models, cache)
            for file, table in tables.items():
                write_text(stage.folder / file, table)
            stage.write_result(name, result)


def evaluate(pair: Pair, name: str, models: Models, cache: ResultCache) -> tuple[dict[str, Any], dict[str, str]]:
    """(result, tables by file name) of one pair. name: `finetuned`, or a control's."""
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
        "losses": part("losses", [n_tokens, n_patched, config.patched_batch_size, config.ablate_every],
                       lambda: patched_losses(pair, first, n_patched, f"{name}: patched losses")),
        "moved": part("moved", [full, models.own, config.own_finetune.moved_tokens, config.own_finetune.source,
                                config.finetuned_model], lambda: _moved(pair, models, full))}
    if full:
        result["tokenizers"] = models.tokenizers.report()
        result["repair"] = ({"status": "disabled", "message": "switched off (transfer.repair.enabled)"}
                            if not config.repair.enabled else
                            part("repair", [config.repair.model_dump(), pair.params.train.model_dump(), first.limit],
                                 lambda: repair(pair, first.limit)))
    return round_significant(result, DIGITS), read["tables"]


def _statistics(pair: Pair, name: str, n_tokens: int) -> dict[str, Any]:
    """The first pass: figures, tables, and what the other parts need of it."""
    statistics = sweep(pair, n_tokens, f"{name}: statistics")
    result: dict[str, Any] = {
        "coverage": results.coverage(pair, statistics), "similarity": results.similarity(statistics),
        "outliers": statistics.outliers.report(), "latents": {},
        "quality": {role: results.quality(stats) for role, stats in statistics.saes.items()}}
    prefix = "" if name == MAIN else f"{name}_"
    tables = {"outlier_tokens.tsv": _outlier_tokens(result["outliers"]["listed"])} if name == MAIN else {}
    for role, stats in statistics.saes.items():
        result["latents"][role], frame = results.latents(pair, stats, role)
        tables[f"{prefix}latents.tsv" if role == "base" else f"{prefix}latents_{role}_sae.tsv"] = as_tsv(frame)
    return {"result": result, "tables": tables, "first": statistics.first.plain()}


def _outlier_tokens(listed: list[dict[str, Any]]) -> str:
    lines = ["\t".join([item["model"], f"{item['norm']:.6g}", str(item["position"]),
                        *(repr(item[part]) for part in ("before", "token", "after"))]) for item in listed]
    return "\n".join(["model\tnorm\tposition\tbefore\ttoken\tafter", *lines]) + "\n"


def _setting(pair: Pair) -> dict[str, Any]:
    sae = pair.saes["base"]
    return {"base_model": pair.base.name, "finetuned_model": pair.finetuned.name, "hook": pair.hook,
            "hooks": list(pair.hooks), "sae": sae.cfg.provenance.get("name") or sae.cfg.architecture, "d_in": sae.cfg.d_in,
            "d_sae": sae.cfg.d_sae, "dataset": pair.source.text.dataset, "split": pair.source.split,
            "context_size": pair.source.text.context_size, "dtype": str(pair.base.dtype).removeprefix("torch."),
            "outlier_rule": pair.params.transfer.outliers.rule, "random_seed": pair.params.random_seed}


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
        found["outputs_on_finetuned_text"] = {"source": source,
                                              **(_outputs(pair, config.own_finetune.moved_tokens, source) or {})}
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
    return fingerprint({
        "name": name, "models": [pair.base.fingerprint, pair.finetuned.fingerprint, pair.finetuned.name],
        "saes": {role: sae.weights_fingerprint() for role, sae in pair.saes.items()}, "hooks": pair.hooks,
        "text": [text_fingerprint(pair.source.text, pair.source.split), pair.source.text.model_dump(), pair.source.own],
        "outliers": [config.outliers.model_dump(), known_values(config.outliers, pair.base.name)],
        "sampling": config.sampling.model_dump(), "batch_size": config.batch_size, "aligned": config.min_aligned_fraction,
        "mask": params.token_mask.model_dump(), "seed": params.random_seed, "dtype": str(pair.base.dtype),
        "device": pair.base.device.type,
        "code": code_fingerprint(__name__, classes=[type(sae) for sae in pair.saes.values()])})
