"""What is compared: both models, their SAEs, text and tokenizers, loaded and checked. What cannot be compared stops here
with one line.

Two tokenizers are checked for meaning the same by their ids: without that, one tokenizer's ids make no sense to the other's
model.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from sae_research.config.params import Params, Text, TokenMask
from sae_research.config.transfer import Transfer, TransferSAE
from sae_research.lm import LanguageModel, load_configured, token_mask
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import fingerprint, round_significant, write_json, write_text
from sae_research.runtime.formatting import tsv_text
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SparseAutoencoder
from sae_research.saes.sources import check_fits, fill_in, is_model, open_sae, reference_of
from sae_research.transfer.finetune import finetuned_model
from sae_research.transfer.text import PairBatch, TextSource

MODELS = ("base", "finetuned")


@dataclass(frozen=True)
class Pair:
    """Two models and what they are compared with."""

    base: LanguageModel
    finetuned: LanguageModel
    saes: dict[str, SparseAutoencoder]
    """By role: `base`, and `finetuned` where the finetuned model's own is given. One hook for all."""
    hooks: tuple[str, ...]
    """Where activations are compared, the SAE's hook among them."""
    source: TextSource
    params: Params

    @property
    def hook(self) -> str:
        """The SAE's."""
        return self.saes["base"].cfg.hook_name

    @property
    def models(self) -> dict[str, LanguageModel]:
        return {"base": self.base, "finetuned": self.finetuned}


class Masks(NamedTuple):
    """Which tokens of a batch count at one hook."""

    counted: dict[str, Tensor]
    """By model, outliers included [batch, seq]."""
    kept: dict[str, Tensor]
    """Without tokens that are outliers in either model."""
    pairs: tuple[Tensor, Tensor]
    """Flat positions of matched tokens that count in both models [n], [n]."""
    pair_kept: Tensor
    """[n]"""


def masks(pair: Pair, batch: PairBatch, acts: dict[str, Tensor], limit: float) -> Masks:
    """acts: by model, at the hook that `limit` belongs to [batch, seq, d_in]."""
    rule = TokenMask(drop_first_position=pair.params.token_mask.drop_first_position, outlier_norm_multiple=None)
    sides = batch.sides
    found = {
        model: token_mask(lm, sides[model].tokens, acts[model], rule) & sides[model].real
        for model, lm in pair.models.items()
    }
    if not pair.source.own:  # the ids are the base tokenizer's: it says which are special
        found["finetuned"] = found["base"]
    outliers = {model: acts[model].float().norm(dim=-1) > limit for model in MODELS}
    one, other = batch.pairs
    both = found["base"].flatten()[one] & found["finetuned"].flatten()[other]
    one, other = one[both], other[both]
    hit = outliers["base"].flatten()[one] | outliers["finetuned"].flatten()[other]
    for model, index in (("base", one), ("finetuned", other)):
        outliers[model].view(-1)[index[hit]] = True
    return Masks(found, {m: found[m] & ~outliers[m] for m in MODELS}, (one, other), ~hit)


_PARTS = ("merges", "normalizer", "pre_tokenizer", "post_processor")


class TokenizerCheck(NamedTuple):
    """What a comparison found."""

    table: dict[str, float]
    """The seven metrics of the published check, under their names there; fractions in percent."""
    usable: float
    """Fraction of tokens with the same string and id, the smaller of both vocabularies'."""
    shared: float
    """Fraction of the base vocabulary's strings that the other vocabulary has under any id."""
    agrees: dict[str, bool | None]
    """Further parts of the tokenizers: whether they are equal; None where one does not tell."""
    special_tokens: dict[str, list[Any]]
    """Roles whose token or id differ: role -> [base, finetuned]."""
    embedding_rows: tuple[int, int]
    """Rows of both models' embeddings: at least as many as the vocabulary, often padded."""
    mismatches: list[tuple[str, str, int | None, int | None]]
    """(kind, token, base id, finetuned id), in the order of the ids."""

    def report(self) -> dict[str, Any]:
        """As JSON, without the list of mismatches, which can be as long as the vocabulary."""
        return {
            "table": self.table,
            "usable_fraction": self.usable,
            "shared_fraction": self.shared,
            "agrees": self.agrees,
            "special_tokens": self.special_tokens,
            "embedding_rows": list(self.embedding_rows),
            "mismatches": len(self.mismatches),
        }


