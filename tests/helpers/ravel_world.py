"""A model built by hand to know two facts about a dozen towns, and nothing else: RAVEL's right answers are known.

Dimension 0 of an entity's last token holds its country (+1 or -1), dimension 1 its language. Layer 0 does nothing. Layer 1
copies both dimensions to every later position by uniform attention. Layer 2 answers with the one that the prompt's last
word asks for. So the latents that read dimensions 0 and 1 after layer 0 carry one attribute each, and nothing else does.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

D, HOOK, SEPARATOR, PAD = 32, "blocks.0.hook_resid_post", "<|endoftext|>", "[PAD]"
COUNTRY, LANGUAGE, GOT_COUNTRY, GOT_LANGUAGE, ASK_COUNTRY, ASK_LANGUAGE, SAY_COUNTRY, SAY_LANGUAGE, SAID, FILLER = range(10)
VALUES = {"Country": {1: "Norland", -1: "Sudland"}, "Language": {1: "Norse", -1: "Sudic"}}
TEMPLATES = {
    "Country": ["the town of %s lies in", "I know that %s lies in"],
    "Language": ["the people of %s speak", "I know that in the town of %s people speak"],
}
TOWNS = {
    (1, 1): ["Ada", "old Bree", "Cork", "Dun"],
    (1, -1): ["Ely", "new Fife", "Goa", "Hull"],
    (-1, 1): ["Ivy", "Jura", "old Kent", "Lund"],
    (-1, -1): ["Mull", "Nice", "Ohm", "port Pau"],
}
"""(country, language) -> towns, the last two of each held out."""


def make_world(folder: Path) -> Path:
    """Save the model and its tokenizer to `folder`, and the prompts in SAE Bench's layout to `folder/prompts`."""
    words = {word for template in (t for ts in TEMPLATES.values() for t in ts) for word in template.split()} - {"%s"}
    words |= {word for towns in TOWNS.values() for town in towns for word in town.split()}
    words |= {value for pair in VALUES.values() for value in pair.values()} | {"."}
    vocabulary = {word: i for i, word in enumerate([SEPARATOR, PAD, *sorted(words)])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token=PAD))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, eos_token=SEPARATOR, pad_token=PAD).save_pretrained(folder)
    _model(vocabulary).save_pretrained(folder)
    write_prompts(folder / "prompts")
    return folder


def write_prompts(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    facts = {
        town: {"Country": VALUES["Country"][c], "Language": VALUES["Language"][s]}
        for (c, s), towns in TOWNS.items()
        for town in towns
    }
    split = {town: "train" if towns.index(town) < 2 else "val" for towns in TOWNS.values() for town in towns}
    for kind, content in {
        "entity_attributes": facts,
        "attribute_to_prompts": TEMPLATES,
        "entity_to_split": split,
        "prompt_to_split": {t: "train" for ts in TEMPLATES.values() for t in ts},
    }.items():
        (folder / f"ravel_town_{kind}.json").write_text(json.dumps(content))


@torch.no_grad()
def _model(vocabulary: dict[str, int]) -> LlamaForCausalLM:
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=D,
            intermediate_size=4,
            num_hidden_layers=3,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=D,
            vocab_size=len(vocabulary),
            max_position_embeddings=64,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=vocabulary[SEPARATOR],
            pad_token_id=vocabulary[PAD],
        )
    )
    for name, weight in model.named_parameters():
        weight.fill_(1.0 if "norm" in name else 0.0)
    embed, head = model.model.embed_tokens.weight, model.lm_head.weight
    embed[:, FILLER] = 1.0
    for (country, language), towns in TOWNS.items():
        for town in towns:
            row = embed[vocabulary[town.split()[-1]]]
            row[COUNTRY], row[LANGUAGE] = country, language
    embed[vocabulary["in"], ASK_COUNTRY] = embed[vocabulary["speak"], ASK_LANGUAGE] = 1.0
    for attribute, say in (("Country", SAY_COUNTRY), ("Language", SAY_LANGUAGE)):
        for sign, value in VALUES[attribute].items():
            head[vocabulary[value], say] = sign
            embed[vocabulary[value], SAID] = 1.0
    embed[vocabulary["."], SAID] = head[vocabulary["."], SAID] = 1.0
    copy, answer = model.model.layers[1].self_attn, model.model.layers[2].mlp
    for i, (held, got, ask, say) in enumerate(
        ((COUNTRY, GOT_COUNTRY, ASK_COUNTRY, SAY_COUNTRY), (LANGUAGE, GOT_LANGUAGE, ASK_LANGUAGE, SAY_LANGUAGE))
    ):
        copy.v_proj.weight[got, held] = 1.0
        copy.o_proj.weight[got, got] = 8.0
        answer.gate_proj.weight[i, ask], answer.up_proj.weight[i, got] = 10.0, 1.0
        answer.down_proj.weight[say, i] = 4.0
    return model
