"""Evaluations on the workers of a Ray cluster of two nodes, against one process: equal bytes, and what a loss costs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sae_research.config.params import Params
from sae_research.evals.run import run_evaluation
from sae_research.runtime.cache import cache_dir
from sae_research.runtime.files import write_json
from sae_research.saes import save_sae, save_variant
from sae_research.saes.sources import PREPARED
from tests.helpers.evals_saes import config, standard
from tests.helpers.ray_cluster import loopback_cluster

FAMILIES = {"a": ("ihtp_k1", "ihtp_k4"), "b": ("mpsae_s3", "mpsae_s6")}
NAMES = ["a", "b", "c", "d", *FAMILIES["a"], *FAMILIES["b"]]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with loopback_cluster(1, 1) as cluster:
        yield cluster


@pytest.fixture
def prepared(in_project: Path) -> None:
    """SAEs as the setup stage leaves them."""
    for seed, name in enumerate("abcd"):
        save_sae(standard(seed), in_project / PREPARED / name)
    for base, names in FAMILIES.items():
        for name in names:
            form, size = ("ihtp", "k") if name.startswith("ihtp") else ("matching_pursuit", "s")
            options = {size: int(name[-1])}
            save_variant(config(form, **options), options, in_project / PREPARED / name, in_project / PREPARED / base)
    write_json(in_project / PREPARED / "manifest.json", {"order": NAMES})


@pytest.fixture
def tasks(tmp_path: Path) -> str:
    rows = [f"{label} text of words number {i},{label}" for label in ("cat", "dog", "cow") for i in range(120)]
    (tmp_path / "mine.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return str(tmp_path / "mine.csv")


def written(evaluation: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((Path("eval_results") / evaluation).iterdir())}


def on_cluster(params: Params, cluster: Any, **settings: Any) -> Params:
    return params.model_copy(update={"cluster": params.cluster.model_copy(update={"address": cluster.address, **settings})})


def forget() -> None:
    """Empty the result cache."""
    import shutil

    shutil.rmtree(cache_dir("results"))


SECTIONS: dict[str, dict[str, Any]] = {
    "core": {},
    "sparse_probing": {
        "context_length": 12,
        "probe_train_set_size": 16,
        "probe_test_set_size": 8,
        "k_values": [1],
        "train_draws": 2,
    },
    "scr": {"context_length": 12, "train_set_size": 16, "test_set_size": 8, "n_values": [2], "probe_epochs": 2},
}


@pytest.mark.parametrize("evaluation", ["core", "sparse_probing"])
def test_two_nodes_write_the_bytes_of_one_process(
    evaluation: str, prepared: None, cluster: Any, make_params: Any, tasks: str
) -> None:
    section = {"sparse_probing": {**SECTIONS["sparse_probing"], "dataset_names": [tasks]}}
    params = make_params(**section)
    run_evaluation(evaluation, params)
    alone = written(evaluation)
    forget()
    run_evaluation(evaluation, on_cluster(params, cluster))
    assert written(evaluation) == alone
