"""A tiny base model, finetunes of it with other weights, vocabularies and tokenizers, and an SAE in a project of its own."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from sae_research.config.params import Params, Text
from sae_research.lm import LanguageModel, load_language_model
from sae_research.saes import save_sae
from sae_research.transfer.loading import Pair
from sae_research.transfer.text import TextSource
from tests.helpers.tiny_model import SEPARATOR, WORDS
from tests.helpers.tiny_saes import tiny_sae

HOOK, DEEPER = "blocks.1.hook_resid_post", "blocks.0.hook_mlp_out"


@pytest.fixture(scope="session")
def models_folder(tiny_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`near/` (weights a little off), `resized/` (seven rows more), `other_tokenizer/`."""
    folder = tmp_path_factory.mktemp("finetunes")
    torch.manual_seed(1)
    for name in ("near", "resized"):
        model = AutoModelForCausalLM.from_pretrained(tiny_inputs / "tiny")
        tokenizer = AutoTokenizer.from_pretrained(tiny_inputs / "tiny")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter) * parameter.std())
        if name == "resized":
            tokenizer.add_tokens([f"<extra_{i}>" for i in range(3)])
            model.resize_token_embeddings(len(tokenizer) + 4)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    shutil.copytree(folder / "near", folder / "other_tokenizer")
    other = _other_tokenizer()
    other.save_pretrained(folder / "other_tokenizer")
    model = AutoModelForCausalLM.from_pretrained(folder / "other_tokenizer")
    model.resize_token_embeddings(len(other))
    model.save_pretrained(folder / "other_tokenizer")
    return folder


def _other_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level as the base's, but with merges learnt from half of the words: it cuts the others differently."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=[SEPARATOR], show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([" ".join(WORDS[::2])], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SEPARATOR)


@pytest.fixture(scope="session")
def base(tiny_inputs: Path) -> LanguageModel:
    return load_language_model(str(tiny_inputs / "tiny"), "cpu")


@pytest.fixture(scope="session")
def finetunes(models_folder: Path) -> dict[str, LanguageModel]:
    return {path.name: load_language_model(str(path), "cpu") for path in sorted(models_folder.iterdir())}


def params_for(inputs: Path, **transfer: Any) -> Params:
    """Keyword arguments change the section `transfer`."""
    return Params.model_validate(
        {
            "model": {"name": str(inputs / "tiny"), "device": "cpu"},
            "eval_types": {"transfer": True},
            "text": {"dataset": str(inputs / "texts"), "context_size": 24},
            "transfer": {
                "sae": {"name": "topk"},
                "hooks": [DEEPER],
                "tokens": 1000,
                "patched_tokens": 240,
                "batch_size": 8,
                "own_finetune": {"source": None, "steps": 3, "moved_tokens": 96},
                "controls": {"tokens": 480, "patched_tokens": 96},
                "repair": {"tokens": 480, "held_out_tokens": 240, "batch_size": 64},
                **transfer,
            },
        }
    )


@pytest.fixture
def make_params(tiny_inputs: Path, in_project: Path) -> Any:
    """Parameters of a project with one prepared SAE."""
    save_sae(tiny_sae("topk", model_name=str(tiny_inputs / "tiny"), context_size=24), in_project / "downloaded_saes/topk")
    return partial(params_for, tiny_inputs)


@pytest.fixture(scope="session")
def make_pair(base: LanguageModel, finetunes: dict[str, LanguageModel], tiny_inputs: Path) -> Any:
    """A pair with one of the finetunes, the base model itself by the name `self`."""

    def make(name: str, own: bool = False, form: str = "topk", **transfer: Any) -> Pair:
        params = params_for(tiny_inputs, **transfer)
        text = Text(dataset=params.text.dataset, context_size=24)
        finetuned = base if name == "self" else finetunes[name]
        saes = {"base": tiny_sae(form, model_name=base.name)}
        return Pair(base, finetuned, saes, (DEEPER, HOOK), TextSource(text, "core_eval", own), params)

    return make
