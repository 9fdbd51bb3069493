"""`hook_attn_out` and `hook_mlp_out` are what a layer adds to the residual stream, or are refused: over random models of
the families that transformers knows."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING
from transformers import AutoModelForCausalLM as Auto

from benchmarks.models import OWN, SMALL
from sae_research.lm import LanguageModel
from sae_research.runtime.errors import UserError

PLAIN = (
    "llama",
    "gpt2",
    "gpt_neox",
    "gptj",
    "gemma",
    "qwen2",
    "qwen3",
    "phi",
    "phi3",
    "cohere",
    "falcon",
    "mixtral",
    "nemotron",
    "persimmon",
    "stablelm",
    "gpt_bigcode",
    "smollm3",
    "gpt_oss",
)
"""Families in which the two modules' own outputs are added."""
OTHERWISE = (
    "olmo2",
    "olmo3",
    "gemma2",
    "gemma3_text",
    "glm4",
    "exaone4",
    "vaultgemma",
    "afmoe",
    "bloom",
    "mpt",
    "granite",
    "granitemoe",
    "hyperclovax",
    "minicpm3",
    "opt",
    "xglm",
    "biogpt",
    "llama4_text",
)
"""Families with norms, sums or numbers in between, or without a module for the MLP."""
REFUSED = ("doge", "minimax")
TOKENIZER = types.SimpleNamespace(get_vocab=dict, bos_token_id=1, eos_token_id=2, pad_token_id=None, all_special_ids=[1, 2])


def make(family: str, dtype: torch.dtype = torch.float32) -> LanguageModel:
    torch.manual_seed(0)
    scales = {"residual_multiplier": 0.3} if family.startswith(("granite", "hyperclovax")) else {}
    values = {"vocab_size": 97, **OWN[family]} if family in OWN else SMALL | scales
    model = Auto.from_config(CONFIG_MAPPING[family](**values)).float()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return LanguageModel(model.to(dtype), TOKENIZER, family, family)


