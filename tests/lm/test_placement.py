"""A language model in parts, in main memory and on disk, against the whole one."""

from __future__ import annotations

import gc
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import Gemma2Config, GPT2Config, GPTNeoXConfig, LlamaConfig, PretrainedConfig

from sae_research.config.params import ActivationCaching, check_params
from sae_research.lm import LanguageModel, SharedPrefixes, collect_hooks, load_configured, load_language_model
from sae_research.lm.generate import unembedding
from sae_research.lm.placement import Loading, whole_state
from sae_research.runtime.errors import UserError
from sae_research.transfer.finetune import perturbed_model, weights_moved

HOOKS = ("hook_resid_pre", "hook_resid_post", "hook_mlp_out", "hook_attn_out", "attn.hook_z")
SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
FAMILIES = {
    "llama": LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=False),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=4, n_head=4),
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=48),
    "gemma2": Gemma2Config(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8),
}
TOKENIZER = types.SimpleNamespace(get_vocab=dict, bos_token_id=1, eos_token_id=2, pad_token_id=None, all_special_ids=[1, 2])
CPU = torch.device("cpu")


def half_on_disk(model: Any) -> dict[str, str]:
    """A limit of memory under which about half of the layers lie on disk."""
    return {"cpu": f"{0.66e-3 * model.get_memory_footprint():.0f}KB"}


