"""Feature absorption on first letters (arXiv 2409.14507): does the latent that stands for "starts with S" stay silent on
some words with S because other latents have taken the letter over?

`words` makes the prompts, runs the model once and encodes every word; `letters` finds the letters' directions, the latents
that stand for them, and what other latents have absorbed; `evaluation` puts it together.
"""

from sae_research.evals.absorption.evaluation import evaluate

__all__ = ["evaluate"]
