"""Evaluations on the workers of a Ray cluster of two nodes, against one process: equal bytes, and what a loss costs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from sae_research.config.cluster import Cluster
from sae_research.config.params import Params
from sae_research.evals import harness, run, units
from sae_research.evals.absorption import evaluation as absorption_module
from sae_research.evals.run import run_evaluation
from sae_research.evals.units import EvaluationWorker, evaluation_job
from sae_research.lm import load_configured
from sae_research.planning.costs import UnitShares
from sae_research.runtime.cache import cache_dir
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import write_json
from sae_research.runtime.ray_workers import RayWorkers
from sae_research.runtime.workers import InProcess, Job, Outcome, Unit
from sae_research.saes import SparseAutoencoder, load_sae, save_sae, save_variant
from sae_research.saes.sources import PREPARED
from tests.helpers.evals_saes import HOOK, config, small_sections, standard
from tests.helpers.ray_cluster import loopback_cluster

ROOT = Path(__file__).parents[2]
SMALL_CORE = {"batch_size_prompts": 3, "n_eval_sparsity_variance_batches": 3}
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


def written(evaluation: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((Path("eval_results") / evaluation).iterdir())}


def on_cluster(params: Params, cluster: Any, **settings: Any) -> Params:
    return params.model_copy(update={"cluster": params.cluster.model_copy(update={"address": cluster.address, **settings})})


def forget() -> None:
    """Empty the result cache."""
    shutil.rmtree(cache_dir("results"))


SLOW = ("tpp", "absorption", "sparse_probing_sae_probes", "meta_sae")


@pytest.mark.parametrize(
    "evaluation", ["core", "sparse_probing", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_units_give_the_bytes_of_the_whole(
    evaluation: str, prepared: None, make_params: Any, tasks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One worker in this process, which is told to share units out among three."""
    monkeypatch.setattr(absorption_module, "MIN_TRAIN_WORDS", 4)
    monkeypatch.setattr(absorption_module, "MIN_TEST_WORDS", 1)
    params = make_params(eval_types={evaluation: True}, **small_sections(tasks))
    run_evaluation(evaluation, params)
    alone = written(evaluation)
    forget()
    asked: list[Unit] = []

    class Three(InProcess):
        size = 3

        def run(self, units: Sequence[Unit], shared: bytes = b"") -> Iterator[Outcome]:
            asked.extend(units)
            return super().run(units, shared)

    monkeypatch.setattr(run, "_started_workers", lambda name, params: nullcontext(Three(evaluation_job(name, params))))
    run_evaluation(evaluation, params)
    assert written(evaluation) == alone
    assert evaluation == "meta_sae" or len(asked) >= 3


@pytest.mark.slow
@pytest.mark.parametrize("evaluation", ["core", "sparse_probing"])
def test_two_nodes_write_the_bytes_of_one_process(
    evaluation: str, prepared: None, cluster: Any, make_params: Any, tasks: str
) -> None:
    params = make_params(eval_types={evaluation: True}, **small_sections(tasks))
    run_evaluation(evaluation, params)
    alone = written(evaluation)
    forget()
    run_evaluation(evaluation, on_cluster(params, cluster))
    assert written(evaluation) == alone


