"""Sparse coders of EleutherAI's sparsify: `cfg.json` with `sae.safetensors`, in a folder that is named after the module they
were trained on. Read of all its versions, written for the present one.

| cfg.json | becomes |
|---|---|
| `activation: topk` | `topk` |
| `activation: groupmax` | `groupmax` |
| `signed: true` (before version 1) | `abs_topk` |
| `transcode: true` | a transcoder, which does not subtract `b_dec` from what it reads; `skip_connection: true` its skip |

| folder | an SAE reads | a transcoder reads, and writes |
|---|---|---|
| `layers.L` | `hook_resid_post` | `hook_resid_pre`, `hook_resid_post` |
| `layers.L.mlp` | `hook_mlp_out` | `mlp.hook_in`, `hook_mlp_out` |
| `layers.L.self_attn` | `hook_attn_out` | refused: there is no hook for what attention is given |

What a module puts out is what it adds to the stream, but for models that norm it once more; `provenance` names the module,
and a model that does so refuses it (`sources.check_fits`). The model stands in `config.json` beside the folder.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch

from sae_research.runtime.errors import UserError
from sae_research.runtime.files import read_settings, write_bytes, write_json
from sae_research.saes.base import SAEConfig, SparseAutoencoder
from sae_research.saes.forms import as_subtracting
from sae_research.saes.reading import check_shapes, flag, floats, load_safetensors, renamed, shown, text, whole
from sae_research.saes.registry import form_class

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae.safetensors"
LIBRARY = "sparsify"
_KEYS = frozenset(
    "activation expansion_factor normalize_decoder num_latents k multi_topk skip_connection transcode d_in signed".split()
)
_NAMES = {
    "encoder.weight": "W_enc.T",
    "encoder.bias": "b_enc",
    "W_dec": "W_dec",
    "b_dec": "b_dec",
    "W_skip": "W_skip",
}
_OF_FORM = {"topk": "topk", "groupmax": "groupmax"}
"""Our form -> its `activation`."""
_FOLDER = re.compile(r"(?:model\.|transformer\.|gpt_neox\.|decoder\.)*(?:layers|h|blocks)[._]([0-9]{1,4})(?:\.(\w+))?")
_ATTENTION = ("self_attn", "attention", "attn")


class Hooks(NamedTuple):
    """What the folder's name says: where it reads and writes, and which module inside a layer that is."""

    read: str
    written: str = ""
    module: str = ""


def hooks_of(folder: str, transcode: bool, where: object) -> Hooks:
    """Read off a hookpoint of sparsify, such as `layers.5.mlp`. Raises `UserError` for one without a hook here."""
    match = _FOLDER.fullmatch(folder)
    if match is None:
        raise UserError(
            f"{where}: the folder's name must be the module it was trained on, such as layers.5 or layers.5.mlp, not "
            f"{shown(folder)}" + (": there is no hook for the embedding" if folder.startswith("embed") else "")
        )
    block, module = f"blocks.{int(match[1])}", match[2] or ""
    if not module:
        return (
            Hooks(f"{block}.hook_resid_pre", f"{block}.hook_resid_post") if transcode else Hooks(f"{block}.hook_resid_post")
        )
    if module == "mlp":
        written = f"{block}.hook_mlp_out"
        return Hooks(f"{block}.mlp.hook_in", written, module) if transcode else Hooks(written, "", module)
    if module in _ATTENTION and not transcode:
        return Hooks(f"{block}.hook_attn_out", "", module)
    raise UserError(
        f"{where}: {shown(folder)} is not read: "
        + ("there is no hook for what attention is given" if module in _ATTENTION else "known modules are mlp and self_attn")
    )


