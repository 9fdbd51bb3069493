"""One run from one file, sweeps over many devices, and what watches them."""
