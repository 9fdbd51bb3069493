"""`hook_mlp_in`, `ln2.hook_normalized` and `mlp.hook_in` are what a layer's MLP reads, or are refused; and resuming from
what it writes: over random models of several families, held against their own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import layer_norm

from sae_research.lm.hooks import check_pair
from sae_research.runtime.errors import UserError
from tests.lm.test_parts import make

IN, NORMALISED, GIVEN, OUT = (
    f"blocks.1.{kind}" for kind in ("hook_mlp_in", "ln2.hook_normalized", "mlp.hook_in", "hook_mlp_out")
)
NORMS = {
    "llama": "post_attention_layernorm",
    "qwen3": "post_attention_layernorm",
    "gemma": "post_attention_layernorm",
    "gemma2": "pre_feedforward_layernorm",
    "gemma3_text": "pre_feedforward_layernorm",
    "gpt2": "ln_2",
    "gpt_neox": "post_attention_layernorm",
    "granite": "post_attention_layernorm",
}
"""The norm before the MLP, by its name in transformers."""
AFTER = {"gemma2": "post_feedforward_layernorm", "gemma3_text": "post_feedforward_layernorm"}


def normalised(x: torch.Tensor, norm: torch.nn.Module, family: str) -> torch.Tensor:
    """TransformerLens' `hook_normalized`: before weight and bias."""
    if family in ("gpt2", "gpt_neox"):
        return layer_norm(x, x.shape[-1:], eps=norm.eps)
    eps = getattr(norm, "eps", None) or norm.variance_epsilon
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()


