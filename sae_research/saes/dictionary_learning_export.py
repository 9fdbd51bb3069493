"""SAEs written as dictionary_learning's `ae.pt` and `config.json`, which SAE Bench and SAELens read as well.

The class is the one whose `encode`, as called by default, gives our latents: weights go out with the bias their class
subtracts or does not.

| form | class | trainer_class |
|---|---|---|
| `standard` | `AutoEncoder` | `StandardTrainer`; by recipe `StandardTrainerAprilUpdate` or `PAnnealTrainer` |
| `topk` | `AutoEncoderTopK` | `TopKTrainer` |
| `jumprelu` of `batch_top_k` | `BatchTopKSAE` | `BatchTopKTrainer` |
| `jumprelu` of `matryoshka_batch_top_k` | `MatryoshkaBatchTopKSAE` | `MatryoshkaBatchTopKTrainer` |
| other `jumprelu` | `JumpReluAutoEncoder` | `JumpReluTrainer` |
| `gated` | `GatedAutoEncoder` | `GatedSAETrainer` |

`AutoEncoderNew`, for a `standard` SAE on request, is read by dictionary_learning alone.

A `top_k` SAE with a threshold goes out as `JumpReluAutoEncoder`: their `AutoEncoderTopK` ignores its threshold unless
told otherwise (`use_threshold`). Asked for by name, that class carries both k and threshold, as their trainer writes it.
"""

from __future__ import annotations

import io
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_research.errors import UserError
from sae_research.saes.base import SparseAutoencoder
from sae_research.saes.dictionary_learning import CONFIG_FILE, LAYOUTS, WEIGHTS_FILE
from sae_research.store import read_json, round_significant, write_bytes, write_json

CLASSES_OF_FORM = {
    "standard": ("AutoEncoder", "AutoEncoderNew"),
    "topk": ("AutoEncoderTopK",),
    "jumprelu": ("JumpReluAutoEncoder", "BatchTopKSAE", "MatryoshkaBatchTopKSAE", "AutoEncoderTopK"),
    "gated": ("GatedAutoEncoder",),
}
"""What each form may be written as, the usual class first."""
_CLASS_OF_ARCHITECTURE = {"batchtopk": "BatchTopKSAE", "matryoshka_batchtopk": "MatryoshkaBatchTopKSAE"}
_TRAINER_OF_RECIPE = {"standard_new": "StandardTrainerAprilUpdate", "p_anneal": "PAnnealTrainer"}
SUBMODULES = ("resid_post", "resid_pre", "mlp_out", "attn_out")
"""Kinds of hook that a checkpoint's `submodule_name` can name."""
EVAL_FILE = "eval_results.json"
THEIR_FIGURES = {
    "l0": "l0",
    "l1": "l1_loss",
    "variance_explained": "frac_variance_explained",
    "cosine_similarity": "cossim",
    "l2_ratio": "l2_ratio",
    "relative_reconstruction_bias": "relative_reconstruction_bias",
    "ce_clean": "loss_original",
    "ce_patched": "loss_reconstructed",
    "ce_zero_ablated": "loss_zero",
    "loss_recovered": "frac_recovered",
    "fraction_alive": "frac_alive",
}
"""Our name of a held-out figure -> the one their `eval_results.json` uses."""


def export_dictionary_learning(
    sae: SparseAutoencoder, folder: str | Path, dict_class: str | None = None, figures: Path | None = None
) -> str:
    """Write `ae.pt` and `config.json`; returns the class. The same SAE gives the same bytes.

    dict_class: one of `CLASSES_OF_FORM`, by default the one whose default `encode` gives our latents. figures: our
    `eval_results.json`, written along under their names. Raises `UserError` for a form, an input treatment or weights
    that their classes do not have.
    """
    folder = Path(folder)
    name = _chosen_class(sae, dict_class)
    layout = LAYOUTS[name]
    tensors = _as_they_subtract(sae, layout.subtracts_b_dec)
    if sae.cfg.form == "jumprelu" and name != "JumpReluAutoEncoder":
        tensors["threshold"] = _one_threshold(tensors["threshold"], name)
    state = {key: (tensors[ours].T if ours in layout.transposed else tensors[ours]).contiguous().clone()
             for ours, key in layout.keys.items()}
    further: dict[str, Any] = {}
    if "k" in layout.extra:
        further["k"] = _mean_l0(sae)
        state["k"] = torch.tensor(further["k"], dtype=torch.int32)
    if "threshold" in layout.extra:
        state["threshold"] = tensors.get("threshold", torch.tensor(-1.0))  # -1: never learnt
    if "group_sizes" in layout.extra:
        further["group_sizes"] = _group_sizes(sae)
        state["group_sizes"] = torch.tensor(further["group_sizes"])
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(folder / WEIGHTS_FILE, buffer.getvalue())
    write_json(folder / CONFIG_FILE, _config(sae, name, further))
    if figures is not None and figures.is_file():
        ours = read_json(figures)
        write_json(folder / EVAL_FILE, round_significant({
            **{theirs: ours[key] for key, theirs in THEIR_FIGURES.items() if key in ours},
            "hyperparameters": {"n_tokens": ours.get("tokens"), "context_length": sae.cfg.context_size}}))
    return name


