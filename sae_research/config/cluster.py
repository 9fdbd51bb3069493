"""Section `cluster` of `params.yaml`: where units of work are computed, and in how many processes SAEs are trained. It is an
input of no stage: where something was computed changes no result."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sae_research.config.section import Name, Section, Whole

Share = Annotated[float, Field(ge=0, le=64)]


class Cluster(Section):
    """Workers for evaluations, and ranks that train (docs/cluster.md)."""

    address: Name | None = None
    """null: this process; local: all devices; auto: the running Ray cluster; or its HOST:PORT."""
    gpus_per_worker: Share | None = None
    """null: one where the cluster has GPUs, none elsewhere; 0.5: two workers on each."""
    cpus_per_worker: Annotated[Whole, Field(ge=1, le=1024)] = 1
    """Cores, and threads, of each worker, and of each rank that trains on a CPU."""
    max_retries: Annotated[Whole, Field(ge=0, le=100)] = 2
    """How often a unit is tried again, elsewhere, after its worker died or it failed."""
    train_ranks: Annotated[Whole, Field(ge=1, le=1024)] | None = None
    """Processes of this machine that train one stream together, each with a device of its own. null: one a GPU where an
    address is given, else 1."""
