"""SAEs of SAELens: its folders, its objects and its directory of releases, converted to our forms.

`sae_lens` itself takes many seconds to import; only `from_release` does, when something is to be downloaded.
"""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from torch import Tensor

from sae_research.errors import UserError
from sae_research.saes.base import SAEConfig, SparseAutoencoder
from sae_research.saes.folding import fold_decoder_norms
from sae_research.saes.norm_rescaled import NormRescaledSAE
from sae_research.saes.registry import form_class

FORMS = {"standard": "standard", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated",
         "batchtopk": "jumprelu", "matryoshka_batchtopk": "jumprelu"}
"""SAELens architecture -> our form. The BatchTopK pair are training classes; at inference they have a
threshold."""
_UNFOLDABLE = {
    "layer_norm": "every token is scaled by its own norm",
    "constant_norm_rescale": "every token is scaled by its own norm, which is supported for standard SAEs alone",
    "covariance_whitening": "SAELens folds its whitening when it saves for inference; save it so",
    "expected_average_only_in": "the factor it multiplied activations by is not recorded with the weights",
}
# Ways of loading a model that change no activation: where it lies, in what precision, how it is fetched.
_NEUTRAL = frozenset("""
    attn_implementation cache_dir default_padding_side default_prepend_bos device device_map dtype first_n_layers
    force_download local_files_only low_cpu_mem_usage max_memory mirror move_to_device n_ctx n_devices offload_buffers
    offload_folder offload_state_dict output_loading_info proxies resume_download token torch_dtype trust_remote_code tp_plan
    use_auth_token use_fast use_flash_attention_2 use_safetensors variant weights_only
""".split())
# TransformerLens loads the model unprocessed for SAELens; these switched off change nothing.
_NEUTRAL_WHEN_FALSE = ("center_writing_weights", "fold_ln", "center_unembed", "fold_value_biases",
                       "refactor_factored_attn_matrices", "load_in_8bit", "load_in_4bit")
_PINNED = re.compile(r"main|[0-9a-f]{7,40}")
"""Revisions that name no other weights: the main branch, and commits, which pin what a branch holds."""


def convert(values: dict[str, Any], tensors: dict[str, Tensor], where: str,
            scaling_factor: float | None = None) -> SparseAutoencoder:
    """An SAE from SAELens' configuration and weights, with unit decoder rows.

    scaling_factor: what activations were multiplied by in training (`normalize_activations:
    expected_average_only_in`), where it is known. Raises `UserError`, naming `where`, for anything the
    weights alone would not reproduce.
    """
    values = _modern(values)
    metadata = values["metadata"]
    form = FORMS.get(values["architecture"])
    if form is None:
        raise UserError(f"{where}: SAELens architecture {values['architecture']!r} is not supported; "
                        f"known: {', '.join(FORMS)}")
    _refuse_unsupported(values, where, scaling_factor)
    tensors = _folded(
        values,
        {name: tensor.detach().cpu().float().clone() for name, tensor in tensors.items()},
        where,
        scaling_factor,
    )
    cls = form_class(form)
    missing = [name for name in cls.tensor_names if name not in tensors]
    if missing:
        raise UserError(f"{where}: weights lack {', '.join(missing)} for the architecture "
                        f"{values['architecture']}")
    if _rescales_tokens(values):
        cls, tensors = NormRescaledSAE, NormRescaledSAE.widened(tensors)
    hook = str(metadata.get("hook_name") or "")
    text = {"text": str(metadata["dataset_path"])} if metadata.get("dataset_path") else {}
    try:
        cfg = SAEConfig(
            form=cls.form, d_in=int(values["d_in"]), d_sae=int(values["d_sae"]) + _rescales_tokens(values),
            model_name=model_name(metadata), hook_name=hook,
            context_size=int(metadata.get("context_size") or 128),
            prepend_bos=bool(metadata.get("prepend_bos", True)),
            apply_b_dec_to_input=bool(values.get("apply_b_dec_to_input", True)),
            center_input=centres_input(metadata.get("model_from_pretrained_kwargs") or {}, hook, where),
            options={name: int(values[name]) for name in cls.option_names}, provenance={"format": "sae_lens", **text})
        return cls.from_tensors(cfg, {name: tensors[name] for name in cls.tensor_names})
    except KeyError as error:
        raise UserError(f"{where}: the configuration lacks {error}") from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: not an SAE configuration ({error})") from None
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


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
    active = {name: value for name, value in kwargs.items()
              if value is not None and name not in _NEUTRAL and name != "revision"
              and not (name in _NEUTRAL_WHEN_FALSE and value is False)}
    if not active:
        return False
    if active == {"center_writing_weights": True}:
        return not hook_name.endswith("hook_z")
    named = ", ".join(f"{name}={value}" for name, value in sorted(active.items()))
    raise UserError(f"{where}: trained on a model loaded with {named}; only center_writing_weights can be "
                    "reproduced on the unprocessed model")


