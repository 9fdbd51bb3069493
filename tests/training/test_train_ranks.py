"""Two ranks that train one stream: real processes, real gloo, against one process."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from sae_research.config.params import Params
from sae_research.runtime.errors import Interrupted, UserError
from sae_research.text import tokens
from sae_research.training import group, loop, rank_process, ranks, stage, stream
from sae_research.training.checkpoints import progress_path, run_folder, saved_checkpoints
from sae_research.training.recipes.l1 import Standard
from tests.helpers.training import CONFIGS, STANDARD, TOP_K

TWO_HOOKS = {
    "standard": {**STANDARD, "resample_every": 0.1, "resample_window": 0.05},
    "topk": TOP_K,
    "other": {**TOP_K, "d_sae": 96, "hook_name": "blocks.2.hook_mlp_out"},
}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def progress(params: Params) -> dict[str, Any]:
    return json.loads(progress_path(params).read_text())


def changed(params: Params, section: str, **values: Any) -> Params:
    return params.model_copy(update={section: getattr(params, section).model_copy(update=values)})


def with_ranks(params: Params, n: int | None) -> Params:
    return changed(params, "cluster", train_ranks=n)


class Forked:
    """A rank that starts in a moment, with what this process has imported. Stands in for `subprocess.Popen`."""

    def __init__(self, task: bytes, threads: int, log: Path) -> None:
        reading, writing = os.pipe()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            os.close(writing)
            output = os.open(log, os.O_WRONLY | os.O_CREAT)
            for old, new in ((reading, 0), (output, 1), (output, 2)):
                os.dup2(old, new)
            sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
            os._exit(rank_process.main())
        os.close(reading)
        os.set_inheritable(writing, False)
        self.stdin = os.fdopen(writing, "wb")
        self.stdin.write(task + b"\n")
        self.stdin.flush()

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.returncode

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)


def ended_well(rank: Forked) -> bool:
    """By itself, or because rank 0 was done before it."""
    return rank.returncode in (0, group.LOST)


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> list[Forked]:
    """Ranks start as forks of this process, which spares each the imports; the list holds those started."""
    started: list[Forked] = []

    def start(module: str, task: bytes, log: Path, environment: dict[str, str]) -> Forked:
        started.append(Forked(task, int(environment["OMP_NUM_THREADS"]), log))
        return started[-1]

    monkeypatch.setattr(group, "start_child", start)
    return started


def at_call(number: int, act: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 0 does something in the middle of one of its steps."""
    original, calls, rank_0 = loop.train_step, [], os.getpid()

    def train_step(member, batch):
        calls.append(member)
        if len(calls) == number and os.getpid() == rank_0:
            act()
        return original(member, batch)

    monkeypatch.setattr(loop, "train_step", train_step)


def test_two_ranks_train_what_one_process_trains(make_params, tmp_path, forked, monkeypatch):
    params = make_params(saes=TWO_HOOKS, tokens=1024, buffer_tokens=512, saved_checkpoints=3, checkpoint_steps=7)
    params = changed(params, "activation_caching", enabled=False)
    stage.train(params, tmp_path / "alone")
    read, collect = [], stream.ActivationStream._collect
    monkeypatch.setattr(stream.ActivationStream, "_collect", lambda self, chunk: read.append(chunk) or collect(self, chunk))
    stage.train(with_ranks(params, 2), tmp_path / "together")
    assert files(tmp_path / "together") == files(tmp_path / "alone")
    assert read == [0, 2] and len(forked) == 1 and ended_well(forked[0])
    assert progress(params)["state"] == "finished" and not saved_checkpoints(run_folder(params))
    assert not torch.distributed.is_initialized()


def test_each_rank_has_as_many_latents(make_params):
    params = make_params(
        saes={name: {**TOP_K, "d_sae": width} for name, width in zip("abcde", (64, 64, 128, 32, 96), strict=True)}
    )
    assert ranks.owners(params, 2) == {"c": 0, "e": 1, "a": 1, "b": 0, "d": 1}
    assert ranks.owners(params, 1) == dict.fromkeys("abcde", 0)