def check_tokenizers(base: Any, finetuned: Any, embedding_rows: tuple[int, int]) -> TokenizerCheck:
    """Compare two Hugging Face tokenizers. embedding_rows: of the two models' embeddings."""
    ours, theirs = base.get_vocab(), finetuned.get_vocab()
    only_base, only_finetuned = ours.keys() - theirs.keys(), theirs.keys() - ours.keys()
    moved = {token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token]}
    good = [len(ours) - len(only_base) - len(moved), len(theirs) - len(only_finetuned) - len(moved)]
    table = {
        "Base Tokenizer Size": len(ours),
        "Fine-tune Tokenizer Size": len(theirs),
        "Keys only in Base": len(only_base),
        "Keys only in Fine-tune": len(only_finetuned),
        "Keys with Mismatched Token IDs": len(moved),
        "Good Tokens in Base (%)": 100 * good[0] / max(len(ours), 1),
        "Good Tokens in Fine-tune (%)": 100 * good[1] / max(len(theirs), 1),
    }
    mismatches = [("only in base", t, ours[t], None) for t in only_base]
    mismatches += [("only in finetuned", t, None, theirs[t]) for t in only_finetuned]
    mismatches += [("other id", t, ours[t], theirs[t]) for t in moved]
    mismatches.sort(key=lambda item: (item[0], item[2] if item[2] is not None else item[3], item[1]))
    return TokenizerCheck(
        table,
        min(good[0] / max(len(ours), 1), good[1] / max(len(theirs), 1)),
        1 - len(only_base) / max(len(ours), 1),
        {**_parts_agree(base, finetuned), "chat_template": _template(base) == _template(finetuned)},
        _special_differences(base, finetuned),
        embedding_rows,
        mismatches,
    )


def _parts_agree(base: Any, finetuned: Any) -> dict[str, bool | None]:
    """The same vocabulary can cut text differently: merges, normaliser and splitting decide that."""
    one, other = _definition(base), _definition(finetuned)
    return {part: None if one is None or other is None else one[part] == other[part] for part in _PARTS}


def _definition(tokenizer: Any) -> dict[str, Any] | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    values = json.loads(backend.to_str())
    merges = (values.get("model") or {}).get("merges")
    joined = None if merges is None else [" ".join(pair) if isinstance(pair, list) else pair for pair in merges]
    return {"merges": joined, **{part: values.get(part) for part in _PARTS[1:]}}


def _template(tokenizer: Any) -> Any:
    return getattr(tokenizer, "chat_template", None)


def _special_differences(base: Any, finetuned: Any) -> dict[str, list[Any]]:
    maps = [
        {
            role: [token, tokenizer.convert_tokens_to_ids(token)]
            for role, token in tokenizer.special_tokens_map.items()
            if isinstance(token, str)
        }
        for tokenizer in (base, finetuned)
    ]
    return {
        role: [maps[0].get(role), maps[1].get(role)]
        for role in sorted(maps[0].keys() | maps[1].keys())
        if maps[0].get(role) != maps[1].get(role)
    }


MIN_USABLE = 0.9
"""Of tokens that mean the same in both vocabularies; with fewer, one tokenizer for both makes no sense."""


