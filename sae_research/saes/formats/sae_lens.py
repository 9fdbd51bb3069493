"""SAELens' `cfg.json` of any version: brought to the keys of version 6, every one of them used or refused.

SAEs of SAELens: its folders, its objects and its directory of releases, converted to our forms.

`sae_lens` itself takes many seconds to import; only `from_release` does, when something is to be downloaded.
"""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.saes.base import SAEConfig, SparseAutoencoder
from sae_research.saes.forms import UNIT_TOLERANCE, LensPursuitSAE, NormRescaledSAE, fold_decoder_norms
from sae_research.saes.reading import (
    DAMAGED,
    check_shapes,
    flag,
    floats,
    hook_of,
    number,
    precision,
    section,
    shown,
    text,
    whole,
)
from sae_research.saes.registry import form_class

OF_ALL = frozenset(
    {
        "architecture",
        "d_in",
        "d_sae",
        "dtype",
        "device",
        "apply_b_dec_to_input",
        "normalize_activations",
        "reshape_activations",
        "metadata",
    }
)
_OF_TOPK = frozenset({"k", "rescale_acts_by_decoder_norm"})
OF_ARCHITECTURE: dict[str, frozenset[str]] = {
    "standard": frozenset(),
    "gated": frozenset(),
    "jumprelu": frozenset(),
    "topk": _OF_TOPK,
    "batchtopk": _OF_TOPK,
    "matryoshka_batchtopk": _OF_TOPK,
    "matching_pursuit": frozenset({"residual_threshold", "max_iterations", "stop_on_duplicate_support"}),
}
"""Keys that a latent's activation depends on, by architecture; a test holds them against the package."""
TRAINING_ONLY = frozenset(
    {
        "decoder_init_norm",
        "l1_coefficient",
        "lp_norm",
        "l1_warm_up_steps",
        "use_sparse_activations",
        "aux_loss_coefficient",
        "jumprelu_init_threshold",
        "jumprelu_bandwidth",
        "jumprelu_sparsity_loss_mode",
        "l0_coefficient",
        "l0_warm_up_steps",
        "pre_act_loss_coefficient",
        "jumprelu_tanh_scale",
        "jumprelu_ste_to_input",
        "target_l0",
        "topk_threshold_lr",
        "matryoshka_widths",
        "use_matryoshka_aux_loss",
    }
)
"""Keys of its training classes, which change no activation of finished weights; likewise held against the package."""
_OLD_RUNNER = re.compile(
    r"model_(name|class_name|kwargs|from_pretrained_kwargs)|hook_(name|point|eval|point_eval|layer|point_layer)"
    r"|dataset_(path|trust_remote_code)|is_dataset_tokenized|streaming|use_chat_formatting|context_size|prepend_bos"
    r"|(use_)?cached_activations(_path)?|from_pretrained_path|n_batches_\w+|(total_)?training_tokens|\w*batch_size\w*"
    r"|tokens_per_buffer|seqpos_slice|disable_concat_sequences|sequence_separator_token|activations_mixing_fraction"
    r"|exclude_special_tokens|(llm_|act_store_)?device|prefetch_llm_batches|seed|autocast(_lm)?|compile_(llm|sae)"
    r"|\w+_compilation_mode|adam_\w+|lr(_\w+)?|n_restart_cycles|dead_feature_\w+|feature_(sampling_\w+|reinit_scale)"
    r"|resample_batches|n_eval_batches|eval_every_n_wandb_logs|log_\w+|logger|wandb_\w+|run_name|verbose|n_checkpoints"
    r"|checkpoint_path|save_final_checkpoint|output_path|resume\w*|sae_lens_(training_)?version|neuronpedia_id"
    r"|l1_\w+|l0_\w+|lp_norm|sparsity_\w+|mse_loss_normalization|use_ghost_grads|ghost_grads\w*|expansion_factor"
    r"|b_dec_init_method|decoder_(orthogonal|heuristic)_init\w*|normalize_sae_decoder|init_encoder_as_decoder_transpose"
    r"|scale_sparsity_penalty_by_decoder_norm|noise_scale|jumprelu_\w+|n_running_sparsity|effective_\w+|training_\w+"
)
"""Keys of configurations before version 6, which held the settings of the whole training run in one level."""
_SPELLINGS = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "hook_point_layer": "hook_layer",
    "activation_fn_str": "activation_fn",
}