@pytest.mark.parametrize(
    ("device", "train_device", "asked", "address", "found"),
    [
        ("cpu", None, None, "local", 1),
        ("cpu", None, 3, None, 3),
        ("cuda", None, None, None, 1),
        ("cuda", None, None, "local", 4),
        ("auto", None, None, "auto", 4),
        ("cuda:1", None, None, "local", 1),
        ("cuda", "cpu", None, "local", 1),
        ("cuda", None, 4, None, 4),
        ("cuda", None, 5, None, "5 ranks need as many GPUs, this machine has 4"),
        ("cuda:0", None, 2, None, "2 ranks have a device each"),
        ("cuda", "cuda:1", 2, None, "train.device: null"),
    ],
)
def test_how_many_ranks(device, train_device, asked, address, found, make_params, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    params = changed(make_params(device=train_device), "model", device=device)
    params = changed(params, "cluster", train_ranks=asked, address=address)
    assert device == "cpu" or asked or ranks.number_of_ranks(changed(params, "model", placement="auto")) == 1
    monkeypatch.setenv("SAE_RESEARCH_DEVICE", "cuda:2")  # as in a sweep, whose runs have one each
    assert device != "auto" or ranks.number_of_ranks(params) == 1
    monkeypatch.delenv("SAE_RESEARCH_DEVICE")
    if isinstance(found, int):
        assert ranks.number_of_ranks(params) == found
    else:
        with pytest.raises(UserError, match=found):
            ranks.number_of_ranks(params)


@pytest.mark.slow
def test_what_another_rank_meets_is_said_as_in_one_process(make_params, tmp_path, forked, monkeypatch):
    params = with_ranks(make_params(saes={"topk": TOP_K, "standard": STANDARD}, tokens=4096, checkpoint_steps=10), 2)
    assert ranks.owners(params, 2)["standard"] == 1
    original = Standard.compute

    def diverge(self, x, progress):
        out = original(self, x, progress)
        return out._replace(loss=out.loss * float("nan")) if self.last_fired_F.max() > 0.55 else out

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"^train\.saes\.standard: the loss at step \d+ is"):
        patch.setattr(Standard, "compute", diverge)
        stage.train(params, tmp_path / "out")
    [(step, _)] = saved_checkpoints(run_folder(params))
    assert 20 <= step < 50 and progress(params)["state"] == "failed"

    def broken(self, x, progress):
        raise ValueError("a defect")

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"^rank 1 of 2 failed \(ValueError: a defect; its") as met,
    ):
        patch.setattr(Standard, "compute", broken)
        stage.train(params, tmp_path / "out")
    assert f"the checkpoint of step {step} is kept" in str(met.value)
    log = re.search(r"its output: (\S+)\)", str(met.value))
    assert log and "in broken" in Path(log[1]).read_text()

    def large(self, x, progress):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")

    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match=r"memory \(rank 1 of 2: CUDA out of memory\); raise"),
    ):
        patch.setattr(Standard, "compute", large)
        stage.train(params, tmp_path / "out")

    def lacking(model, dtype):
        raise UserError("no such model")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="^no such model$"):
        patch.setattr(rank_process, "load_configured", lacking)
        stage.train(params, tmp_path / "out")
    assert all(rank.returncode is not None for rank in forked)


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_the_next_start_goes_on(make_params, tmp_path, forked, monkeypatch, capsys):
    params = make_params(saes=TWO_HOOKS, tokens=4096, checkpoint_steps=5)
    stage.train(params, tmp_path / "alone")
    with monkeypatch.context() as patch, pytest.raises(UserError) as met:
        at_call(60, lambda: forked[0].kill(), patch)
        stage.train(with_ranks(params, 2), tmp_path / "out")
    kept = saved_checkpoints(run_folder(params))[0][0]
    assert str(met.value).startswith("rank 1 of 2 was ended by SIGKILL") and "\n" not in str(met.value)
    assert f"the checkpoint of step {kept} is kept; start the same run again to go on from there" in str(met.value)
    assert progress(params)["state"] == "failed" and not (tmp_path / "out").exists() and kept >= 25
    stage.train(with_ranks(params, 2), tmp_path / "out")
    assert f"going on from the checkpoint of step {kept}" in capsys.readouterr().out
    assert files(tmp_path / "out") == files(tmp_path / "alone")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_goes_on_with_other_numbers_of_ranks(number, make_params, tmp_path, forked, monkeypatch, capsys):
    saes = {"topk": TOP_K, "standard": {**STANDARD, "resample_every": 0.1}, "gates": CONFIGS["hard_concrete"]}
    params = make_params(saes=saes, tokens=4096, saved_checkpoints=4)
    monkeypatch.setattr(tokens, "IN_MEMORY_TOKENS", 1000)  # from a file
    stage.train(params, tmp_path / "alone")
    steps = []
    for n in (2, 5, 1):
        with monkeypatch.context() as patch, pytest.raises(Interrupted, match="go on from there") as stop:
            at_call(20, lambda: os.kill(os.getpid(), number), patch)
            stage.train(with_ranks(params, n), tmp_path / "out")
        assert stop.value.code == 128 + number and progress(params)["state"] == "interrupted"
        steps.append(saved_checkpoints(run_folder(params))[0][0])
        assert progress(params)["step"] == steps[-1]
    assert steps == sorted(set(steps)) and all(map(ended_well, forked)) and len(forked) == 5
    stage.train(with_ranks(params, 2), tmp_path / "out")
    assert capsys.readouterr().out.count("going on from the checkpoint of step") == 3
    assert files(tmp_path / "out") == files(tmp_path / "alone")


@pytest.mark.slow
def test_ranks_with_every_recipe_as_processes_of_their_own(make_params, tmp_path):
    """Started as a user starts them."""
    cross = {**CONFIGS["batch_top_k"], "hook_names": ["blocks.0.hook_resid_post", "blocks.1.hook_resid_post"]}
    params = make_params(saes={**CONFIGS, "other": TWO_HOOKS["other"], "cross": cross}, tokens=1536)
    stage.train(params, tmp_path / "alone")
    stage.train(with_ranks(params, 2), tmp_path / "together")
    assert files(tmp_path / "together") == files(tmp_path / "alone")


@pytest.mark.slow
def test_no_rank_outlives_rank_0(make_params, tmp_path):
    params = with_ranks(make_params(saes=TWO_HOOKS, tokens=12_288, batch_size=16), 3)

    def work() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        stage.train(params, tmp_path / "out")

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    others: list[psutil.Process] = []
    try:
        until = time.monotonic() + 120
        while not (progress_path(params).is_file() and progress(params)["step"] > 3):
            assert time.monotonic() < until and process.is_alive()
            time.sleep(0.1)
        others = psutil.Process(process.pid).children()
    finally:
        process.kill()
        process.join()
    assert len(others) == 2 and not psutil.wait_procs(others, timeout=20)[1]
