"""An evaluation lab for sparse autoencoders. The names below are looked up when first used: importing the package imports
neither torch nor any stage."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae_research.config import Params, load_params
    from sae_research.evaluate import evaluate
    from sae_research.lm import LanguageModel, load_language_model
    from sae_research.saes import SparseAutoencoder, load_sae, save_sae

    __version__: str

__all__ = [
    "LanguageModel",
    "Params",
    "SparseAutoencoder",
    "__version__",
    "evaluate",
    "load_language_model",
    "load_params",
    "load_sae",
    "save_sae",
]

_WHERE = {
    "LanguageModel": ".lm",
    "Params": ".config",
    "SparseAutoencoder": ".saes",
    "evaluate": ".evaluate",
    "load_language_model": ".lm",
    "load_params": ".config",
    "load_sae": ".saes",
    "save_sae": ".saes",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("sae-research")
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