def both(config: PretrainedConfig, folder: Path, dtype: torch.dtype) -> tuple[LanguageModel, LanguageModel]:
    """The model in one part and in two."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Auto.from_config(config).save_pretrained(folder)
    whole = Auto.from_pretrained(folder, dtype=dtype)
    loading = Loading(CPU, dtype, "auto", half_on_disk(whole))
    parts = LanguageModel(Auto.from_pretrained(folder, dtype=dtype, **loading.options), TOKENIZER, "parts", "")
    parts.loading = loading
    assert set(parts.model.hf_device_map.values()) == {"cpu", "disk"}, parts.model.hf_device_map
    return LanguageModel(whole, TOKENIZER, "whole", ""), parts


@pytest.mark.parametrize(("family", "dtype"), [*((family, torch.float32) for family in FAMILIES), ("llama", torch.bfloat16)])
def test_every_hook_and_resume_give_the_whole_model_s_numbers(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    whole, parts = both(FAMILIES[family], tmp_path, dtype)
    assert parts.can_resume and parts.device == CPU and parts.dtype == dtype
    tokens, wanted = torch.randint(3, 97, (3, 24)), torch.tensor([4, 23])
    logits = whole.logits(tokens)
    assert torch.equal(parts.logits(tokens), logits)
    assert torch.equal(parts.logits(tokens, wanted), whole.logits(tokens, wanted))
    for layer in (0, 3):  # one in memory and one on disk
        for kind in HOOKS:
            hook = f"blocks.{layer}.{kind}"
            acts = whole.activations(tokens, hook)
            assert parts.d_in(hook) == whole.d_in(hook)
            assert torch.equal(parts.activations(tokens, hook), acts), hook
            assert torch.equal(parts.resume(hook, acts, tokens), whole.resume(hook, acts, tokens)), hook
            edited = whole.patched_logits(tokens, hook, torch.zeros_like)
            assert torch.equal(parts.patched_logits(tokens, hook, torch.zeros_like), edited), hook
            assert not torch.equal(edited, logits), f"editing {hook} changes nothing"
    assert torch.equal(parts.generate(tokens, 3), whole.generate(tokens, 3))
    assert all(torch.equal(one, two) for one, two in zip(unembedding(parts)[:2], unembedding(whole)[:2], strict=True))


def test_gradients_reach_edited_activations_through_a_part_on_disk(tmp_path: Path) -> None:
    whole, parts = both(FAMILIES["llama"], tmp_path, torch.float32)
    tokens, hook = torch.randint(3, 97, (2, 9)), "blocks.0.hook_resid_post"
    found = []
    for lm in (whole, parts):
        acts = whole.activations(tokens, hook).requires_grad_()
        found.append(torch.autograd.grad(lm.resume(hook, acts, tokens).logsumexp(-1).sum(), acts)[0])
    assert torch.equal(*found) and found[0].abs().sum() > 0


@pytest.fixture
def tiny(tiny_inputs: Path) -> str:
    return str(tiny_inputs / "tiny")


def test_parameters_place_a_model_and_cached_activations_serve_both(tiny: str) -> None:
    whole = load_language_model(tiny, "cpu")
    limits = half_on_disk(whole.model)
    params = check_params({"model": {"name": tiny, "device": "cpu", "placement": "auto", "max_memory": limits}}, "here")
    parts = load_configured(params.model)
    assert set(parts.model.hf_device_map.values()) == {"cpu", "disk"}
    assert parts.fingerprint == whole.fingerprint
    rows, hook = torch.randint(3, 97, (4, 12)), "blocks.2.hook_resid_post"
    first = collect_hooks(parts, [hook], rows, 2, ActivationCaching())[hook].flat
    parts.activations = None  # ty: ignore[invalid-assignment]  (read from the cache from here on)
    parts.activations_at = None  # ty: ignore[invalid-assignment]
    whole.activations = None  # ty: ignore[invalid-assignment]
    assert torch.equal(first, collect_hooks(whole, [hook], rows, 2, ActivationCaching())[hook].flat)


def test_a_sequence_goes_on_from_the_keys_of_a_model_in_parts(tiny: str) -> None:
    whole = load_language_model(tiny, "cpu")
    parts = load_language_model(tiny, "cpu", placement="auto", max_memory=half_on_disk(whole.model))
    tails, off = [torch.randint(3, 97, (n,)) for n in (5, 7)], ActivationCaching(enabled=False)
    prefixes = SharedPrefixes([torch.randint(3, 97, (6,))], [0, 0])
    hook = "blocks.1.hook_resid_post"
    one, two = (collect_hooks(lm, [hook], tails, 2, off, prefixes=prefixes)[hook].flat for lm in (whole, parts))
    assert torch.equal(one, two)


def test_weights_are_compared_but_not_changed_in_parts(tiny: str) -> None:
    whole = load_language_model(tiny, "cpu")
    parts = load_language_model(tiny, "cpu", placement="auto", max_memory=half_on_disk(whole.model))
    state = whole_state(parts.model)
    assert all(torch.equal(value, state[name]) for name, value in whole.model.state_dict().items())
    moved = weights_moved(parts, perturbed_model(whole, 0.1, "blocks.1.hook_resid_post", 0))
    assert moved == weights_moved(whole, perturbed_model(whole, 0.1, "blocks.1.hook_resid_post", 0))
    with pytest.raises(UserError, match="transfer: weights are changed on one device .* model.placement: one"):
        perturbed_model(parts, 0.1, "blocks.1.hook_resid_post", 0)


def test_what_a_part_on_disk_needed_is_removed_with_the_model(tiny: str) -> None:
    lm = load_language_model(tiny, "cpu", placement="auto", max_memory={"cpu": "100KB"})
    folder = Path(lm.loading.options["offload_folder"])
    assert folder.is_dir()
    del lm
    gc.collect()
    assert not folder.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement": "auto", "max_memory": {"7": "1GiB"}}, "model.max_memory: no device 7 .* there are cpu"),
        ({"placement": "auto", "max_memory": {"cpu": "much"}}, "model.max_memory.cpu: 'much' is no size"),
        ({"max_memory": {"cpu": "1GiB"}}, "model.max_memory: .* set model.placement: auto, or null here"),
        ({"quantization": "bnb_4bit"}, "model.quantization: bnb_4bit needs (the package bitsandbytes|a CUDA device)"),
    ],
)
def test_what_cannot_be_placed_is_said_in_one_line(tiny: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_language_model(tiny, "cpu", **options)


def test_a_quantisation_that_nobody_knows_is_refused() -> None:
    with pytest.raises(UserError, match="model.quantization: .*bnb_4bit"):
        check_params({"model": {"quantization": "bnb_3bit"}}, "here")
