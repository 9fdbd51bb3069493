"""What `params.yaml` may say: one class a section, with the only defaults. Imports no torch."""

from sae_research.config.params import Params, load_params

__all__ = ["Params", "load_params"]
