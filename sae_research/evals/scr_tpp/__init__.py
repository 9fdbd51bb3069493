"""Spurious correlation removal (SCR) and targeted probe perturbation (TPP): what ablating an SAE's latents does to
linear probes.

A warning from the literature: arXiv 2605.18229 finds both unreliable at their usual settings (TPP falls as an SAE
trains longer, SCR can run against the quality it should measure), so neither belongs in a headline.
"""

from sae_research.evals.scr_tpp.evaluation import evaluate_scr, evaluate_tpp

__all__ = ["evaluate_scr", "evaluate_tpp"]
