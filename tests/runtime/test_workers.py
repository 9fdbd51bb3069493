"""Workers in this process and on a real Ray cluster of two nodes: every end a unit can come to."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sae_research.config.cluster import Cluster
from sae_research.runtime import ray_workers, workers
from sae_research.runtime.errors import UserError
from sae_research.runtime.workers import InProcess, Job, Outcome, Unit, Waiting, Workers, start_workers
from tests.helpers.ray_cluster import loopback_cluster


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Any]:
    with loopback_cluster(1, 1) as cluster:
        yield cluster


@pytest.fixture
def job(in_project: Path) -> Job:
    return Job("tests.helpers.ray_work:Obedient", str(in_project / "journal").encode())


def unit(name: str, cost: float = 1.0, **asked: Any) -> Unit:
    return Unit(name, json.dumps({"name": name, **asked}).encode(), cost)


def started(job: Job) -> Counter[str]:
    return Counter(Path(job.argument.decode()).read_text().split())


def ended(found: Workers, units: list[Unit], shared: bytes = b"!") -> dict[str, Outcome]:
    return {outcome.unit.name: outcome for outcome in found.run(units, shared)}


def test_in_process_the_longest_comes_first_and_a_failure_takes_no_other_with_it(job: Job) -> None:
    units = [
        unit("short"),
        unit("bad", 5, fail="it is odd"),
        unit("refused", 4, user_error="not like this"),
        unit("long", 9),
    ]
    found = ended(InProcess(job), units)
    assert list(found) == ["long", "bad", "refused", "short"]
    assert (found["long"].value, found["short"].value) == (b"long!", b"short!")
    assert found["bad"].failure == "ValueError: it is odd" and found["refused"].failure == "not like this"


def test_units_go_to_workers_that_have_prepared_what_they_need() -> None:
    waiting = Waiting([Unit(f"{need}{part}", b"", 1.0, need) for need in "abc" for part in range(2)])
    assert [waiting.take(worker)[0].name for worker in (1, 2)] == ["a0", "b0"], "each its own"
    assert waiting.take(1)[0].name == "a1" and waiting.take(1)[0].name == "c0"
    waiting.put_back(Unit("c0", b"", 1.0, "c"), 2)
    waiting.forget(1)
    assert waiting.take(3) == (Unit("c0", b"", 1.0, "c"), 2) and len(waiting) == 2
    assert {waiting.take(2)[0].name, waiting.take(2)[0].name} == {"b1", "c1"} and not len(waiting)


def test_no_address_is_this_process(job: Job) -> None:
    assert isinstance(start_workers(Cluster(), job), InProcess)


@pytest.mark.slow
def test_every_end_of_a_unit_on_two_nodes(job: Job, ray_cluster: Any, in_project: Path) -> None:
    found = start_workers(Cluster(address=ray_cluster.address, max_retries=1), job)
    assert found.size == 2
    try:
        outcomes = ended(
            found,
            [
                *(unit(f"plain{number}") for number in range(4)),
                unit("bad", fail="it is odd"),
                unit("refused", user_error="not like this"),
                unit("lost_once", die_once=str(in_project / "died")),
                unit("lost", die=True),
            ],
        )
        assert {name for name, outcome in outcomes.items() if outcome.value == f"{name}!".encode()} == {
            "plain0",
            "plain1",
            "plain2",
            "plain3",
            "lost_once",
        }
        assert outcomes["refused"].failure == "not like this"
        reason, where, *log = outcomes["bad"].failure.splitlines()
        assert reason == "ValueError: it is odd" and ".cache/logs/" in where
        assert "    on the way to a failure" in log and "    ValueError: it is odd" in log
        assert outcomes["lost"].failure.startswith("its worker was lost (ActorDiedError)") or outcomes[
            "lost"
        ].failure.startswith("its worker was lost (ActorUnavailableError)")
        assert started(job) == {
            **{f"plain{number}": 1 for number in range(4)},
            "bad": 2,
            "refused": 1,
            "lost_once": 2,
            "lost": 2,
        }
        again = ended(found, [unit("afterwards")])
        assert again["afterwards"].value == b"afterwards!"
    finally:
        found.close()


@pytest.mark.slow
def test_a_node_that_goes_costs_the_units_it_had(job: Job, in_project: Path) -> None:
    with loopback_cluster(1, 1) as cluster:
        found = start_workers(Cluster(address=cluster.address), job)
        go = in_project / "go"
        units = [unit(f"u{number}", until=str(go)) for number in range(2)] + [unit(f"v{number}", 0.5) for number in range(4)]

        def remove() -> None:
            while not Path(job.argument.decode()).is_file() or len(started(job)) < 2:
                time.sleep(0.1)
            (second,) = [node for node in cluster.list_all_nodes() if node is not cluster.head_node]
            cluster.remove_node(second)
            go.touch()

        removal = threading.Thread(target=remove)
        removal.start()
        outcomes = ended(found, units)
        removal.join()
        found.close()
    assert all(outcome.value is not None for outcome in outcomes.values()) and len(outcomes) == 6
    assert sorted(started(job).values())[-1] == 2 and sum(started(job).values()) == 7, "one unit ran twice"


@pytest.mark.slow
def test_what_is_wrong_with_a_cluster_is_one_line(job: Job, ray_cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no node has the 64 cores"):
        start_workers(Cluster(address=ray_cluster.address, cpus_per_worker=64), job)
    real = workers.versions
    monkeypatch.setattr(ray_workers, "versions", lambda job: {**real(job), "torch": "1.0"})
    with pytest.raises(UserError, match=r"has torch 2\S+, this process 1\.0"):
        start_workers(Cluster(address=ray_cluster.address), job)


@pytest.mark.slow
def test_no_cluster_at_an_address_is_one_line(job: Job) -> None:
    with pytest.raises(UserError, match="no Ray cluster answers there"):
        start_workers(Cluster(address="127.0.0.1:1"), job)
