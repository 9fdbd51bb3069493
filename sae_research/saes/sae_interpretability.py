"""Runs of SAE-Interpretability: `output/<run>/{final_config.yaml, samples_<N>.pt}`, one SAE for each hook point.

| sae_type | becomes | note |
|---|---|---|
| `relu` | `standard` | decoder columns normalised, as its forward pass does; reads x uncentred |
| `gated` | `gated` | its decoder is not constrained: norms folded |
| `hard_concrete` | `signed_hard_concrete` | no ReLU there: magnitudes may be negative |
| `gated_hard_concrete` | `gated_hard_concrete` | its decoder is not constrained: norms folded |

Hard-concrete gates are those of its own evaluation, `clip(sigmoid(logits) (r - l) + l)`: a temperature of 1 whatever
the one it trained with, so that these SAEs compute here what they computed there.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from sae_research.errors import UserError
from sae_research.saes.base import SAEConfig, SparseAutoencoder
from sae_research.saes.dictionary_learning import load_state
from sae_research.saes.folding import fold_decoder_norms
from sae_research.saes.registry import form_class

CONFIG_FILE = "final_config.yaml"
FORMS = {"relu": "standard", "gated": "gated", "hard_concrete": "signed_hard_concrete",
         "gated_hard_concrete": "gated_hard_concrete"}
_CHECKPOINT = re.compile(r"samples_(\d+)\.pt")
EVALUATION_BETA = 1.0


def load_run(folder: str | Path) -> dict[str, SparseAutoencoder]:
    """The SAEs of a run's last checkpoint, by hook name.

    Raises `UserError` for missing or damaged files, and for a kind of SAE that later versions added.
    """
    folder = Path(folder)
    config = _config(folder / CONFIG_FILE)
    weights = last_checkpoint(folder)
    saes = config["saes"]
    kind = saes.get("sae_type", "relu")
    if kind not in FORMS:
        raise UserError(f"{folder / CONFIG_FILE}: sae_type {kind!r} is not supported; known: {', '.join(FORMS)}")
    by_hook = _split(load_state(weights), weights)
    found = {}
    for position in saes.get("sae_positions") or list(by_hook):
        state = by_hook.get(position.replace(".", "-"))
        if state is None:
            raise UserError(f"{weights}: holds no SAE of {position}; it has {', '.join(sorted(by_hook))}")
        try:
            found[position] = _convert(kind, state, _describe(kind, position, state, config))
        except KeyError as error:
            raise UserError(f"{weights}: the SAE of {position} lacks {error} for sae_type {kind}") from None
        except UserError as error:
            raise UserError(f"{weights}: {position}: {error}") from None
    return found


def last_checkpoint(folder: Path) -> Path:
    """`samples_<N>.pt` of the highest N."""
    found = {int(match[1]): path for path in folder.glob("samples_*.pt") if (match := _CHECKPOINT.fullmatch(path.name))}
    if not found:
        raise UserError(f"{folder}: no samples_<N>.pt there")
    return found[max(found)]


def _config(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())[:160]}") from None
    if not isinstance(values, dict) or not isinstance(values.get("saes"), dict):
        raise UserError(f"{path}: no `saes` section; not a configuration of SAE-Interpretability")
    return values


def _split(state: dict[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """`blocks-2-hook_resid_pre.encoder.weight` -> tensors by position and name."""
    by_hook: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        position, _, name = key.removeprefix("saes.").partition(".")
        by_hook.setdefault(position, {})[name] = tensor
    if not by_hook:
        raise UserError(f"{path}: holds no weights")
    return by_hook


def _describe(kind: str, hook_name: str, state: dict[str, Tensor], config: dict[str, Any]) -> SAEConfig:
    d_in, d_sae = state["decoder.weight"].shape
    saes = config["saes"]
    stretch = [float(limit) for limit in saes.get("hard_concrete_stretch_limits") or (-0.1, 1.1)]
    beta = float(state["beta"]) if "beta" in state else None
    return SAEConfig(
        form=FORMS[kind], d_in=d_in, d_sae=d_sae,
        model_name=str(config.get("tlens_model_name") or config.get("tlens_model_path") or ""),
        hook_name=hook_name, context_size=int((config.get("data") or {}).get("context_length") or 256),
        apply_b_dec_to_input=kind.startswith("gated"), architecture=kind,
        options={"beta": EVALUATION_BETA, "stretch": stretch} if "hard_concrete" in kind else {},
        provenance={"format": "sae_interpretability", "sae_type": kind,
                    **({} if beta is None else {"training_beta": beta}),
                    **({"seed": config["seed"]} if "seed" in config else {})})


def _convert(kind: str, state: dict[str, Tensor], cfg: SAEConfig) -> SparseAutoencoder:
    s = {name: tensor.float() for name, tensor in state.items()}
    W_dec = s["decoder.weight"].T
    cls = form_class(cfg.form)
    if kind == "relu":
        tensors = {"W_enc": s["encoder.0.weight"].T, "b_enc": s["encoder.0.bias"],
                   "W_dec": _unit(W_dec), "b_dec": s["decoder.bias"]}
    elif kind == "hard_concrete":
        tensors = {**_hard_concrete_encoder(s, cfg.d_sae), "W_dec": _unit(W_dec), "b_dec": s["decoder.bias"]}
    else:
        tensors = {"W_enc": s["encoder.weight"].T, "W_dec": W_dec, "b_dec": s["decoder_bias"], "b_gate": s["gate_bias"],
                   "b_mag": s["mag_bias"], "r_mag": s["r_mag"]}
        if kind == "gated":
            tensors = fold_decoder_norms("gated", tensors)
        else:
            tensors = _folded_beside_gates({**tensors, "sharpness": torch.ones(cfg.d_sae)})
    return cls.from_tensors(cfg, {name: tensor.contiguous().clone() for name, tensor in tensors.items()})


def _hard_concrete_encoder(s: dict[str, Tensor], d_sae: int) -> dict[str, Tensor]:
    """The gates' logits come first in its one matrix, magnitudes second; gates that no input moves stand alone."""
    weight, bias = s["encoder.weight"].T, s["encoder.bias"]
    if "gate_logits" in s:
        return {"W_enc": weight, "b_enc": bias, "W_gate": torch.zeros_like(weight), "b_gate": s["gate_logits"]}
    return {"W_gate": weight[:, :d_sae], "b_gate": bias[:d_sae], "W_enc": weight[:, d_sae:], "b_enc": bias[d_sae:]}


def _unit(W_dec: Tensor) -> Tensor:
    return torch.nn.functional.normalize(W_dec, dim=1)


def _folded_beside_gates(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Unit rows, magnitudes scaled to match; the gates read the encoder as it is, so that it stays."""
    norms_F = tensors["W_dec"].norm(dim=1)
    norms_F = torch.where(norms_F > 0, norms_F, torch.ones_like(norms_F))
    return {**tensors, "W_dec": tensors["W_dec"] / norms_F[:, None], "b_mag": tensors["b_mag"] * norms_F,
            "r_mag": tensors["r_mag"] + norms_F.log()}
