"""A language model without its weights: its configuration, and from that parameters and products of its layers."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from sae_research.lm.hooks import find_layers, parse_hook
from sae_research.lm.load import PACKAGED, located, one_line, package_of, parsed_once, unpacked_folder
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import fingerprint, read_json
from sae_research.text.hub import offline_if_silent


def model_config(name: str) -> Any:
    """The `transformers` configuration of a model as `load_language_model` takes its name, without its weights. A local
    folder needs no more than config.json. Raises `UserError` where it cannot be had."""
    from transformers import AutoConfig

    if name in PACKAGED:
        return _packaged_config(name)
    where, revision = located(name)
    if isinstance(where, Path) and not (where / "config.json").is_file():
        raise UserError(f"model.name: the folder {name} has no config.json")
    with (
        nullcontext() if isinstance(where, Path) else offline_if_silent(f"api/models/{where}"),
        one_line(name, "has a config.json that transformers cannot use"),
    ):
        return AutoConfig.from_pretrained(where, revision=revision)


def _packaged_config(name: str) -> Any:
    """From the unpacked model, else from the head of the package's file."""
    from transformers import AutoConfig

    folder = unpacked_folder(name)
    if folder.is_dir():
        return AutoConfig.from_pretrained(folder)
    with parsed_once():
        return AutoConfig.from_pretrained(package_of(name), gguf_file=PACKAGED[name][2])


def known_fingerprint(name: str, config: Any) -> str:
    """The `LanguageModel.fingerprint` that a model of this name would have, where it can be told without reading its
    weights; "" elsewhere."""
    commit = getattr(config, "_commit_hash", None)
    if name in PACKAGED:
        recorded = unpacked_folder(name) / "fingerprint.json"
        return str(read_json(recorded)["fingerprint"]) if recorded.is_file() else ""
    where, _ = located(name)
    return "" if commit is None or isinstance(where, Path) else fingerprint([where, commit])


class ModelShape(NamedTuple):
    """What a pass through a decoder costs. Every parameter of a matrix is one multiply-add a token."""

    name: str
    n_layers: int
    d_model: int
    vocab_size: int
    parameters: int
    layer_matrices: float
    """Parameters of one layer's matrices, mean over layers. In a mixture of experts, of those experts that a token meets."""
    attention_width: int
    """Heads times their dimension."""
    attention_layers: int
    """Layers that attend to earlier tokens."""

    def depth(self, hook: str) -> int:
        """Layers that run before a hook's activations are there."""
        layer, kind = parse_hook(hook)
        return layer + (kind != "hook_resid_pre")

    def width(self, hook: str) -> int:
        """d_in at a hook."""
        return self.attention_width if parse_hook(hook)[1] == "attn.hook_z" else self.d_model

    def layer_flops(self, context: int) -> float:
        """FLOPs of one layer for one token of a context of that many; causal attention meets half of it."""
        share = self.attention_layers / self.n_layers
        return 2 * self.layer_matrices + share * 2 * context * self.attention_width

    def prefix_flops(self, hook: str, context: int) -> float:
        """FLOPs a token of a pass up to the hook."""
        return self.depth(hook) * self.layer_flops(context)

    def above_flops(self, hook: str, context: int) -> float:
        """FLOPs a token of a pass from the hook to the logits."""
        return (self.n_layers - self.depth(hook)) * self.layer_flops(context) + 2 * self.d_model * self.vocab_size


def shape_by_name(name: str) -> tuple[ModelShape, Any]:
    """Of a model as `load_language_model` takes its name, with its configuration; None in place of that where the hub does
    not give it (no network, no access) and the sizes are `listed_shape`. Raises `UserError` where neither can be had."""
    try:
        config = model_config(name)
    except UserError:
        listed = listed_shape(name)
        if listed is None:
            raise
        return listed, None
    return model_shape(name, config), config


def listed_shape(name: str) -> ModelShape | None:
    """Of a model whose sizes TransformerLens lists, as it does for families whose hub pages need access (Gemma, Llama); None
    of others. The embedding is counted once, norms and biases are not."""
    from huggingface_hub import constants
    from transformer_lens.loading_from_pretrained import get_pretrained_model_config

    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True  # of other models it would ask the hub
    try:
        cfg: Any = get_pretrained_model_config(name)
    except (OSError, ValueError):
        return None
    finally:
        constants.HF_HUB_OFFLINE = before
    heads, key_value_heads = cfg.n_heads, cfg.n_key_value_heads or cfg.n_heads
    attention = 2 * (heads + key_value_heads) * cfg.d_model * cfg.d_head
    matrices = attention + (3 if cfg.gated_mlp else 2) * cfg.d_model * cfg.d_mlp
    parameters = cfg.n_layers * matrices + cfg.d_vocab * cfg.d_model
    width = heads * cfg.d_head
    return ModelShape(name, cfg.n_layers, cfg.d_model, cfg.d_vocab, parameters, float(matrices), width, cfg.n_layers)


def model_shape(name: str, config: Any) -> ModelShape:
    """config: of transformers. The model is built without memory for its weights. Raises `UserError` where transformers has
    no causal language model of that configuration."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), one_line(name, "is not a causal language model"):
        model = AutoModelForCausalLM.from_config(config)
    return shape_of(name, model)


def shape_of(name: str, model: Any) -> ModelShape:
    """Of a model of transformers."""
    text = model.config.get_text_config()
    layers = find_layers(model, text.num_hidden_layers)
    matrices = sum(_matrices(layer, text) for layer in layers) / len(layers)
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    embeddings: Any = model.get_input_embeddings()
    attending = sum(any("attn" in part or "attention" in part for part, _ in layer.named_modules()) for layer in layers)
    return ModelShape(
        name,
        text.num_hidden_layers,
        text.hidden_size,
        embeddings.weight.shape[0],
        sum(parameter.numel() for parameter in model.parameters()),
        matrices,
        heads * head,
        attending,
    )


def _matrices(layer: nn.Module, config: Any) -> float:
    """Parameters of a layer's matrices that one token meets. Experts are told by their name."""
    experts = next(
        (value for key in ("num_local_experts", "num_experts", "n_routed_experts") if (value := getattr(config, key, None))),
        1,
    )
    met = min(getattr(config, "num_experts_per_tok", None) or experts, experts) / experts
    return sum(
        parameter.numel() * (met if ".experts" in name or name.startswith("experts") else 1)
        for name, parameter in layer.named_parameters()
        if parameter.dim() > 1
    )
