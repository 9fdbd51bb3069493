"""Inside an SAE: latent statistics, runs with SAEs in place, steering, ablation, attribution, descriptors."""
