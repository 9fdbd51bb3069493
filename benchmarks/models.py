"""Which model families work: a tiny random model of every causal family that transformers knows, saved, loaded as any local
folder is, and held against transformers' own forward pass.

    python -m benchmarks.models             # writes docs/models.json (some minutes on one core)
    python -m sae_research.cli.reference    # then the page, docs/reference/models.md
"""

from __future__ import annotations

import argparse
import functools
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor

from sae_research.lm import LanguageModel, load_language_model
from sae_research.runtime.errors import UserError, run_main
from sae_research.runtime.files import project_root, read_json, write_json

RECORD = Path("docs/models.json")
LAYER = 1
HOOKS = (
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "attn.hook_z",
    "mlp.hook_in",
    "hook_mlp_in",
    "ln2.hook_normalized",
)
"""Each is a check of its own; and `resume`."""
MAX_PARAMETERS = 2_500_000
"""A larger model has sizes that `SMALL` does not name, and shows nothing that a small one does not."""
LONGEST = 200
"""Characters of a reason on record."""
OK = "ok"
SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "linear_num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_d_head": 8,
    "mamba_head_dim": 8,
    "mamba_d_ssm": 64,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "mamba_chunk_size": 16,
    "chunk_size": 16,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 97,
    "num_kv_shared_layers": 0,
}
"""Sizes by the names that most families give them."""
_LATENT_ATTENTION = SMALL | {"num_key_value_heads": 4, "head_dim": 4, "n_group": 1, "topk_group": 1, "n_routed_experts": 4}
_WITH_ENCODER: dict[str, Any] = {
    "d_model": 32,
    "encoder_layers": 3,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
}
_SEES: dict[str, Any] = {
    "text_config": SMALL,
    "vision_config": {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 28,
        "patch_size": 14,
    },
}
OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("axk1", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "youtu"), _LATENT_ATTENTION),
    **dict.fromkeys(("bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian"), _WITH_ENCODER),
    **dict.fromkeys(("mbart", "mvp", "pegasus", "plbart"), _WITH_ENCODER),
    **dict.fromkeys(("gemma3", "llama4", "qwen3_5", "qwen3_5_moe"), _SEES),
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4},
    "gptj": {"n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3},
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 48},
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 3,
        "num_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "attention_types": [[["global"], 3]],
    },
    "codegen": {"n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4},
    "openai-gpt": {"n_embd": 32, "n_layer": 3, "n_head": 4},
    "ctrl": {"n_embd": 32, "n_layer": 3, "n_head": 4, "dff": 48},
    "dots1": SMALL | {"n_routed_experts": 4, "n_shared_experts": 1},
    "gemma4_text": SMALL | {"per_layer_config": {}},
    "lfm2_moe": SMALL | {"layer_types": ["conv", "full_attention", "conv"], "num_dense_layers": 1},
    "mamba2": SMALL | {"num_heads": 8, "state_size": 8, "n_groups": 1},
    "nemotron_h": SMALL | {"n_groups": 1, "layer_types": ["mamba", "attention", "moe"]},
}
"""Sizes of families with names of their own."""
_RAISED = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, ImportError),
    *(NotImplementedError, StrictDataclassError),
)
"""What transformers raises for sizes that do not fit together, or for a package that is missing."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", help="only these; the others' rows stay. Default: all of transformers'")
    options = parser.parse_args()
    unknown = sorted(set(options.families) - set(known_families()))
    if unknown:
        raise UserError(f"transformers has no causal family {', '.join(unknown)}")
    import transformers

    place, rows = project_root() / RECORD, {}
    if options.families:
        record = read_json(place)
        if record["transformers"] != transformers.__version__:
            raise UserError(f"{RECORD} is of transformers {record['transformers']}; name no family, so that all are checked")
        rows = record["families"]
    for family in options.families or known_families():
        rows[family] = check(family)
        print(f"{family:28}{summary(rows[family])}", flush=True)
    write_json(place, {"transformers": transformers.__version__, "families": dict(sorted(rows.items()))})


def known_families() -> list[str]:
    """Families of which transformers has a class for causal language modelling, by their `model_type`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def summary(row: dict[str, Any]) -> str:
    """One line of a family's record."""
    if "checks" not in row:
        return next(f"{key}: {value}" for key, value in row.items())
    missing = [f"{name}: {found}" for name, found in row["checks"].items() if found != OK]
    return "; ".join(missing) or OK


def check(family: str) -> dict[str, Any]:
    """`{"untried": why}` where no tiny model could be made, `{"refused": the line}` where it does not load, else `{"checks":
    {check: "ok", or the line that refuses it}, "resumes": whether earlier layers can stay idle}`. A check that finds wrong
    numbers says "wrong: ...".
    """
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        try:
            save_tiny(family, Path(folder))
        except _RAISED as error:
            return {"untried": _line(error, folder, family)}
        try:
            lm = load_language_model(folder, device="cpu")
        except UserError as error:
            line = _line(error, folder, family)
            return {"untried" if "does not run on" in line else "refused": line}  # sizes, or what the family asks for beside
        tokens = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
        checks: dict[str, Callable[[LanguageModel, Tensor], None]] = {
            hook: functools.partial(_CHECKS.get(hook, _reads_and_edits), hook=f"blocks.{LAYER}.{hook}") for hook in HOOKS
        }
        found = {name: _outcome(run, lm, tokens, folder, family) for name, run in checks.items()}
        return {"checks": found, "resumes": lm.can_resume}


