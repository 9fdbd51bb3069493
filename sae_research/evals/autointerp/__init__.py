"""Automatic interpretation: explanations of latents, written and scored by a language model."""

from sae_research.evals.autointerp.evaluation import evaluate, find_windows

__all__ = ["evaluate", "find_windows"]
