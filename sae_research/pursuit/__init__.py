"""Pursuit over a dictionary of unit atoms: what the encoders in `sae_research.instance_sae` compute with.

`dictionary` holds atoms and Gram rows within memory limits; `matching` takes atoms one by one, `orthogonal` with a
refit after each, `least_squares` fits supports chosen beforehand. Each has a plain torch path, which defines what is
computed; `kernels_numba` and `kernels_triton` compute the same faster.
"""

from __future__ import annotations

from types import ModuleType


def source_modules() -> list[ModuleType]:
    """The modules whose code decides what an encoder returns: results computed by other code are other results."""
    from sae_research.pursuit import dictionary, kernels_numba, least_squares, matching, orthogonal, thresholding

    modules = [dictionary, kernels_numba, least_squares, matching, orthogonal, thresholding]
    if matching.triton_there():
        from sae_research.pursuit import kernels_triton

        modules.append(kernels_triton)
    return modules
