"""Slots, leases and processes: no job meets another on a GPU, and nothing but our own is ever ended."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from sae_research.experiments import monitor
from sae_research.experiments.devices import Found, Lease, Slot, holder, parse_devices
from sae_research.lm.load import pick_device
from sae_research.runtime import processes
from sae_research.runtime.errors import UserError
from sae_research.runtime.given_device import DEVICE_VARIABLE

GPUS = [Found("cuda:0", ""), Found("cuda:1", ""), Found("cpu", "")]
SLEEP = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_names_become_slots(in_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [slot.name for slot in parse_devices("cuda:1, cpu,cpu", GPUS)] == ["cuda_1", "cpu", "cpu_2"]
    assert parse_devices("cuda", GPUS) == [Slot("cuda:0", 0)]
    assert parse_devices("auto", GPUS) == [Slot("cuda:0", 0), Slot("cuda:1", 0)]
    assert parse_devices("auto", [Found("mps", ""), Found("cpu", "")]) == [Slot("mps", 0)]
    assert parse_devices("auto", GPUS[2:]) == [Slot("cpu", 0)]
    for text, line in (
        ("cuda:7", "cuda:7 is not there; found cuda:0, cuda:1, cpu"),
        ("gpu", "'gpu' is no device"),
        (",", "names no device"),
    ):
        with pytest.raises(UserError, match=line):
            parse_devices(text, GPUS)
    assert Slot("cuda:1", 0).environment(0) == {"CUDA_VISIBLE_DEVICES": "1", DEVICE_VARIABLE: "cuda"}
    assert Slot("cpu", 0).environment(1) == {"CUDA_VISIBLE_DEVICES": "", DEVICE_VARIABLE: "cpu"}
    assert "OMP_NUM_THREADS" in Slot("cpu", 1).environment(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert Slot("cuda:1", 0).environment(0)["CUDA_VISIBLE_DEVICES"] == "6"


def test_a_worker_s_environment_says_what_auto_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DEVICE_VARIABLE, "cpu")
    assert pick_device("auto").type == "cpu"


def test_a_lease_keeps_others_off_until_every_holder_has_ended(in_project: Path) -> None:
    slot = Slot("cuda:0", 0)
    lease = Lease(slot, "sweep a")
    with pytest.raises(UserError, match="cuda:0 is busy with sweep a"):
        Lease(slot, "sweep b")
    assert holder(slot) == "sweep a"
    assert parse_devices("auto", GPUS) == [Slot("cuda:1", 0)]
    Lease(Slot("cuda:0", 1), "a second worker on the same GPU, asked for by name").close()
    worker = subprocess.Popen(SLEEP, pass_fds=[lease.descriptor])
    lease.close()
    assert holder(slot) == "sweep a", "a worker that outlives the sweep still holds it"
    worker.kill()
    worker.wait()
    assert holder(slot) is None
    Lease(Slot("cpu", 0), "a").close()


def test_a_number_used_again_is_another_process(in_project: Path) -> None:
    ours = subprocess.Popen(SLEEP)
    record = processes.record("run", "ours", ours.pid, device="cpu", progress="none", saes=[], log=None)
    assert record.process is not None
    assert processes.find(ours.pid, record.started + 5) is None
    ours.kill()
    ours.wait()
    assert record.process is None


def test_only_what_is_on_record_is_ended(in_project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ours, others = subprocess.Popen(SLEEP), subprocess.Popen(SLEEP)
    for name, process, later in (("ours", ours, 0), ("recycled", others, 9)):
        made = processes.record("run", name, process.pid, device="cpu", progress="none", saes=[], log=None)
        made.update(started=made.started + later)  # as though the number had belonged to a process of ours before
    assert monitor.show(watch=False) == 0
    shown = capsys.readouterr().out
    assert "running  ours  cpu" in shown and "ended    recycled" in shown
    with pytest.raises(UserError, match="no job 'recycled' of this project is running"):
        monitor.kill("recycled")
    assert monitor.kill("all") == 0
    ours.wait(timeout=10)
    assert others.poll() is None
    others.kill()
    others.wait()
    with pytest.raises(UserError, match="nothing of this project is running"):
        monitor.kill("ours")


def test_a_process_of_another_machine_is_never_ours(in_project: Path) -> None:
    ours = subprocess.Popen(SLEEP)
    record = processes.record("job", "elsewhere", ours.pid, device="cpu", log="none")
    assert record.process is not None
    record.update(host="another")
    assert processes.records("job")[0].process is None
    ours.kill()
    ours.wait()


def test_a_session_keeps_those_whose_parent_died(tmp_path: Path) -> None:
    child = f"import subprocess; subprocess.run({SLEEP})"
    leader = subprocess.Popen([sys.executable, "-c", child], start_new_session=True)
    while len(found := processes.in_session(leader.pid)) < 2:
        time.sleep(0.01)
    leader.kill()
    leader.wait()
    (left,) = processes.in_session(leader.pid)
    assert left in found
    processes.stop_all_but_callers([left])
    assert not left.is_running()


def test_a_log_is_followed_to_its_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    writer = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\nfor i in range(4):\n print(i, flush=True)\n"
            " time.sleep(0.1)\nprint('1%\\r50%\\r100%\\r', end='')",
        ],
        stdout=log.open("w"),
    )
    start = time.monotonic()
    text = "".join(processes.follow(log, lambda: writer.poll() is None, seconds=0.05))
    assert text.split("\n")[:4] == ["0", "1", "2", "3"] and time.monotonic() - start < 30
    assert processes.last_line(log) == "100%"
    assert processes.last_line(tmp_path / "none") == ""
