"""Which numbers of the comparison's sections fit an SAE's sizes: known before anything is trained or computed.

A module of its own, because the train stage asks it of the SAE to be and the setup stage of the SAE there is.
"""

from __future__ import annotations

from sae_research.errors import UserError
from sae_research.params import Params

SIZES = ("k_values", "s_values")
"""Keys of the sections of `sae_variants` that count latents of a token or sequence."""


def check_sizes(params: Params, d_in: int, d_sae: int) -> None:
    """Raises `UserError` where a control or a pursuit variant would need more latents than the baseline has, or more
    components than its activations have dimensions."""
    controls = params.controls
    if {"random", "data_rows"} & set(controls.names) and max(controls.s) > d_sae:
        raise UserError(f"controls.s = {max(controls.s)} is larger than the baseline's d_sae = {d_sae}")
    if "pca" in controls.names and max(controls.pca_components) > d_in:
        raise UserError(f"controls.pca_components = {max(controls.pca_components)} is larger than the activations' width "
                        f"{d_in}")
    for label, section in params.sae_variants:
        for key in SIZES:
            sizes: list[int] = getattr(section, key, []) if getattr(section, "enabled", False) else []
            if max(sizes, default=0) > d_sae:
                raise UserError(f"sae_variants.{label}.{key}: {max(sizes)} is larger than the baseline's d_sae = {d_sae}")
