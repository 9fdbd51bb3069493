"""The stage `transfer_eval`: writes `eval_results/transfer/`, one result for the pair and one for every control."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sae_research import intervals
from sae_research.errors import UserError
from sae_research.lm import LanguageModel, load_language_model, unembedding
from sae_research.params import Params, Text
from sae_research.saes import SparseAutoencoder, load_sae
from sae_research.setup.fits import check_fits, fill_in
from sae_research.setup.sources import read_folder, read_release
from sae_research.stats import losses as loss_statistics
from sae_research.stats import reconstruction
from sae_research.store import (
    ResultCache,
    StageFolder,
    fingerprint,
    round_significant,
    source_fingerprint,
    write_json,
    write_text,
)
from sae_research.text.corpus import text_fingerprint
from sae_research.transfer import results
from sae_research.transfer.finetune import finetuned_model, outputs_moved, perturbed_model, weights_moved
from sae_research.transfer.losses import patched_losses
from sae_research.transfer.repair import repair
from sae_research.transfer.sweep import Pair, Statistics, sweep
from sae_research.transfer.table import as_tsv
from sae_research.transfer.text import SPLIT, TextSource, batches
from sae_research.transfer.tokenizers import TokenizerCheck, check_tokenizers, choose_tokenization
from sae_research.transfer_params import TransferSAE

SAE_FOLDER = Path("downloaded_saes")
DIGITS = 6
_MODULES = ("text", "sweep", "similarity", "latents", "outliers", "losses", "table", "results", "logits", "sums",
            "finetune", "repair", "stage")


class Models(NamedTuple):
    """What is compared, loaded and checked."""

    base: LanguageModel
    finetuned: LanguageModel
    saes: dict[str, SparseAutoencoder]
    text: Text
    tokenizers: TokenizerCheck
    own: bool
    """Each model reads with its own tokenizer."""


def run(params: Params, stage: StageFolder) -> None:
    """Everything, into the stage's folder. Raises `UserError` in one line for what cannot be compared."""
    torch.manual_seed(params.random_seed)
    models = load(params, stage)
    pairs = [("finetuned", _pair(models, models.finetuned, params))]
    pairs += [(f"control_{name}", pair) for name, pair in _controls(models, params)]
    cache = ResultCache("transfer")
    for name, pair in pairs:
        key = _key(pair, name)
        found = cache.get(key)
        if found is None:
            found = evaluate(pair, name, models)
            cache.put(key, found)
        for file, table in found["tables"].items():
            write_text(stage.folder / file, table)
        stage.write_result(name, found["result"])


def evaluate(pair: Pair, name: str, models: Models) -> dict[str, Any]:
    """{result, tables by file name} of one pair. name: `finetuned`, or a control's, which reads fewer tokens."""
    config = pair.params.transfer
    full = name == "finetuned"
    statistics = sweep(pair, config.tokens if full else config.controls.tokens, f"{name}: statistics")
    patched = config.patched_tokens if full else config.controls.patched_tokens
    result: dict[str, Any] = {
        "setting": _setting(pair), "coverage": results.coverage(pair, statistics),
        "similarity": results.similarity(statistics), "outliers": statistics.outliers.report(),
        "quality": {role: results.quality(stats) for role, stats in statistics.saes.items()},
        "losses": patched_losses(pair, statistics, patched, f"{name}: patched losses"),
        "moved": _moved(pair, models, full)}
    tables = {"outlier_tokens.tsv": _outlier_tokens(result["outliers"]["listed"])} if full else {}
    result["latents"] = {}
    for role, stats in statistics.saes.items():
        result["latents"][role], frame = results.latents(pair, stats, role)
        prefix = "" if full else f"{name}_"
        tables[f"{prefix}latents.tsv" if role == "base" else f"{prefix}latents_{role}_sae.tsv"] = as_tsv(frame)
    if full:
        result["tokenizers"] = models.tokenizers.report()
        result["repair"] = _repair(pair, statistics)
    return {"result": round_significant(result, DIGITS), "tables": tables}


