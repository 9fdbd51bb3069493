"""Autoencoders of OpenAI's sparse_autoencoder on GPT-2 small: `{location}[_v4|_v5_32k|_v5_128k]/autoencoders/{layer}.pt`.

`z = activation((x - pre_bias) W_enc + latent_bias)`, with a ReLU or with TopK, the second on inputs normed token by token
(`layer_norm`), as the library itself tells them apart. Statistics of training (`stats_last_nonzero` and the like) change
nothing.

| location | hook |
|---|---|
| `resid_delta_attn`, `resid_delta_mlp` | `hook_attn_out`, `hook_mlp_out` |
| `resid_post_mlp` | `hook_resid_post` |
| `resid_post_attn`, `mlp_post_act` | refused: there is no such hook here |
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
from sae_research.saes.reading import load_checkpoint, renamed, section, shown, text, whole

LIBRARY = "openai"
MODEL = "gpt2"
MARK = "latent_bias"
"""A tensor that no other library's checkpoints have."""
_NAMES = {"encoder.weight": "W_enc.T", "latent_bias": "b_enc", "decoder.weight": "W_dec.T", "pre_bias": "b_dec"}
_TIED = "decoder.linear.weight"
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_LOCATIONS = {
    "resid_delta_attn": "hook_attn_out",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_post_mlp": "hook_resid_post",
    "resid_post_attn": "",
    "mlp_post_act": "",
}
_FOLDER = re.compile(f"({'|'.join(_LOCATIONS)})(?:_v[0-9]\\w*)?")


def hook_of_path(names: Sequence[str], where: object) -> str:
    """The hook that a path ending in `{location}_v5_32k/autoencoders/{layer}.pt` stands for."""
    locations = [match[1] for name in names if (match := _FOLDER.fullmatch(name))]
    layer = re.fullmatch(r"([0-9]{1,3})\.pt", names[-1])
    if len(locations) != 1 or layer is None:
        raise UserError(
            f"{where}: an autoencoder of OpenAI's, and its path does not say of which hook; keep the names it is published "
            "under, such as resid_post_mlp_v5_32k/autoencoders/8.pt"
        )
    kind = _LOCATIONS[locations[0]]
    if not kind:
        raise UserError(
            f"{where}: {locations[0]} has no hook here; take one of resid_delta_attn, resid_delta_mlp, resid_post_mlp"
        )
    return f"blocks.{int(layer[1])}.{kind}"


def load_openai(path: str | Path, names: Sequence[str]) -> SparseAutoencoder:
    """Read one file. names: of the folders that lead to it and its own (`reading.names_on_path`)."""
    path = Path(path)
    return read(load_checkpoint(path), hook_of_path(names, path), str(path))


def read(checkpoint: dict[str, Any], hook: str, where: str) -> SparseAutoencoder:
    """The SAE of a checkpoint: tensors, the name of the activation and what belongs to it."""
    activation = text(checkpoint.get("activation"), "activation", where) or "ReLU"
    further = section(checkpoint.get("activation_state_dict"), "activation_state_dict", where)
    tensors = {
        key: value for key, value in checkpoint.items() if key not in ("activation", "activation_state_dict", *_STATISTICS)
    }
    if not all(isinstance(value, Tensor) for value in tensors.values()):
        raise UserError(f"{where}: also holds what is no tensor; not a checkpoint of OpenAI's sparse_autoencoder")
    if _TIED in tensors and "decoder.weight" not in tensors and "encoder.weight" in tensors:
        if not (tensors[_TIED] == tensors["encoder.weight"]).all():
            raise UserError(f"{where}: a tied decoder that is not the encoder; fetch it again")
        del tensors[_TIED]
        tensors["decoder.weight"] = tensors["encoder.weight"].T
    state = renamed(tensors, _NAMES, where)
    metadata = {"model_name": MODEL, "hook_name": hook, "context_size": 64}
    if activation == "ReLU" and not further:
        return from_parts(LIBRARY, "standard", state, metadata, where)
    if activation != "TopK" or set(further) != {"k", "postact_fn"} or further["postact_fn"] != "ReLU":
        raise UserError(
            f"{where}: activation {shown(activation)} with {shown(further)} is not known; known: ReLU, TopK over ReLU"
        )
    k = whole(further["k"], "k", where)
    return from_parts(LIBRARY, "topk", state, metadata, where, normalize_activations="layer_norm", k=k)
