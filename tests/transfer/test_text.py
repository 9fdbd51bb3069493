"""Tokenizer check, text that both models read, tokens matched by their place, models whose vocabularies differ."""

from __future__ import annotations

import math
from itertools import islice
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from sae_research.config.params import Text
from sae_research.config.transfer import Transfer
from sae_research.runtime.errors import UserError
from sae_research.text.corpus import documents
from sae_research.text.tokens import token_contexts
from sae_research.transfer.loading import check_tokenizers, choose_tokenization
from sae_research.transfer.losses import patched_losses
from sae_research.transfer.sweep import sweep
from sae_research.transfer.text import align, batches, contexts, windows


def test_contexts_are_those_of_the_stream(base: Any, make_params: Any) -> None:
    text = Text(dataset=make_params().text.dataset, context_size=24)
    want = token_contexts(base.tokenizer, base.separator_id, text, "core_eval", 1000).tokens
    got = list(islice(contexts(base.tokenizer, base.separator_id, documents(text, "core_eval"), 24), len(want)))
    assert torch.equal(torch.tensor(got), want)


def test_tables_of_the_check(base: Any, finetunes: Any) -> None:
    ours = base.tokenizer
    same = check_tokenizers(ours, finetunes["near"].tokenizer, (400, 400))
    assert list(same.table.values()) == [len(ours), len(ours), 0, 0, 0, 100.0, 100.0]
    assert same.usable == 1 and not same.mismatches and all(same.agrees.values())
    resized = check_tokenizers(ours, finetunes["resized"].tokenizer, (400, 407))
    assert resized.table["Keys only in Fine-tune"] == 3 and resized.usable == pytest.approx(len(ours) / (len(ours) + 3))
    assert [item[1] for item in resized.mismatches] == ["<extra_0>", "<extra_1>", "<extra_2>"]
    other = check_tokenizers(ours, finetunes["other_tokenizer"].tokenizer, (400, 330))
    assert other.agrees["merges"] is False and other.usable < 0.9 and other.table["Keys with Mismatched Token IDs"] > 0
    assert sum(kind == "other id" for kind, *_ in other.mismatches) == other.table["Keys with Mismatched Token IDs"]
    assert other.table["Good Tokens in Base (%)"] == pytest.approx(
        100 * (len(ours) - other.table["Keys only in Base"] - other.table["Keys with Mismatched Token IDs"]) / len(ours)
    )


def test_special_tokens_and_chat_template(tiny_inputs: Any) -> None:
    one, other = (AutoTokenizer.from_pretrained(tiny_inputs / "tiny") for _ in range(2))
    other.add_special_tokens({"pad_token": "<pad>"})
    other.chat_template = "{{ messages }}"
    found = check_tokenizers(one, other, (400, 401))
    assert found.agrees["chat_template"] is False
    assert found.special_tokens == {"pad_token": [None, ["<pad>", len(one)]]}


def test_choice_of_tokenization(base: Any, finetunes: Any) -> None:
    same = check_tokenizers(base.tokenizer, finetunes["near"].tokenizer, (400, 400))
    other = check_tokenizers(base.tokenizer, finetunes["other_tokenizer"].tokenizer, (400, 330))
    assert [choose_tokenization(found, Transfer()) for found in (same, other)] == ["base", "own"]
    with pytest.raises(UserError, match=r"only .* % of tokens have the same id"):
        choose_tokenization(other, Transfer(tokenize="base"))
    with pytest.raises(UserError, match="share no token at all"):
        choose_tokenization(other._replace(shared=0.0), Transfer())


def test_alignment_by_place() -> None:
    # "ab cd": one side cuts [ab][cd], the other [a][b][cd]; white space was left out of the spans
    assert align(([(0, 2), (3, 5)], [(0, 1), (1, 2), (3, 5)])) == [(1, 2)]
    assert align(([(0, 1), (0, 1)], [(0, 1)])) == [(1, 0)], "the last byte of a character has read it whole"


def test_matched_tokens_stand_for_the_same_text(make_pair: Any) -> None:
    pair = make_pair("other_tokenizer", own=True)
    batch = next(batches(pair.base, pair.finetuned, pair.source, 200, 8))
    ones, others = (
        side.tokens.flatten()[index].tolist() for side, index in zip((batch.base, batch.finetuned), batch.pairs, strict=True)
    )
    assert len(ones) > 50
    assert [pair.base.tokenizer.decode([i]).strip() for i in ones] == [
        pair.finetuned.tokenizer.decode([i]).strip() for i in others
    ]
    row = next(windows(pair.base, pair.finetuned, documents(pair.source.text, "core_eval"), 24))
    assert len(row.ids[0]) <= 23 and row.n_bytes == len(pair.base.tokenizer.decode(row.ids[0]).encode())


def test_equal_tokenizers_of_their_own_match_every_token(make_pair: Any) -> None:
    tokens = sweep(make_pair("near", own=True), 300).tokens
    assert tokens["aligned"] == tokens["counted_base"] > 200 and tokens["base"] == tokens["finetuned"]


def test_own_tokenizers_bits_per_byte(make_pair: Any) -> None:
    pair = make_pair("other_tokenizer", own=True)
    statistics = sweep(pair, 700)
    assert 0.2 < statistics.tokens["aligned"] / statistics.tokens["counted_base"] < 1
    assert statistics.tokens["finetuned"] != statistics.tokens["base"]
    losses = patched_losses(pair, statistics.first, 400)
    assert "clean_kl" not in losses, "other ids, no KL"
    for model, lm in pair.models.items():
        nats = size = 0.0
        for batch in batches(pair.base, pair.finetuned, pair.source, 400, 8):
            side = batch.sides[model]
            log_p = lm.logits(side.tokens).log_softmax(-1)[:, :-1].gather(2, side.tokens[:, 1:, None])[..., 0]
            nats -= float(log_p[side.real[:, 1:]].sum())
            size += float(batch.text_bytes.sum())
        got = losses["models"][model]["kept"]["bits_per_byte_clean"]["value"]
        assert got == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_resized_vocabulary_loads_as_it_is(make_pair: Any, base: Any) -> None:
    pair = make_pair("resized")
    assert pair.finetuned.vocab_size == base.vocab_size + 7
    losses = patched_losses(pair, sweep(pair, 400).first, 200)
    assert losses["clean_kl"]["value"] >= 0 and losses["models"]["finetuned"]["kept"]["ce_clean"]["value"] > 0


def test_tokenizers_that_hardly_meet(make_pair: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_research.transfer.sweep.MIN_ALIGNED", 0.999)
    with pytest.raises(UserError, match="stand in the same place"):
        sweep(make_pair("other_tokenizer", own=True), 400)


def test_text_that_runs_out(make_pair: Any) -> None:
    with pytest.raises(UserError, match="ends after"):
        for _ in batches(*make_pair("near").models.values(), make_pair("near").source, 10**7, 512):
            pass
