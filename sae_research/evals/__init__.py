"""SAE Bench's evaluations and one with a known truth, a folder each, over one shared pool of activations."""