def model_name(metadata: dict[str, Any]) -> str:
    """The model an SAE was trained on, with its revision (`pythia-70m-deduped@step3000`) where that names other weights."""
    name, revision = (str(value or "") for value in (
        metadata.get("model_name"), (metadata.get("model_from_pretrained_kwargs") or {}).get("revision")))
    return f"{name}@{revision}" if name and revision and not _PINNED.fullmatch(revision) else name


def _modern(values: dict[str, Any]) -> dict[str, Any]:
    """SAELens 6 keys from a configuration of any version: older ones kept everything in one level."""
    if isinstance(values.get("metadata"), dict) and "architecture" in values:
        return values
    kwargs = values.get("activation_fn_kwargs") or {}
    is_topk = values.get("activation_fn", values.get("activation_fn_str")) == "topk"
    normalisation = values.get("normalize_activations")
    if isinstance(normalisation, bool):
        normalisation = "expected_average_only_in" if normalisation else "none"
    renamed = {"hook_point": "hook_name", "hook_point_head_index": "hook_head_index"}
    return {**values, **({"k": kwargs.get("k")} if is_topk else {}),
            "architecture": "topk" if is_topk else values.get("architecture", "standard"),
            "normalize_activations": normalisation,
            "metadata": {renamed.get(key, key): value for key, value in values.items()}}


def _rescales_tokens(values: dict[str, Any]) -> bool:
    return values.get("normalize_activations") == "constant_norm_rescale" and values["architecture"] == "standard"


def _refuse_unsupported(values: dict[str, Any], where: str, scaling_factor: float | None) -> None:
    normalisation = values.get("normalize_activations") or "none"
    if normalisation != "none" and not _rescales_tokens(values) and not (
            normalisation == "expected_average_only_in" and scaling_factor):
        why = _UNFOLDABLE.get(normalisation, "unknown")
        raise UserError(f"{where}: normalize_activations = {normalisation} cannot be folded into the "
                        f"weights: {why}")
    if values["metadata"].get("hook_head_index") is not None:
        raise UserError(f"{where}: reads one attention head only (hook_head_index); hooks give all heads")
    if values.get("finetuning_scaling_factor"):
        raise UserError(f"{where}: finetuning_scaling_factor is not supported")


def _folded(values: dict[str, Any], tensors: dict[str, Tensor], where: str,
            scaling_factor: float | None) -> dict[str, Tensor]:
    """Input scale and decoder norms folded into the weights; BatchTopK's one threshold spread over the
    latents."""
    architecture, form = values["architecture"], FORMS[values["architecture"]]
    if any(tensors[name].dim() != 2 for name in ("W_enc", "W_dec") if name in tensors) or not (
            {"W_enc", "W_dec", "b_dec"} <= set(tensors)):
        raise UserError(f"{where}: weights lack the matrices W_enc and W_dec, or b_dec")
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
    return tuple(ReleasedSAE(release, str(entry["id"]), value["repo_id"], _card(entry))
                 for release, value in release_directory().items() for entry in value["saes"])


def _card(entry: dict[str, Any]) -> dict[str, float]:
    return {key: float(entry[key]) for key in ("l0", "variance_explained")
            if isinstance(entry.get(key), int | float)}


def matching_saes(release_pattern: str, id_pattern: str) -> list[ReleasedSAE]:
    """Releases and ids that both patterns match in full, as SAE Bench's `get_saes_from_regex` selects them.

    Raises `UserError` for a pattern that is no regular expression, and when nothing matches.
    """
    try:
        release, sae_id = re.compile(release_pattern), re.compile(id_pattern)
    except re.error as error:
        raise UserError(f"comparison_saes: {error.pattern!r} is not a regular expression ({error})") from None
    found = [
        sae for sae in released_saes() if release.fullmatch(sae.release) and sae_id.fullmatch(sae.sae_id)
    ]
    if not found:
        releases = sum(1 for name in {sae.release for sae in released_saes()} if release.fullmatch(name))
        raise UserError(f"comparison_saes: no SAE of SAELens' directory matches {release_pattern!r} and "
                        f"{id_pattern!r} "
                        f"in full ({releases} releases match the first)")
    return found


def from_release(release: str, sae_id: str) -> SparseAutoencoder:
    """Download an SAE by release and id (or hub repository and folder) and convert it. Needs the hub or its
    cache."""
    try:
        from sae_lens import SAE

        sae = SAE.from_pretrained(release, sae_id, device="cpu")
    except (ValueError, KeyError) as error:
        raise UserError(f"SAELens {release} / {sae_id}: {str(error).partition(chr(10))[0]}") from None
    converted = from_sae_lens(sae, f"SAELens {release} / {sae_id}")
    card = next(
        (item.card for item in released_saes() if (item.release, item.sae_id) == (release, sae_id)), {}
    )
    converted.cfg = converted.cfg.replace(
        provenance={
            **converted.cfg.provenance,
            "release": release,
            "sae_id": sae_id,
            **({"held_out": card} if card else {}),
        }
    )
    return converted