def _chosen_class(sae: SparseAutoencoder, wanted: str | None) -> str:
    form = sae.cfg.form
    if form not in CLASSES_OF_FORM:
        raise UserError(f"dictionary_learning has no class for the form {form}; it has "
                        f"{', '.join(CLASSES_OF_FORM)}")
    if sae.cfg.center_input:
        raise UserError("dictionary_learning cannot express an SAE that reads a centred residual stream")
    if wanted is not None:
        if wanted not in CLASSES_OF_FORM[form]:
            raise UserError(f"an SAE of the form {form} cannot be a {wanted}; "
                            f"possible: {', '.join(CLASSES_OF_FORM[form])}")
        return wanted
    if form == "jumprelu":
        return _CLASS_OF_ARCHITECTURE.get(sae.cfg.architecture, CLASSES_OF_FORM[form][0])
    return CLASSES_OF_FORM[form][0]


def _one_threshold(threshold_F: Tensor, name: str) -> Tensor:
    if (threshold_F != threshold_F[0]).any():
        raise UserError(f"{name} has one threshold for all latents, this SAE one for each; "
                        "export it as JumpReluAutoEncoder")
    return threshold_F[0].clone()


def _mean_l0(sae: SparseAutoencoder) -> int:
    """The k it was trained with."""
    provenance = sae.cfg.provenance
    k = sae.options().get("k") or provenance.get("hyper_parameters", {}).get("k") or (
        provenance.get("held_out", {}).get("l0"))
    if k is None:
        raise UserError("the k this SAE was trained with is not recorded; export it as JumpReluAutoEncoder")
    return max(1, round(float(k)))


def _group_sizes(sae: SparseAutoencoder) -> list[int]:
    """Sizes of the nested groups; one group where they are not recorded. Only training reads them."""
    provenance, width = sae.cfg.provenance, sae.cfg.d_sae
    if provenance.get("group_sizes"):
        return [int(size) for size in provenance["group_sizes"]]
    fractions = provenance.get("hyper_parameters", {}).get("group_fractions", [1.0])
    inner = [int(fraction * width) for fraction in fractions[:-1]]
    bounds = [0, *accumulate(inner), width]
    return [end - start for start, end in zip(bounds, bounds[1:], strict=False) if end > start]


def _as_they_subtract(sae: SparseAutoencoder, theirs: bool) -> dict[str, Tensor]:
    """Tensors on the CPU, with encoder biases for a class that subtracts `b_dec` before encoding, or does not."""
    tensors = {name: tensor.detach().cpu().float() for name, tensor in sae.tensors().items()}
    if sae.cfg.apply_b_dec_to_input == theirs:
        return tensors
    shift_F = (tensors["b_dec"] @ tensors["W_enc"]) * (1 if theirs else -1)
    if sae.cfg.form == "gated":
        return {**tensors, "b_gate": tensors["b_gate"] + shift_F,
                "b_mag": tensors["b_mag"] + shift_F * tensors["r_mag"].exp()}
    return {**tensors, "b_enc": tensors["b_enc"] + shift_F}


def _config(sae: SparseAutoencoder, dict_class: str, further: dict[str, Any]) -> dict[str, Any]:
    cfg, provenance = sae.cfg, sae.cfg.provenance
    kind = cfg.hook_name.rpartition(".")[2].removeprefix("hook_")
    if kind not in SUBMODULES:
        raise UserError(f"dictionary_learning has no name for the hook {cfg.hook_name!r}; it has "
                        f"{', '.join(SUBMODULES)}")
    trainer_class = LAYOUTS[dict_class].trainer_class
    if cfg.form == "standard":
        trainer_class = _TRAINER_OF_RECIPE.get(provenance.get("recipe", ""), provenance.get("trainer_class", trainer_class))
    return {
        "trainer": {
            "dict_class": dict_class,
            "trainer_class": trainer_class,
            "activation_dim": cfg.d_in,
            "dict_size": cfg.d_sae,
            "layer": cfg.hook_layer,
            "lm_name": cfg.model_name,
            "device": "cpu",
            "lr": provenance.get("hyper_parameters", {}).get("learning_rate"),
            "seed": provenance.get("seed"),
            "wandb_name": trainer_class,
            "submodule_name": f"{kind}_layer_{cfg.hook_layer}",
            **further,
        },
        "buffer": {
            "d_submodule": cfg.d_in,
            "io": "out",
            "n_ctxs": None,
            "ctx_len": cfg.context_size,
            "refresh_batch_size": None,
            "out_batch_size": None,
            "device": "cpu",
        },
    }
