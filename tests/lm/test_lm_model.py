"""Hook points, resuming and the activation pool, on random models of several families."""

from __future__ import annotations

import types
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen2Config,
)

from sae_research.config.params import ActivationCaching, TokenMask
from sae_research.lm import LanguageModel, collect, load_language_model, token_mask
from sae_research.runtime.errors import UserError

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
FAMILIES = {
    "llama": LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "gpt_neox": GPTNeoXConfig(**SMALL, intermediate_size=48),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=4, n_head=4),
    "gemma2": Gemma2Config(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8),
    "qwen2": Qwen2Config(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "bloom": BloomConfig(vocab_size=97, hidden_size=32, n_layer=4, n_head=4),
}
HOOKS = ("hook_resid_pre", "hook_resid_post", "hook_mlp_out", "hook_attn_out", "attn.hook_z")
TOKENIZER = types.SimpleNamespace(get_vocab=dict, bos_token_id=1, eos_token_id=2, pad_token_id=None, all_special_ids=[1, 2])


def make(family: str) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(Auto.from_config(FAMILIES[family]).float(), TOKENIZER, family, family)


@pytest.mark.parametrize("family", FAMILIES)
def test_resume_equals_a_full_run(family: str) -> None:
    lm, tokens = make(family), torch.randint(3, 97, (3, 11))
    assert lm.can_resume
    for kind in HOOKS:
        hook = f"blocks.2.{kind}"
        acts = lm.activations(tokens, hook)
        assert acts.shape == (3, 11, lm.d_in(hook))
        torch.testing.assert_close(lm.resume(hook, acts, tokens), lm.logits(tokens), atol=1e-5, rtol=1e-5)
        edited = acts + torch.randn(3, 11, lm.d_in(hook))
        patched = lm.patched_logits(tokens, hook, lambda _, edited=edited: edited)
        torch.testing.assert_close(lm.resume(hook, edited, tokens), patched, atol=1e-5, rtol=1e-5)
        assert (patched - lm.logits(tokens)).abs().max() > 1e-4, f"editing {hook} changes nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_edited_activations_and_nothing_else(family: str) -> None:
    lm, tokens, wanted = make(family), torch.randint(3, 97, (3, 11)), torch.tensor([4, 10])
    for kind in HOOKS:
        hook = f"blocks.2.{kind}"
        acts = lm.activations(tokens, hook).requires_grad_()
        logits = lm.resume(hook, acts, tokens, wanted)
        torch.testing.assert_close(logits, lm.logits(tokens)[:, wanted], atol=1e-5, rtol=1e-5)
        gradient = torch.autograd.grad(logits[:, 0].logsumexp(-1).sum(), acts)[0]
        assert gradient[:, :5].abs().sum() > 0
        assert gradient[:, 5:].abs().sum() == 0, "a later token changes no earlier logit"
        with torch.no_grad():
            assert not lm.resume(hook, acts, tokens).requires_grad
    assert not lm.resume(hook, acts.detach(), tokens).requires_grad
    assert all(parameter.grad is None for parameter in lm.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_greedy_and_patches_the_prompt_alone(family: str) -> None:
    lm, tokens, hook = make(family), torch.randint(3, 97, (4, 7)), "blocks.2.hook_resid_post"
    shift = 3 * torch.randn(4, 7, 32)

    def whole(edit: bool) -> torch.Tensor:
        ids = tokens
        for step in range(5):
            added = torch.nn.functional.pad(shift, (0, 0, 0, step)) if edit else torch.zeros(())
            ids = torch.cat([ids, lm.patched_logits(ids, hook, lambda acts, d=added: acts + d)[:, -1:].argmax(-1)], dim=1)
        return ids[:, 7:]

    assert torch.equal(lm.generate(tokens, 5), whole(edit=False))
    patched = lm.generate(tokens, 5, hook, lambda acts: acts + shift)
    assert torch.equal(patched, whole(edit=True))
    assert not torch.equal(patched, whole(edit=False))


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_layers_outside_the_needed_ones_do_not_run(family: str) -> None:
    lm, tokens, ran = make(family), torch.randint(3, 97, (2, 7)), []
    for i, layer in enumerate(lm.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    acts = lm.activations(tokens, "blocks.1.hook_resid_post")
    assert set(ran) <= {0, 1}
    ran.clear()
    lm.resume("blocks.1.hook_resid_post", acts, tokens)
    assert ran == [2, 3]
    lm.logits(tokens)
    assert ran == [2, 3, 0, 1, 2, 3], "the layers are back in place"


def test_residual_hooks_meet_and_parts_add_up() -> None:
    lm, tokens = make("llama"), torch.randint(3, 97, (2, 9))
    read = {kind: lm.activations(tokens, f"blocks.1.{kind}") for kind in HOOKS}
    torch.testing.assert_close(read["hook_resid_pre"], lm.activations(tokens, "blocks.0.hook_resid_post"))
    torch.testing.assert_close(
        read["hook_resid_pre"] + read["hook_attn_out"] + read["hook_mlp_out"], read["hook_resid_post"]
    )


@pytest.mark.parametrize(
    "hook",
    [
        "blocks.9.hook_resid_post",
        "blocks.0.hook_nothing",
        "resid",
        "blocks.x.attn.hook_z",
        "blocks.01.hook_resid_post",
        "blocks.1.hook_resid_post\n",
        "blocks.\uff11.hook_resid_post",
    ],
)
def test_unknown_hooks_are_refused(hook: str) -> None:
    with pytest.raises(UserError, match="hook"):
        make("llama").activations(torch.zeros(1, 4, dtype=torch.long), hook)


def test_padding_changes_no_real_token() -> None:
    lm = make("llama")
    short, long = torch.randint(3, 97, (5,)), torch.randint(3, 97, (12,))
    pool = collect(lm, "blocks.2.hook_resid_post", [short, long], 2, ActivationCaching(enabled=False))
    alone = lm.activations(short[None], "blocks.2.hook_resid_post")[0]
    batch = pool.batch([0, 1])
    torch.testing.assert_close(batch.acts[0, :5], alone, atol=1e-5, rtol=1e-5)
    assert batch.real.sum(1).tolist() == [5, 12]
    assert batch.acts[0, 5:].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pool_comes_back_from_the_cache_bit_for_bit(in_project: Path, dtype: torch.dtype) -> None:
    lm, caching = make("llama"), ActivationCaching()
    lm.model.to(dtype)
    tokens = torch.randint(3, 97, (6, 10))
    first = collect(lm, "blocks.1.hook_resid_post", tokens, 4, caching)
    lm.layers[0].register_forward_hook(lambda *_: pytest.fail("the model ran although its activations are cached"))
    second = collect(lm, "blocks.1.hook_resid_post", tokens, 4, caching)
    assert torch.equal(first.flat, second.flat)
    assert first.flat.dtype == dtype
    assert [b.index.tolist() for b in second.batches(4)] == [[0, 1, 2, 3], [4, 5]]


def test_an_interrupted_pass_leaves_no_cache_entry(in_project: Path) -> None:
    lm = make("llama")
    handle = lm.layers[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        collect(lm, "blocks.1.hook_resid_post", torch.randint(3, 97, (6, 10)), 4, ActivationCaching())
    handle.remove()
    assert list((in_project / ".cache" / "activations").iterdir()) == []


def test_token_mask_drops_special_first_and_outlier_tokens() -> None:
    lm = make("llama")
    tokens = torch.tensor([[5, 6, 2, 7, 8, 9, 10, 11]])
    acts = torch.ones(1, 8, 4)
    acts[0, 4] *= 50
    assert token_mask(lm, tokens, acts, TokenMask())[0].tolist() == [False, True, False, True, False, True, True, True]
    assert token_mask(lm, tokens, acts, TokenMask(drop_first_position=False, outlier_norm_multiple=None)).sum() == 7


def test_bad_models_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no config.json"):
        load_language_model(str(tmp_path), "cpu")
    with pytest.raises(UserError, match="cuda:99 is not there"):
        load_language_model("smollm2-135m-instruct", "cuda:99")


def test_fingerprint_follows_the_weights(tiny_inputs: Path, tmp_path: Path) -> None:
    from tests.helpers.tiny_model import make_tiny_model

    same = load_language_model(str(tiny_inputs / "tiny"), "cpu")
    other = load_language_model(str(make_tiny_model(tmp_path / "other", seed=1)), "cpu")
    again = load_language_model(str(make_tiny_model(tmp_path / "again")), "cpu")
    assert same.fingerprint == again.fingerprint != other.fingerprint
