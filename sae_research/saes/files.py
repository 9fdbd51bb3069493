"""SAE folders: `cfg.json` and `sae_weights.safetensors` in SAELens layout, variants without weights of their
own."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from sae_research.config.recipes import PLUS
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import checked_name, file_sha256, read_settings, write_bytes, write_json
from sae_research.runtime.packaged import PREFIX, packaged_place
from sae_research.saes.base import SAEConfig, SparseAutoencoder
from sae_research.saes.formats.sae_lens import convert
from sae_research.saes.reading import (
    flag,
    floats,
    hook_of,
    load_safetensors,
    number,
    precision,
    section,
    shown,
    text,
    whole,
)
from sae_research.saes.registry import form_class

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
# SAELens discards nested metadata unless it believes a version of its own from 6.0.0 on wrote the file.
SAE_LENS_VERSION = "6.54.12"
SAE_LENS_FORMS = (
    "standard",
    "gated",
    "jumprelu",
    "topk",
    "abstopk",
    "matching_pursuit",
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
)
"""Architectures that this version reads as we mean them."""
OF_MODELS = ("base", "finetuned")
"""Before the hooks of a crosscoder of two models (`transfer.crosscoder`)."""
_SKIP = "skip_transcoder"
ROLES = ("baseline", "variant", "comparison", "control")


def save_sae(sae: SparseAutoencoder, folder: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write an SAE whose weights are its own, in `dtype`; the same SAE gives the same bytes.

    Where SAELens has the form, `SAE.load_from_disk(folder)` reads it; where not, it refuses the architecture's name and
    `sae_lens_lacks` says why.
    """
    folder = Path(folder)
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in sae.tensors().items()}
    cfg = sae.cfg
    if dtype != torch.float32:
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        cfg = cfg.replace(dtype=str(dtype).removeprefix("torch."))
    weights = safetensors.torch.save(tensors)
    values = _to_json(cfg, sae.options(), sae.W_skip is not None)
    values["metadata"]["sae_research"]["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    write_bytes(folder / WEIGHTS_FILE, weights)
    write_json(folder / CONFIG_FILE, values)


def sae_lens_lacks(sae: SparseAutoencoder) -> str:
    """Why SAELens cannot read this SAE's folder, in a line; empty where it can."""
    name, _ = _as_sae_lens_has_it(sae.cfg, sae.options(), sae.W_skip is not None)
    if name in SAE_LENS_FORMS:
        return ""
    kind = f" as a {sae.cfg.kind}" if sae.cfg.kind != "SAE" else ""
    return f"SAELens {SAE_LENS_VERSION} has no form {sae.cfg.form}{kind}; sae_research alone reads it"


def _as_sae_lens_has_it(cfg: SAEConfig, options: dict[str, Any], skip: bool) -> tuple[str, dict[str, Any]]:
    """(architecture, options) under which SAELens computes the same; a name it refuses where it cannot: it knows no
    crosscoders.

    Its matching pursuit takes positive correlations only, as our non-negative one; read as that, our signed one would
    give other latents without a word.
    """
    form = cfg.form
    if cfg.is_crosscoder:
        return f"{form}_crosscoder", {}
    if cfg.is_transcoder:
        kind = _SKIP if skip else "transcoder"
        return (kind if form == "standard" else f"{form}_{kind}"), {}
    if form in ("topk", "abs_topk"):  # unit decoder rows are folded in: SAELens must not weigh activations by norms again
        return form.replace("_", ""), {"rescale_acts_by_decoder_norm": False}
    if form == "sae_lens_matching_pursuit":
        return "matching_pursuit", {}
    if form == "nonnegative_matching_pursuit" and set(options) == {"s"}:
        return "matching_pursuit", {
            "max_iterations": options["s"],
            "residual_threshold": 0.0,
            "stop_on_duplicate_support": False,
        }
    return ("signed_matching_pursuit" if form == "matching_pursuit" else form), {}


def save_variant(cfg: SAEConfig, options: dict[str, Any], folder: str | Path, weights_from: Path) -> None:
    """Write an SAE that reads another's dictionary: a configuration that points there, and no copied weights.

    `weights_from` is the other SAE's folder; the path is kept relative, the weights are pinned by SHA-256.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    values = _to_json(cfg, options, skip=False)
    values["metadata"]["sae_research"]["weights_from"] = {
        "folder": os.path.relpath(weights_from, folder),
        "sha256": file_sha256(weights_from / WEIGHTS_FILE),
    }
    write_json(folder / CONFIG_FILE, values)


def load_sae(folder: str | Path, device: str = "cpu") -> SparseAutoencoder:
    """Read an SAE folder, ours or SAELens' own, or `packaged:NAME`. Raises `UserError` when files are missing, damaged, or
    not what cfg.json says."""
    named = isinstance(folder, str) and folder.startswith(PREFIX)
    folder = packaged_place(str(folder).removeprefix(PREFIX)) if named else Path(folder)
    values = read_settings(folder / CONFIG_FILE)
    if "num_latents" in values and "d_sae" not in values:
        raise UserError(f"{folder / CONFIG_FILE}: of an SAE of sparsify, whose weights are sae.safetensors; fetch both")
    metadata = values.get("metadata")
    if not (isinstance(metadata, dict) and "sae_research" in metadata):
        return convert(values, load_safetensors(folder / WEIGHTS_FILE), str(folder), _scaling_factor(folder)).to(device)
    cfg, weights_from, sha256 = _from_json(values, folder)
    cls = form_class(cfg.form)
    names = (*cls.tensor_names, "W_skip") if _has_skip(values) else cls.tensor_names
    if weights_from:
        tensors = load_safetensors(_shared_weights(folder, weights_from))
    else:
        tensors = _own_weights(folder / WEIGHTS_FILE, sha256, names)
    missing = [name for name in names if name not in tensors]
    if missing:
        raise UserError(f"{folder}: weights lack {', '.join(missing)} for the form {cfg.form}")
    own = floats({name: tensors[name] for name in names}, folder)
    try:
        sae = cls.from_tensors(cfg, own)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # options that the form does not have, or lacks
        raise UserError(f"{folder / CONFIG_FILE}: options do not fit the form {cfg.form} ({error})") from None
    if "W_skip" in own and sae.W_skip is None:
        raise UserError(f"{folder}: the form {cfg.form} takes no skip")
    for name, value in cfg.options.items():
        used = sae.options().get(name, getattr(sae, name, value))
        if json.dumps(used) != json.dumps(value):
            raise UserError(f"{folder / CONFIG_FILE}: the option {name} = {value!r} does not fit the form {cfg.form}")
    return sae.to(device)


def _own_weights(path: Path, sha256: str | None, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights beside a configuration, the very ones that it was written with, where it says which."""
    if sha256 is not None and file_sha256(path) != sha256:
        raise UserError(
            f"{path}: damaged weights, or others than {CONFIG_FILE} was written with; make or fetch them "
            "again, or remove weights_sha256 from it if the change was meant"
        )
    tensors = load_safetensors(path)
    unused = sorted(set(tensors) - set(names))
    if unused:
        raise UserError(f"{path}: also holds {', '.join(unused)[:120]}, which the form does not use")
    return tensors


def _shared_weights(folder: Path, weights_from: dict[str, Any]) -> Path:
    """The weights file a variant points to, in a folder beside it, unchanged since the variant was made."""
    place = text(weights_from.get("folder"), "weights_from.folder", folder / CONFIG_FILE)
    up, _, name = place.partition("/")
    if up != ".." or PurePosixPath(place).parts != ("..", name):
        raise UserError(f"{folder / CONFIG_FILE}: weights_from.folder {place[:60]!r} is no folder beside this one")
    checked_name(name, f"{folder / CONFIG_FILE}: weights_from.folder")
    source = (folder / place).resolve() / WEIGHTS_FILE
    if file_sha256(source) != weights_from.get("sha256"):
        raise UserError(
            f"{folder}: the weights in {source.parent.name} changed since this variant was made; run the setup stage again"
        )
    return source


def _scaling_factor(folder: Path) -> float | None:
    """What SAELens multiplied activations by in training, where a checkpoint of its trainer recorded it."""
    path = folder / "activation_scaler.json"
    factor = read_settings(path).get("scaling_factor") if path.exists() else None
    if factor is not None and not number(factor, "scaling_factor", path) > 0:
        raise UserError(f"{path}: scaling_factor must be positive, not {factor!r}")
    return None if factor is None else float(factor)


def _to_json(cfg: SAEConfig, options: dict[str, Any], skip: bool) -> dict[str, Any]:
    architecture, lens_options = _as_sae_lens_has_it(cfg, options, skip)
    written = {"hook_name_out": cfg.hook_out, "hook_head_index_out": None} if cfg.is_transcoder else {}
    return {
        "architecture": architecture,
        "d_in": cfg.d_in,
        **({"d_out": cfg.d_out} if cfg.is_transcoder else {}),
        "d_sae": cfg.d_sae,
        "dtype": cfg.dtype,
        "device": "cpu",
        "apply_b_dec_to_input": cfg.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **options,
        **lens_options,
        "metadata": {
            "sae_lens_version": SAE_LENS_VERSION,
            "model_name": cfg.model_name,
            "hook_name": cfg.hook_name,
            "hook_head_index": None,
            **written,
            "context_size": cfg.context_size,
            "prepend_bos": cfg.prepend_bos,
            "model_from_pretrained_kwargs": {"center_writing_weights": True} if cfg.center_input else {},
            "sae_research": {
                "architecture": cfg.architecture,
                "role": cfg.role,
                "base": cfg.base,
                "options": options,
                "center_input": cfg.center_input,
                "provenance": cfg.provenance,
                **({"hook_out": cfg.hook_out} if cfg.is_transcoder else {}),
                **({"hook_scales": list(cfg.hook_scales)} if cfg.is_crosscoder else {}),
                **({} if architecture == cfg.form else {"form": cfg.form}),
            },
        },
    }


def _from_json(values: dict[str, Any], folder: Path) -> tuple[SAEConfig, dict[str, Any] | None, str | None]:
    """(configuration, where the weights are if not here, their SHA-256 if recorded) of a folder that `save_sae` or
    `save_variant` wrote."""
    path, metadata = folder / CONFIG_FILE, values["metadata"]
    ours = section(metadata["sae_research"], "metadata.sae_research", path)
    try:
        cfg = SAEConfig(
            form=text(ours.get("form", values["architecture"]), "architecture", path),
            d_in=whole(values["d_in"], "d_in", path),
            d_sae=whole(values["d_sae"], "d_sae", path),
            d_out=whole(values["d_out"], "d_out", path) if "d_out" in values else 0,
            dtype=precision(values["dtype"], "dtype", path),
            model_name=text(metadata["model_name"], "model_name", path),
            hook_name=text(metadata["hook_name"], "hook_name", path),
            hook_out=text(metadata.get("hook_name_out"), "hook_name_out", path),
            context_size=whole(metadata["context_size"], "context_size", path),
            prepend_bos=flag(metadata["prepend_bos"], "prepend_bos", path),
            apply_b_dec_to_input=flag(values["apply_b_dec_to_input"], "apply_b_dec_to_input", path),
            center_input=flag(ours["center_input"], "center_input", path),
            options=section(ours["options"], "options", path),
            architecture=text(ours["architecture"], "sae_research.architecture", path),
            role=text(ours["role"], "role", path),
            base=text(ours["base"], "base", path) or None,
            provenance=section(ours["provenance"], "provenance", path),
            hook_scales=_scales(ours.get("hook_scales"), path),
        )
    except KeyError as error:
        raise UserError(f"{path}: the key {error} is missing") from None
    except UserError as error:
        raise UserError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
    if cfg.role not in ROLES:
        raise UserError(f"{path}: role {shown(cfg.role)} is not known; known: {', '.join(ROLES)}")
    form_class(cfg.form)  # an unknown one is named before what else does not fit it
    _check_agrees(values, cfg, path)
    weights_from = section(ours.get("weights_from"), "weights_from", path) or None
    sha256 = text(ours.get("weights_sha256"), "weights_sha256", path) or None
    written = {"hook_out": PLUS.join(hook_of(name, path) for name in cfg.hooks_out)} if cfg.is_transcoder else {}
    read = PLUS.join(_hook_read(name, path) for name in cfg.hook_names)
    return cfg.replace(hook_name=read, **written), weights_from, sha256


def _hook_read(name: str, path: Path) -> str:
    """A hook's name, which a crosscoder of two models has behind the word for the model (`OF_MODELS`)."""
    model, _, hook = name.rpartition(" ")
    return f"{model} {hook_of(hook, path)}" if model in OF_MODELS else hook_of(name, path)


def _scales(value: Any, path: Path) -> tuple[float, ...]:
    if value is not None and not isinstance(value, list):
        raise UserError(f"{path}: hook_scales must be a list of numbers, not {shown(value)}")
    return tuple(number(scale, "hook_scales", path) for scale in value or ())


def _has_skip(values: dict[str, Any]) -> bool:
    return str(values["architecture"]).endswith(_SKIP)


def _check_agrees(values: dict[str, Any], cfg: SAEConfig, path: Path) -> None:
    """Raises `UserError` where the file says something else than what is made of it: some of it stands there twice, for
    SAELens and for us, and a key that `save_sae` never writes may ask for what this project does not do."""
    written = _to_json(cfg, cfg.options, skip=_has_skip(values))
    metadata = written.pop("metadata")
    top = {key: value for key, value in values.items() if key not in ("metadata", "device")}
    inner = {key: value for key, value in values["metadata"].items() if key in metadata and key != "sae_lens_version"}
    ours = {key: value for key, value in inner.pop("sae_research").items() if key not in ("weights_from", "weights_sha256")}
    for said, meant in ((top, written), (inner, metadata), (ours, metadata["sae_research"])):
        for key, value in said.items():
            if key not in meant or json.dumps(value, sort_keys=True) != json.dumps(meant[key], sort_keys=True):
                raise UserError(
                    f"{path}: {key} = {str(value)[:60]} does not fit the rest of the file, an SAE of the form "
                    f"{cfg.form[:60]}" + (f" with {shown(meant[key])}" if key in meant else "")
                )
