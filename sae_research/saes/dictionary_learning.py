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

import pickle
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_research.errors import UserError
from sae_research.saes.base import SAEConfig, SparseAutoencoder
from sae_research.saes.folding import fold_decoder_norms
from sae_research.saes.registry import form_class
from sae_research.store import read_json

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
    tensors = {name: (state[key].T if name in layout.transposed else state[key]).float().contiguous()
               for name, key in layout.keys.items()}
    if layout.form == "jumprelu" and tensors["threshold"].dim() == 0:
        tensors["threshold"] = tensors["threshold"].expand(tensors["b_enc"].shape).clone()
    if (
        layout.form != "topk"
    ):  # a TopK SAE there ranks by activation alone, and keeps unit rows while training
        tensors = fold_decoder_norms(layout.form, tensors)
    options, k = {}, trainer.get("k", state["k"].item() if "k" in state else None)
    if layout.form == "topk":
        options["k"] = _integer(k, "k", config)
    d_sae, d_in = tensors["W_dec"].shape
    cfg = SAEConfig(
        form=layout.form, d_in=d_in, d_sae=d_sae, model_name=str(trainer["lm_name"]),
        hook_name=hook_name(trainer, config), context_size=context_size,
        apply_b_dec_to_input=layout.subtracts_b_dec, options=options, architecture=layout.architecture,
        provenance={"format": "dictionary_learning", "dict_class": trainer["dict_class"],
                    **{key: trainer[key] for key in ("trainer_class",) if trainer.get(key)},
                    **({} if k is None else {"held_out": {"l0": float(k)}}),
                    **({"group_sizes": state["group_sizes"].tolist()} if "group_sizes" in state else {})})
    try:
        return form_class(layout.form).from_tensors(cfg, tensors)
    except UserError as error:
        raise UserError(f"{weights}: {error}") from None


def load_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.pt` file, read without executing anything in it. Raises `UserError` for a damaged
    one."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        # files of torch before 1.6 are no zip archives and cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise UserError(
            f"{path}: damaged, or holds more than tensors; only plain state dicts are read"
        ) from None
    except (RuntimeError, EOFError, ValueError) as error:
        raise UserError(
            f"{path}: damaged weights ({str(error).partition(chr(10))[0][:120]}); fetch them again"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: not a state dict of tensors")
    return state


def hook_name(trainer: dict[str, Any], config: Path) -> str:
    """The hook a checkpoint was trained at: the residual stream after its layer unless its submodule says
    otherwise."""
    layer = _integer(trainer["layer"], "layer", config)
    submodule = str(trainer.get("submodule_name") or "")
    for word, hook in (("resid_pre", "hook_resid_pre"), ("mlp", "hook_mlp_out"), ("attn", "hook_attn_out"),
                       ("attention", "hook_attn_out")):
        if word in submodule:
            return f"blocks.{layer}.{hook}"
    return f"blocks.{layer}.hook_resid_post"


def _trainer(config: Path) -> tuple[dict[str, Any], int]:
    """(trainer section, context length) of a config.json."""
    values = read_json(config)
    trainer = values.get("trainer") if isinstance(values, dict) else None
    if not isinstance(trainer, dict):
        raise UserError(f"{config}: no `trainer` section; not a dictionary_learning configuration")
    missing = [key for key in ("dict_class", "layer", "lm_name") if key not in trainer]
    if missing:
        raise UserError(f"{config}: trainer lacks {', '.join(missing)}")
    return trainer, _integer((values.get("buffer") or {}).get("ctx_len", 128), "ctx_len", config)


def _layout(trainer: dict[str, Any], config: Path) -> Layout:
    try:
        return LAYOUTS[trainer["dict_class"]]
    except (KeyError, TypeError):
        raise UserError(f"{config}: dict_class {trainer['dict_class']!r} is not supported; "
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
    bad = [
        key
        for key in ("encoder.weight", "decoder.weight", "W_enc", "W_dec")
        if key in state and state[key].dim() != 2
    ]
    if bad:
        raise UserError(f"{path}: {bad[0]} is no matrix (shape {tuple(state[bad[0]].shape)})")


def _integer(value: Any, key: str, config: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise UserError(f"{config}: {key} must be a whole number, not {value!r}")
    return int(value)
