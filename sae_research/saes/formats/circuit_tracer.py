"""Transcoders as circuit-tracer reads them: `config.yaml` with one file a layer, `layer_L.safetensors`; of cross-layer ones
`W_enc_L.safetensors` and `W_dec_L.safetensors`.

| tensor | shape | |
|---|---|---|
| `W_enc` | [d_sae, d_in] | |
| `W_dec` | [d_sae, d_out]; cross-layer [d_sae, layers from L on, d_out] | |
| `b_enc`, `b_dec` | [d_sae], [d_out] | |
| `W_skip` | [d_out, d_in] | optional |
| `activation_function.threshold` | [d_sae] or one number | optional: JumpReLU |

A folder of cross-layer files is one cross-layer transcoder, whose thresholds are called `threshold_L`. A file of it is one
layer. What a layer reconstructs is a sum over all layers up to it. Of layer 0 it has one term, so that layer 0 is an exact
transcoder of its own and is read as one; any other layer is read for its latents (`saes.cross_layer`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.saes.base import SparseAutoencoder
from sae_research.saes.cross_layer import LayerWeights, of_layers
from sae_research.saes.formats.sae_lens import from_parts
from sae_research.saes.reading import floats, load_safetensors, read_yaml, renamed, text

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


def is_transcoder_file(path: Path) -> bool:
    """Whether a file is named as a transcoder of one layer."""
    return bool(_FILE.fullmatch(path.name))


def is_cross_layer_file(path: Path) -> bool:
    """Whether a file is named as one of a cross-layer transcoder; of a layer's two the encoder's stands for both."""
    match = _CROSS.fullmatch(path.name)
    return match is not None and match[1] == "enc"


def files_of(layer: int) -> tuple[str, str]:
    """The two files of a layer of a cross-layer transcoder."""
    return f"W_enc_{layer}.safetensors", f"W_dec_{layer}.safetensors"


def files_with(path: str) -> tuple[str, ...]:
    """A file of a repository, and of a cross-layer transcoder both of its layer."""
    folder, slash, name = path.rpartition("/")
    match = _CROSS.fullmatch(name)
    return tuple(f"{folder}{slash}{part}" for part in (files_of(int(match[2])) if match else (name,)))


def load_circuit_tracer(path: str | Path, names: Sequence[str]) -> SparseAutoencoder:
    """Read the transcoder of one layer, `layer_L.safetensors`; either file of a layer of a cross-layer one; or the folder of
    all of them. names: of the folders that lead to it (`reading.names_on_path`), by which a set without `config.yaml` is
    known."""
    path = Path(path)
    if path.is_dir():
        return _whole(path, _described(path / CONFIG_FILE, names))
    hooks = _described(path.parent / CONFIG_FILE, names)
    if match := _FILE.fullmatch(path.name):
        return read(load_safetensors(path), int(match[1]), hooks, str(path))
    match = _CROSS.fullmatch(path.name)
    if match is None:
        raise UserError(f"{path}: not a file of transcoders; name layer_L.safetensors")
    layer = int(match[2])
    bare = _of_layer(path.parent, layer)
    if layer == 0:
        return read({**bare, "W_dec": bare["W_dec"][:, 0]}, 0, hooks, str(path.parent))
    weights = _layer_weights(bare, path)
    spots = _hooks(range(layer, layer + len(weights.decoders)), hooks)
    return of_layers([weights], spots, path, hooks["model_name"], LIBRARY, part=True)


def _whole(folder: Path, about: dict[str, str]) -> SparseAutoencoder:
    n = _of_layer(folder, 0)["W_dec"].shape[1]
    missing = [name for layer in range(n) for name in files_of(layer) if not (folder / name).exists()]
    if missing:
        raise UserError(
            f"{folder}: a cross-layer transcoder of {n} layers, of which {', '.join(missing)[:120]} are missing; fetch "
            f"them, or name one layer: {folder / files_of(0)[0]}"
        )
    layers = [_layer_weights(_of_layer(folder, layer), folder / files_of(layer)[0]) for layer in range(n)]
    return of_layers(layers, _hooks(range(n), about), folder, about["model_name"], LIBRARY)


def _hooks(layers: Sequence[int], about: dict[str, str]) -> list[tuple[str, str]]:
    read, written = (about[key] for key in _HOOKS)
    return [(f"blocks.{layer}.{read}", f"blocks.{layer}.{written}") for layer in layers]


def _of_layer(folder: Path, layer: int) -> dict[str, Tensor]:
    """Both files' tensors, without the layer's number."""
    tensors: dict[str, Tensor] = {}
    for name in files_of(layer):
        tensors |= load_safetensors(folder / name)
    others = sorted(name for name in tensors if not name.endswith(f"_{layer}"))
    if others:
        raise UserError(
            f"{folder}: files of layer {layer} also hold {', '.join(others)[:120]}, which is no tensor of that layer"
        )
    bare = {name.removesuffix(f"_{layer}"): tensor for name, tensor in tensors.items()}
    if "threshold" in bare:
        bare[_THRESHOLD] = bare.pop("threshold").reshape(-1)
    if "W_dec" not in bare:
        raise UserError(f"{folder / files_of(layer)[1]}: the weights lack W_dec_{layer}; fetch them again")
    if bare["W_dec"].dim() != 3:
        raise UserError(
            f"{folder / files_of(layer)[1]}: W_dec_{layer} has shape {tuple(bare['W_dec'].shape)}, expected [d_sae, layers "
            f"from {layer} on, d_out]"
        )
    return bare


def _layer_weights(bare: dict[str, Tensor], where: Path) -> LayerWeights:
    state = floats(renamed(bare, _NAMES, where, optional=("W_skip", _THRESHOLD)), where)
    decoders = state["W_dec"].unbind(1)
    return LayerWeights(
        state["W_enc"], state["b_enc"], decoders, state["b_dec"], state.get("threshold"), state.get("W_skip")
    )


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
