"""Temporal SAEs as their authors publish them (arXiv 2511.01836): `conf.yaml` with `latest_ckpt.safetensors`, in a folder
`MODEL/layer_L/temporal`. SAELens has the same architecture in its own layout."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_research.runtime.errors import UserError
from sae_research.saes.base import SparseAutoencoder
from sae_research.saes.formats.sae_lens import convert
from sae_research.saes.reading import load_safetensors, number, read_yaml, section, text, whole

CONFIG_FILE, WEIGHTS_FILE = "conf.yaml", "latest_ckpt.safetensors"
LIBRARY = "temporal_saes"
_LAYER = re.compile(r"layer_([0-9]{1,3})")
_NAMES = {"D": "W_dec", "E": "W_enc", "b": "b_dec"}
_OF_SAE = ("n_heads", "n_attn_layers", "bottleneck_factor", "sae_diff_type", "kval_topk", "tied_weights")


def load_temporal(folder: str | Path, names: Sequence[str], about: Mapping[str, Any] | None = None) -> SparseAutoencoder:
    """Read one folder. names: of the folders that lead to it (`reading.names_on_path`), which say the layer; about:
    `model_name` and `dataset_path`, which its files do not say."""
    folder = Path(folder)
    path, weights = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    conf = read_yaml(path)
    sae = section(conf.get("sae"), "sae", path)
    d_in = whole(section(conf.get("llm"), "llm", path).get("dimin"), "llm.dimin", path)
    layers = [match[1] for name in names if (match := _LAYER.fullmatch(name))]
    if len(layers) != 1:
        raise UserError(
            f"{folder}: no folder above the weights says which layer; keep the published names (layer_12/temporal)"
        )
    missing = [key for key in (*_OF_SAE, "exp_factor", "scaling_factor") if key not in sae]
    if missing:
        raise UserError(f"{path}: sae lacks {', '.join(missing)}; fetch it again")
    values = {
        "architecture": "temporal",
        "d_in": d_in,
        "d_sae": int(d_in * number(sae["exp_factor"], "sae.exp_factor", path)),
        **{key: sae[key] for key in _OF_SAE},
        "normalize_activations": "constant_scalar_rescale",
        "activation_normalization_factor": number(sae["scaling_factor"], "sae.scaling_factor", path),
        "apply_b_dec_to_input": True,
        "metadata": {"hook_name": f"blocks.{int(layers[0])}.hook_resid_post", **(about or {})},
    }
    text(sae["sae_diff_type"], "sae.sae_diff_type", path)
    tensors = {_NAMES.get(name, name): tensor for name, tensor in load_safetensors(weights).items()}
    found = convert(values, tensors, str(weights))
    found.cfg = found.cfg.replace(provenance={**found.cfg.provenance, "format": LIBRARY})
    return found
