"""A model small enough for any test: a random Llama with a byte-level tokenizer, saved to a folder."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEPARATOR = "<|endoftext|>"
WORDS = (
    "the a of to and in that it was for on with as his her they at be this from have not or by one had but "
    "what all were when we there can an your which their said if do will each about how up out them then she "
    "many some so these would other into has more two like him see time could no make than first been its "
    "who now people my made over did down only way find use may water long little very after words called "
    "just where most know"
).split()


def make_tiny_model(folder: str | Path, d_model: int = 32, n_layers: int = 3, seed: int = 0) -> Path:
    """Save a random Llama and a byte-level BPE tokenizer with `<|endoftext|>`;
    `load_language_model(str(folder))`."""
    folder = Path(folder)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        hidden_size=d_model,
        intermediate_size=2 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        bos_token_id=None,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.convert_tokens_to_ids(SEPARATOR),
        initializer_range=0.3,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_tiny_text(folder: str | Path, n_documents: int = 300, n_words: int = 60, seed: int = 0) -> Path:
    """A folder with `documents.jsonl` (column `text`) of distinct random sentences, enough for every
    split."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=n_words))}) for _ in range(n_documents)]
    (folder / "documents.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 400 tokens at most, with `<|endoftext|>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[SEPARATOR],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([" ".join(WORDS), " ".join(reversed(WORDS))], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SEPARATOR)
