"""Texts too long for memory: the same tokens from a file, in memory that stays flat."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from sae_research.config.params import Text
from sae_research.runtime.cache import CHECKSUMS, damage, held, prune, remove_unheld
from sae_research.runtime.errors import UserError
from sae_research.text import corpus, tokens
from sae_research.text.tokens import StoredContexts, contexts_sha256, long_contexts, token_contexts
from tests.helpers.damage import DAMAGES

SEPARATOR, SPLIT = 256, "sae_train"


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Text:
    """Documents of 20 to 200 letters, every third one twice."""
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(tokens, "IN_MEMORY_TOKENS", 1_000)
    monkeypatch.setattr(tokens, "CHUNK_TOKENS", 700)
    monkeypatch.setattr(corpus, "HASHES_IN_MEMORY", 8)
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = [
        json.dumps({"text": f"{number}: " + "word " * (4 + number % 37)})
        for number in range(400)
        for _ in range(1 + (number % 3 == 0))
    ]
    (folder / "rows.jsonl").write_text("\n".join(lines))
    return Text(dataset=str(folder), context_size=16)


def contexts(tokenizer: PreTrainedTokenizerFast, text: Text, n_tokens: int, max_gb: float = 1.0):
    fingerprint = corpus.text_fingerprint(text, SPLIT)
    return long_contexts(tokenizer, SEPARATOR, text, SPLIT, n_tokens, fingerprint, max_gb).tokens


def cached(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / ".cache/tokens").iterdir())


def test_a_file_holds_what_memory_would(byte_tokenizer: PreTrainedTokenizerFast, text: Text, tmp_path: Path) -> None:
    found = contexts(byte_tokenizer, text, 10_000)
    want = token_contexts(byte_tokenizer, SEPARATOR, text, SPLIT, 10_000).tokens
    assert isinstance(found, StoredContexts) and found.shape == want.shape == (625, 16)
    assert found.numel() == want.numel() and len(found) == len(want)
    for rows in (slice(0, 5), slice(3, None), slice(620, 900), slice(700, 800), slice(None)):
        assert torch.equal(found[rows], want[rows]) and found[rows].dtype == want.dtype
    assert contexts_sha256(found) == contexts_sha256(want) == hashlib.sha256(want.numpy().tobytes()).hexdigest()
    short = contexts(byte_tokenizer, text, 1_000)
    assert isinstance(short, torch.Tensor) and torch.equal(short, found[:63])


def test_the_file_is_made_once_and_serves_shorter_runs(
    byte_tokenizer: PreTrainedTokenizerFast, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    early = contexts(byte_tokenizer, text, 3_000)
    late = contexts(byte_tokenizer, text, 6_000)  # takes its place, for who reads the first nothing changes
    [path] = cached(tmp_path)
    used = path / CHECKSUMS
    before = used.stat().st_mtime
    os.utime(used, (before - 100, before - 100))
    with monkeypatch.context() as patch:
        patch.setattr(tokens, "context_chunks", None)
        again = contexts(byte_tokenizer, text, 2_000)
    assert torch.equal(again[:], late[:125]) and torch.equal(early[:], late[:188]) and used.stat().st_mtime > before - 1
    other = Text(dataset=text.dataset, context_size=32)
    contexts(byte_tokenizer, other, 2_000)
    assert len(cached(tmp_path)) == 2
    contexts(byte_tokenizer, Text(dataset=text.dataset, context_size=64), 6_000, max_gb=3e-5)
    assert len(cached(tmp_path)) == 1  # the least recently used went
    assert torch.equal(late[100:120], token_contexts(byte_tokenizer, SEPARATOR, text, SPLIT, 6_000).tokens[100:120])


def test_nothing_half_written_stays(byte_tokenizer: PreTrainedTokenizerFast, text: Text, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"ends after [\d,]+ of 1,000,000 tokens"):
        contexts(byte_tokenizer, text, 1_000_000)
    assert not cached(tmp_path)
    leftover = tmp_path / ".cache/tokens" / ".abc-1.xyz.tmp"  # of a process that was killed
    leftover.mkdir()
    (leftover / "ids").write_bytes(b"half")
    contexts(byte_tokenizer, text, 2_000)
    assert not leftover.exists() and len(cached(tmp_path)) == 1


@pytest.mark.parametrize("kind", DAMAGES)
def test_a_damaged_file_is_made_again(
    kind: str, byte_tokenizer: PreTrainedTokenizerFast, text: Text, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    want = contexts(byte_tokenizer, text, 3_000)[:]
    [path] = cached(tmp_path)
    DAMAGES[kind](path / "tokens.int32")
    assert torch.equal(contexts(byte_tokenizer, text, 2_000)[:], want[:125])
    assert "tokens.int32" in capsys.readouterr().out
    assert [damage(entry) for entry in cached(tmp_path)] == [None], "what was damaged is gone"


def test_the_switch_passes_over_the_file(
    byte_tokenizer: PreTrainedTokenizerFast, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts(byte_tokenizer, text, 3_000)
    monkeypatch.setenv("SAE_RESEARCH_NO_CACHE", "1")
    monkeypatch.setattr(tokens, "context_chunks", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        contexts(byte_tokenizer, text, 2_000)
    assert len(cached(tmp_path)) == 1


def test_what_a_process_holds_is_not_pruned(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(bytes(1000))
    with held(tmp_path / "a"), held(tmp_path / "a"), held(tmp_path / "new"):
        assert not remove_unheld(tmp_path / "a") and not remove_unheld(tmp_path / "new")
        assert prune(tmp_path, 0) == [tmp_path / "b"]
    assert {path.name for path in prune(tmp_path, -1)} == {"a", "new"} and remove_unheld(tmp_path / "a")


def peak_growth(work) -> int:
    """By how many bytes this process' peak of resident memory rises above where it stands."""
    status = Path("/proc/self/status")

    def value(key: str) -> int:
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = value("VmRSS")
    work()
    return value("VmHWM") - before


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="Linux counts peaks")
def test_memory_stays_flat(byte_tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    monkeypatch.setattr(tokens, "IN_MEMORY_TOKENS", 0)
    monkeypatch.setattr(corpus, "HASHES_IN_MEMORY", 64)
    (tmp_path / "texts").mkdir()
    letters = np.random.default_rng(0).integers(97, 123, 4_500_000, np.uint8).tobytes().decode()
    with (tmp_path / "texts/rows.jsonl").open("w") as rows:
        for start in range(0, len(letters), 600):
            rows.write(json.dumps({"text": letters[start : start + 600]}) + "\n")
    text = Text(dataset=str(tmp_path / "texts"), context_size=128)

    def read(n_tokens: int) -> None:
        found = contexts(byte_tokenizer, text, n_tokens)
        contexts_sha256(found)
        for start in range(0, len(found), 128):
            found[start : start + 128].sum()

    read(200_000)  # whatever is made once
    grown = peak_growth(lambda: read(2_000_000))
    assert grown < 8e6  # as a tensor alone it would be 16 MB
