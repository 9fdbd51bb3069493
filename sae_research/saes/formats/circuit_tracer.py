"""Transcoders as circuit-tracer reads them: `config.yaml` with one file a layer, `layer_L.safetensors`; of cross-layer ones
`W_enc_L.safetensors` and `W_dec_L.safetensors`.

| tensor | shape | |
|---|---|---|
| `W_enc` | [d_sae, d_in] | |
| `W_dec` | [d_sae, d_out]; cross-layer [d_sae, layers from L on, d_out] | |
| `b_enc`, `b_dec` | [d_sae], [d_out] | |
| `W_skip` | [d_out, d_in] | optional |
| `activation_function.threshold` | [d_sae] or one number | optional: JumpReLU |

What a layer of a cross-layer transcoder reconstructs is a sum over all layers up to it. Of layer 0 it has one term, so that
layer 0 is an exact transcoder of its own and is read as one; any other layer is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.saes.base import SparseAutoencoder
from sae_research.saes.formats.sae_lens import from_parts
from sae_research.saes.reading import load_safetensors, read_yaml, renamed, text

CONFIG_FILE = "config.yaml"
LIBRARY = "circuit_tracer"
_FILE = re.compile(r"layer_([0-9]{1,3})\.safetensors")
_CROSS = re.compile(r"W_(enc|dec)_([0-9]{1,3})\.safetensors")
_QWEN = re.compile(r"(?:.*/)?qwen3-([0-9.]+)b-transcoders(?:-lowl0)?")
_HOOKS = {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
_THRESHOLD = "activation_function.threshold"
_NAMES = {
    "W_enc": "W_enc.T",
    "W_dec": "W_dec",
    "b_enc": "b_enc",
    "b_dec": "b_dec",
    "W_skip": "W_skip",
    _THRESHOLD: "threshold",
}
ONE_OF_MANY = (
    "one layer of a cross-layer transcoder: what it reconstructs is a sum over all layers up to it, and alone stands for "
    "nothing; layer 0, the only term of its sum, can be read"
)


def is_transcoder_file(path: Path) -> bool:
    """Whether a file is named as one of these; of the two of a cross-layer layer the encoder's stands for both."""
    match = _CROSS.fullmatch(path.name)
    return bool(_FILE.fullmatch(path.name)) or (match is not None and match[1] == "enc")


def files_of(layer: int) -> tuple[str, str]:
    """The two files of a layer of a cross-layer transcoder. Raises `UserError` for any but layer 0."""
    if layer:
        raise UserError(ONE_OF_MANY)
    return f"W_enc_{layer}.safetensors", f"W_dec_{layer}.safetensors"


def files_with(path: str) -> tuple[str, ...]:
    """A file of a repository, and of a cross-layer transcoder both of its layer. Raises as `files_of`."""
    folder, slash, name = path.rpartition("/")
    match = _CROSS.fullmatch(name)
    return tuple(f"{folder}{slash}{part}" for part in (files_of(int(match[2])) if match else (name,)))


def load_circuit_tracer(path: str | Path, names: Sequence[str]) -> SparseAutoencoder:
    """Read the transcoder of one layer: `layer_L.safetensors`, or of a cross-layer one either file of layer 0. names: of the
    folders that lead to it (`reading.names_on_path`), by which a set without `config.yaml` is known."""
    path = Path(path)
    hooks = _described(path.parent / CONFIG_FILE, names)
    if match := _FILE.fullmatch(path.name):
        return read(load_safetensors(path), int(match[1]), hooks, str(path))
    match = _CROSS.fullmatch(path.name)
    if match is None:
        raise UserError(f"{path}: not a file of transcoders; name layer_L.safetensors")
    layer = int(match[2])
    try:
        both = files_of(layer)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    tensors = {name: tensor for part in both for name, tensor in load_safetensors(path.with_name(part)).items()}
    bare = {name.removesuffix(f"_{layer}"): tensor for name, tensor in tensors.items()}
    if "W_dec" in bare and bare["W_dec"].dim() == 3:
        bare["W_dec"] = bare["W_dec"][:, 0]
    return read(bare, layer, hooks, str(path.parent))


def _described(path: Path, names: Sequence[str]) -> dict[str, str]:
    """Model and hooks of the set; the hooks that circuit-tracer's sets have where its `config.yaml` names none."""
    values = read_yaml(path) if path.exists() else {}
    model = text(values.get("model_name"), "model_name", path)
    if not model:
        found = [match[1] for name in names if (match := _QWEN.fullmatch(name))]
        if not found:
            raise UserError(f"{path}: model_name is missing; say there which model the transcoders are of")
        model = f"Qwen/Qwen3-{found[-1]}B"
    return {"model_name": model, **{key: _kind(values, key, usual, path) for key, usual in _HOOKS.items()}}


def _kind(values: dict[str, Any], key: str, usual: str, path: Path) -> str:
    """The kind of hook: names of it may begin with `blocks.{layer}.`. `hook_resid_mid`, the stream between attention and
    MLP, is what the MLP's branch takes."""
    kind = (text(values.get(key), key, path) or usual).removeprefix("blocks.{layer}.")
    return "hook_mlp_in" if kind == "hook_resid_mid" else kind


def read(tensors: dict[str, Tensor], layer: int, about: dict[str, str], where: str) -> SparseAutoencoder:
    """The transcoder of one layer. about: `model_name` and both hooks of a layer, without its `blocks.L.`."""
    state = renamed(tensors, _NAMES, where, optional=("W_skip", _THRESHOLD))
    if "threshold" in state and state["threshold"].numel() == 1:
        state["threshold"] = state["threshold"].reshape(1).expand(len(state["b_enc"])).contiguous()
    architecture = "jumprelu_" * ("threshold" in state) + "skip_" * ("W_skip" in state) + "transcoder"
    read_hook, written = (f"blocks.{layer}.{about[key]}" for key in _HOOKS)
    metadata = {"model_name": about["model_name"], "hook_name": read_hook, "hook_name_out": written}
    return from_parts(LIBRARY, architecture, state, metadata, where, apply_b_dec_to_input=False)