@pytest.mark.parametrize("family", NORMS)
@torch.no_grad()
def test_what_the_mlp_reads(family: str) -> None:
    lm, tokens = make(family), torch.randint(3, 97, (2, 9))
    read = {hook: lm.activations(tokens, hook) for hook in (IN, NORMALISED, GIVEN, OUT)}
    layer: Any = lm.layers[1]
    norm = getattr(layer, NORMS[family])
    torch.testing.assert_close(norm(read[IN]), read[GIVEN], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(normalised(read[IN], norm, family), read[NORMALISED], atol=1e-5, rtol=1e-4)
    out = layer.mlp(read[GIVEN])
    out = getattr(layer, AFTER[family])(out) if family in AFTER else out
    out = out * getattr(layer, "residual_multiplier", 1)
    torch.testing.assert_close(out, read[OUT], atol=1e-6, rtol=1e-5)
    together = lm.activations_at(tokens, [IN, NORMALISED, GIVEN, OUT])
    assert all(torch.equal(together[hook], read[hook]) for hook in read)
    plain = lm.logits(tokens)
    for hook in (IN, NORMALISED, GIVEN):
        assert lm.d_in(hook) == 32
        torch.testing.assert_close(lm.patched_logits(tokens, hook, lambda x: x + 0), plain)
        edited = lm.patched_logits(tokens, hook, lambda x: x + torch.linspace(-1, 1, 32))
        assert (edited - plain).abs().max() > 1e-3


@torch.no_grad()
def test_an_edit_of_what_the_mlp_reads_changes_the_mlp_alone() -> None:
    lm, tokens = make("llama"), torch.randint(3, 97, (2, 9))
    new, layer, seen = torch.randn(2, 9, 32), lm.layers[1], {}
    kinds = ("hook_attn_out", "hook_mlp_out")
    before = lm.activations_at(tokens, [f"blocks.1.{kind}" for kind in kinds])
    for hook, given in (
        (IN, layer.post_attention_layernorm(new)),
        (NORMALISED, new * layer.post_attention_layernorm.weight),
        (GIVEN, new),
    ):
        watch = {f"blocks.1.{kind}": lambda x, kind=kind: seen.__setitem__(kind, x.clone()) or x for kind in kinds}
        lm.edited_logits(tokens, {hook: lambda _: new} | watch)
        torch.testing.assert_close(seen["hook_mlp_out"], layer.mlp(given), atol=1e-5, rtol=1e-4)
        assert torch.equal(seen["hook_attn_out"], before["blocks.1.hook_attn_out"])


@pytest.mark.parametrize("family", ["qwen3_moe", "ernie4_5_moe"])
@torch.no_grad()
def test_a_mixture_of_experts_is_the_mlp_and_not_attention_of_that_family(family: str) -> None:
    """`Qwen3MoeAttention` carries the family's name too."""
    lm, tokens = make(family), torch.randint(3, 97, (2, 9))
    layer, given = lm.layers[1], []
    handle = layer.mlp.register_forward_pre_hook(
        lambda _, args, kwargs: given.append([*args, *kwargs.values()][0]), with_kwargs=True
    )
    read = {hook: lm.activations(tokens, hook) for hook in (IN, GIVEN)}
    lm.logits(tokens)
    handle.remove()
    torch.testing.assert_close(read[GIVEN], given[-1])
    torch.testing.assert_close(layer.post_attention_layernorm(read[IN]), given[-1], atol=1e-6, rtol=1e-5)


def test_a_norm_that_serves_attention_too_is_no_hook_of_the_mlp() -> None:
    lm, tokens = make("gptj"), torch.randint(3, 97, (2, 9))
    assert lm.activations(tokens, GIVEN).shape == (2, 9, 32)
    with pytest.raises(UserError, match="hook_mlp_in: layer 1 .* has one norm for attention and MLP; use mlp.hook_in"):
        lm.activations(tokens, IN)


@pytest.mark.parametrize(
    ("family", "hook", "match"),
    [
        ("olmo2", NORMALISED, "hands no norm's output to its MLP; use mlp.hook_in"),
        ("opt", GIVEN, "has no one module for its MLP"),
        ("doge", IN, "adds something else"),
    ],
)
def test_what_cannot_be_told_is_refused(family: str, hook: str, match: str) -> None:
    lm = make(family)
    with pytest.raises(UserError, match=match):
        lm.d_in(hook)


def test_a_norm_with_a_zero_weight_hides_what_it_scaled() -> None:
    lm = make("llama")
    lm.layers[1].post_attention_layernorm.weight.data[3] = 0
    assert lm.d_in(IN) == 32
    with pytest.raises(UserError, match="weight is 0 somewhere.*use mlp.hook_in"):
        lm.d_in(NORMALISED)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "granite", "olmo2"])
@torch.no_grad()
def test_resuming_from_the_mlps_output(family: str) -> None:
    lm, tokens, ran = make(family), torch.randint(3, 97, (2, 9)), []
    after = lm.added_to(OUT)
    assert after == "blocks.1.hook_resid_post"
    acts = lm.activations_at(tokens, [OUT, after])
    rest, edited = acts[after] - acts[OUT], torch.randn(2, 9, 32)
    full = lm.resume(OUT, edited, tokens)
    handle = lm.layers[0].register_forward_hook(lambda *_: ran.append(1))
    torch.testing.assert_close(lm.resume(OUT, edited, tokens, rest=rest), full, atol=2e-4, rtol=1e-3)
    handle.remove()
    assert not ran, "the layers before did not run"
    assert lm.added_to("blocks.1.hook_attn_out") is None, "the MLP reads what attention adds"


@pytest.mark.parametrize(
    ("read", "written", "match"),
    [
        (GIVEN, "blocks.2.hook_mlp_out", "a transcoder's hooks belong to one layer"),
        (OUT, IN, "computes after .* are the two exchanged"),
        (OUT, OUT, "computes after"),
        (GIVEN, "blocks.1.hook_mlp", "unknown hook"),
    ],
)
def test_hooks_that_do_not_belong_together(read: str, written: str, match: str) -> None:
    with pytest.raises(UserError, match=match):
        check_pair(read, written)
    check_pair(GIVEN, OUT)
