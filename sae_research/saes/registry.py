"""Inference forms by name, imported when first asked for."""

from __future__ import annotations

import importlib
import uuid
from collections.abc import Iterable, Iterator, Mapping

from sae_research.runtime.errors import UserError
from sae_research.runtime.sources import sources_fingerprint
from sae_research.saes.base import SparseAutoencoder

_PLACES = {
    "standard": "sae_research.saes.forms:StandardSAE",
    "standard_norm_rescaled": "sae_research.saes.token_scaled:NormRescaledSAE",
    "layer_norm": "sae_research.saes.token_scaled:LayerNormSAE",
    "groupmax": "sae_research.saes.forms:GroupMaxSAE",
    "tanh_relu": "sae_research.saes.forms:TanhReLUSAE",
    "sae_lens_temporal": "sae_research.saes.temporal:TemporalSAE",
    "cross_layer": "sae_research.saes.cross_layer:CrossLayerTranscoder",
    "linear": "sae_research.saes.forms:LinearSAE",
    "topk": "sae_research.saes.forms:TopKSAE",
    "jumprelu": "sae_research.saes.forms:JumpReLUSAE",
    "gated": "sae_research.saes.forms:GatedSAE",
    "hard_concrete": "sae_research.saes.forms:HardConcreteSAE",
    "abs_topk": "sae_research.saes.forms:AbsTopKSAE",
    "signed_hard_concrete": "sae_research.saes.forms:SignedHardConcreteSAE",
    "gated_hard_concrete": "sae_research.saes.forms:GatedHardConcreteSAE",
    "ihtp": "sae_research.saes.pursuit.encoders:IHTPSAE",
    "matching_pursuit": "sae_research.saes.pursuit.encoders:MPSAE",
    "mapped_matching_pursuit": "sae_research.saes.pursuit.mapped:MappedMPSAE",
    "nonnegative_matching_pursuit": "sae_research.saes.pursuit.encoders:NonNegativeMPSAE",
    "sae_lens_matching_pursuit": "sae_research.saes.forms:LensPursuitSAE",
    "omp": "sae_research.saes.pursuit.encoders:OMPSAE",
    "nonnegative_omp": "sae_research.saes.pursuit.encoders:NonNegativeOMPSAE",
    "topk_refit": "sae_research.saes.pursuit.encoders:TopKRefitSAE",
}


class _Registry(Mapping[str, type[SparseAutoencoder]]):
    """Form -> class. A form may also be `package.module:Class`, a class of the user's own."""

    def __getitem__(self, form: str) -> type[SparseAutoencoder]:
        if not isinstance(form, str):
            raise KeyError(form)
        place = _PLACES.get(form, form)
        if ":" not in place:
            raise KeyError(form)
        module_name, class_name = place.split(":", 1)
        try:
            module = importlib.import_module(module_name)
        except (ImportError, SyntaxError) as error:
            absent = isinstance(error, ModuleNotFoundError) and f"{module_name}.".startswith(f"{error.name}.")
            mend = "; put the file into custom_saes/ and write custom_saes.FILE:CLASS" if absent else ""
            raise UserError(f"{place}: cannot import {module_name} ({error}){mend}") from None
        if not hasattr(module, class_name):
            raise UserError(f"{place}: {module_name} has no class {class_name}")
        cls = getattr(module, class_name)
        if not (isinstance(cls, type) and issubclass(cls, SparseAutoencoder)):
            raise UserError(f"{place}: {class_name} is not a subclass of sae_research.saes.SparseAutoencoder")
        return cls

    def __iter__(self) -> Iterator[str]:
        return iter(_PLACES)

    def __len__(self) -> int:
        return len(_PLACES)


registry = _Registry()


def form_class(form: str) -> type[SparseAutoencoder]:
    """The class of an inference form. Raises `UserError` naming the known forms."""
    try:
        return registry[form]
    except KeyError:
        raise UserError(
            f"unknown SAE form {str(form)[:60]!r}; known: {', '.join(registry)}, or module:Class of your own"
        ) from None


def code_fingerprint(*modules: str, classes: Iterable[type] = ()) -> str:
    """SHA-256 of the code and library versions by which `modules` compute something with SAEs of `classes`.

    The other inference forms do not count, although importing this module can reach them. A class whose source cannot be
    read, from a notebook's cell or the main script, gives another value each time: its results are never taken for old ones.
    """
    own = {cls.__module__ for cls in classes}
    try:
        return sources_fingerprint(*modules, *sorted(own), by_name={__name__: ()})
    except ModuleNotFoundError as error:
        if error.name not in own:
            raise
        return uuid.uuid4().hex
