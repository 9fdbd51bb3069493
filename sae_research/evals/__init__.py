"""SAE Bench's evaluations, one file each, over one shared pool of activations."""
