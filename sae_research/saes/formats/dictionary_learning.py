"""Checkpoints of the dictionary_learning library: `ae.pt` (a plain state dict) with `config.json` beside it.

| dict_class | becomes | note |
|---|---|---|
| `AutoEncoder` | `standard` | decoder norms folded |
| `AutoEncoderNew` | `standard` | likewise; does not subtract `b_dec` before encoding |
| `AutoEncoderTopK` | `topk` | its `threshold` is off by default there, left out |
| `BatchTopKSAE`, `MatryoshkaBatchTopKSAE` | `jumprelu` | one threshold for all; `architecture` tells them apart |
| `JumpReluAutoEncoder` | `jumprelu` | does not subtract `b_dec` before encoding |
| `GatedAutoEncoder` | `gated` | |

`dictionary_learning_export` is the way back.

SAEs written as dictionary_learning's `ae.pt` and `config.json`, which SAE Bench and SAELens read as well.

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
import re
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.runtime.files import read_json, read_settings, round_significant, write_bytes, write_json
from sae_research.saes.base import SAEConfig, SparseAutoencoder
from sae_research.saes.forms import as_subtracting, fold_decoder_norms
from sae_research.saes.reading import check_shapes, floats, hook_of, load_state, section, shown, text, whole
from sae_research.saes.registry import form_class

WEIGHTS_FILE = "ae.pt"
CONFIG_FILE = "config.json"


class Layout(NamedTuple):
    """How one `dict_class` stores its tensors: our name -> their key; `transposed` ones are nn.Linear
    weights."""

    form: str
    keys: dict[str, str]
    transposed: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    """Further keys that may be there."""
    trainer_class: str = ""
    """What SAE Bench chooses its loader by."""
    architecture: str = ""
    """Group in tables and plots; the form where empty."""
    subtracts_b_dec: bool = True
    """`b_dec` is subtracted before encoding."""


_LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight"}
_PLAIN = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
LAYOUTS: dict[str, Layout] = {
    "AutoEncoder": Layout(
        "standard",
        {**_LINEAR, "b_enc": "encoder.bias", "b_dec": "bias"},
        ("W_enc", "W_dec"),
        trainer_class="StandardTrainer",
    ),
    # SAE Bench and SAELens read April-update SAEs as `AutoEncoder`; this class exists in dictionary_learning alone
    "AutoEncoderNew": Layout(
        "standard",
        {**_LINEAR, "b_enc": "encoder.bias", "b_dec": "decoder.bias"},
        ("W_enc", "W_dec"),
        trainer_class="StandardTrainerAprilUpdate",
        subtracts_b_dec=False,
    ),
    "AutoEncoderTopK": Layout(
        "topk",
        {**_LINEAR, "b_enc": "encoder.bias", "b_dec": "b_dec"},
        ("W_enc", "W_dec"),
        ("k", "threshold"),
        "TopKTrainer",
    ),
    "BatchTopKSAE": Layout(
        "jumprelu",
        {**_LINEAR, "b_enc": "encoder.bias", "b_dec": "b_dec", "threshold": "threshold"},
        ("W_enc", "W_dec"),
        ("k",),
        "BatchTopKTrainer",
        "batchtopk",
    ),
    "MatryoshkaBatchTopKSAE": Layout(
        "jumprelu",
        _PLAIN,
        extra=("k", "group_sizes"),
        trainer_class="MatryoshkaBatchTopKTrainer",
        architecture="matryoshka_batchtopk",
    ),
    "JumpReluAutoEncoder": Layout("jumprelu", _PLAIN, trainer_class="JumpReluTrainer", subtracts_b_dec=False),
    "GatedAutoEncoder": Layout(
        "gated",
        {**_LINEAR, "b_dec": "decoder_bias", "b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"},
        ("W_enc", "W_dec"),
        trainer_class="GatedSAETrainer",
    ),
}


def load_dictionary_learning(folder: str | Path) -> SparseAutoencoder:
    """Read `ae.pt` and `config.json` of a folder. Raises `UserError` for a class, keys or weights that do not
    fit."""
    folder = Path(folder)
    return read_checkpoint(folder / WEIGHTS_FILE, folder / CONFIG_FILE)


def read_checkpoint(weights: Path, config: Path) -> SparseAutoencoder:
    """Read one checkpoint from its two files. `provenance` records the class, and k as the L0 to expect."""
    trainer, context_size = _trainer(config)
    layout = _layout(trainer, config)
    state = load_state(weights)
    _check_keys(state, layout, trainer["dict_class"], weights)
    tensors = _tensors(state, layout, trainer, weights, config)
    if layout.form != "topk":  # a TopK SAE there ranks by activation alone, and keeps unit rows while training
        tensors = fold_decoder_norms(layout.form, tensors)
    k = trained_k(trainer, state, config, weights)
    if layout.form == "topk" and k is None:
        raise UserError(f"{config}: trainer lacks k, and so do the weights")
    d_sae, d_in = tensors["W_dec"].shape
    cfg = SAEConfig(
        form=layout.form,
        d_in=d_in,
        d_sae=d_sae,
        model_name=text(trainer["lm_name"], "lm_name", config),
        hook_name=hook_name(trainer, config),
        context_size=context_size,
        apply_b_dec_to_input=layout.subtracts_b_dec,
        options={"k": k} if layout.form == "topk" else {},
        architecture=layout.architecture,
        provenance={
            "format": "dictionary_learning",
            "dict_class": trainer["dict_class"],
            **{key: text(trainer[key], key, config) for key in ("trainer_class",) if trainer.get(key)},
            **({} if k is None else {"held_out": {"l0": float(k)}}),
            **({"group_sizes": state["group_sizes"].tolist()} if "group_sizes" in state else {}),
        },
    )
    try:
        return form_class(layout.form).from_tensors(cfg, tensors)
    except UserError as error:
        raise UserError(f"{weights}: {error}") from None


def _tensors(
    state: dict[str, Tensor], layout: Layout, trainer: dict[str, Any], weights: Path, config: Path
) -> dict[str, Tensor]:
    """Our tensors by our names, of the sizes that config.json says; where it says none, of those of `W_dec`."""
    found = {name: state[key].T if name in layout.transposed else state[key] for name, key in layout.keys.items()}
    sizes = found["W_dec"].shape
    d_sae = whole(trainer.get("dict_size", sizes[0]), "dict_size", config)
    d_in = whole(trainer.get("activation_dim", sizes[1]), "activation_dim", config)
    if layout.form == "jumprelu" and found["threshold"].dim() == 0:
        check_shapes({"b_enc": found["b_enc"]}, d_in, d_sae, weights)
        found["threshold"] = found["threshold"].expand(d_sae)
    check_shapes(found, d_in, d_sae, weights)
    return floats(found, weights)


def trained_k(trainer: dict[str, Any], state: dict[str, Tensor], config: Path, weights: Path) -> int | None:
    """How many latents it was trained to use, of the configuration or the weights; both must say the same."""
    said = None if trainer.get("k") is None else whole(trainer["k"], "k", config)
    if "k" not in state:
        return said
    if state["k"].numel() != 1:
        raise UserError(f"{weights}: k has shape {tuple(state['k'].shape)}, not one number")
    kept = whole(state["k"].item(), "k", weights)
    if said is not None and said != kept:
        raise UserError(f"{weights}: k is {kept}, config.json says {said}; correct the one that is wrong")
    return kept


_SUBMODULES = {
    "resid_post": "hook_resid_post",
    "resid_pre": "hook_resid_pre",
    "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
    "attention_out": "hook_attn_out",
}
"""What a `submodule_name` without its `_layer_N` may be, and the hook that it is."""


def hook_name(trainer: dict[str, Any], config: Path) -> str:
    """The hook a checkpoint was trained at. Without `submodule_name`, which their trainers need not record, it is the
    residual stream after its layer, where SAE Bench puts all of them.

    Raises `UserError` for a submodule that is not known exactly, and for one of another layer.
    """
    layer = whole(trainer["layer"], "layer", config, least=0)
    submodule = text(trainer.get("submodule_name"), "submodule_name", config)
    match = re.fullmatch(r"(\w+?)(?:_layer_([0-9]{1,6}))?", submodule)
    if not submodule:
        hook = f"blocks.{layer}.hook_resid_post"
    elif match and match[1] in _SUBMODULES:
        hook = f"blocks.{int(match[2] or layer)}.{_SUBMODULES[match[1]]}"
    elif "." in submodule:
        hook = hook_of(submodule, config)
    else:
        raise UserError(
            f"{config}: submodule_name {shown(submodule)} is not known; known: "
            f"{', '.join(f'{kind}_layer_{layer}' for kind in _SUBMODULES)}"
        )
    if not hook.startswith(f"blocks.{layer}."):
        raise UserError(f"{config}: submodule_name {shown(submodule)} is not of layer {layer}, which `layer` says")
    return hook


def _trainer(config: Path) -> tuple[dict[str, Any], int]:
    """(trainer section, context length) of a config.json."""
    values = read_settings(config)
    trainer = values.get("trainer")
    if not isinstance(trainer, dict):
        raise UserError(f"{config}: no `trainer` section; not a dictionary_learning configuration")
    missing = [key for key in ("dict_class", "layer", "lm_name") if key not in trainer]
    if missing:
        raise UserError(f"{config}: trainer lacks {', '.join(missing)}")
    buffer = section(values.get("buffer"), "buffer", config)
    if buffer.get("io", "out") != "out":
        raise UserError(f"{config}: buffer.io is {shown(buffer['io'])}: it reads not just what its submodule puts out")
    return trainer, whole(buffer.get("ctx_len", 128), "ctx_len", config)


def _layout(trainer: dict[str, Any], config: Path) -> Layout:
    try:
        return LAYOUTS[trainer["dict_class"]]
    except (KeyError, TypeError):
        raise UserError(
            f"{config}: dict_class {shown(trainer['dict_class'])} is not supported; known: {', '.join(LAYOUTS)}"
        ) from None


def _check_keys(state: dict[str, Tensor], layout: Layout, dict_class: str, path: Path) -> None:
    """The weights must be those of the class that config.json names: a wrong guess would still encode
    something."""
    missing = sorted(set(layout.keys.values()) - set(state))
    unknown = sorted(set(state) - set(layout.keys.values()) - set(layout.extra))
    if missing or unknown:
        parts = [f"lacks {', '.join(missing)}"] * bool(missing) + [f"also holds {', '.join(unknown)}"] * bool(unknown)
        raise UserError(f"{path}: not the weights of {dict_class}, which config.json names: {' and '.join(parts)}")
    bad = [name for name in ("W_enc", "W_dec") if state[layout.keys[name]].dim() != 2]
    if bad:
        key = layout.keys[bad[0]]
        raise UserError(f"{path}: {key} is no matrix (shape {tuple(state[key].shape)})")


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
"""Our name of a held-out metric -> the one their `eval_results.json` uses."""


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
    tensors = as_subtracting(sae, layout.subtracts_b_dec)
    if sae.cfg.form == "jumprelu" and name != "JumpReluAutoEncoder":
        tensors["threshold"] = _one_threshold(tensors["threshold"], name)
    state = {
        key: (tensors[ours].T if ours in layout.transposed else tensors[ours]).contiguous().clone()
        for ours, key in layout.keys.items()
    }
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
        write_json(
            folder / EVAL_FILE,
            round_significant(
                {
                    **{theirs: ours[key] for key, theirs in THEIR_FIGURES.items() if key in ours},
                    "hyperparameters": {"n_tokens": ours.get("tokens"), "context_length": sae.cfg.context_size},
                }
            ),
        )
    return name


def _chosen_class(sae: SparseAutoencoder, wanted: str | None) -> str:
    form = sae.cfg.form
    if form not in CLASSES_OF_FORM:
        raise UserError(f"dictionary_learning has no class for the form {form}; it has {', '.join(CLASSES_OF_FORM)}")
    if sae.cfg.is_transcoder:
        raise UserError("dictionary_learning has no transcoders; export it as sae_lens")
    if sae.cfg.center_input:
        raise UserError("dictionary_learning cannot express an SAE that reads a centred residual stream")
    if wanted is not None:
        if wanted not in CLASSES_OF_FORM[form]:
            raise UserError(f"an SAE of the form {form} cannot be a {wanted}; possible: {', '.join(CLASSES_OF_FORM[form])}")
        return wanted
    if form == "jumprelu":
        return _CLASS_OF_ARCHITECTURE.get(sae.cfg.architecture, CLASSES_OF_FORM[form][0])
    return CLASSES_OF_FORM[form][0]


def _one_threshold(threshold_F: Tensor, name: str) -> Tensor:
    if (threshold_F != threshold_F[0]).any():
        raise UserError(f"{name} has one threshold for all latents, this SAE one for each; export it as JumpReluAutoEncoder")
    return threshold_F[0].clone()


def _mean_l0(sae: SparseAutoencoder) -> int:
    """The k it was trained with."""
    provenance = sae.cfg.provenance
    k = (
        sae.options().get("k")
        or provenance.get("hyper_parameters", {}).get("k")
        or (provenance.get("held_out", {}).get("l0"))
    )
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


def _config(sae: SparseAutoencoder, dict_class: str, further: dict[str, Any]) -> dict[str, Any]:
    cfg, provenance = sae.cfg, sae.cfg.provenance
    kind = cfg.hook_name.rpartition(".")[2].removeprefix("hook_")
    if kind not in SUBMODULES:
        raise UserError(f"dictionary_learning has no name for the hook {cfg.hook_name!r}; it has {', '.join(SUBMODULES)}")
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
