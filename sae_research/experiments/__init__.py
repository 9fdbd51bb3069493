"""One run from one file, sweeps over many devices on DVC's queue, and what watches them."""