def streams(lm: LanguageModel, tokens: torch.Tensor, edits: dict, layer: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream before and after a layer while parts of it are replaced."""
    taken = {}

    def keep(kind: str):
        return lambda acts: taken.setdefault(kind, acts)

    hooks = {f"blocks.{layer}.hook_{kind}": keep(kind) for kind in ("resid_pre", "resid_post")}
    lm.edited_logits(tokens, edits | hooks)
    return taken["resid_pre"], taken["resid_post"]


@pytest.mark.parametrize("family", PLAIN + OTHERWISE)
@torch.no_grad()
def test_attention_and_mlp_are_what_a_layer_adds(family: str) -> None:
    lm, tokens = make(family), torch.randint(3, 97, (2, 9))
    attn, mlp = "blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"
    kinds = ("attn_out", "mlp_out", "resid_pre", "resid_post")
    read = {kind: lm.activations(tokens, f"blocks.1.hook_{kind}") for kind in kinds}
    at_once = lm.activations_at(tokens, [f"blocks.1.hook_{kind}" for kind in kinds])
    assert all(torch.equal(at_once[f"blocks.1.hook_{kind}"], read[kind]) for kind in kinds)
    added = read["resid_post"] - read["resid_pre"]
    torch.testing.assert_close(read["attn_out"] + read["mlp_out"], added, atol=2e-5, rtol=1e-4)
    one, two = torch.randn(2, 2, 9, 32)
    before, after = streams(lm, tokens, {attn: lambda _: one, mlp: lambda _: two})
    torch.testing.assert_close(after - before, one + two, atol=2e-5, rtol=1e-4)
    before, after = streams(lm, tokens, {mlp: lambda _: two})
    torch.testing.assert_close(after - before, read["attn_out"] + two, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "olmo2", "granite", "bloom"])
def test_in_16_bits_the_same_modules_are_found(family: str) -> None:
    exact, short = make(family), make(family, torch.bfloat16)
    for lm in (exact, short):  # a stream so large that a part's output is less than its rounding
        lm.model.get_input_embeddings().weight.data *= 1e4
    named = [{module: name for name, module in lm.model.named_modules()} for lm in (exact, short)]
    for hook in ("blocks.1.hook_attn_out", "blocks.1.hook_mlp_out"):
        one, two = exact._point(hook), short._point(hook)
        assert (named[0][one.module], one.scale) == (named[1][two.module], two.scale)


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_adds_something_else_is_refused(family: str) -> None:
    lm, tokens = make(family), torch.randint(3, 97, (2, 9))
    for kind in ("attn_out", "mlp_out"):
        with pytest.raises(UserError, match=f"hook_{kind}: layer 1 .* adds something else to the residual stream"):
            lm.activations(tokens, f"blocks.1.hook_{kind}")
        with pytest.raises(UserError, match="adds something else"):
            lm.d_in(f"blocks.1.hook_{kind}")
    assert lm.activations(tokens, "blocks.1.hook_resid_post").shape == (2, 9, 32)


class _Odd(nn.Module):
    """A layer around another that adds its share of a third part."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.self_attn, self.mlp, self.__dict__["whole"] = layer.self_attn, layer.mlp, layer

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        return self.whole(hidden_states, *args, **kwargs) + 0.01 * hidden_states.roll(1, -1)


def test_a_layer_with_a_third_part_is_refused_and_only_there() -> None:
    lm, tokens = make("llama"), torch.randint(3, 97, (2, 9))
    lm.layers[1] = _Odd(lm.layers[1])
    with pytest.raises(UserError, match="layer 1 ._Odd. adds something else.*hook_resid_pre or"):
        lm.activations(tokens, "blocks.1.hook_mlp_out")
    lm.activations(tokens, "blocks.2.hook_mlp_out")


def test_the_check_runs_once_a_layer() -> None:
    lm, tokens, ran = make("llama"), torch.randint(3, 97, (2, 9)), []
    lm.layers[1].register_forward_hook(lambda *_: ran.append(1))
    lm.activations(tokens, "blocks.1.hook_mlp_out")
    lm.d_in("blocks.1.hook_attn_out")
    ran.clear()
    lm.d_in("blocks.1.hook_mlp_out")
    assert not ran


@pytest.mark.parametrize(
    ("family", "match"),
    [
        ("bert", "later tokens change what earlier ones predict"),
        ("xlm", "does not read what layer 0 returns"),
        ("deepseek_v4", "layer 1 returns .1, 8, 4, 32. for 8 tokens, not one vector of 32 a token"),
    ],
)
def test_models_that_are_no_causal_stack_of_layers_are_refused(family: str, match: str) -> None:
    values = {"emb_dim": 32, "n_layers": 3, "n_heads": 4, "n_words": 97} if family == "xlm" else SMALL
    with pytest.raises(UserError, match=match):
        LanguageModel(Auto.from_config(CONFIG_MAPPING[family](**values)), TOKENIZER, family, family)


@torch.no_grad()
def test_layers_that_return_more_than_the_stream_are_stood_in_for() -> None:
    """Bamba's layers return two values, and its model unpacks both."""
    lm, tokens, hook = make("bamba"), torch.randint(3, 97, (2, 9)), "blocks.1.hook_resid_post"
    edited = torch.randn(2, 9, 32)
    assert lm.can_resume
    torch.testing.assert_close(
        lm.resume(hook, edited, tokens), lm.patched_logits(tokens, hook, lambda _: edited), atol=1e-4, rtol=1e-3
    )


@pytest.mark.parametrize(
    ("family", "mlp", "attention"),
    [
        ("llama", True, "self_attn"),
        ("gpt_neox", True, "attention"),
        ("gpt2", True, "attn"),
        ("gemma2", False, "self_attn"),
        ("granite", False, "self_attn"),
    ],
)
def test_whose_output_a_hook_has(family: str, mlp: bool, attention: str) -> None:
    """Gemma 2 norms what its MLP puts out, Granite scales it, before it is added to the stream."""
    lm = make(family)
    assert lm.is_output_of("mlp", "blocks.1.hook_mlp_out") == mlp
    assert lm.is_output_of(attention, "blocks.1.hook_attn_out") == mlp
    assert not lm.is_output_of("mlp", "blocks.1.hook_attn_out") and not lm.is_output_of("mlp", "blocks.1.mlp.hook_in")
    assert not lm.is_output_of("nothing", "blocks.1.hook_mlp_out")
