"""Cross-layer transcoders of Gemma Scope 2, `clt/.../params_layer_L.safetensors`, one file a layer.

| tensor | shape | |
|---|---|---|
| `w_enc`, `b_enc`, `threshold` | [d_in, d_sae], [d_sae], [d_sae] | JumpReLU |
| `w_dec` | [d_sae, layers, d_out] | into every layer; those into earlier ones are zero |
| `b_dec` | [d_out] | of what this layer writes |
| `affine_skip_connection` | [d_in, d_out] | optional: from what this layer reads to what it writes |

Every layer reads `mlp.hook_in` and writes `hook_mlp_out`, as the release's transcoders do. A file alone is one layer: layer
0 an exact transcoder, any other read for its latents (`saes.cross_layer`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.runtime.files import read_settings
from sae_research.saes.base import SparseAutoencoder
from sae_research.saes.cross_layer import LayerWeights, of_layers
from sae_research.saes.formats.gemma_scope import CLT, CONFIG_FILE, LIBRARY, NAMES, SKIP, Place, checked, place_of, read
from sae_research.saes.formats.gemma_scope_crosscoders import FOLDER as CROSSCODER
from sae_research.saes.reading import floats, load_safetensors, renamed

_FILE = re.compile(r"params_layer_(0|[1-9][0-9]{0,2})\.safetensors")


def is_cross_layer_file(path: Path) -> bool:
    """Whether a file is named as one layer of a cross-layer transcoder. A crosscoder's files are named alike, below a folder
    `crosscoder`."""
    return bool(_FILE.fullmatch(path.name)) and CROSSCODER not in path.absolute().parts


def load_cross_layer(path: str | Path, names: Sequence[str]) -> SparseAutoencoder:
    """Read the folder of all layers, or the file of one. names: of the folders that lead to it
    (`reading.names_on_path`)."""
    path = Path(path)
    if CLT not in [name.removesuffix("_all") for name in names]:
        raise UserError(
            f"{path}: no folder above it is called {CLT}, as Gemma Scope 2 has it; keep the repository's own names"
        )
    place = place_of(names, path)
    if not path.is_dir():
        return _one(path, place)
    files = {int(match[1]): one for one in path.iterdir() if (match := _FILE.fullmatch(one.name))}
    layers = [_layer(load_safetensors(files[number]), files[number], number, place) for number in sorted(files)]
    n = len(layers[0].decoders) + min(files)
    missing = [f"params_layer_{number}.safetensors" for number in range(n) if number not in files]
    if missing:
        raise UserError(
            f"{path}: a cross-layer transcoder of {n} layers, of which {', '.join(missing)[:120]} are missing; fetch them, "
            f"or name one layer: {files[min(files)]}"
        )
    return _made(layers, range(n), place, path)


def _one(path: Path, place: Place) -> SparseAutoencoder:
    number = int(path.stem.rpartition("_")[2])
    tensors = load_safetensors(path)
    layer = _layer(tensors, path, number, place)
    if number == 0:
        return read({**tensors, "w_dec": layer.decoders[0]}, place, str(path))
    return _made([layer], range(number, number + len(layer.decoders)), place, path, part=True)


def _layer(tensors: dict[str, Tensor], path: Path, number: int, place: Place) -> LayerWeights:
    if (path.parent / CONFIG_FILE).exists():
        checked(_of_layer_0(read_settings(path.parent / CONFIG_FILE)), place, SKIP in tensors, path.parent / CONFIG_FILE)
    names = {"w_enc": "W_enc", "w_dec": "W_dec"} | {name: name for name in NAMES if not name.startswith("W_")}
    state = floats(renamed(tensors, {**names, SKIP: "W_skip.T"}, path, optional=(SKIP,)), path)
    decoders: Tensor = state["W_dec"]
    if decoders.dim() != 3 or decoders.shape[1] <= number:
        raise UserError(f"{path}: w_dec has shape {tuple(decoders.shape)}, expected [d_sae, layers, d_out]")
    if bool(decoders[:, :number].any()):
        raise UserError(f"{path}: w_dec has decoders into layers before {number} that are not zero; no latent writes those")
    own = decoders.unbind(1)[number:]
    return LayerWeights(state["W_enc"], state["b_enc"], own, state["b_dec"], state["threshold"], state.get("W_skip"))


def _of_layer_0(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration whose hooks are of every layer, `model.layers.{all}. ...`, as layer 0 has them."""
    return {key: value.replace("{all}", "0") if isinstance(value, str) else value for key, value in values.items()}


def _made(
    layers: Sequence[LayerWeights], numbers: Sequence[int], place: Place, where: Path, part: bool = False
) -> SparseAutoencoder:
    read_kind, written_kind = (hook.removeprefix("blocks.0.") for hook in (place.hook_name, place.hook_out))
    hooks = [(f"blocks.{number}.{read_kind}", f"blocks.{number}.{written_kind}") for number in numbers]
    return of_layers(layers, hooks, where, place.model_name, LIBRARY, part=part, context_size=1024)
