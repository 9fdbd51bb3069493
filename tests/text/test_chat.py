"""Conversations as text: by the chat template, with the tokens of some roles marked, held against masks made by hand."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sae_research.config.params import Text, check_params
from sae_research.runtime.errors import UserError
from sae_research.text.chat import Reader
from sae_research.text.corpus import documents, text_fingerprint
from sae_research.text.tokens import context_chunks, long_contexts, reorder_evenly, token_contexts

SEPARATOR = 256
PLAIN = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}</{{ m['role'] }}>\n{% endfor %}"
FORGETS = """{% for m in messages %}{% set said = m['content'].split('</think>')[-1] %}\
<{{ m['role'] }}>{% if loop.last and '</think>' in m['content'] %}{{ m['content'].split('</think>')[0] }}</think>\
{% elif loop.last %}<think></think>{% endif %}{{ said | trim }}</{{ m['role'] }}>{% endfor %}"""
TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "assistant? Né"},
    {"role": "assistant", "content": " Yes: assistant. "},
    {"role": "user", "content": "assistant? Né"},
    {"role": "assistant", "content": "No."},
]
ROLES = ["assistant"]


def with_template(tokenizer: PreTrainedTokenizerFast, template: str | None, **tokens: str) -> PreTrainedTokenizerFast:
    other = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>", **tokens)
    other.chat_template = template
    return other


def marked(text: str, ranges: Any) -> list[str]:
    return [text[start:end] for start, end in ranges]


def by_hand(messages: list[dict[str, str]], roles: list[str]) -> tuple[bytes, list[bool]]:
    """What `PLAIN` makes of messages, and which bytes are of the roles."""
    data, flags = b"", []
    for message in messages:
        content = message["content"].strip().encode()
        head, tail = f"<{message['role']}>".encode(), f"</{message['role']}>\n".encode()
        data += head + content + tail
        flags += [False] * len(head) + [message["role"] in roles] * len(content) + [False] * len(tail)
    return data, flags


def write(folder: Path, rows: list[Any], column: str = "messages") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "chats.jsonl").write_text("".join(json.dumps({column: row}) + "\n" for row in rows))
    return folder


@pytest.fixture
def chats(tmp_path: Path) -> tuple[Path, list[list[dict[str, str]]]]:
    """Conversations of some turns each under one long system prompt."""
    rng, prompt = random.Random(0), " ".join(f"rule{i}" for i in range(80))
    rows = [
        [
            {"role": "system", "content": prompt},
            *(
                {"role": role, "content": f" {rng.randrange(10**9)} é {rng.randrange(10**6)}"}
                for _ in range(rng.randrange(1, 3))
                for role in ("user", "assistant")
            ),
        ]
        for _ in range(120)
    ]
    return write(tmp_path / "chats", rows), rows


def chat_text(folder: Path, roles: list[str] | None = ROLES, **changes: Any) -> Text:
    return Text(dataset=str(folder), column_name="messages", roles=roles, context_size=32, **changes)


@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        (["assistant"], ["Yes: assistant.", "No."]),
        (["user"], ["assistant? Né"] * 2),
        (["system", "assistant"], ["Be brief.", "Yes: assistant.", "No."]),
        (["tool"], []),
    ],
)
def test_the_messages_of_a_role_are_found_in_the_text(byte_tokenizer: Any, roles: list[str], expected: list[str]) -> None:
    found = Reader(with_template(byte_tokenizer, PLAIN), roles).read(TURNS, "here")
    assert found.text == by_hand(TURNS, [])[0].decode()
    assert found.said == "assistant? Né\n Yes: assistant. \nassistant? Né\nNo." and found.counted is not None
    assert marked(found.text, found.counted) == expected
    whole = Reader(with_template(byte_tokenizer, PLAIN)).read(TURNS, "here")
    assert whole.text == found.text and whole.counted is None


def test_a_template_may_rewrite_what_a_message_holds(byte_tokenizer: Any) -> None:
    thought = [*TURNS[:2], {"role": "assistant", "content": "a</think> b "}, TURNS[3], TURNS[2] | {"content": "c</think>d"}]
    found = Reader(with_template(byte_tokenizer, FORGETS), ROLES).read(thought, "here")
    assert found.text.count("</think>") == 1 and found.counted is not None
    assert marked(found.text, found.counted) == ["b", "c</think>d"]
    found = Reader(with_template(byte_tokenizer, FORGETS), ROLES).read(TURNS, "here")
    assert found.text.endswith("<assistant><think></think>No.</assistant>")
    assert marked(found.text, found.counted) == ["Yes: assistant.", "No."]


def test_today_is_always_the_same_day(byte_tokenizer: Any) -> None:
    template = "{{ date_string }}|{{ strftime_now('%Y-%m-%d') }}|{{ messages[0]['content'] }}"
    found = Reader(with_template(byte_tokenizer, template), ["system"]).read(TURNS[:1], "here")
    assert found.text == "01 Jan 2025|2025-01-01|Be brief." and marked(found.text, found.counted) == ["Be brief."]


@pytest.mark.parametrize("roles", [["assistant"], ["user", "system"]])
def test_masks_of_packed_contexts_are_those_made_by_hand(byte_tokenizer: Any, chats: Any, roles: list[str]) -> None:
    folder, rows = chats
    tokenizer, text = with_template(byte_tokenizer, PLAIN), chat_text(folder, roles)
    texts = [by_hand(row, roles) for row in rows]
    found = {data: flags for data, flags in texts}
    stream, flags = [], []
    for document in documents(text, "sae_train", Reader(tokenizer, roles)):
        data = document.text.encode()
        lead = [SEPARATOR] if stream else []
        stream += [*lead, *tokenizer(document.text, add_special_tokens=False)["input_ids"]]
        flags += [*(False for _ in lead), *found[data]]
    n = len(stream) // 31
    contexts = token_contexts(tokenizer, SEPARATOR, text, "sae_train", n * 32)
    first = torch.zeros(n, 1, dtype=torch.bool)
    assert contexts.counted is not None
    assert torch.equal(contexts.counted, torch.cat([first, torch.tensor(flags[: n * 31]).view(n, 31)], 1))
    assert torch.equal(contexts.tokens[:, 1:], torch.tensor(stream[: n * 31]).view(n, 31))
    assert contexts.counted.any()
    chunks = list(context_chunks(tokenizer, SEPARATOR, text, "sae_train", n * 32, 7))
    assert torch.equal(torch.cat([chunk.counted for chunk in chunks if chunk.counted is not None]), contexts.counted)
    mixed, rank = reorder_evenly(contexts, 5), {tuple(row): i for i, row in enumerate(contexts.tokens.tolist())}
    order = [rank[tuple(row)] for row in mixed.tokens.tolist()]
    assert mixed.counted is not None and order != sorted(order)
    assert torch.equal(mixed.counted, contexts.counted[order])


def test_without_roles_all_of_the_text_counts(byte_tokenizer: Any, chats: Any) -> None:
    tokenizer = with_template(byte_tokenizer, PLAIN)
    one, two = (token_contexts(tokenizer, SEPARATOR, chat_text(chats[0], r), "sae_train", 640) for r in (None, ROLES))
    assert one.counted is None and torch.equal(one.tokens, two.tokens)
    assert text_fingerprint(chat_text(chats[0], None), "sae_train") != text_fingerprint(chat_text(chats[0]), "sae_train")


def test_a_shared_system_prompt_makes_no_near_copies(byte_tokenizer: Any, chats: Any) -> None:
    folder, rows = chats
    found = documents(chat_text(folder), "sae_train", Reader(with_template(byte_tokenizer, PLAIN), ROLES))
    train = list(found)
    assert len(train) > 40 and found.near_copies == 0
    again = write(folder.parent / "twice", [*rows, *([{"role": "system", "content": "New."}, *row[1:]] for row in rows)])
    found = documents(chat_text(again), "sae_train", Reader(with_template(byte_tokenizer, PLAIN), ROLES))
    assert len(list(found)) == len(train), "the same conversation under another prompt is a copy"


def test_long_runs_keep_their_masks_in_a_file(byte_tokenizer: Any, chats: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, text = with_template(byte_tokenizer, PLAIN), chat_text(chats[0])
    want = token_contexts(tokenizer, SEPARATOR, text, "sae_train", 3_000)
    monkeypatch.setattr("sae_research.text.tokens.IN_MEMORY_TOKENS", 100)
    for n_tokens in (3_000, 2_000):  # written, and read of the longer one
        found = long_contexts(tokenizer, SEPARATOR, text, "sae_train", n_tokens, text_fingerprint(text, "sae_train"), 1.0)
        assert want.counted is not None and found.counted is not None
        n = len(found.tokens)
        assert torch.equal(found.tokens[0:n], want.tokens[:n]) and torch.equal(found.counted[0:n], want.counted[:n])
    tokenizer.chat_template = PLAIN.replace("trim", "upper")
    found = long_contexts(tokenizer, SEPARATOR, text, "sae_train", 2_000, text_fingerprint(text, "sae_train"), 1.0)
    assert not torch.equal(found.tokens[0:9], want.tokens[:9]), "another template makes another text"


def test_a_template_s_own_bos_is_the_separator(byte_tokenizer: Any, chats: Any) -> None:
    template = "{{ bos_token }}" + PLAIN
    tokenizer = with_template(byte_tokenizer, template, bos_token="<|endoftext|>")
    with_bos = token_contexts(tokenizer, SEPARATOR, chat_text(chats[0]), "sae_train", 640)
    without = token_contexts(with_template(byte_tokenizer, PLAIN), SEPARATOR, chat_text(chats[0]), "sae_train", 640)
    assert torch.equal(with_bos.tokens, without.tokens) and torch.equal(with_bos.counted, without.counted)  # ty: ignore


def test_parquet_holds_messages_too(byte_tokenizer: Any, chats: Any, tmp_path: Path) -> None:
    folder, rows = chats
    (tmp_path / "table").mkdir()
    pq.write_table(pa.table({"messages": rows}), tmp_path / "table" / "chats.parquet")
    tokenizer = with_template(byte_tokenizer, PLAIN)
    one, two = (
        token_contexts(tokenizer, SEPARATOR, chat_text(place), "sae_train", 640) for place in (folder, tmp_path / "table")
    )
    assert torch.equal(one.tokens, two.tokens) and torch.equal(one.counted, two.counted)  # ty: ignore


@pytest.mark.parametrize(
    ("row", "template", "roles", "message"),
    [
        (TURNS, None, ROLES, r"column 'messages' holds messages, and this model's tokenizer has no chat template"),
        (TURNS, None, None, r"column 'messages' holds messages, and this model's tokenizer has no chat template"),
        ("Hello", PLAIN, ROLES, r"column 'messages' holds text, and text.roles is for conversations"),
        ([1, 2, 3], PLAIN, ROLES, r"column 'messages' holds token ids, and text.roles is for conversations"),
        ([{"from": "human", "value": "Hello"}], PLAIN, ROLES, r"holds \{'from': 'human'.*, which is no message: each is an"),
        ([{"role": "user", "content": [{"type": "text"}]}], PLAIN, None, r"which is no message: each is an object with a"),
        ([{"role": "user", "content": None}], PLAIN, None, r"which is no message"),
        (["Hello"], PLAIN, None, r"holds 'Hello', which is no message"),
        ({"role": ["user"], "content": ["Hello"]}, PLAIN, None, r"which is no text"),
        (TURNS, "{{ raise_exception('no system here') }}", ROLES, r"refuses the messages of system, user.*: no system here"),
        (TURNS, PLAIN + "{{ messages | string | length }}", ROLES, r"writes other messages anew when message 3 changes"),
        (TURNS, PLAIN, ["model"], r"text.roles: no message of model in .*; the roles there are assistant, system, user"),
    ],
)
def test_what_is_no_conversation_is_said_in_one_line(
    byte_tokenizer: Any, tmp_path: Path, row: Any, template: str | None, roles: list[str] | None, message: str
) -> None:
    own = [" ".join(f"{i}.{j}" for j in range(20)) for i in range(60)]
    rows = [row] if row is not TURNS else [[*TURNS, {"role": "user", "content": content}] for content in own]
    text = chat_text(write(tmp_path / "rows", rows), roles)
    with pytest.raises(UserError, match=message) as caught:
        token_contexts(with_template(byte_tokenizer, template), SEPARATOR, text, "sae_train", 320)
    assert "\n" not in str(caught.value)


def test_one_role_of_several_that_never_occurs_is_noted_once(byte_tokenizer: Any, chats: Any, capsys: Any) -> None:
    text, tokenizer = chat_text(chats[0], ["assistant", "tool"]), with_template(byte_tokenizer, PLAIN)
    for _ in range(2):
        token_contexts(tokenizer, SEPARATOR, text, "sae_train", 320)
    assert capsys.readouterr().err.count("text.roles: no message of tool in") == 1


def test_packaged_text_has_no_roles(byte_tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"text.roles: the packaged text holds no conversations"):
        token_contexts(byte_tokenizer, SEPARATOR, Text(roles=ROLES), "sae_train", 320)
    with pytest.raises(UserError, match=r"text\.roles"):
        check_params({"text": {"roles": []}}, "here")
