"""SAEs of SAELens: its folders and its objects, converted to our forms. Readers of other layouts that SAELens converts as
well give theirs its names (`from_parts`), so that what is folded or refused is so in one place."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.saes.base import SAEConfig, SparseAutoencoder
from sae_research.saes.formats.sae_lens_settings import settings
from sae_research.saes.formats.sae_lens_temporal import temporal
from sae_research.saes.forms import UNIT_TOLERANCE, LensPursuitSAE, fold_decoder_norms
from sae_research.saes.reading import (
    check_shapes,
    floats,
    hook_of,
    number,
    whole,
)
from sae_research.saes.registry import form_class
from sae_research.saes.token_scaled import LayerNormSAE, NormRescaledSAE

FORMS = {
    "standard": "standard",
    "tanh_relu": "tanh_relu",
    "topk": "topk",
    "abstopk": "abs_topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "batchtopk": "jumprelu",
    "matryoshka_batchtopk": "jumprelu",
    "matching_pursuit": "sae_lens_matching_pursuit",
    "temporal": "sae_lens_temporal",
    "transcoder": "standard",
    "skip_transcoder": "standard",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
"""SAELens architecture -> our form. The BatchTopK pair are training classes; at inference they have a
threshold. Of a transcoder the form is what its encoder is."""
_UNFOLDABLE = {
    "layer_norm": "every token is scaled by its own deviation, which is supported for standard and topk SAEs alone",
    "constant_norm_rescale": "every token is scaled by its own norm, which is supported for standard SAEs alone",
    "constant_scalar_rescale": "SAELens has it for its temporal architecture alone",
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
    if values["architecture"] == "temporal":
        options, state = temporal(values, tensors, where)
        return _made(form_class("sae_lens_temporal"), values, options, state, where)
    _refuse_unsupported(values, where, scaling_factor)
    factor, tensors = _factor(values, tensors, where)
    state = _used(values["architecture"], tensors, where)
    check_shapes(
        {name: tensor for name, tensor in state.items() if name != "topk_threshold"},
        values["d_in"],
        values["d_sae"],
        where,
        values.get("d_out"),
    )
    state = {name: tensor.clone() for name, tensor in floats(state, where).items()}
    if factor is not None:
        state["W_dec"] = state["W_dec"] * factor[:, None]
    if values["architecture"] == "matching_pursuit":
        cls, state, options = _pursuit(values, state, where, scaling_factor)
    else:
        cls, state = form_class(FORMS[values["architecture"]]), _folded(values, state, where, scaling_factor)
        options = {name: whole(values.get(name), name, where) for name in cls.option_names}
        scaled = _scales_tokens(values)
        if scaled is not None:
            cls, state = scaled, scaled.widened(state)
            options = {name: options.get(name, 0) for name in cls.option_names}
    return _made(cls, values, options, state, where)


def from_parts(
    library: str,
    architecture: str,
    tensors: dict[str, Tensor],
    metadata: dict[str, Any],
    where: str,
    scaling_factor: float | None = None,
    **keys: Any,
) -> SparseAutoencoder:
    """An SAE of another layout, whose reader has given everything SAELens' names; sizes are those of the matrices.

    library: the layout, for `provenance`; metadata, keys: of the configuration; scaling_factor: as for `convert`. Raises
    `UserError`, naming `where`, as `convert` does, and for matrices that are missing or none.
    """
    missing = [name for name in ("W_enc", "W_dec") if name not in tensors]
    if missing:
        raise UserError(f"{where}: weights lack {' and '.join(missing)}; fetch them again")
    for name in ("W_enc", "W_dec"):
        if tensors[name].dim() != 2:
            raise UserError(f"{where}: {name} is no matrix (shape {tuple(tensors[name].shape)})")
    (d_in, _), (d_sae, d_out) = tensors["W_enc"].shape, tensors["W_dec"].shape
    sizes = {"d_in": d_in, "d_sae": d_sae, **({"d_out": d_out} if architecture.endswith("transcoder") else {})}
    if scaling_factor is not None:
        keys["normalize_activations"] = "expected_average_only_in"
    values = {"architecture": architecture, **sizes, "metadata": metadata, **keys}
    sae = convert(values, tensors, where, scaling_factor)
    sae.cfg = sae.cfg.replace(provenance={**sae.cfg.provenance, "format": library})
    return sae


def _made(
    cls: type[SparseAutoencoder], values: dict[str, Any], options: dict[str, Any], state: dict[str, Tensor], where: str
) -> SparseAutoencoder:
    names = (*cls.tensor_names, *_SKIP[: _has_skip(values["architecture"])])
    missing = [name for name in names if name not in state]
    if missing:
        raise UserError(f"{where}: weights lack {', '.join(missing)} for the architecture {values['architecture']}")
    hooks = _hooks(values, where)
    try:
        cfg = _config(cls, {**values, "d_sae": len(state["W_dec"])}, options, hooks, where)
        return cls.from_tensors(cfg, {name: state[name] for name in names})
    except UserError as error:
        raise UserError(str(error) if str(error).startswith(where) else f"{where}: {error}") from None


_SKIP = ("W_skip",)
_MLP_INPUT = re.compile(r"model\.layers\.([0-9]{1,6})\.pre_feedforward_layernorm\.output")


def _has_skip(architecture: str) -> bool:
    return architecture.endswith("skip_transcoder")


def _hooks(values: dict[str, Any], where: str) -> dict[str, Any]:
    """`hook_name`, and a transcoder's `hook_out`.

    SAELens calls what Gemma Scope 2's transcoders read `hook_mlp_in`, which in TransformerLens is the stream before the
    norm; `hf_hook_name` beside it says that it is what the norm puts out.
    """
    metadata = values["metadata"]
    hook = hook_of(metadata.get("hook_name") or "", where)
    given = _MLP_INPUT.fullmatch(metadata.get("hf_hook_name") or "")
    if given and hook.endswith(".hook_mlp_in"):
        if hook != f"blocks.{given[1]}.hook_mlp_in":
            raise UserError(f"{where}: hook_name is {hook}, hf_hook_name {given[0]}; correct the one that is wrong")
        hook = f"blocks.{given[1]}.mlp.hook_in"
    written = hook_of(metadata.get("hook_name_out") or "", where)
    if not values["architecture"].endswith("transcoder"):
        if written not in ("", hook):
            raise UserError(f"{where}: hook_name_out is {written}, but {values['architecture']} is no transcoder")
        return {"hook_name": hook}
    if not hook or not written:
        key = "hook_name_out" if hook else "hook_name"
        raise UserError(f"{where}: the configuration of a transcoder lacks metadata.{key}; add the hook that it means")
    return {"hook_name": hook, "hook_out": written}


def _config(
    cls: type[SparseAutoencoder], values: dict[str, Any], options: dict[str, Any], hooks: dict[str, Any], where: str
) -> SAEConfig:
    metadata = values["metadata"]
    dataset = {"text": metadata["dataset_path"]} if metadata.get("dataset_path") else {}
    return SAEConfig(
        form=cls.form,
        d_in=values["d_in"],
        d_sae=values["d_sae"],
        model_name=model_name(metadata),
        **hooks,
        d_out=values.get("d_out", 0) if "hook_out" in hooks else 0,
        context_size=whole(metadata.get("context_size") or 128, "context_size", where),
        prepend_bos=metadata.get("prepend_bos") is not False,
        apply_b_dec_to_input=values.get("apply_b_dec_to_input", True),
        center_input=centres_input(metadata.get("model_from_pretrained_kwargs") or {}, hooks["hook_name"], where),
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


_FACTORS = ("finetuning_scaling_factor", "scaling_factor")


def _factor(values: dict[str, Any], tensors: dict[str, Tensor], where: str) -> tuple[Tensor | None, dict[str, Tensor]]:
    """(what each latent is multiplied by before it is decoded [d_sae], the other tensors): factors of a finetuning, which
    SAELens had before version 6. Ones may stand there without a word in the configuration."""
    wanted = bool(values.get("finetuning_scaling_factor"))
    found = [name for name in _FACTORS if name in tensors]
    if not found:
        if wanted:
            raise UserError(
                f"{where}: the configuration says finetuning_scaling_factor, the weights lack it; fetch them again"
            )
        return None, tensors
    if len(found) > 1:
        raise UserError(f"{where}: the weights hold both {' and '.join(found)}; remove the one that is not meant")
    factor = floats({found[0]: tensors[found[0]]}, where)[found[0]]
    if tuple(factor.shape) != (values["d_sae"],):
        raise UserError(f"{where}: {found[0]} has shape {tuple(factor.shape)}, expected {(values['d_sae'],)}")
    if not wanted and (factor != 1).any():
        raise UserError(
            f"{where}: the weights hold {found[0]}, and the configuration does not say finetuning_scaling_factor: true; "
            "say it there, or remove the factors"
        )
    return factor if wanted else None, {name: tensor for name, tensor in tensors.items() if name != found[0]}


def _used(architecture: str, tensors: dict[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors, all of which the architecture uses. Raises `UserError` for one that it does not: a `threshold` beside a
    plain ReLU says that one of the two is wrong."""
    cls = form_class(FORMS[architecture])
    known = {*cls.tensor_names, *_BESIDE.get(architecture, ()), *_SKIP[: _has_skip(architecture)]}
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


def _scales_tokens(values: dict[str, Any]) -> type[NormRescaledSAE] | type[LayerNormSAE] | None:
    """The form of an SAE that scales every token by something of its own."""
    normalisation, architecture = values.get("normalize_activations"), values["architecture"]
    if normalisation == "constant_norm_rescale" and architecture == "standard":
        return NormRescaledSAE
    return LayerNormSAE if normalisation == "layer_norm" and architecture in ("standard", "topk") else None


def _refuse_unsupported(values: dict[str, Any], where: str, scaling_factor: float | None) -> None:
    normalisation = values.get("normalize_activations") or "none"
    if normalisation != "none" and values["architecture"].endswith("transcoder"):
        raise UserError(
            f"{where}: normalize_activations = {normalisation[:60]} of a transcoder is not supported: it scales what is "
            "read, not what is written"
        )
    if (
        normalisation != "none"
        and _scales_tokens(values) is None
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
    form = FORMS[values["architecture"]]
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
    if needed or form == "tanh_relu" or (form in ("topk", "abs_topk") and not ranks_by_norm):
        return tensors
    return fold_decoder_norms(form, tensors)
