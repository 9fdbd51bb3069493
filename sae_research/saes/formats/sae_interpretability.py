"""Runs of SAE-Interpretability: `output/<run>/{final_config.yaml, samples_<N>.pt}`, one SAE for each hook point; read, and
written with one SAE (`write_run`).

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

import io
import re
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.runtime.files import regular_file, write_bytes, write_text
from sae_research.saes.base import SAEConfig, SparseAutoencoder
from sae_research.saes.forms import as_subtracting, fold_decoder_norms
from sae_research.saes.reading import (
    check_shapes,
    flag,
    floats,
    hook_of,
    load_state,
    number,
    section,
    shown,
    text,
    whole,
)
from sae_research.saes.registry import form_class

CONFIG_FILE = "final_config.yaml"
FORMS = {
    "relu": "standard",
    "gated": "gated",
    "hard_concrete": "signed_hard_concrete",
    "gated_hard_concrete": "gated_hard_concrete",
}
_CHECKPOINT = re.compile(r"samples_(\d+)\.pt")
EVALUATION_BETA = 1.0


def load_run(folder: str | Path) -> dict[str, SparseAutoencoder]:
    """The SAEs of a run's last checkpoint, by hook name.

    Raises `UserError` for missing or damaged files, and for a kind of SAE that later versions added.
    """
    folder = Path(folder)
    path = folder / CONFIG_FILE
    config = _config(path)
    weights = last_checkpoint(folder)
    kind = text(config["saes"].get("sae_type", "relu"), "saes.sae_type", path)
    if kind not in FORMS:
        raise UserError(f"{path}: sae_type {shown(kind)} is not supported; known: {', '.join(FORMS)}")
    by_hook = _split(load_state(weights), weights)
    found = {}
    for position in _positions(config["saes"], by_hook, path):
        state = by_hook.get(position.replace(".", "-"))
        if state is None:
            raise UserError(f"{weights}: holds no SAE of {position}; it has {', '.join(sorted(by_hook))}")
        where = f"{weights}: {position}"
        tensors = _tensors(kind, floats(state, where), where)
        cfg = _describe(kind, hook_of(position, path), state, tensors["W_dec"], config, path)
        try:
            found[position] = form_class(cfg.form).from_tensors(cfg, tensors)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return found


def _positions(saes: dict[str, Any], by_hook: dict[str, Any], path: Path) -> list[str]:
    positions = saes.get("sae_positions") or [name.replace("-", ".") for name in by_hook]
    positions = [positions] if isinstance(positions, str) else positions
    if not isinstance(positions, list) or not all(isinstance(position, str) for position in positions):
        raise UserError(f"{path}: saes.sae_positions must be a list of hooks, not {str(positions)[:60]!r}")
    return positions


def last_checkpoint(folder: Path) -> Path:
    """`samples_<N>.pt` of the highest N."""
    found = {int(match[1]): path for path in folder.glob("samples_*.pt") if (match := _CHECKPOINT.fullmatch(path.name))}
    if not found:
        raise UserError(f"{folder}: no samples_<N>.pt there")
    return found[max(found)]


class _UniqueKeys(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error, and an alias too: nothing may grow from a few bytes."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        values = super().construct_mapping(node, deep)
        if len(values) < len(node.value):
            raise yaml.YAMLError(f"a key stands twice, line {node.start_mark.line + 1}")  # ty: ignore[missing-union-attribute]
        return values

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"an alias, line {self.peek_event().start_mark.line + 1}")
        return super().compose_node(parent, index)


def _config(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(regular_file(path).read_text(encoding="utf-8-sig"), Loader=_UniqueKeys)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
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


def _describe(
    kind: str, hook_name: str, state: dict[str, Tensor], W_dec: Tensor, config: dict[str, Any], path: Path
) -> SAEConfig:
    d_sae, d_in = W_dec.shape
    saes = config["saes"]
    ratio = number(saes.get("dict_size_to_input_ratio", d_sae / d_in), "saes.dict_size_to_input_ratio", path)
    if abs(ratio * d_in - d_sae) > 1:
        raise UserError(
            f"{path}: saes.dict_size_to_input_ratio {ratio:g} makes {ratio * d_in:g} latents of {d_in} "
            f"dimensions, the weights have {d_sae}"
        )
    gated_by_input = saes.get("input_dependent_gates", "gate_logits" not in state)
    if kind == "hard_concrete" and flag(gated_by_input, "saes.input_dependent_gates", path) == ("gate_logits" in state):
        raise UserError(f"{path}: saes.input_dependent_gates is {gated_by_input}, the weights say the opposite")
    limits = saes.get("hard_concrete_stretch_limits") or [-0.1, 1.1]
    if not isinstance(limits, list) or len(limits) != 2:
        raise UserError(f"{path}: saes.hard_concrete_stretch_limits must be two numbers, not {str(limits)[:60]!r}")
    stretch = [number(limit, "saes.hard_concrete_stretch_limits", path) for limit in limits]
    model = text(config.get("tlens_model_name"), "tlens_model_name", path) or text(
        config.get("tlens_model_path"), "tlens_model_path", path
    )
    context_size = section(config.get("data"), "data", path).get("context_length") or 256
    return SAEConfig(
        form=FORMS[kind],
        d_in=d_in,
        d_sae=d_sae,
        model_name=model,
        hook_name=hook_name,
        context_size=whole(context_size, "data.context_length", path),
        apply_b_dec_to_input=kind.startswith("gated"),
        architecture=kind,
        options={"beta": EVALUATION_BETA, "stretch": stretch} if "hard_concrete" in kind else {},
        provenance={
            "format": "sae_interpretability",
            "sae_type": kind,
            **({"training_beta": float(state["beta"])} if "beta" in state else {}),
            **({"seed": config["seed"]} if isinstance(config.get("seed"), int) else {}),
        },
    )


_KEYS = {
    "relu": {"W_enc": "encoder.0.weight", "b_enc": "encoder.0.bias", "W_dec": "decoder.weight", "b_dec": "decoder.bias"},
    "hard_concrete": {
        "W_enc": "encoder.weight",
        "b_enc": "encoder.bias",
        "W_dec": "decoder.weight",
        "b_dec": "decoder.bias",
    },
    "gated": {
        "W_enc": "encoder.weight",
        "W_dec": "decoder.weight",
        "b_dec": "decoder_bias",
        "b_gate": "gate_bias",
        "b_mag": "mag_bias",
        "r_mag": "r_mag",
    },
}
_KEYS["gated_hard_concrete"] = _KEYS["gated"]
_FURTHER = {"hard_concrete": {"beta", "gate_logits"}, "gated_hard_concrete": {"beta"}}
"""What may stand beside them: the temperature of training, and the logits of gates that no input moves."""


def _tensors(kind: str, state: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """Our tensors by our names, of sizes that fit each other. Raises `UserError` for one that is missing, or not used."""
    keys = _KEYS[kind]
    missing = sorted(set(keys.values()) - set(state))
    unused = sorted(set(state) - set(keys.values()) - _FURTHER.get(kind, set()))
    if missing or unused:
        raise UserError(
            f"{where}: not an SAE of sae_type {kind}: "
            + " and ".join(
                [f"lacks {', '.join(missing)}"] * bool(missing) + [f"also holds {', '.join(unused)}"] * bool(unused)
            )
        )
    if state.get("beta", torch.ones(1)).numel() != 1:
        raise UserError(f"{where}: beta is not one number")
    s = {name: state[key].T if name.startswith("W_") else state[key] for name, key in keys.items()}
    if s["W_dec"].dim() != 2:
        raise UserError(f"{where}: decoder.weight is no matrix (shape {tuple(s['W_dec'].shape)})")
    d_sae, d_in = s["W_dec"].shape
    if kind == "hard_concrete":
        s |= _hard_concrete_encoder(s["W_enc"], s["b_enc"], state.get("gate_logits"), d_in, d_sae, where)
    check_shapes(s, d_in, d_sae, where)
    if kind in ("relu", "hard_concrete"):
        s["W_dec"] = _unit(s["W_dec"])
    elif kind == "gated":
        s = fold_decoder_norms("gated", s)
    else:
        s = _folded_beside_gates({**s, "sharpness": torch.ones(d_sae)})
    return {name: tensor.contiguous().clone() for name, tensor in s.items()}


def _hard_concrete_encoder(
    weight: Tensor, bias: Tensor, gate_logits: Tensor | None, d_in: int, d_sae: int, where: str
) -> dict[str, Tensor]:
    """The gates' logits come first in its one matrix, magnitudes second; gates that no input moves stand alone."""
    if gate_logits is not None:
        return {"W_gate": torch.zeros(d_in, d_sae), "b_gate": gate_logits}
    if tuple(weight.shape) != (d_in, 2 * d_sae) or tuple(bias.shape) != (2 * d_sae,):
        raise UserError(
            f"{where}: encoder.weight has shape {tuple(weight.T.shape)} and encoder.bias "
            f"{tuple(bias.shape)}, expected {(2 * d_sae, d_in)} and {(2 * d_sae,)}: gates, then magnitudes"
        )
    return {"W_gate": weight[:, :d_sae], "b_gate": bias[:d_sae], "W_enc": weight[:, d_sae:], "b_enc": bias[d_sae:]}


