"""What is compared: both models, their SAEs, text and tokenizers, loaded and checked. Whatever cannot be compared stops
here with one line."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from sae_research.errors import UserError
from sae_research.lm import LanguageModel, load_language_model
from sae_research.params import Params, Text
from sae_research.saes import SparseAutoencoder, load_sae
from sae_research.setup.fits import check_fits, fill_in, is_model
from sae_research.setup.sources import read_folder, read_release
from sae_research.store import fingerprint, round_significant, user_path, write_json, write_text
from sae_research.store_stages import StageFolder
from sae_research.transfer.finetune import finetuned_model
from sae_research.transfer.tokenizers import TokenizerCheck, check_tokenizers, choose_tokenization
from sae_research.transfer_params import TransferSAE

SAE_FOLDER = Path("downloaded_saes")
DIGITS = 6
"""Significant digits of what is written."""


class Models(NamedTuple):
    """What is compared, loaded and checked."""

    base: LanguageModel
    finetuned: LanguageModel
    saes: dict[str, SparseAutoencoder]
    text: Text
    tokenizers: TokenizerCheck
    own: bool
    """Each model reads with its own tokenizer."""


def load(params: Params, stage: StageFolder) -> Models:
    """Both models, the SAEs, the text. Writes what the tokenizer check found, also when the stage stops there."""
    config = params.transfer
    base = _model(config.base_model or params.model.name, params, "base_model")
    if config.tokenizer is not None:
        base = _with_tokenizer(base, config.tokenizer)
    saes = {"base": read_sae(config.sae, "transfer.sae")}
    if config.finetuned_sae is not None:
        saes["finetuned"] = read_sae(config.finetuned_sae, "transfer.finetuned_sae")
    for assumed in fill_in(saes["base"], base.name, params.train.hook_name):
        stage.notes["sae"] = assumed
    check_fits(f"transfer.sae {config.sae.path or config.sae.release or config.sae.name}", saes["base"], base,
               params.model.same_as)
    hook = saes["base"].cfg.hook_name
    for name in hooks(params, hook):
        _width(base, name)
    text = Text(dataset=config.dataset or saes["base"].cfg.provenance.get("text") or params.text.dataset,
                column_name=config.column_name if config.dataset else params.text.column_name,
                context_size=config.context_size or saes["base"].cfg.context_size)
    finetuned = (finetuned_model(base, config.own_finetune, text, hook, params.model.device, params.random_seed)
                 if config.finetuned_model is None else _model(config.finetuned_model, params, "finetuned_model"))
    check_pair(base, finetuned, hooks(params, hook))
    if "finetuned" in saes:
        _check_finetuned_sae(saes["finetuned"], finetuned, hook)
    if config.finetuned_model is None:
        finetuned.name = f"{base.name} + {config.own_finetune.steps} steps on {config.own_finetune.source or 'all text'}"
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


def _with_tokenizer(lm: LanguageModel, name: str) -> LanguageModel:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        other = LanguageModel(lm.model, tokenizer, lm.name, fingerprint([lm.fingerprint, name, tokenizer.get_vocab()]))
    except (OSError, ValueError) as error:
        raise UserError(f"transfer.tokenizer: cannot load {name!r}: {str(error).strip().partition(chr(10))[0]}") from None
    other.names, other.saved_from = lm.names, lm.saved_from
    return other


def read_sae(config: TransferSAE, key: str) -> SparseAutoencoder:
    """An SAE by where it comes from. Raises `UserError` where there is none."""
    try:
        if config.source == "sae_lens":
            assert config.release and config.sae_id  # transfer_params.py requires them for this source
            return read_release(config.release, config.sae_id)
        if config.source == "folder":
            assert config.path
            return read_folder(user_path(config.path))
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
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
        widths = _width(base, name), _width(finetuned, name)
        if widths[0] != widths[1]:
            raise UserError(f"transfer: {name} has width {widths[0]} in {base.name}, {widths[1]} in {finetuned.name}")


def _width(lm: LanguageModel, hook: str) -> int:
    try:
        return lm.d_in(hook)
    except UserError as error:
        raise UserError(f"transfer.hooks: {lm.name}: {error}") from None


def _check_finetuned_sae(sae: SparseAutoencoder, finetuned: LanguageModel, hook: str) -> None:
    fill_in(sae, finetuned.name, hook)
    if not is_model(sae.cfg.model_name, finetuned):
        raise UserError(f"transfer.finetuned_sae was trained on {sae.cfg.model_name}, the finetuned model is "
                        f"{finetuned.name}; choose an SAE of the finetuned model")
    if sae.cfg.hook_name != hook or sae.cfg.d_in != finetuned.d_in(hook):
        raise UserError(f"transfer.finetuned_sae reads {sae.cfg.d_in} dimensions at {sae.cfg.hook_name}, transfer.sae "
                        f"{finetuned.d_in(hook)} at {hook}; both must read the same hook")


def _mismatches(found: TokenizerCheck) -> str:
    lines = ["\t".join([kind, repr(token), "" if one is None else str(one), "" if other is None else str(other)])
             for kind, token, one, other in found.mismatches]
    return "\n".join(["kind\ttoken\tbase_id\tfinetuned_id", *lines]) + "\n"
