"""Pursuit over a dictionary of unit atoms: the encoders of `encoders` and what they compute with.

`dictionary` holds atoms and Gram rows within memory limits; `matching` takes atoms one by one, `orthogonal` with a
refit after each; `thresholding` takes the largest correlations and fits supports by least squares. Each has a plain
torch path, which defines what is computed; `kernels_numba` and `kernels_triton` compute the same faster, and are
imported when first needed.
"""