def _unit(W_dec: Tensor) -> Tensor:
    return torch.nn.functional.normalize(W_dec, dim=1)


def _folded_beside_gates(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Unit rows, magnitudes scaled to match; the gates read the encoder as it is, so that it stays."""
    norms_F = tensors["W_dec"].norm(dim=1)
    norms_F = torch.where(norms_F > 0, norms_F, torch.ones_like(norms_F))
    return {
        **tensors,
        "W_dec": tensors["W_dec"] / norms_F[:, None],
        "b_mag": tensors["b_mag"] * norms_F,
        "r_mag": tensors["r_mag"] + norms_F.log(),
    }


# --- writing ---------------------------------------------------------------------------------


def write_run(sae: SparseAutoencoder, folder: str | Path) -> str:
    """Write a run with this one SAE, `final_config.yaml` and `samples_0.pt`; returns its `sae_type`. The same SAE gives the
    same bytes. Raises `UserError` for what its classes do not have."""
    folder, cfg = Path(folder), sae.cfg
    kind = next((kind for kind, form in FORMS.items() if form == cfg.form), None)
    if kind is None:
        raise UserError(f"SAE-Interpretability has no class for the form {cfg.form}; it has {', '.join(FORMS.values())}")
    if cfg.is_transcoder or cfg.center_input:
        raise UserError("SAE-Interpretability has no transcoders and no centred input; export it as sae_lens")
    tensors = _as_theirs(kind, sae)
    position = cfg.hook_name.replace(".", "-")
    state = {
        f"{position}.{key}": (tensors[name].T if name.startswith("W_") else tensors[name]).contiguous().clone()
        for name, key in _KEYS[kind].items()
    }
    if "hard_concrete" in kind:
        state[f"{position}.beta"] = torch.tensor(EVALUATION_BETA)
    config: dict[str, Any] = {
        "tlens_model_name": cfg.model_name,
        "saes": {
            "sae_type": kind,
            "sae_positions": [cfg.hook_name],
            "dict_size_to_input_ratio": cfg.d_sae / cfg.d_in,
            **({"hard_concrete_stretch_limits": list(sae.options()["stretch"])} if "hard_concrete" in kind else {}),
            **({"input_dependent_gates": True} if kind == "hard_concrete" else {}),
        },
        "data": {"context_length": cfg.context_size},
        **({"seed": cfg.provenance["seed"]} if isinstance(cfg.provenance.get("seed"), int) else {}),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(folder / "samples_0.pt", buffer.getvalue())
    write_text(folder / CONFIG_FILE, yaml.safe_dump(config, sort_keys=False))
    return kind


def _as_theirs(kind: str, sae: SparseAutoencoder) -> dict[str, Tensor]:
    """Our tensors, of an SAE that computes the same in their class: rows as it norms them, gates at the temperature of its
    evaluation."""
    s = as_subtracting(sae, theirs=kind.startswith("gated"))
    if kind in ("relu", "hard_concrete"):
        off = (s["W_dec"].norm(dim=1) - 1).abs().max()
        if kind == "relu":
            s = fold_decoder_norms("standard", s)
        elif off > 1e-5:  # its gates do not scale with the magnitudes
            norms_F = s["W_dec"].norm(dim=1)
            norms_F = torch.where(norms_F > 0, norms_F, torch.ones_like(norms_F))
            s |= {"W_dec": s["W_dec"] / norms_F[:, None], "W_enc": s["W_enc"] * norms_F, "b_enc": s["b_enc"] * norms_F}
    if "hard_concrete" not in kind:
        return s
    beta = sae.options()["beta"] / EVALUATION_BETA
    if kind == "hard_concrete":
        gates = {"W_enc": s["W_gate"] / beta, "b_enc": s["b_gate"] / beta}
        return {**s, **{name: torch.cat([gates[name], s[name]], dim=-1) for name in gates}}
    sharpness = s["sharpness"] / beta
    if not (sharpness > 0).all():
        raise UserError(
            "SAE-Interpretability's gated_hard_concrete opens its gates with its magnitudes; this SAE closes some"
        )
    # logits are pi + b_gate there: the encoder takes the sharpness, and r_mag gives it back to the magnitudes
    return {**s, "W_enc": s["W_enc"] * sharpness, "b_gate": s["b_gate"] / beta, "r_mag": s["r_mag"] - sharpness.log()}
