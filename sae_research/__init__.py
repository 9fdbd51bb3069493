"""An evaluation lab for sparse autoencoders that anyone can reproduce with `dvc repro`."""