def _outlier_tokens(listed: list[dict[str, Any]]) -> str:
    lines = ["\t".join([item["model"], f"{item['norm']:.6g}", str(item["position"]),
                        *(repr(item[part]) for part in ("before", "token", "after"))]) for item in listed]
    return "\n".join(["model\tnorm\tposition\tbefore\ttoken\tafter", *lines]) + "\n"


def _repair(pair: Pair, statistics: Statistics) -> dict[str, Any]:
    if not pair.params.transfer.repair.enabled:
        return {"status": "disabled", "message": "switched off (transfer.repair.enabled)"}
    return repair(pair, statistics)


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


# --- loading and checking --------------------------------------------------------------------

def load(params: Params, stage: StageFolder) -> Models:
    """Both models, the SAEs, the text. Writes what the tokenizer check found, also when the stage stops there."""
    config = params.transfer
    base = _model(config.base_model or params.model.name, params, "base_model")
    if config.tokenizer is not None:
        base.tokenizer = _tokenizer(config.tokenizer)
    hook_hint = params.train.hook_name
    saes = {"base": read_sae(config.sae, "transfer.sae")}
    if config.finetuned_sae is not None:
        saes["finetuned"] = read_sae(config.finetuned_sae, "transfer.finetuned_sae")
    for assumed in fill_in(saes["base"], base.name, hook_hint):
        stage.notes["sae"] = assumed
    check_fits(f"transfer.sae {config.sae.name}", saes["base"], base)
    hook = saes["base"].cfg.hook_name
    text = Text(dataset=config.dataset or saes["base"].cfg.provenance.get("text") or params.text.dataset,
                column_name=config.column_name if config.dataset else params.text.column_name,
                context_size=config.context_size or saes["base"].cfg.context_size)
    finetuned = (finetuned_model(base, config.own_finetune, text, hook, params.model.device, params.random_seed)
                 if config.finetuned_model is None else _model(config.finetuned_model, params, "finetuned_model"))
    if config.finetuned_model is None:
        finetuned.name = f"{base.name} + {config.own_finetune.steps} steps on {config.own_finetune.source or 'all text'}"
    check_pair(base, finetuned, hooks(params, hook))
    if "finetuned" in saes:
        _check_finetuned_sae(saes["finetuned"], finetuned, hook)
    found = check_tokenizers(base.tokenizer, finetuned.tokenizer, (base.vocab_size, finetuned.vocab_size))
    write_json(stage.folder / "tokenizer_check.json", round_significant(found.report(), DIGITS))
    write_text(stage.folder / "tokenizer_mismatches.tsv", _mismatches(found))
    own = choose_tokenization(found, config) == "own"
    stage.notes |= {"base_model": base.name, "finetuned_model": finetuned.name, "hook": hook, "text": text.dataset,
                    "tokenizers": "each its own" if own else "the base model's for both"}
    return Models(base, finetuned, {role: sae.to(base.device) for role, sae in saes.items()}, text, found, own)


def _model(name: str, params: Params, key: str) -> LanguageModel:
    try:
        return load_language_model(name, params.model.device, params.model.torch_dtype)
    except UserError as error:
        raise UserError(str(error).replace("model.name", f"transfer.{key}", 1)) from None


def _tokenizer(name: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"transfer.tokenizer: cannot load {name!r}: {str(error).strip().partition(chr(10))[0]}") from None


def read_sae(config: TransferSAE, key: str) -> SparseAutoencoder:
    """An SAE by where it comes from. Raises `UserError` where there is none."""
    if config.source == "sae_lens":
        assert config.release and config.sae_id  # transfer_params.py requires them for this source
        return read_release(config.release, config.sae_id)
    if config.source == "folder":
        assert config.path
        return read_folder(Path(config.path))
    if not (SAE_FOLDER / config.name / "cfg.json").is_file():
        known = ", ".join(sorted(path.parent.name for path in SAE_FOLDER.glob("*/cfg.json")))
        raise UserError(f"{key}: {SAE_FOLDER} holds no SAE {config.name!r}"
                        + (f"; there are {known}" if known else "; run the setup stage first (dvc repro setup)"))
    return load_sae(SAE_FOLDER / config.name)