def save_tiny(family: str, folder: Path) -> None:
    """A random model of a family and a byte-level tokenizer, in a folder. Raises ValueError for a model that would not be
    small, and what transformers does for sizes that do not fit together."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, logging

    from tests.helpers.tiny_model import tiny_tokenizer

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    tokenizer = tiny_tokenizer()
    ids = {
        "vocab_size": len(tokenizer),
        "vocab_size_per_layer_input": len(tokenizer),
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    config = CONFIG_MAPPING[family](**(OWN.get(family, SMALL) | ids))
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"its sizes have names of their own: {size:,} parameters remain")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(config).float()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _outcome(
    run: Callable[[LanguageModel, Tensor], None], lm: LanguageModel, tokens: Tensor, folder: str, family: str
) -> str:
    try:
        run(lm, tokens)
    except UserError as error:
        return _line(error, folder, family)
    except AssertionError as error:
        return f"wrong: {_line(error, folder, family)}"
    return OK


def _line(error: Exception, folder: str, family: str) -> str:
    """What was raised, in a line, without this computer's folder."""
    text = (str(error).strip() or type(error).__name__).replace(folder, family).splitlines()
    line = re.sub(r" \(relative error [^)]*\)", "", " ".join(text[:2]))  # differs by machine
    return " ".join(line.split())[:LONGEST]


# --- checks: each raises AssertionError for wrong numbers, UserError for a hook that the model lacks ------------------


def _equal(found: Tensor, want: Tensor, what: str) -> None:
    torch.testing.assert_close(found, want, atol=2e-4, rtol=1e-3, msg=lambda text: f"{what}: {text.splitlines()[0]}")


@torch.no_grad()
def _stream(lm: LanguageModel, tokens: Tensor, hook: str) -> None:
    """The stream is what the layer returns, and one of transformers' own hidden states; resuming from an edit of it gives
    the logits of a forward pass in which a plain hook of torch makes the same edit."""
    found = lm.activations(tokens, hook)
    returned: list[Tensor] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        returned.append((output[0] if isinstance(output, tuple) else output).clone())

    handle = lm.layers[LAYER].register_forward_hook(keep)
    stated = lm.model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states
    handle.remove()
    _equal(found, returned[0], "the stream is not what the layer returns")
    near = () if stated is None else stated[LAYER : LAYER + 2]  # Mamba's do not begin with the embeddings
    same = [state.shape == found.shape and torch.allclose(found, state, atol=2e-4, rtol=1e-3) for state in near]
    assert any(same) or not near, "the stream is not transformers' hidden state"
    edited = found + torch.randn(found.shape, generator=torch.Generator().manual_seed(1))

    def replace(_: Any, __: Any, output: Any) -> Any:
        return (edited, *output[1:]) if isinstance(output, tuple) else edited

    handle = lm.layers[LAYER].register_forward_hook(replace)
    want = lm.model(input_ids=tokens, use_cache=False).logits
    handle.remove()
    _equal(lm.resume(hook, edited, tokens), want, "resuming is not the forward pass with that edit")
    assert (want - lm.logits(tokens)).abs().max() > 1e-4, "an edit changes nothing"


@torch.no_grad()
def _adds(lm: LanguageModel, tokens: Tensor, hook: str) -> None:
    """Attention's and the MLP's hooks together are what the layer adds to the stream; and the checks of any hook."""
    _reads_and_edits(lm, tokens, hook)
    kinds = ("hook_attn_out", "hook_mlp_out", "hook_resid_pre", "hook_resid_post")
    attention, mlp, before, after = (lm.activations(tokens, f"blocks.{LAYER}.{kind}") for kind in kinds)
    _equal(attention + mlp, after - before, "attention and MLP do not add up to what the layer adds")


@torch.no_grad()
def _feeds_the_mlp(lm: LanguageModel, tokens: Tensor, hook: str) -> None:
    """An edit of what the MLP reads changes what the MLP adds and not what attention adds."""
    kinds = ("hook_attn_out", "hook_mlp_out")
    lm.d_in(hook)
    seen: dict[str, Tensor] = {}
    before = lm.activations_at(tokens, [f"blocks.{LAYER}.{kind}" for kind in kinds])

    def watch(name: str) -> Callable[[Tensor], Tensor]:
        return lambda value: seen.setdefault(name, value.clone())

    lm.edited_logits(tokens, {hook: lambda x: x.flip(1)} | {name: watch(name) for name in before})
    attention, mlp = (f"blocks.{LAYER}.{kind}" for kind in kinds)
    _equal(seen[attention], before[attention], "an edit of what the MLP reads changes attention")
    assert (seen[mlp] - before[mlp]).abs().max() > 1e-5, "an edit of what the MLP reads does not reach the MLP"
    _reads_and_edits(lm, tokens, hook)


@torch.no_grad()
def _reads_and_edits(lm: LanguageModel, tokens: Tensor, hook: str) -> None:
    """Width and shape fit, writing back what was read changes nothing, and an edit changes the logits."""
    plain, width = lm.model(input_ids=tokens, use_cache=False).logits, lm.d_in(hook)
    found = lm.activations(tokens, hook)
    assert found.shape == (*tokens.shape, width), f"activations of shape {tuple(found.shape)}"
    _equal(lm.resume(hook, found, tokens), plain, "writing back what was read changes the logits")
    edited = lm.patched_logits(tokens, hook, lambda x: x + torch.linspace(-1, 1, width))
    assert (edited - plain).abs().max() > 1e-4, "an edit changes nothing"


_CHECKS: dict[str, Callable[..., None]] = {
    "hook_resid_post": _stream,
    "hook_attn_out": _adds,
    "hook_mlp_out": _adds,
    "mlp.hook_in": _feeds_the_mlp,
    "hook_mlp_in": _feeds_the_mlp,
    "ln2.hook_normalized": _feeds_the_mlp,
}
"""By hook; others: `_reads_and_edits`."""


if __name__ == "__main__":
    run_main(main)
