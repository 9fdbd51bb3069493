"""What each token id looks like as text."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_SENTENCEPIECE_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def token_strings(tokenizer: PreTrainedTokenizerBase, n: int | None = None) -> list[str]:
    """The text of ids 0 to n - 1 (default: the whole vocabulary), leading spaces kept; ids without a token are empty.

    A token that is part of a character only, and so no text of its own, shows as the tokenizer's name for it.
    """
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    texts = tokenizer.batch_decode([[i] for i in range(len(pieces))], clean_up_tokenization_spaces=False)
    shown = [_shown(piece or "", text) for piece, text in zip(pieces, texts, strict=True)]
    n = len(shown) if n is None else n
    return (shown + [""] * (n - len(shown)))[:n]


def _shown(piece: str, text: str) -> str:
    if _SENTENCEPIECE_SPACE in piece:  # a decoder drops the space that leads a text
        return piece.replace(_SENTENCEPIECE_SPACE, " ")
    return piece if _REPLACEMENT in text else text
