"""Real sweeps of DVC experiments, in a clone of the pipeline with a tiny model: a minute or two."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from ruamel.yaml import YAML

from tests.helpers.experiments import ENV, run, verb
from tests.helpers.ray_cluster import loopback_cluster

pytestmark = pytest.mark.slow


def sweep_file(project: Path, name: str, text: str) -> str:
    """Outside the repository, whose untracked files DVC would look at."""
    path = project.parent / f"{name}.yaml"
    path.write_text(text)
    return str(path)


def test_points_are_run_once_and_failures_are_failures(pipeline: Path) -> None:
    """Two runs on two workers: one is finished, one runs out of text; the next call tries the failed one alone."""
    before = (pipeline / "params.yaml").read_bytes()
    config = sweep_file(pipeline, "grid", "train.saes.topk.k: [4, 8]\ntrain.tokens: [3000, 99000000]\n")
    call = ("sweep", "--sweep_config", config, "--devices", "cpu,cpu", "--output_dir", str(pipeline.parent / "copies"))
    done = verb(pipeline, *call)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "4 of 4 points, 6 SAEs in 2 runs; 0 SAEs are finished" in done.stdout
    assert "1 of 2 jobs failed" in done.stdout and "ends after" in done.stdout and "Traceback" not in done.stderr
    assert (pipeline / "params.yaml").read_bytes() == before
    assert run(pipeline, "git", "status", "--porcelain").stdout == ""
    rows = json.loads(run(pipeline, "dvc", "exp", "show", "--json").stdout)[-1]["experiments"]
    shown = {row["name"]: row["revs"][0]["data"] for row in rows if row["revs"][0].get("data")}
    ((name, data),) = (
        (name, data) for name, data in shown.items() if "data" in (data["metrics"] or {}).get("metrics/core.json", {})
    )
    metrics = data["metrics"]["metrics/core.json"]["data"]
    assert {"standard", "topk_k_4", "topk_k_8"} <= set(metrics) and metrics["topk_k_8"]["l0"] > 0
    assert data["metrics"]["metrics/sparse_probing.json"]["data"]["_status"]["status"] == "disabled"
    copies = pipeline.parent / "copies"
    assert (
        YAML(typ="safe").load(run(pipeline, "git", "show", f"{data['rev']}:params.yaml").stdout)["train"]["saes"]
        == YAML(typ="safe").load((copies / f"{name}.yaml").read_text())["train"]["saes"]
    )
    assert (copies / "results.csv").read_text().count(name) == 3
    assert json.loads((copies / "outcome.json").read_text())["done"] == [name]

    longer = sweep_file(pipeline, "longer", "train.saes.topk.k: [4, 8, 16]\ntrain.tokens: [3000]\n")
    planned = verb(pipeline, "sweep", "--sweep_config", longer, "--devices", "cpu", "--dry_run").stdout
    assert "4 SAEs in 1 runs; 3 SAEs are finished, 1 to train in 1 runs" in planned
    again = verb(
        pipeline,
        "sweep",
        "--sweep_config",
        sweep_file(pipeline, "again", "train.saes.topk.k: [4, 8]\ntrain.tokens: [3000]\n"),
        "--devices",
        "cpu",
    )
    assert again.returncode == 0 and "0 to train in 0 runs" in again.stdout and "topk_k_8" in again.stdout
    watched = verb(pipeline, "monitor").stdout
    assert f"done     {name}" in watched and "failed   grid-" in watched and "ends after" in watched
    (pipeline / "scripts" / "train_saes.py").write_text((pipeline / "scripts" / "train_saes.py").read_text() + "\n")
    changed = verb(pipeline, "sweep", "--sweep_config", longer, "--devices", "cpu", "--dry_run").stdout
    assert "0 SAEs are finished, 4 to train" in changed, "other code, other results"
    run(pipeline, "git", "checkout", "-q", ".")


def test_a_job_is_ended_alone_and_goes_on_later(pipeline: Path) -> None:
    """`monitor --kill JOB` ends one job of two; Ctrl-C ends the sweep and all of its processes, and no others."""
    config = sweep_file(
        pipeline,
        "long",
        "train.tokens: [60000, 61000]\ntrain.batch_size: 4\ntrain.saes.topk.d_sae: 4096\ntrain.checkpoint_steps: 200\n",
    )
    stranger = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    log = (pipeline.parent / "log").open("w")
    # a shell's background jobs, and all they start, ignore Ctrl-C
    sweep = subprocess.Popen(
        [sys.executable, "-m", "sae_research", "sweep", "--sweep_config", config, "--devices", "cpu,cpu"],
        cwd=pipeline,
        env=ENV,
        stdout=log,
        stderr=log,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        running: list[str] = []
        deadline = time.monotonic() + 300
        while len(running) < 2 and time.monotonic() < deadline:
            time.sleep(2)
            running = [
                line
                for line in verb(pipeline, "monitor").stdout.splitlines()
                if line.startswith("running  long-") and "step 0" not in line and "cpu  step" in line
            ]
        assert len(running) == 2, (pipeline.parent / "log").read_text()
        second = verb(pipeline, "sweep", "--sweep_config", config, "--devices", "cpu")
        assert second.returncode == 1 and "is at work already" in second.stderr
        victim, survivor = (line.split()[1] for line in running)
        assert verb(pipeline, "monitor", "--kill", victim).returncode == 0
        shown = ""
        while f"failed   {victim}" not in shown and time.monotonic() < deadline:
            shown = verb(pipeline, "monitor").stdout
        assert f"failed   {victim}" in shown and f"running  {survivor}" in shown and "checkpoint" in shown
        ours = psutil.Process(sweep.pid).children(recursive=True)
        sweep.send_signal(signal.SIGINT)
        assert sweep.wait(timeout=90) == 130
        _, left = psutil.wait_procs(ours, timeout=10)
        assert not [process for process in left if process.status() != psutil.STATUS_ZOMBIE]
        assert stranger.poll() is None
    finally:
        sweep.terminate()  # where an assertion failed: its workers would go on without it
        sweep.wait(timeout=90)
        stranger.kill()
        stranger.wait()
    resumed = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "sae_research",
            "sweep",
            "--sweep_config",
            config,
            "--devices",
            "cpu",
            "--sequential",
            "--limit",
            "1",
        ],
        cwd=pipeline,
        env=ENV,
        stdout=subprocess.PIPE,
        text=True,
    )
    said = ""
    for line in resumed.stdout or ():
        said += line
        if "going on from the checkpoint of step" in line:
            resumed.terminate()
    assert resumed.wait(timeout=90) == 143, said
    assert "going on from the checkpoint of step" in said


def test_jobs_on_a_ray_cluster(pipeline: Path) -> None:
    """Two nodes of one core: both take jobs, the experiments come back, and a killed driver leaves nothing at work."""
    params = pipeline / "params.yaml"
    before = params.read_text()
    grid = sweep_file(pipeline, "nodes", "train.saes.topk.k: [2, 3]\ntrain.tokens: [3100, 3200]\n")
    slow = sweep_file(pipeline, "endless", "train.tokens: [400000, 410000]\ntrain.batch_size: 4\n")
    with loopback_cluster(1, 1) as cluster:
        params.write_text(before.replace("address:", f"address: {cluster.address}"))
        try:
            done = verb(pipeline, "sweep", "--sweep_config", grid)
            assert done.returncode == 0 and f"on the Ray cluster {cluster.address}" in done.stdout, done.stderr
            names = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("done ")}
            assert len(names) == 2 and names <= set(run(pipeline, "dvc", "exp", "list", "--name-only").stdout.split())
            driver = subprocess.Popen(
                [sys.executable, "-m", "sae_research", "sweep", "--sweep_config", slow],
                cwd=pipeline,
                env=ENV,
                stdout=subprocess.DEVNULL,
            )
            shown, deadline = "", time.monotonic() + 120
            while shown.count("running  endless-") < 2 or "step" not in shown:
                assert time.monotonic() < deadline and driver.poll() is None, shown
                shown = verb(pipeline, "monitor").stdout
            driver.kill()
            driver.wait()
            while left := at_work_in(pipeline):
                assert time.monotonic() < deadline, left
                time.sleep(0.5)
        finally:
            params.write_text(before)


def at_work_in(project: Path) -> list[list[str]]:
    """Commands of the processes of jobs, and of all below them."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if Path(process.cwd()).is_relative_to(project / ".cache/jobs/clones"):
                found.append(process.cmdline())
    return found
