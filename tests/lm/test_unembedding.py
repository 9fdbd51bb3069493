"""The logit lens of several families, whose norms keep their gains in different ways."""

from __future__ import annotations

import types

import pytest
import torch
from transformers import AutoModelForCausalLM as Auto
from transformers import Gemma2Config, GPT2Config, LlamaConfig

from sae_research.lm import LanguageModel
from sae_research.lm.generate import unembedding

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = {
    "llama": LlamaConfig(**SMALL, intermediate_size=48),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4),
    "gemma2": Gemma2Config(**SMALL, intermediate_size=48, head_dim=8, final_logit_softcapping=None),
}
TOKENIZER = types.SimpleNamespace(get_vocab=dict, bos_token_id=1, eos_token_id=2, pad_token_id=None, all_special_ids=[1, 2])


@pytest.mark.parametrize("family", FAMILIES)
def test_directions_become_the_models_own_logits(family: str) -> None:
    torch.manual_seed(0)
    model = Auto.from_config(FAMILIES[family]).float()
    for name, value in model.named_parameters():
        if "norm" in name or "ln_f" in name:
            value.data += 0.3 * torch.randn_like(value) * (not name.endswith("bias"))
    lm, x, tokens = LanguageModel(model, TOKENIZER, family, family), torch.randn(1, 5, 32), torch.randint(3, 97, (1, 5))
    out = unembedding(lm)
    assert out.centred == (family == "gpt2") and (out.gain - 1).abs().max() > 0.1
    read = x - x.mean(-1, keepdim=True) if out.centred else x
    scale = read.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(
        out.logits(x[0]) / scale[0], lm.resume("blocks.1.hook_resid_post", x, tokens)[0], atol=1e-4, rtol=1e-3
    )
