"""Token contexts: the packing, token by token, and running out of text."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sae_research.config.params import Text
from sae_research.runtime.errors import UserError
from sae_research.text.corpus import documents
from sae_research.text.tokens import token_contexts

SEPARATOR = 256


@pytest.fixture
def text(tmp_path: Path) -> Text:
    for number in range(200):
        (tmp_path / f"{number:03}.txt").write_text(f"Text {number}: " + "naïve words, " * (number % 7))
    return Text(dataset=str(tmp_path), context_size=16)


def test_packing_is_exact(byte_tokenizer: PreTrainedTokenizerFast, text: Text) -> None:
    found = token_contexts(byte_tokenizer, SEPARATOR, text, "sae_train", 1_000)
    assert found.tokens.shape == found.doc_ids.shape == (63, 16)  # 63 * 16 >= 1,000
    assert found.tokens.dtype == torch.int64 and found.doc_ids.dtype == torch.int32
    assert (found.tokens[:, 0] == SEPARATOR).all() and (found.doc_ids[:, 0] == -1).all()

    stream: list[int] = []
    for document in documents(text, "sae_train"):
        ids = byte_tokenizer(document.text, add_special_tokens=False)["input_ids"]
        stream += [SEPARATOR, *ids] if stream else ids
    assert found.tokens[:, 1:].flatten().tolist() == stream[: 63 * 15]


def test_tokens_decode_back_to_their_documents(byte_tokenizer: PreTrainedTokenizerFast, text: Text) -> None:
    found = token_contexts(byte_tokenizer, SEPARATOR, text, "sae_train", 1_000)
    originals = list(documents(text, "sae_train"))
    assert ((found.tokens == SEPARATOR) == (found.doc_ids == -1)).all()
    assert len(found.documents) == len(found.sources) == int(found.doc_ids.max()) + 1
    for index, (doc_id, source) in enumerate(zip(found.documents, found.sources, strict=True)):
        decoded = byte_tokenizer.decode(found.tokens[found.doc_ids == index])
        assert (doc_id, source) == originals[index][1:3]
        if index + 1 < len(found.documents):
            assert decoded == originals[index].text
        else:  # cut where the last context ends
            assert originals[index].text.encode().startswith(decoded.encode().rstrip("\ufffd".encode()))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_tokenised_rows_are_what_their_text_is(
    byte_tokenizer: PreTrainedTokenizerFast, text: Text, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    texts = [file.read_text() for file in sorted(Path(text.dataset).glob("*.txt"))]
    rows = pd.DataFrame(
        {"input_ids": [[SEPARATOR, *byte_tokenizer(content, add_special_tokens=False)["input_ids"]] for content in texts]}
    )
    folder = tmp_path_factory.mktemp("rows")
    path = folder / f"rows.{suffix}"
    rows.to_parquet(path) if suffix == "parquet" else rows.to_json(path, orient="records", lines=True)
    tokenised = Text(dataset=str(folder), column_name="input_ids", context_size=16)
    want = token_contexts(byte_tokenizer, SEPARATOR, text, "sae_train", 1_000)
    assert torch.equal(token_contexts(byte_tokenizer, SEPARATOR, tokenised, "sae_train", 1_000).tokens, want.tokens)
    path.unlink()
    (folder / "bad.jsonl").write_text('{"input_ids": [5, 300000]}\n')
    with pytest.raises(UserError, match="token ids that are not this model's .ids 5 to 300000, the vocabulary has"):
        token_contexts(byte_tokenizer, SEPARATOR, tokenised, "sae_train", 1_000)


def test_longer_streams_begin_with_shorter_ones(byte_tokenizer: PreTrainedTokenizerFast, text: Text) -> None:
    short = token_contexts(byte_tokenizer, SEPARATOR, text, "core_eval", 100)
    long = token_contexts(byte_tokenizer, SEPARATOR, text, "core_eval", 400)
    assert torch.equal(long.tokens[: len(short.tokens)], short.tokens)
    assert long.documents[: len(short.documents)] == short.documents


def test_packaged_text_is_never_short_of_the_defaults(byte_tokenizer: PreTrainedTokenizerFast) -> None:
    found = token_contexts(byte_tokenizer, SEPARATOR, Text(), "sae_train", 100_000)
    assert found.tokens.shape == (782, 128) and len(set(found.sources)) > 15


def test_running_out_says_how_much_there_was(byte_tokenizer: PreTrainedTokenizerFast, text: Text) -> None:
    with pytest.raises(UserError, match=r"ends after [\d,]+ of 1,000,000 tokens \(0\.\d%, \d+ documents\)"):
        token_contexts(byte_tokenizer, SEPARATOR, text, "sae_train", 1_000_000)


def test_a_split_without_documents(byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "only.txt").write_text("The capital of France is Paris.")  # belongs to one split of the four
    ends = 0
    for split in ("sae_train", "core_eval", "probe_train", "probe_test"):
        with pytest.raises(UserError) as error:
            token_contexts(byte_tokenizer, SEPARATOR, Text(dataset=str(tmp_path)), split, 1_000)
        ends += "0 documents" in str(error.value)
    assert ends == 3