def settings(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Version 6's keys of a configuration of any version, checked: `metadata` is a section, sizes are whole numbers.

    Raises `UserError`, naming `where`, for a missing or doubtful value and for a key that could change what a latent
    does and that this project does not know.
    """
    known = _one_level_up(values, where)
    architecture = known["architecture"]
    if not isinstance(architecture, str) or architecture not in OF_ARCHITECTURE:
        raise UserError(
            f"{where}: SAELens architecture {shown(architecture)} is not supported; known: {', '.join(OF_ARCHITECTURE)}"
        )
    _check_activation(known, where)
    unknown = sorted(
        key
        for key, value in known.items()
        if value is not None and key not in OF_ALL | OF_ARCHITECTURE[architecture] | TRAINING_ONLY
    )
    if unknown:
        raise UserError(
            f"{where}: the configuration holds {', '.join(unknown)[:120]}, which the architecture "
            f"{architecture} does not use; remove what changes no activation"
        )
    for key in ("d_in", "d_sae"):
        if key not in known:
            raise UserError(f"{where}: the configuration lacks '{key}'")
        known[key] = whole(known[key], key, where)
    for key in ("apply_b_dec_to_input", "rescale_acts_by_decoder_norm", "stop_on_duplicate_support"):
        if key in known:
            flag(known[key], key, where)
    text(known.get("normalize_activations"), "normalize_activations", where)
    precision(known.get("dtype", "float32"), "dtype", where)
    _check_metadata(known, where)
    return known


def _one_level_up(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Keys as version 6 names them. Before it, everything stood in one level."""
    if "metadata" in values:
        if "architecture" not in values:
            raise UserError(f"{where}: the configuration lacks 'architecture'")
        return {**values, "metadata": section(values["metadata"], "metadata", where)}
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = _SPELLINGS.get(key, key)
        if name in flat and flat[name] != value:
            raise UserError(f"{where}: the configuration says {name} twice, in two spellings")
        flat[name] = value
    kwargs = section(flat.pop("activation_fn_kwargs", None), "activation_fn_kwargs", where)
    unused = sorted(set(kwargs) - ({"k", "device"} if flat.get("activation_fn") == "topk" else {"device"}))
    if unused:
        raise UserError(f"{where}: activation_fn_kwargs holds {', '.join(unused)}, which is not known")
    if flat.get("activation_fn") == "topk" and flat.get("architecture", "standard") in ("standard", "topk"):
        flat |= {"architecture": "topk", "k": kwargs.get("k", flat.get("k"))}
    normalisation = flat.get("normalize_activations")
    if isinstance(normalisation, bool):
        normalisation = "expected_average_only_in" if normalisation else "none"
    return {
        **{key: value for key, value in flat.items() if not _OLD_RUNNER.fullmatch(key) or key == "device"},
        "architecture": flat.get("architecture", "standard"),
        "normalize_activations": normalisation,
        "metadata": flat,
    }


def _check_activation(known: dict[str, Any], where: str) -> None:
    """Takes out of `known` what says nothing new: a ReLU where there is one, a head that is not chosen."""
    for spelling in ("activation_fn", "activation_fn_str"):
        said = known.pop(spelling, None)
        expected = ("topk", "relu") if known["architecture"] == "topk" else ("relu",)
        if said is not None and said not in expected:
            raise UserError(
                f"{where}: the activation function {shown(said)} is not that of the architecture {known['architecture']}"
            )
    for values in (known, known["metadata"]):
        if values.get("hook_head_index") is not None:
            raise UserError(f"{where}: reads one attention head only (hook_head_index); hooks give all heads")
        if values.get("finetuning_scaling_factor"):
            raise UserError(f"{where}: finetuning_scaling_factor is not supported")
    for key in ("hook_head_index", "finetuning_scaling_factor"):
        known.pop(key, None)
    reshaped = known.get("reshape_activations") or "none"
    if reshaped != "none" and not (reshaped == "hook_z" and str(known["metadata"].get("hook_name")).endswith("hook_z")):
        raise UserError(
            f"{where}: reshape_activations {shown(reshaped)} does not fit its hook "
            f"{shown(known['metadata'].get('hook_name'))}"
        )


def _check_metadata(known: dict[str, Any], where: str) -> None:
    metadata = known["metadata"]
    for key in ("model_name", "hook_name", "dataset_path"):
        text(metadata.get(key), key, where)
    section(metadata.get("model_from_pretrained_kwargs"), "model_from_pretrained_kwargs", where)
    if metadata.get("prepend_bos") is not None:
        flag(metadata["prepend_bos"], "prepend_bos", where)
    layer, hook = metadata.get("hook_layer"), metadata.get("hook_name") or ""
    named = re.match(r"blocks\.([0-9]{1,6})\.", hook)
    if layer is not None and named and whole(layer, "hook_layer", where, least=0) != int(named[1]):
        raise UserError(f"{where}: hook_layer is {layer}, the hook is {hook}; correct the one that is wrong")


FORMS = {
    "standard": "standard",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
    "matching_pursuit": "sae_lens_matching_pursuit",
}
"""SAELens architecture -> our form. The BatchTopK pair are training classes; at inference they have a
threshold."""
_UNFOLDABLE = {
    "layer_norm": "every token is scaled by its own norm",
    "constant_norm_rescale": "every token is scaled by its own norm, which is supported for standard SAEs alone",
    "covariance_whitening": "SAELens folds its whitening when it saves for inference; save it so",
    "expected_average_only_in": "the factor it multiplied activations by is not recorded with the weights",
}
# Ways of loading a model that change no activation: where it lies, in what precision, how it is fetched.
_NEUTRAL = frozenset(
    """
    attn_implementation cache_dir default_padding_side default_prepend_bos device device_map dtype first_n_layers
    force_download local_files_only low_cpu_mem_usage max_memory mirror move_to_device n_ctx n_devices offload_buffers
    offload_folder offload_state_dict output_loading_info proxies resume_download token torch_dtype trust_remote_code tp_plan
    use_auth_token use_fast use_flash_attention_2 use_safetensors variant weights_only
""".split()
)
# TransformerLens loads the model unprocessed for SAELens; these switched off change nothing.
_NEUTRAL_WHEN_FALSE = (
    "center_writing_weights",
    "fold_ln",
    "center_unembed",
    "fold_value_biases",
    "refactor_factored_attn_matrices",
    "load_in_8bit",
    "load_in_4bit",
)
_PINNED = re.compile(r"main|[0-9a-f]{7,40}")
"""Revisions that name no other weights: the main branch, and commits, which pin what a branch holds."""


def convert(
    values: dict[str, Any], tensors: dict[str, Tensor], where: str, scaling_factor: float | None = None
) -> SparseAutoencoder:
    """An SAE from SAELens' configuration and weights, with unit decoder rows.

    scaling_factor: what activations were multiplied by in training (`normalize_activations:
    expected_average_only_in`), where it is known. Raises `UserError`, naming `where`, for anything the
    weights alone would not reproduce.
    """
    values = settings(values, where)
    _refuse_unsupported(values, where, scaling_factor)
    state = _used(values["architecture"], tensors, where)
    check_shapes(
        {name: tensor for name, tensor in state.items() if name != "topk_threshold"}, values["d_in"], values["d_sae"], where
    )
    state = {name: tensor.clone() for name, tensor in floats(state, where).items()}
    if values["architecture"] == "matching_pursuit":
        cls, state, options = _pursuit(values, state, where, scaling_factor)
    else:
        cls, state = form_class(FORMS[values["architecture"]]), _folded(values, state, where, scaling_factor)
        if _rescales_tokens(values):
            cls, state = NormRescaledSAE, NormRescaledSAE.widened(state)
        options = {name: whole(values.get(name), name, where) for name in cls.option_names}
    missing = [name for name in cls.tensor_names if name not in state]
    if missing:
        raise UserError(f"{where}: weights lack {', '.join(missing)} for the architecture {values['architecture']}")
    cfg = _config(cls, values, options, where)
    try:
        return cls.from_tensors(cfg, {name: state[name] for name in cls.tensor_names})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _config(cls: type[SparseAutoencoder], values: dict[str, Any], options: dict[str, Any], where: str) -> SAEConfig:
    metadata = values["metadata"]
    hook = hook_of(metadata.get("hook_name") or "", where)
    dataset = {"text": metadata["dataset_path"]} if metadata.get("dataset_path") else {}
    return SAEConfig(
        form=cls.form,
        d_in=values["d_in"],
        d_sae=values["d_sae"] + _rescales_tokens(values),
        model_name=model_name(metadata),
        hook_name=hook,
        context_size=whole(metadata.get("context_size") or 128, "context_size", where),
        prepend_bos=metadata.get("prepend_bos") is not False,
        apply_b_dec_to_input=values.get("apply_b_dec_to_input", True),
        center_input=centres_input(metadata.get("model_from_pretrained_kwargs") or {}, hook, where),
        options=options,
        provenance={"format": "sae_lens", **dataset},
    )


def from_sae_lens(sae: Any, where: str = "SAELens object") -> SparseAutoencoder:
    """Convert an `SAE` or `TrainingSAE` object of SAELens; the object stays as it is."""
    # cloned: SAELens' own folding for inference writes into the tensors it is given
    state = {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}
    return convert(sae.cfg.to_dict(), state, where)


def centres_input(kwargs: dict[str, Any], hook_name: str, where: str) -> bool:
    """Whether the model's way of loading centred what the SAE read. Raises `UserError` where it did anything
    else.

    `center_writing_weights` removes the mean over d_model from every matrix and bias that writes to the
    residual stream (embeddings, attention output, MLP output). What each of them adds then has mean zero, so
    the residual stream, and what MLP or attention add to it, are exactly the unprocessed ones less their mean
    over d_model. A model with LayerNorm computes the same, because it removes that mean before every reading;
    the heads' own outputs (hook_z) lie before a writing matrix and do not change.
    """
    active = {
        name: value
        for name, value in kwargs.items()
        if value is not None
        and name not in _NEUTRAL
        and name != "revision"
        and not (name in _NEUTRAL_WHEN_FALSE and value is False)
    }
    if not active:
        return False
    if active == {"center_writing_weights": True}:
        return not hook_name.endswith("hook_z")
    named = ", ".join(f"{name}={value}" for name, value in sorted(active.items()))
    raise UserError(
        f"{where}: trained on a model loaded with {named}; only center_writing_weights can be "
        "reproduced on the unprocessed model"
    )


def model_name(metadata: dict[str, Any]) -> str:
    """The model an SAE was trained on, with its revision (`pythia-70m-deduped@step3000`) where that names other weights."""
    name, revision = (
        str(value or "")
        for value in (metadata.get("model_name"), (metadata.get("model_from_pretrained_kwargs") or {}).get("revision"))
    )
    return f"{name}@{revision}" if name and revision and not _PINNED.fullmatch(revision) else name


_BESIDE = {
    "jumprelu": ("log_threshold",),
    "batchtopk": ("topk_threshold", "threshold"),
    "matryoshka_batchtopk": ("topk_threshold", "threshold"),
}
"""Tensors that checkpoints of training may hold beside those of the form, or in the place of one."""


def _used(architecture: str, tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors, all of which the architecture uses. Raises `UserError` for one that it does not: a `threshold` beside a
    plain ReLU says that one of the two is wrong."""
    cls = form_class(FORMS[architecture])
    known = {*cls.tensor_names, *_BESIDE.get(architecture, ())}
    unused = sorted(set(tensors) - known)
    if unused:
        raise UserError(
            f"{where}: the weights also hold {', '.join(unused)[:120]}, which the architecture {architecture} "
            "does not use; correct the architecture, or remove them"
        )
    thresholds = sorted({"log_threshold", "threshold", "topk_threshold"} & set(tensors))
    if len(thresholds) > 1:
        raise UserError(f"{where}: the weights hold both {' and '.join(thresholds)}; remove the one that is not meant")
    if "log_threshold" in tensors:
        tensors = {**tensors, "threshold": tensors["log_threshold"].exp()}
        del tensors["log_threshold"]
    if not {"W_dec", "b_dec"} <= set(tensors) or ("W_enc" in cls.tensor_names and "W_enc" not in tensors):
        raise UserError(f"{where}: weights lack the matrices W_enc and W_dec, or b_dec")
    if tensors.get("topk_threshold", tensors["b_dec"][:1]).numel() != 1:
        raise UserError(f"{where}: topk_threshold is not one number")
    return tensors


def _pursuit(
    values: dict[str, Any], tensors: dict[str, Tensor], where: str, scaling_factor: float | None
) -> tuple[type[SparseAutoencoder], dict[str, Tensor], dict[str, Any]]:
    """(form, tensors, options) of SAELens' matching pursuit: ours where that computes the same."""
    threshold = number(values.get("residual_threshold", 1e-2), "residual_threshold", where)
    steps = values.get("max_iterations")
    steps = values["d_in"] if steps is None else whole(steps, "max_iterations", where)
    once = values.get("stop_on_duplicate_support", True)
    if not values.get("apply_b_dec_to_input", True):  # nor does it add b_dec to the reconstruction then
        tensors = {**tensors, "b_dec": torch.zeros_like(tensors["b_dec"])}
        values["apply_b_dec_to_input"] = True
    if scaling_factor and values.get("normalize_activations") == "expected_average_only_in":
        tensors, threshold = {**tensors, "b_dec": tensors["b_dec"] / scaling_factor}, threshold / scaling_factor
    unit = bool(((tensors["W_dec"].norm(dim=1) - 1).abs() <= UNIT_TOLERANCE).all())
    if unit and threshold <= 0 and not once and steps <= values["d_sae"]:
        return form_class("nonnegative_matching_pursuit"), tensors, {"s": steps}
    return (
        LensPursuitSAE,
        tensors,
        {"max_iterations": steps, "residual_threshold": max(threshold, 0.0), "stop_on_duplicate_support": once},
    )


def _rescales_tokens(values: dict[str, Any]) -> bool:
    return values.get("normalize_activations") == "constant_norm_rescale" and values["architecture"] == "standard"


def _refuse_unsupported(values: dict[str, Any], where: str, scaling_factor: float | None) -> None:
    normalisation = values.get("normalize_activations") or "none"
    if (
        normalisation != "none"
        and not _rescales_tokens(values)
        and not (normalisation == "expected_average_only_in" and scaling_factor)
    ):
        why = _UNFOLDABLE.get(normalisation, "unknown")
        raise UserError(f"{where}: normalize_activations = {normalisation[:60]} cannot be folded into the weights: {why}")
    if normalisation == "none" and scaling_factor not in (None, 1):
        raise UserError(f"{where}: activation_scaler.json holds a factor, but normalize_activations is none")


def _folded(
    values: dict[str, Any], tensors: dict[str, Tensor], where: str, scaling_factor: float | None
) -> dict[str, Tensor]:
    """Input scale and decoder norms folded into the weights; BatchTopK's one threshold spread over the
    latents."""
    architecture, form = values["architecture"], FORMS[values["architecture"]]
    ranks_by_norm = bool(values.get("rescale_acts_by_decoder_norm"))
    if scaling_factor and values.get("normalize_activations") == "expected_average_only_in":
        tensors["W_enc"] = tensors["W_enc"] * scaling_factor
        tensors["W_dec"] = tensors["W_dec"] / scaling_factor
        tensors["b_dec"] = tensors["b_dec"] / scaling_factor
        if "topk_threshold" in tensors and ranks_by_norm:  # it is in units of activation times decoder norm
            tensors["topk_threshold"] = tensors["topk_threshold"] / scaling_factor
    if "topk_threshold" in tensors and "b_enc" in tensors:
        if ranks_by_norm:
            tensors = fold_decoder_norms("standard", tensors)
        tensors["threshold"] = tensors["topk_threshold"].expand(tensors["b_enc"].shape).clone()
    needed = [name for name in form_class(form).tensor_names if name not in tensors]
    # without norms in its ranking, a TopK SAE with rescaled rows would choose other latents
    if needed or (architecture == "topk" and not ranks_by_norm):
        return tensors
    return fold_decoder_norms(form, tensors)


# --- the directory of releases ---------------------------------------------------------------


class ReleasedSAE(NamedTuple):
    """One entry of SAELens' directory. `card` holds the figures it publishes: l0, variance_explained."""

    release: str
    sae_id: str
    repo_id: str
    card: dict[str, float]


@cache
def release_directory() -> dict[str, dict[str, Any]]:
    """SAELens' list of releases as its package holds it: model, repo_id and saes (id, path; where known neuronpedia, l0,
    variance_explained) by release."""
    spec = importlib.util.find_spec("sae_lens")  # located, not imported
    if spec is None or not spec.submodule_search_locations:
        raise UserError("sae_lens is not installed; run `make setup`")
    with (Path(spec.submodule_search_locations[0]) / "pretrained_saes.yaml").open("rb") as stream:
        return yaml.load(stream, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@cache
def released_saes() -> tuple[ReleasedSAE, ...]:
    """Every SAE that SAELens knows by release and id."""
    return tuple(
        ReleasedSAE(release, str(entry["id"]), value["repo_id"], _card(entry))
        for release, value in release_directory().items()
        for entry in value["saes"]
    )


def _card(entry: dict[str, Any]) -> dict[str, float]:
    return {key: float(entry[key]) for key in ("l0", "variance_explained") if isinstance(entry.get(key), int | float)}


def matching_saes(release_pattern: str, id_pattern: str) -> list[ReleasedSAE]:
    """Releases and ids that both patterns match in full, as SAE Bench's `get_saes_from_regex` selects them.

    Raises `UserError` for a pattern that is no regular expression, and when nothing matches.
    """
    try:
        release, sae_id = re.compile(release_pattern), re.compile(id_pattern)
    except re.error as error:
        raise UserError(f"comparison_saes: {error.pattern!r} is not a regular expression ({error})") from None
    found = [sae for sae in released_saes() if release.fullmatch(sae.release) and sae_id.fullmatch(sae.sae_id)]
    if not found:
        releases = sum(1 for name in {sae.release for sae in released_saes()} if release.fullmatch(name))
        raise UserError(
            f"comparison_saes: no SAE of SAELens' directory matches {release_pattern!r} and "
            f"{id_pattern!r} "
            f"in full ({releases} releases match the first)"
        )
    return found


def from_release(release: str, sae_id: str) -> SparseAutoencoder:
    """Download an SAE by release and id (or hub repository and folder) and convert it. Needs the hub or its
    cache."""
    try:
        from sae_lens import SAE

        sae = SAE.from_pretrained(release, sae_id, device="cpu")
    except UserError:
        raise
    except DAMAGED as error:
        reason = " ".join(str(error).partition("\n")[0].split())[:200] or type(error).__name__
        raise UserError(f"SAELens {release} / {sae_id}: {reason}") from None
    converted = from_sae_lens(sae, f"SAELens {release} / {sae_id}")
    card = next((item.card for item in released_saes() if (item.release, item.sae_id) == (release, sae_id)), {})
    converted.cfg = converted.cfg.replace(
        provenance={
            **converted.cfg.provenance,
            "release": release,
            "sae_id": sae_id,
            **({"held_out": card} if card else {}),
        }
    )
    return converted
