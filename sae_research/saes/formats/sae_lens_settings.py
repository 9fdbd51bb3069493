"""SAELens' `cfg.json` of any version: brought to the keys of version 6, every one of them used or refused."""

from __future__ import annotations

import re
from typing import Any

from sae_research.runtime.errors import UserError
from sae_research.saes.reading import (
    flag,
    precision,
    section,
    shown,
    text,
    whole,
)

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
_FACTOR = "finetuning_scaling_factor"
"""Whether the weights hold a factor for each latent by which it is decoded; written before version 6."""
_OF_TOPK = frozenset({"k", "rescale_acts_by_decoder_norm"})
_OF_TRANSCODER = frozenset({"d_out"})
OF_ARCHITECTURE: dict[str, frozenset[str]] = {
    "standard": frozenset(),
    "gated": frozenset(),
    "jumprelu": frozenset(),
    "tanh_relu": frozenset(),  # "tanh-relu" before version 6, which itself takes it for a ReLU
    "topk": _OF_TOPK,
    "abstopk": _OF_TOPK,
    "batchtopk": _OF_TOPK,
    "matryoshka_batchtopk": _OF_TOPK,
    "matching_pursuit": frozenset({"residual_threshold", "max_iterations", "stop_on_duplicate_support"}),
    "temporal": frozenset(
        {
            "n_heads",
            "n_attn_layers",
            "bottleneck_factor",
            "sae_diff_type",
            "kval_topk",
            "tied_weights",
            "activation_normalization_factor",
        }
    ),
    "transcoder": _OF_TRANSCODER,
    "skip_transcoder": _OF_TRANSCODER,
    "jumprelu_transcoder": _OF_TRANSCODER,
    "jumprelu_skip_transcoder": _OF_TRANSCODER,
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
        if value is not None and key not in OF_ALL | OF_ARCHITECTURE[architecture] | TRAINING_ONLY | {_FACTOR}
    )
    if unknown:
        raise UserError(
            f"{where}: the configuration holds {', '.join(unknown)[:120]}, which the architecture "
            f"{architecture} does not use; remove what changes no activation"
        )
    for key in ("d_in", "d_sae", *sorted(OF_ARCHITECTURE[architecture] & {"d_out"})):
        if key not in known:
            raise UserError(f"{where}: the configuration lacks '{key}'")
        known[key] = whole(known[key], key, where)
    for key in (
        "apply_b_dec_to_input",
        "rescale_acts_by_decoder_norm",
        "stop_on_duplicate_support",
        "tied_weights",
        _FACTOR,
    ):
        if key in known:
            flag(known[key], key, where)
    text(known.get("normalize_activations"), "normalize_activations", where)
    precision(known.get("dtype", "float32"), "dtype", where)
    _check_metadata(known, where)
    return known


def without_unknown(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration of a release in SAELens' directory without the keys that this module does not know. Versions before 6
    wrote whatever their trainer was told; SAELens leaves out what it does not know as well."""
    if "metadata" in values:
        return values
    known = OF_ALL | TRAINING_ONLY | {_FACTOR, "activation_fn_kwargs", "activation_fn", "hook_name_out", *_SPELLINGS}
    known = known.union(*OF_ARCHITECTURE.values())
    return {key: value for key, value in values.items() if key in known or _OLD_RUNNER.fullmatch(key)}


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
    if flat.get("activation_fn") == "tanh-relu" and flat.get("architecture", "standard") == "standard":
        flat |= {"architecture": "tanh_relu", "activation_fn": None}
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
        for key in ("hook_head_index", "hook_head_index_out"):
            if values.get(key) is not None:
                raise UserError(f"{where}: reads one attention head only ({key}); hooks give all heads")
    known.pop("hook_head_index", None)
    if known.get(_FACTOR) is None:
        known.pop(_FACTOR, None)
    reshaped = known.get("reshape_activations") or "none"
    if reshaped != "none" and not (reshaped == "hook_z" and str(known["metadata"].get("hook_name")).endswith("hook_z")):
        raise UserError(
            f"{where}: reshape_activations {shown(reshaped)} does not fit its hook "
            f"{shown(known['metadata'].get('hook_name'))}"
        )


def _check_metadata(known: dict[str, Any], where: str) -> None:
    metadata = known["metadata"]
    for key in ("model_name", "hook_name", "hook_name_out", "hf_hook_name", "dataset_path"):
        text(metadata.get(key), key, where)
    section(metadata.get("model_from_pretrained_kwargs"), "model_from_pretrained_kwargs", where)
    if metadata.get("prepend_bos") is not None:
        flag(metadata["prepend_bos"], "prepend_bos", where)
    layer, hook = metadata.get("hook_layer"), metadata.get("hook_name") or ""
    named = re.match(r"blocks\.([0-9]{1,6})\.", hook)
    if layer is not None and named and whole(layer, "hook_layer", where, least=0) != int(named[1]):
        raise UserError(f"{where}: hook_layer is {layer}, the hook is {hook}; correct the one that is wrong")
