"""Section `cluster` of `params.yaml`: where units of work are computed. It is an input of no stage: where something was
computed changes no result."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sae_research.config.section import Name, Section, Whole

Share = Annotated[float, Field(ge=0, le=64)]


class Cluster(Section):
    """Workers for evaluations (docs/cluster.md)."""

    address: Name | None = None
    """null: this process; local: all devices; auto: the running Ray cluster; or its HOST:PORT."""
    gpus_per_worker: Share | None = None
    """null: one where the cluster has GPUs, none elsewhere; 0.5: two workers on each."""
    cpus_per_worker: Annotated[Whole, Field(ge=1, le=1024)] = 1
    """Cores, and threads, of each worker."""
    max_retries: Annotated[Whole, Field(ge=0, le=100)] = 2
    """How often a unit is tried again, elsewhere, after its worker died or it failed."""
