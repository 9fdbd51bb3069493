"""Ground truth: SAEs on synthetic activations whose true features are known, and which metric follows the truth."""