def hooks(params: Params, hook: str) -> tuple[str, ...]:
    """Where activations are compared, without repeats, the SAE's own hook last."""
    return tuple(dict.fromkeys([*(name for name in params.transfer.hooks if name != hook), hook]))


def check_pair(base: LanguageModel, finetuned: LanguageModel, names: tuple[str, ...]) -> None:
    """Raises `UserError` where the models differ in width or depth, or lack a hook."""
    for what, one, other in (("width", base.d_model, finetuned.d_model), ("depth", base.n_layers, finetuned.n_layers)):
        if one != other:
            raise UserError(f"transfer: {base.name} has {what} {one}, {finetuned.name} {other}; a finetune of one model "
                            "has its shape")
    for name in names:
        widths = []
        for lm in (base, finetuned):
            try:
                widths.append(lm.d_in(name))
            except UserError as error:
                raise UserError(f"transfer.hooks: {lm.name}: {error}") from None
        if widths[0] != widths[1]:
            raise UserError(f"transfer: {name} has width {widths[0]} in {base.name}, {widths[1]} in {finetuned.name}")


def _check_finetuned_sae(sae: SparseAutoencoder, finetuned: LanguageModel, hook: str) -> None:
    fill_in(sae, finetuned.name, hook)
    if sae.cfg.hook_name != hook or sae.cfg.d_in != finetuned.d_in(hook):
        raise UserError(f"transfer.finetuned_sae reads {sae.cfg.d_in} dimensions at {sae.cfg.hook_name}, transfer.sae "
                        f"{finetuned.d_in(hook)} at {hook}; both must read the same hook")


def _mismatches(found: TokenizerCheck) -> str:
    lines = ["\t".join([kind, repr(token), "" if one is None else str(one), "" if other is None else str(other)])
             for kind, token, one, other in found.mismatches]
    return "\n".join(["kind\ttoken\tbase_id\tfinetuned_id", *lines]) + "\n"


# --- pairs -----------------------------------------------------------------------------------

def _pair(models: Models, finetuned: LanguageModel, params: Params) -> Pair:
    source = TextSource(models.text, SPLIT, models.own and finetuned is models.finetuned)
    return Pair(models.base, finetuned, models.saes, hooks(params, models.saes["base"].cfg.hook_name), source, params)


def _controls(models: Models, params: Params) -> Iterator[tuple[str, Pair]]:
    config, hook = params.transfer.controls, models.saes["base"].cfg.hook_name
    for name in config.names:
        other = models.base if name == "self" else perturbed_model(models.base, config.noise, hook, params.random_seed)
        yield name, _pair(models, other, params)


def _key(pair: Pair, name: str) -> str:
    """Of a pair's result: weights, text, settings, precision, device kind, torch, and the source that computes it."""
    modules = [importlib.import_module(f"sae_research.transfer.{module}") for module in _MODULES]
    params = pair.params
    return fingerprint({
        "name": name, "models": [pair.base.fingerprint, pair.finetuned.fingerprint, pair.finetuned.name],
        "saes": {role: sae.weights_fingerprint() for role, sae in pair.saes.items()}, "hooks": pair.hooks,
        "text": [text_fingerprint(pair.source.text, pair.source.split), pair.source.text.model_dump(), pair.source.own],
        "transfer": params.transfer.model_dump(), "mask": params.token_mask.model_dump(), "seed": params.random_seed,
        "dtype": str(pair.base.dtype), "device": pair.base.device.type, "torch": torch.__version__,
        "source": source_fingerprint([*modules, reconstruction, loss_statistics, intervals, unembedding])})[:40]
