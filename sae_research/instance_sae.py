"""The pursuit encoders under the path that configurations and notebooks use."""

from sae_research.saes.pursuit.encoders import (
    IHTPSAE,
    MPSAE,
    OMPSAE,
    NonNegativeMPSAE,
    NonNegativeOMPSAE,
    PursuitSAE,
    TopKRefitSAE,
)

__all__ = ["IHTPSAE", "MPSAE", "OMPSAE", "NonNegativeMPSAE", "NonNegativeOMPSAE", "PursuitSAE", "TopKRefitSAE"]
