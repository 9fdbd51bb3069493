"""SAE folders: `cfg.json` and `sae_weights.safetensors` in SAELens layout, variants without weights of their
own."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from sae_research.errors import UserError
from sae_research.saes.base import SAEConfig, SparseAutoencoder
from sae_research.saes.registry import form_class
from sae_research.saes.sae_lens import convert
from sae_research.store import file_sha256, read_json, write_bytes, write_json

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
# SAELens discards nested metadata unless it believes a version of its own from 6.0.0 on wrote the file.
SAE_LENS_VERSION = "6.54.12"
SAE_LENS_FORMS = ("standard", "gated", "jumprelu", "topk", "matching_pursuit")
"""Architectures that this version reads as we mean them."""


def save_sae(sae: SparseAutoencoder, folder: str | Path) -> None:
    """Write an SAE whose weights are its own; the same SAE gives the same bytes.

    Where SAELens has the form, `SAE.load_from_disk(folder)` reads it; where not, it refuses the architecture's name and
    `sae_lens_lacks` says why.
    """
    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sae.tensors().items()}
    write_bytes(folder / WEIGHTS_FILE, safetensors.torch.save(tensors))
    write_json(folder / CONFIG_FILE, _to_json(sae.cfg, sae.options()))


def sae_lens_lacks(sae: SparseAutoencoder) -> str:
    """Why SAELens cannot read this SAE's folder, in a line; empty where it can."""
    name, _ = _as_sae_lens_has_it(sae.cfg.form, sae.options())
    if name in SAE_LENS_FORMS:
        return ""
    return f"SAELens {SAE_LENS_VERSION} has no form {sae.cfg.form}; sae_research alone reads it"


def _as_sae_lens_has_it(form: str, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """(architecture, options) under which SAELens computes the same; a name it refuses where it cannot.

    Its matching pursuit takes positive correlations only, as our non-negative one; read as that, our signed one would
    give other latents without a word.
    """
    if form == "topk":  # unit decoder rows are folded in: SAELens must not weigh activations by norms again
        return form, {"rescale_acts_by_decoder_norm": False}
    if form == "nonnegative_matching_pursuit" and set(options) == {"s"}:
        return "matching_pursuit", {"max_iterations": options["s"], "residual_threshold": 0.0,
                                    "stop_on_duplicate_support": False}
    return ("signed_matching_pursuit" if form == "matching_pursuit" else form), {}


def save_variant(cfg: SAEConfig, options: dict[str, Any], folder: str | Path, weights_from: Path) -> None:
    """Write an SAE that reads another's dictionary: a configuration that points there, and no copied weights.

    `weights_from` is the other SAE's folder; the path is kept relative, the weights are pinned by SHA-256.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = _to_json(cfg, options)
    values["metadata"]["sae_research"]["weights_from"] = {
        "folder": os.path.relpath(weights_from, folder), "sha256": file_sha256(weights_from / WEIGHTS_FILE)}
    write_json(folder / CONFIG_FILE, values)


def load_sae(folder: str | Path, device: str = "cpu") -> SparseAutoencoder:
    """Read an SAE folder, ours or SAELens' own. Raises `UserError` when files are missing, damaged, or not
    what cfg.json says."""
    folder = Path(folder)
    values = read_json(folder / CONFIG_FILE)
    if not isinstance(values, dict):
        raise UserError(f"{folder / CONFIG_FILE}: not an SAE configuration")
    metadata = values.get("metadata")
    if not (isinstance(metadata, dict) and "sae_research" in metadata):
        return convert(values, _read_tensors(folder / WEIGHTS_FILE), str(folder), _scaling_factor(folder)).to(
            device
        )
    cfg, weights_from = _from_json(values, folder)
    cls = form_class(cfg.form)
    tensors = _read_tensors(
        folder / WEIGHTS_FILE if weights_from is None else _shared_weights(folder, weights_from)
    )
    missing = [name for name in cls.tensor_names if name not in tensors]
    if missing:
        raise UserError(f"{folder}: weights lack {', '.join(missing)} for the form {cfg.form}")
    try:
        sae = cls.from_tensors(cfg, {name: tensors[name].float() for name in cls.tensor_names})
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except (KeyError, TypeError) as error:  # options that the form does not have, or lacks
        raise UserError(f"{folder / CONFIG_FILE}: options do not fit the form {cfg.form} ({error})") from None
    return sae.to(device)


def _shared_weights(folder: Path, weights_from: dict[str, str]) -> Path:
    """The weights file a variant points to, unchanged since the variant was made."""
    source = (folder / weights_from["folder"]).resolve() / WEIGHTS_FILE
    if file_sha256(source) != weights_from["sha256"]:
        raise UserError(f"{folder}: the weights in {source.parent.name} changed since this variant was made; "
                        "run the setup stage again")
    return source


def _scaling_factor(folder: Path) -> float | None:
    """What SAELens multiplied activations by in training, where a checkpoint of its trainer recorded it."""
    path = folder / "activation_scaler.json"
    factor = read_json(path).get("scaling_factor") if path.is_file() else None
    return None if factor is None else float(factor)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except safetensors.SafetensorError as error:
        raise UserError(f"{path}: damaged weights ({error}); make or fetch them again") from None


def _to_json(cfg: SAEConfig, options: dict[str, Any]) -> dict[str, Any]:
    architecture, lens_options = _as_sae_lens_has_it(cfg.form, options)
    return {
        "architecture": architecture, "d_in": cfg.d_in, "d_sae": cfg.d_sae, "dtype": cfg.dtype, "device": "cpu",
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input, "normalize_activations": "none",
        "reshape_activations": "none", **options, **lens_options,
        "metadata": {
            "sae_lens_version": SAE_LENS_VERSION, "model_name": cfg.model_name, "hook_name": cfg.hook_name,
            "hook_head_index": None, "context_size": cfg.context_size, "prepend_bos": cfg.prepend_bos,
            "model_from_pretrained_kwargs": {"center_writing_weights": True} if cfg.center_input else {},
            "sae_research": {
                "architecture": cfg.architecture, "role": cfg.role, "base": cfg.base, "options": options,
                "center_input": cfg.center_input, "provenance": cfg.provenance,
                **({} if architecture == cfg.form else {"form": cfg.form})},
        },
    }


def _from_json(values: dict[str, Any], folder: Path) -> tuple[SAEConfig, dict[str, str] | None]:
    """(configuration, where the weights are if not here) of a folder that `save_sae` or `save_variant`
    wrote."""
    metadata = values["metadata"]
    try:
        ours = metadata["sae_research"]
        cfg = SAEConfig(
            form=ours.get("form", values["architecture"]),
            d_in=int(values["d_in"]),
            d_sae=int(values["d_sae"]),
            dtype=values["dtype"],
            model_name=metadata["model_name"],
            hook_name=metadata["hook_name"],
            context_size=int(metadata["context_size"]),
            prepend_bos=bool(metadata["prepend_bos"]),
            apply_b_dec_to_input=bool(values["apply_b_dec_to_input"]),
            center_input=bool(ours["center_input"]),
            options=ours["options"],
            architecture=ours["architecture"],
            role=ours["role"],
            base=ours["base"],
            provenance=ours["provenance"],
        )
    except KeyError as error:
        raise UserError(f"{folder / CONFIG_FILE}: the key {error} is missing") from None
    except (TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{folder / CONFIG_FILE}: not an SAE configuration ({error})") from None
    return cfg, ours.get("weights_from")
