"""Pursuit over a dictionary of unit atoms: what the encoders in `sae_research.instance_sae` compute with.

`dictionary` holds atoms and Gram rows within memory limits; `matching` takes atoms one by one, `orthogonal` with a
refit after each; `thresholding` takes the largest correlations; and
`least_squares` fits supports chosen beforehand. Each has a plain torch path, which defines what is computed;
`kernels_numba` and `kernels_triton` compute the same faster, and are imported when first needed.
"""