def load_sparsify(folder: str | Path) -> SparseAutoencoder:
    """Read one folder. Raises `UserError` for a missing or damaged file, and for anything in it that is not used."""
    folder = Path(folder)
    path = folder / CONFIG_FILE
    values = read_settings(path)
    unknown = sorted(key for key, value in values.items() if key not in _KEYS and value not in (None, False))
    if unknown:
        raise UserError(
            f"{path}: holds {', '.join(unknown)[:120]}, which is not known of sparsify; remove what changes nothing"
        )
    transcode, skip, signed = (flag(values.get(key, False), key, path) for key in ("transcode", "skip_connection", "signed"))
    form = _form(text(values.get("activation"), "activation", path) or "topk", signed, path)
    tensors = floats(
        renamed(load_safetensors(folder / WEIGHTS_FILE), _NAMES, folder / WEIGHTS_FILE, optional=("W_skip",)),
        folder / WEIGHTS_FILE,
    )
    if skip != ("W_skip" in tensors):
        raise UserError(f"{path}: skip_connection is {skip}, the weights say the opposite; fetch them again")
    d_in = whole(values.get("d_in"), "d_in", path)
    width = whole(values.get("num_latents") or 0, "num_latents", path, least=0)
    d_sae = width or d_in * whole(values.get("expansion_factor", 32), "expansion_factor", path)
    check_shapes(tensors, d_in, d_sae, folder / WEIGHTS_FILE)
    hooks = hooks_of(folder.absolute().name, transcode, folder)
    if skip and not transcode:
        raise UserError(f"{path}: skip_connection without transcode copies what it reads; set transcode: true if it is one")
    run = _run(folder.absolute().parent / "config.json")
    cfg = SAEConfig(
        form=form,
        d_in=d_in,
        d_sae=d_sae,
        model_name=text(run.get("model"), "model", folder.parent / "config.json"),
        hook_name=hooks.read,
        hook_out=hooks.written,
        context_size=whole(run.get("ctx_len") or 2048, "ctx_len", folder.parent / "config.json"),
        apply_b_dec_to_input=not transcode,
        options={"k": whole(values.get("k", 32), "k", path)},
        provenance={"format": LIBRARY, **({"module": hooks.module} if hooks.module else {})},
    )
    try:
        return form_class(form).from_tensors(cfg, tensors)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None


def _form(activation: str, signed: bool, path: Path) -> str:
    if activation not in _OF_FORM or (signed and activation != "topk"):
        named = f"activation {shown(activation)}" + (" with signed" if signed else "")
        raise UserError(f"{path}: {named} is not known; known: {', '.join(_OF_FORM)}")
    return "abs_topk" if signed else activation


def _run(path: Path) -> dict[str, Any]:
    """Settings of the training run, which stand beside the folders where sparsify itself wrote them."""
    return read_settings(path) if path.is_file() else {}


def write_sparsify(sae: SparseAutoencoder, folder: str | Path) -> Path:
    """Write `cfg.json` and `sae.safetensors` into a folder of `folder` that bears the module's name, which is returned; the
    same SAE gives the same bytes. Raises `UserError` for what sparsify does not have."""
    cfg = sae.cfg
    if cfg.form not in _OF_FORM:
        raise UserError(f"sparsify has no form {cfg.form}; it has {', '.join(_OF_FORM)}")
    if cfg.center_input or cfg.d_out != cfg.d_in:
        raise UserError("sparsify has no centred input, and no d_out of its own")
    place = Path(folder) / _module(cfg)
    tensors = as_subtracting(sae, theirs=not cfg.is_transcoder)
    theirs = {
        key: (tensors[name.removesuffix(".T")].T if name.endswith(".T") else tensors[name]).contiguous().clone()
        for key, name in _NAMES.items()
        if name.removesuffix(".T") in tensors
    }
    values = {
        "activation": _OF_FORM[cfg.form],
        "expansion_factor": max(1, cfg.d_sae // cfg.d_in),
        "normalize_decoder": bool((tensors["W_dec"].norm(dim=1) - 1).abs().max() < 1e-5),
        "num_latents": cfg.d_sae,
        "k": sae.options()["k"],
        "multi_topk": False,
        "skip_connection": sae.W_skip is not None,
        "transcode": cfg.is_transcoder,
        "d_in": cfg.d_in,
    }
    write_bytes(place / WEIGHTS_FILE, safetensors.torch.save(theirs))
    write_json(place / CONFIG_FILE, values)
    return place


def _module(cfg: SAEConfig) -> str:
    for name in ("", ".mlp", ".self_attn"):
        folder = f"layers.{cfg.hook_layer}{name}"
        try:
            hooks = hooks_of(folder, cfg.is_transcoder, "")
        except UserError:
            continue
        if (hooks.read, hooks.written or hooks.read) == (cfg.hook_name, cfg.hook_out):
            return folder
    raise UserError(f"sparsify has no module for {cfg.hooks}")
