"""Feature absorption on first letters: does the latent that stands for "starts with S" stay silent on some S-words
because other latents have taken the letter over (arXiv 2409.14507)?

`words` makes the prompts, `word_activations` runs the model once and encodes once per word and SAE, `letter_probes`
finds the letters' directions, `main_latents` the latents that stand for them, `absorbed` what others carry, `evaluate`
puts it together.
"""

from sae_research.evals.absorption.evaluation import evaluate

__all__ = ["evaluate"]
