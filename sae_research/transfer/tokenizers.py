"""Do two tokenizers mean the same by their ids? Without that, one tokenizer's ids make no sense to the other's model."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from sae_research.errors import UserError
from sae_research.transfer_params import Transfer

_PARTS = ("merges", "normalizer", "pre_tokenizer", "post_processor")


class TokenizerCheck(NamedTuple):
    """What a comparison found."""

    table: dict[str, float]
    """The seven figures of the published check, under their names there; fractions in percent."""
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
        return {"table": self.table, "usable_fraction": self.usable, "shared_fraction": self.shared, "agrees": self.agrees,
                "special_tokens": self.special_tokens, "embedding_rows": list(self.embedding_rows),
                "mismatches": len(self.mismatches)}


def check_tokenizers(base: Any, finetuned: Any, embedding_rows: tuple[int, int]) -> TokenizerCheck:
    """Compare two Hugging Face tokenizers. embedding_rows: of the two models' embeddings."""
    ours, theirs = base.get_vocab(), finetuned.get_vocab()
    only_base, only_finetuned = ours.keys() - theirs.keys(), theirs.keys() - ours.keys()
    moved = {token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token]}
    good = [len(ours) - len(only_base) - len(moved), len(theirs) - len(only_finetuned) - len(moved)]
    table = {
        "Base Tokenizer Size": len(ours), "Fine-tune Tokenizer Size": len(theirs),
        "Keys only in Base": len(only_base), "Keys only in Fine-tune": len(only_finetuned),
        "Keys with Mismatched Token IDs": len(moved),
        "Good Tokens in Base (%)": 100 * good[0] / max(len(ours), 1),
        "Good Tokens in Fine-tune (%)": 100 * good[1] / max(len(theirs), 1)}
    mismatches = [("only in base", t, ours[t], None) for t in only_base]
    mismatches += [("only in finetuned", t, None, theirs[t]) for t in only_finetuned]
    mismatches += [("other id", t, ours[t], theirs[t]) for t in moved]
    mismatches.sort(key=lambda item: (item[0], item[2] if item[2] is not None else item[3], item[1]))
    return TokenizerCheck(
        table, min(good[0] / max(len(ours), 1), good[1] / max(len(theirs), 1)), 1 - len(only_base) / max(len(ours), 1),
        {**_parts_agree(base, finetuned), "chat_template": _template(base) == _template(finetuned)},
        _special_differences(base, finetuned), embedding_rows, mismatches)


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
    maps = [{role: [token, tokenizer.convert_tokens_to_ids(token)]
             for role, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
            for tokenizer in (base, finetuned)]
    return {role: [maps[0].get(role), maps[1].get(role)] for role in sorted(maps[0].keys() | maps[1].keys())
            if maps[0].get(role) != maps[1].get(role)}


def choose_tokenization(check: TokenizerCheck, config: Transfer) -> str:
    """`base` or `own`, as `transfer.tokenize` says. Raises `UserError` where the choice would compute nonsense."""
    same_cuts = all(check.agrees[part] is not False for part in ("merges", "normalizer", "pre_tokenizer"))
    if config.tokenize == "auto":
        if check.usable >= config.min_usable_fraction and same_cuts:
            return "base"
    elif config.tokenize == "base":
        if check.usable < config.min_usable_fraction:
            raise UserError(
                f"transfer.tokenize: base: only {100 * check.usable:.4g} % of tokens have the same id in both tokenizers "
                f"(transfer.min_usable_fraction: {config.min_usable_fraction:g}), so the base tokenizer's ids mean other "
                "text to the finetuned model; use tokenize: own or auto")
        return "base"
    if check.shared == 0:
        raise UserError("transfer: the tokenizers share no token at all; the two models cannot be compared")
    return "own"
