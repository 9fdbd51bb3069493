"""Models of known shapes with random weights, and text of made-up words: what speed on a GPU is measured on.

Nothing is downloaded: a model's speed does not depend on what its weights are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma2Config, GPTNeoXConfig, PretrainedConfig, PreTrainedTokenizerFast

from sae_research.lm import LanguageModel

SEPARATOR, PAD = "<|endoftext|>", "<pad>"


class Shape(NamedTuple):
    """A model and the SAEs that are usual on it."""

    config: PretrainedConfig
    layer: int
    """SAEs read the residual stream after it."""
    d_sae: int

    @property
    def hook(self) -> str:
        return f"blocks.{self.layer}.hook_resid_post"


def shapes(small: bool) -> dict[str, Shape]:
    """By name; with `small` a model that a CPU runs in a second stands for all."""
    if small:
        return {"tiny": Shape(_pythia(64, 3, 4, 512), 1, 256)}
    gemma = Gemma2Config(
        vocab_size=256_000,
        hidden_size=2304,
        intermediate_size=9216,
        num_hidden_layers=26,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=256,
    )
    return {"Pythia-70M": Shape(_pythia(512, 6, 8, 50_304), 3, 16_384), "Gemma-2-2B": Shape(gemma, 12, 16_384)}


def _pythia(width: int, layers: int, heads: int, vocabulary: int) -> GPTNeoXConfig:
    return GPTNeoXConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
    )


def random_model(name: str, shape: Shape, device: torch.device, dtype: torch.dtype) -> LanguageModel:
    """The model with random weights, made on the device."""
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(shape.config, dtype=dtype)
    config: Any = shape.config
    return LanguageModel(model, tokenizer(config.vocab_size), f"{name}'s shape", f"random {name}")


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """One that knows `word2`, `word3`, ... up to the vocabulary's size."""
    ids = {SEPARATOR: 0, PAD: 1} | {f"word{i}": i for i in range(2, vocabulary)}
    plain = Tokenizer(models.WordLevel(ids, unk_token=PAD))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=SEPARATOR, pad_token=PAD)


def random_tokens(vocabulary: int, n: int, context: int) -> Tensor:
    """Contexts [n / context, context], the separator in front of each."""
    tokens = torch.randint(2, vocabulary, (-(-n // context), context), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 0
    return tokens


def write_text(folder: Path, vocabulary: int, documents: int, words: int = 150) -> str:
    """A folder with random documents."""
    folder.mkdir(parents=True)
    rows = torch.randint(2, vocabulary, (documents, words), generator=torch.Generator().manual_seed(1)).tolist()
    lines = (json.dumps({"text": " ".join(f"word{i}" for i in row)}) for row in rows)
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder)


def write_tasks(folder: Path, vocabulary: int, texts: int, words: int = 60) -> tuple[str, str]:
    """(a task of four classes, one of two crossed pairs), texts of each class holding more of its words than others do."""
    folder.mkdir(parents=True)
    g = torch.Generator().manual_seed(2)
    quarter = vocabulary // 4
    rows = []
    for label, second in ((a, b) for a in range(2) for b in range(2)):
        ids = torch.randint(2, vocabulary, (texts, words), generator=g)
        ids[:, ::4] = torch.randint(2, quarter, ids[:, ::4].shape, generator=g) + label * quarter
        ids[:, 1::4] = torch.randint(2, quarter, ids[:, 1::4].shape, generator=g) + (2 + second) * quarter - 2
        for row in ids.tolist():
            text = " ".join(f"word{i}" for i in row)
            rows.append({"text": text, "label": f"class {label}", "second_label": f"kind {second}"})
    classes = [{"text": row["text"], "label": f"{row['label']}, {row['second_label']}"} for row in rows]
    paths = folder / "classes.jsonl", folder / "crossed.jsonl"
    for path, lines in zip(paths, (classes, rows), strict=True):
        path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return str(paths[0]), str(paths[1])
