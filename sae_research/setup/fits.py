"""Does an SAE belong to this model? Cheap checks, made as soon as an SAE is read."""

from __future__ import annotations

from torch import nn

from sae_research.errors import UserError
from sae_research.lm import LanguageModel
from sae_research.saes import SparseAutoencoder

_SAME_MODEL = {"gpt2-small": "gpt2", "mistral-7b": "mistral-7b-v0.1"}
"""TransformerLens names whose last part is not the hub's."""


def same_model(one: str, other: str) -> bool:
    """Whether two names mean one model: hub organisation, path and case aside."""
    return _bare(one) == _bare(other)


def _bare(name: str) -> str:
    last = name.rstrip("/").rpartition("/")[2].lower()
    return _SAME_MODEL.get(last, last)


def fill_in(sae: SparseAutoencoder, model_name: str, hook_name: str) -> list[str]:
    """Complete a configuration that names no model or hook; returns what was assumed, in words."""
    assumed = []
    if not sae.cfg.model_name:
        assumed.append(f"names no model; assumed {model_name}")
        sae.cfg = sae.cfg.replace(model_name=model_name)
    if not sae.cfg.hook_name:
        assumed.append(f"names no hook; assumed {hook_name}")
        sae.cfg = sae.cfg.replace(hook_name=hook_name)
    return assumed


def check_fits(name: str, sae: SparseAutoencoder, lm: LanguageModel) -> None:
    """Raises `UserError` when the SAE was made for another model, another width, or a hook the model
    lacks."""
    cfg = sae.cfg
    if not same_model(cfg.model_name, lm.name):
        raise UserError(f"SAE {name} was trained on {cfg.model_name}, model.name is {lm.name}; set "
                        f"model.name: {cfg.model_name} or choose another SAE")
    width = lm.d_in(cfg.hook_name)
    if cfg.d_in != width:
        raise UserError(f"SAE {name} reads {cfg.d_in} dimensions, {lm.name} has {width} at {cfg.hook_name}")
    if cfg.center_input and not any(isinstance(module, nn.LayerNorm) for module in lm.model.modules()):
        raise UserError(f"SAE {name} was trained with center_writing_weights, which a model without "
                        f"LayerNorm such as "
                        f"{lm.name} does not allow")


def check_tokenizer(lm: LanguageModel) -> None:
    """Raises `UserError` when the tokenizer makes ids the model has no embedding for."""
    if len(lm.tokenizer) > lm.vocab_size:
        raise UserError(f"model.name: the tokenizer of {lm.name} has {len(lm.tokenizer)} tokens, the model "
                        f"{lm.vocab_size}; they do not belong together")
