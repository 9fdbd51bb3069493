"""The setup stage: every SAE of the comparison in one folder, checked against the model before hours are
spent."""

from sae_research.setup.stage import run_setup

__all__ = ["run_setup"]