def choose_tokenization(check: TokenizerCheck, config: Transfer) -> str:
    """`base` or `own`, as `transfer.tokenize` says. Raises `UserError` where the choice would compute nonsense."""
    same_cuts = all(check.agrees[part] is not False for part in ("merges", "normalizer", "pre_tokenizer"))
    if config.tokenize == "auto":
        if check.usable >= MIN_USABLE and same_cuts:
            return "base"
    elif config.tokenize == "base":
        if check.usable < MIN_USABLE:
            raise UserError(
                f"transfer.tokenize: base: only {100 * check.usable:.4g} % of tokens have the same id in both tokenizers "
                f"(at least {MIN_USABLE:.0%} are needed), so the base tokenizer's ids mean other "
                "text to the finetuned model; use tokenize: own or auto"
            )
        return "base"
    if check.shared == 0:
        raise UserError("transfer: the tokenizers share no token at all; the two models cannot be compared")
    return "own"


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
    check_fits(
        f"transfer.sae {config.sae.path or config.sae.release or config.sae.name}", saes["base"], base, params.model.same_as
    )
    for sae in saes.values():
        sae.cfg.check_one_hook("transfer")
    hook = saes["base"].cfg.hook_name
    for name in hooks(params, hook):
        _width(base, name)
    text = Text(
        dataset=config.dataset or saes["base"].cfg.provenance.get("text") or params.text.dataset,
        column_name=config.column_name if config.dataset else params.text.column_name,
        context_size=config.context_size or saes["base"].cfg.context_size,
    )
    finetuned = (
        finetuned_model(base, config.own_finetune, text, hook, params.model.device, params.random_seed)
        if config.finetuned_model is None
        else _model(config.finetuned_model, params, "finetuned_model")
    )
    check_pair(base, finetuned, hooks(params, hook))
    if "finetuned" in saes:
        _check_finetuned_sae(saes["finetuned"], finetuned, hook)
    if config.finetuned_model is None:
        finetuned.name = f"{base.name} + {config.own_finetune.steps} steps on {config.own_finetune.source or 'all text'}"
    found = check_tokenizers(base.tokenizer, finetuned.tokenizer, (base.vocab_size, finetuned.vocab_size))
    write_json(stage.folder / "tokenizer_check.json", round_significant(found.report(), DIGITS))
    write_text(stage.folder / "tokenizer_mismatches.tsv", _mismatches(found))
    own = choose_tokenization(found, config) == "own"
    stage.notes |= {
        "base_model": base.name,
        "finetuned_model": finetuned.name,
        "hook": hook,
        "text": text.dataset,
        "tokenizers": "each its own" if own else "the base model's for both",
    }
    return Models(base, finetuned, {role: sae.to(base.device) for role, sae in saes.items()}, text, found, own)


def _model(name: str, params: Params, key: str) -> LanguageModel:
    try:
        return load_configured(params.model, name)
    except UserError as error:
        raise UserError(str(error).replace("model.name", f"transfer.{key}", 1)) from None


def _with_tokenizer(lm: LanguageModel, name: str) -> LanguageModel:
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)
        other = LanguageModel(lm.model, tokenizer, lm.name, fingerprint([lm.fingerprint, name, tokenizer.get_vocab()]))
    except (OSError, ValueError) as error:
        raise UserError(f"transfer.tokenizer: cannot load {name!r}: {str(error).strip().partition(chr(10))[0]}") from None
    other.names, other.saved_from = lm.names, lm.saved_from
    return other


def read_sae(config: TransferSAE, key: str) -> SparseAutoencoder:
    """An SAE by where it comes from. Raises `UserError` that begins with `key` where there is none."""
    try:
        return open_sae(reference_of(config))
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def hooks(params: Params, hook: str) -> tuple[str, ...]:
    """Where activations are compared, without repeats, the SAE's own hook last."""
    return tuple(dict.fromkeys([*(name for name in params.transfer.hooks if name != hook), hook]))


def check_pair(base: LanguageModel, finetuned: LanguageModel, names: tuple[str, ...]) -> None:
    """Raises `UserError` where the models differ in width or depth, or lack a hook."""
    for what, one, other in (("width", base.d_model, finetuned.d_model), ("depth", base.n_layers, finetuned.n_layers)):
        if one != other:
            raise UserError(
                f"transfer: {base.name} has {what} {one}, {finetuned.name} {other}; a finetune of one model has its shape"
            )
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
        raise UserError(
            f"transfer.finetuned_sae was trained on {sae.cfg.model_name}, the finetuned model is "
            f"{finetuned.name}; choose an SAE of the finetuned model"
        )
    if sae.cfg.hook_name != hook or sae.cfg.d_in != finetuned.d_in(hook):
        raise UserError(
            f"transfer.finetuned_sae reads {sae.cfg.d_in} dimensions at {sae.cfg.hook_name}, transfer.sae "
            f"{finetuned.d_in(hook)} at {hook}; both must read the same hook"
        )


def _mismatches(found: TokenizerCheck) -> str:
    rows = ((kind, repr(token), one, other) for kind, token, one, other in found.mismatches)
    return tsv_text(["kind", "token", "base_id", "finetuned_id"], rows)
