"""Model folders with something wrong: one line each, and never random weights, no text or too long a context."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from sae_research.lm import load_language_model
from sae_research.runtime.errors import UserError

WEIGHTS = "model.safetensors"


def _tensors(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})

    return edit


def _config(**values: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return edit


def _cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def _instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return edit


def _unknown_only(folder: Path) -> None:
    vocabulary = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, unk_token="[UNK]", eos_token="</s>").save_pretrained(folder)


BROKEN = {
    "prefix": (
        _tensors(lambda t: {f"_orig_mod.{key}": value for key, value in t.items()}),
        "lack .*model.embed_tokens.weight.* hold instead _orig_mod.model",
    ),
    "missing": (
        _tensors(lambda t: {key: value for key, value in t.items() if "layers.1.mlp" not in key}),
        "lack model.layers.1.mlp.down_proj.weight.* would be random",
    ),
    "shape": (_tensors(lambda t: t | {"model.norm.weight": torch.ones(16)}), r"do not fit .*model.norm.weight \(\(16,\)"),
    "width": (_config(hidden_size=16), "do not fit its config.json: model.embed_tokens"),
    "untied": (_config(tie_word_embeddings=False), "lack lm_head.weight"),
    "layers": (_config(num_hidden_layers=10**6), "1000000 layers"),
    "words": (_config(hidden_size="many"), "config.json that transformers cannot use"),
    "huge": (_config(hidden_size=10**18), "is not a causal language model|do not fit"),
    "activation": (_config(hidden_act="nothing"), "is not a causal language model"),
    "cut config": (_cut("config.json", 100), "config.json in .* is damaged"),
    "empty weights": (_cut(WEIGHTS, 0), "model.safetensors in .* is damaged or cut short"),
    "cut weights": (_cut(WEIGHTS, 5000), "model.safetensors in .* is damaged or cut short"),
    "pipe": (_instead(WEIGHTS, os.mkfifo), "model.safetensors in .* is no file"),
    "pipe for a tokenizer": (_instead("tokenizer.json", os.mkfifo), "tokenizer.json in .* is no file"),
    "folder": (_instead(WEIGHTS, Path.mkdir), "model.safetensors in .* is no file"),
    "dead link": (_instead(WEIGHTS, lambda path: path.symlink_to("nowhere")), "model.safetensors in .* is no file"),
    "pickle": (_instead(WEIGHTS, lambda path: path.with_name("pytorch_model.bin").write_bytes(b"abc")), "cannot|is not"),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "must turn text into tokens"),
    "cut tokenizer": (_cut("tokenizer.json", 300), "no tokenizer that can be read"),
    "only unknown tokens": (_unknown_only, "nothing but special and unknown tokens of plain text"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_folder_is_one_line(what: str, tiny_inputs: Path, tmp_path: Path) -> None:
    edit, match = BROKEN[what]
    folder = tmp_path / "model"
    shutil.copytree(tiny_inputs / "tiny", folder)
    edit(folder)
    with pytest.raises(UserError, match=match) as caught:
        load_language_model(str(folder), "cpu")
    assert "\n" not in str(caught.value)


def test_a_family_with_a_tokenizer_of_its_own_needs_its_files(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2)).save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="must turn text into tokens"):
        load_language_model(str(tmp_path / "gpt2"), "cpu")


def test_weights_without_use_are_named(tiny_inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = shutil.copytree(tiny_inputs / "tiny", tmp_path / "model")
    _tensors(lambda t: t | {"extra.head.weight": torch.ones(3)})(folder)
    lm = load_language_model(str(folder), "cpu")
    assert "no use for its weights extra.head.weight" in capsys.readouterr().out
    assert lm.n_layers == 3


def test_a_context_longer_than_the_positions_is_refused(tiny_inputs: Path) -> None:
    lm = load_language_model(str(tiny_inputs / "tiny"), "cpu")
    long, hook = torch.zeros(1, 257, dtype=torch.long), "blocks.1.hook_resid_post"
    for ask in (
        lambda: lm.logits(long),
        lambda: lm.activations(long, hook),
        lambda: lm.activations_at(long, [hook]),
        lambda: lm.patched_logits(long, hook, lambda acts: acts),
        lambda: lm.generate(long[:, :250], 8),
        lambda: lm.resume(hook, torch.zeros(1, 257, 32), long),
    ):
        with pytest.raises(UserError, match="has 256 positions, a context of 257 tokens"):
            ask()
    assert lm.logits(long[:, :256]).shape[1] == 256
    assert lm.generate(long[:, :250], 7).shape == (1, 7)


def test_home_and_a_file_called_fingerprint(tiny_inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = shutil.copytree(tiny_inputs / "tiny", tmp_path / "model")
    (folder / "fingerprint.json").write_text('{"fingerprint": "claimed"}')
    lm = load_language_model("~/model", "cpu")
    assert lm.fingerprint == load_language_model(str(tiny_inputs / "tiny"), "cpu").fingerprint != "claimed"
    with pytest.raises(UserError, match="no such folder"):
        load_language_model("~/absent", "cpu")
