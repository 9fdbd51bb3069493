"""A real Ray cluster on the loopback address: a head and further nodes, each a set of processes of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def loopback_cluster(*cpus: int) -> Iterator[Any]:
    """`ray.cluster_utils.Cluster` with one node for each number of logical cores, the head first."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    import ray
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus[0], **small})
    try:
        for more in cpus[1:]:
            cluster.add_node(num_cpus=more, object_store_memory=100 * 2**20)
        yield cluster
    finally:
        if ray.is_initialized():
            ray.shutdown()
        cluster.shutdown()