def test_a_unit_that_fails_everywhere_costs_its_saes_alone(
    prepared: None, make_params: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = make_params()

    class Failing(InProcess):
        size = 2

        def run(self, units: Sequence[Unit], shared: bytes = b"") -> Iterator[Outcome]:
            bad = [unit for unit in units if b'"c"' in unit.payload]
            yield from (Outcome(unit, None, "its worker was lost\nlog") for unit in bad)
            yield from super().run([unit for unit in units if unit not in bad], shared)

    monkeypatch.setattr(run, "_started_workers", lambda name, params: nullcontext(Failing(evaluation_job(name, params))))
    run_evaluation("core", params)
    status = json.loads(written("core")["_status.json"])
    assert status["skipped"]["c"] == "its worker was lost" and status["status"] == "ok"
    assert {name for name in NAMES if f"{name}_eval_results.json" in written("core")} == set(NAMES) - set(status["skipped"])


def test_an_sae_too_large_for_a_worker_is_refused_and_the_rest_is_scored(
    prepared: None, make_params: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = make_params()

    class Small(InProcess):
        def __init__(self, job: Job) -> None:
            super().__init__(job)
            self.memory = 40_000  # more than pursuit's dictionary takes, less than encoder and decoder

    monkeypatch.setattr(run, "_started_workers", lambda name, params: nullcontext(Small(evaluation_job(name, params))))
    run_evaluation("core", params)
    skipped = json.loads(written("core")["_status.json"])["skipped"]
    assert set(skipped) == set("abcd") and "a worker has" in skipped["a"]


def test_a_worker_with_other_files_says_so(prepared: None, make_params: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_params()
    worker = EvaluationWorker(evaluation_job("core", params).argument)
    payload = {"kind": "core_sparsity", "hooks": [HOOK, HOOK], "saes": ["a"], "part": 0, "keys": {"a": "other"}, "known": {}}
    with pytest.raises(UserError, match="SAE a, the model, the text or the code are not the driver's"):
        worker(json.dumps({**payload, "device": "cpu"}).encode(), b"{}")
    with pytest.raises(UserError, match="computes on cpu, the driver on cuda"):
        worker(json.dumps({**payload, "device": "cuda"}).encode(), b"{}")


@pytest.mark.parametrize(
    "parts, families, workers, shares, room, expected",
    [
        (1, 16, 2, (0, 0), 99, 16),  # a group costs nothing
        (2, 16, 2, (2, 0), 99, 1),  # a group repeats a pass
        (1, 16, 2, (2, 0), 99, 2),
        (1, 3, 8, (0, 0), 99, 3),
        (8, 16, 1, (0, 0), 99, 1),  # nobody to share with
        (8, 16, 1, (0.1, 1), 4, 4),  # as many as a worker keeps open
        (8, 16, 1, (9, 1), 4, 1),  # opened again at every part, which is cheaper than a pass for each group
    ],
)
def test_saes_are_split_no_further_than_sharing_needs(
    parts: int, families: int, workers: int, shares: tuple[float, float], room: int, expected: int
) -> None:
    assert units._groups(parts, families, workers, UnitShares(*shares), room) == expected


def test_a_worker_opens_the_saes_of_its_units_once(
    prepared: None, make_params: Any, in_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def load(folder: Path, device: str) -> SparseAutoencoder:
        opened.append(folder.name)
        return load_sae(folder, device)

    monkeypatch.setattr(harness, "load_sae", load)
    lm = load_configured(make_params().model)
    first = units._Kept(lm, ["a", "b"], None)
    weights = first["a"].W_dec
    second = units._Kept(lm, ["b", "a"], first)
    assert second["a"].W_dec is weights and opened == ["a", "b"] and second.infos.keys() == {"a", "b"}
    third = units._Kept(lm, ["b"], second)
    assert third["b"] is second["b"] and list(third._open) == ["b"], "what no unit asks for is closed"
    fourth = units._Kept(lm, ["a"], third)
    assert fourth["a"].W_dec is not weights and opened == ["a", "b", "a"]
    monkeypatch.setattr(units, "OPEN_BYTES", 1)
    narrow = units._Kept(lm, ["a"], None)
    assert narrow["a"] is not narrow["a"], "nothing is kept that does not fit"
    monkeypatch.setattr(units, "OPEN_BYTES", first.infos["a"].nbytes)
    several = units._Kept(lm, ["a", "b"], None)
    assert several["a"] is not several["a"], "nor one of those that do not fit together"


@pytest.mark.slow
def test_a_driver_that_was_killed_goes_on_where_it_was(
    prepared: None, cluster: Any, make_params: Any, in_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second driver asks for exactly what the first had not kept."""
    params = on_cluster(make_params(core_eval={**SMALL_CORE, "n_eval_reconstruction_batches": 8}), cluster)
    run_evaluation("core", params.model_copy(update={"cluster": Cluster()}))
    alone = written("core")
    forget()
    write_json(in_project / "given.json", params.model_dump(mode="json"))
    code = (
        "import json; from sae_research.config.params import Params; from sae_research.evals.run import run_evaluation; "
        "run_evaluation('core', Params.model_validate(json.load(open('given.json'))))"
    )
    kept = cache_dir("results") / "core_predictions"
    with subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)}) as driver:
        while not kept.is_dir() or len(list(kept.glob("*.json"))) < 2 * len(NAMES):
            assert driver.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        driver.kill()
    done = {path.stem for path in kept.glob("*.json")}
    assert 0 < len(done) < 8 * len(NAMES)
    asked: list[str] = []
    real = RayWorkers.run

    def recorded(self: RayWorkers, units: Sequence[Unit], shared: bytes = b"") -> Iterator[Outcome]:
        asked.extend(key for unit in units for key in json.loads(unit.payload)["keys"].values())
        return real(self, units, shared)

    monkeypatch.setattr(RayWorkers, "run", recorded)
    run_evaluation("core", params)
    assert written("core") == alone
    assert len(asked) == 8 * len(NAMES) - len(done) and not done & set(asked)
