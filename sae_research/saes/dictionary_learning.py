"""Checkpoints of the dictionary_learning library: `ae.pt` (a plain state dict) with `config.json` beside it.

| dict_class | becomes | note |
|---|---|---|
| `AutoEncoder` | `standard` | decoder norms folded |
| `AutoEncoderNew` | `standard` | likewise; does not subtract `b_dec` before encoding |
| `AutoEncoderTopK` | `topk` | its `threshold` is off by default there, left out |
| `BatchTopKSAE`, `MatryoshkaBatchTopKSAE` | `jumprelu` | one threshold for all; `architecture` tells them apart |
| `JumpReluAutoEncoder` | `jumprelu` | does not subtract `b_dec` before encoding |
| `GatedAutoEncoder` | `gated` | |

`dictionary_learning_export` is the way back.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sae_research.errors import UserError
from sae_research.saes.base import SAEConfig, SparseAutoencoder
from sae_research.saes.folding import fold_decoder_norms
from sae_research.saes.reading import check_shapes, floats, hook_of, load_state, section, shown, text, whole
from sae_research.saes.registry import form_class
from sae_research.store import read_settings

WEIGHTS_FILE = "ae.pt"
CONFIG_FILE = "config.json"


class Layout(NamedTuple):
    """How one `dict_class` stores its tensors: our name -> their key; `transposed` ones are nn.Linear
    weights."""

    form: str
    keys: dict[str, str]
    transposed: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    """Further keys that may be there."""
    trainer_class: str = ""
    """What SAE Bench chooses its loader by."""
    architecture: str = ""
    """Group in tables and plots; the form where empty."""
    subtracts_b_dec: bool = True
    """`b_dec` is subtracted before encoding."""


_LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight"}
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
LAYOUTS: dict[str, Layout] = {
    "AutoEncoder": Layout(
        "standard",
        {**_LINEAR, "b_enc": "encoder.bias", "b_dec": "bias"},
        ("W_enc", "W_dec"),
        trainer_class="StandardTrainer",
    ),
    # SAE Bench and SAELens read April-update SAEs as `AutoEncoder`; this class exists in dictionary_learning alone
    "AutoEncoderNew": Layout(
        "standard",
        {**_LINEAR, "b_enc": "encoder.bias", "b_dec": "decoder.bias"},
        ("W_enc", "W_dec"),
        trainer_class="StandardTrainerAprilUpdate",
        subtracts_b_dec=False,
    ),
    "AutoEncoderTopK": Layout(
        "topk",
        {**_LINEAR, "b_enc": "encoder.bias", "b_dec": "b_dec"},
        ("W_enc", "W_dec"),
        ("k", "threshold"),
        "TopKTrainer",
    ),
    "BatchTopKSAE": Layout(
        "jumprelu",
        {**_LINEAR, "b_enc": "encoder.bias", "b_dec": "b_dec", "threshold": "threshold"},
        ("W_enc", "W_dec"),
        ("k",),
        "BatchTopKTrainer",
        "batchtopk",
    ),
    "MatryoshkaBatchTopKSAE": Layout(
        "jumprelu",
        _PLAIN,
        extra=("k", "group_sizes"),
        trainer_class="MatryoshkaBatchTopKTrainer",
        architecture="matryoshka_batchtopk",
    ),
    "JumpReluAutoEncoder": Layout(
        "jumprelu", _PLAIN, trainer_class="JumpReluTrainer", subtracts_b_dec=False
    ),
    "GatedAutoEncoder": Layout(
        "gated",
        {**_LINEAR, "b_dec": "decoder_bias", "b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"},
        ("W_enc", "W_dec"),
        trainer_class="GatedSAETrainer",
    ),
}


def load_dictionary_learning(folder: str | Path) -> SparseAutoencoder:
    """Read `ae.pt` and `config.json` of a folder. Raises `UserError` for a class, keys or weights that do not
    fit."""
    folder = Path(folder)
    return read_checkpoint(folder / WEIGHTS_FILE, folder / CONFIG_FILE)


def read_checkpoint(weights: Path, config: Path) -> SparseAutoencoder:
    """Read one checkpoint from its two files. `provenance` records the class, and k as the L0 to expect."""
    trainer, context_size = _trainer(config)
    layout = _layout(trainer, config)
    state = load_state(weights)
    _check_keys(state, layout, trainer["dict_class"], weights)
    tensors = _tensors(state, layout, trainer, weights, config)
    if (
        layout.form != "topk"
    ):  # a TopK SAE there ranks by activation alone, and keeps unit rows while training
        tensors = fold_decoder_norms(layout.form, tensors)
    k = _k(trainer, state, config, weights)
    if layout.form == "topk" and k is None:
        raise UserError(f"{config}: trainer lacks k, and so do the weights")
    d_sae, d_in = tensors["W_dec"].shape
    cfg = SAEConfig(
        form=layout.form, d_in=d_in, d_sae=d_sae, model_name=text(trainer["lm_name"], "lm_name", config),
        hook_name=hook_name(trainer, config), context_size=context_size,
        apply_b_dec_to_input=layout.subtracts_b_dec, options={"k": k} if layout.form == "topk" else {},
        architecture=layout.architecture,
        provenance={"format": "dictionary_learning", "dict_class": trainer["dict_class"],
                    **{key: text(trainer[key], key, config) for key in ("trainer_class",) if trainer.get(key)},
                    **({} if k is None else {"held_out": {"l0": float(k)}}),
                    **({"group_sizes": state["group_sizes"].tolist()} if "group_sizes" in state else {})})
    try:
        return form_class(layout.form).from_tensors(cfg, tensors)
    except UserError as error:
        raise UserError(f"{weights}: {error}") from None


def _tensors(state: dict[str, Tensor], layout: Layout, trainer: dict[str, Any], weights: Path, config: Path
             ) -> dict[str, Tensor]:
    """Our tensors by our names, of the sizes that config.json says; where it says none, of those of `W_dec`."""
    found = {name: state[key].T if name in layout.transposed else state[key] for name, key in layout.keys.items()}
    sizes = found["W_dec"].shape
    d_sae = whole(trainer.get("dict_size", sizes[0]), "dict_size", config)
    d_in = whole(trainer.get("activation_dim", sizes[1]), "activation_dim", config)
    if layout.form == "jumprelu" and found["threshold"].dim() == 0:
        check_shapes({"b_enc": found["b_enc"]}, d_in, d_sae, weights)
        found["threshold"] = found["threshold"].expand(d_sae)
    check_shapes(found, d_in, d_sae, weights)
    return floats(found, weights)


def _k(trainer: dict[str, Any], state: dict[str, Tensor], config: Path, weights: Path) -> int | None:
    """How many latents it was trained to use, of the configuration or the weights; both must say the same."""
    said = None if trainer.get("k") is None else whole(trainer["k"], "k", config)
    if "k" not in state:
        return said
    if state["k"].numel() != 1:
        raise UserError(f"{weights}: k has shape {tuple(state['k'].shape)}, not one number")
    kept = whole(state["k"].item(), "k", weights)
    if said is not None and said != kept:
        raise UserError(f"{weights}: k is {kept}, config.json says {said}; correct the one that is wrong")
    return kept


_SUBMODULES = {"resid_post": "hook_resid_post", "resid_pre": "hook_resid_pre", "mlp_out": "hook_mlp_out",
               "attn_out": "hook_attn_out", "attention_out": "hook_attn_out"}
"""What a `submodule_name` without its `_layer_N` may be, and the hook that it is."""


def hook_name(trainer: dict[str, Any], config: Path) -> str:
    """The hook a checkpoint was trained at. Without `submodule_name`, which their trainers need not record, it is the
    residual stream after its layer, where SAE Bench puts all of them.

    Raises `UserError` for a submodule that is not known exactly, and for one of another layer.
    """
    layer = whole(trainer["layer"], "layer", config, least=0)
    submodule = text(trainer.get("submodule_name"), "submodule_name", config)
    match = re.fullmatch(r"(\w+?)(?:_layer_([0-9]{1,6}))?", submodule)
    if not submodule:
        hook = f"blocks.{layer}.hook_resid_post"
    elif match and match[1] in _SUBMODULES:
        hook = f"blocks.{int(match[2] or layer)}.{_SUBMODULES[match[1]]}"
    elif "." in submodule:
        hook = hook_of(submodule, config)
    else:
        raise UserError(f"{config}: submodule_name {shown(submodule)} is not known; known: "
                        f"{', '.join(f'{kind}_layer_{layer}' for kind in _SUBMODULES)}")
    if not hook.startswith(f"blocks.{layer}."):
        raise UserError(f"{config}: submodule_name {shown(submodule)} is not of layer {layer}, which `layer` says")
    return hook


def _trainer(config: Path) -> tuple[dict[str, Any], int]:
    """(trainer section, context length) of a config.json."""
    values = read_settings(config)
    trainer = values.get("trainer")
    if not isinstance(trainer, dict):
        raise UserError(f"{config}: no `trainer` section; not a dictionary_learning configuration")
    missing = [key for key in ("dict_class", "layer", "lm_name") if key not in trainer]
    if missing:
        raise UserError(f"{config}: trainer lacks {', '.join(missing)}")
    buffer = section(values.get("buffer"), "buffer", config)
    if buffer.get("io", "out") != "out":
        raise UserError(f"{config}: buffer.io is {shown(buffer['io'])}: it reads not just what its submodule puts out")
    return trainer, whole(buffer.get("ctx_len", 128), "ctx_len", config)


def _layout(trainer: dict[str, Any], config: Path) -> Layout:
    try:
        return LAYOUTS[trainer["dict_class"]]
    except (KeyError, TypeError):
        raise UserError(f"{config}: dict_class {shown(trainer['dict_class'])} is not supported; "
                        f"known: {', '.join(LAYOUTS)}") from None


def _check_keys(state: dict[str, Tensor], layout: Layout, dict_class: str, path: Path) -> None:
    """The weights must be those of the class that config.json names: a wrong guess would still encode
    something."""
    missing = sorted(set(layout.keys.values()) - set(state))
    unknown = sorted(set(state) - set(layout.keys.values()) - set(layout.extra))
    if missing or unknown:
        parts = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"also holds {', '.join(unknown)}"] * bool(
            unknown
        )
        raise UserError(f"{path}: not the weights of {dict_class}, which config.json names: "
                        f"{' and '.join(parts)}")
    bad = [name for name in ("W_enc", "W_dec") if state[layout.keys[name]].dim() != 2]
    if bad:
        key = layout.keys[bad[0]]
        raise UserError(f"{path}: {key} is no matrix (shape {tuple(state[key].shape)})")
