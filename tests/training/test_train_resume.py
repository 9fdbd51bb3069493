"""Runs that are killed, interrupted, starved of disk or led astray, and what is left of them."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sae_research.runtime.cache import held
from sae_research.runtime.errors import Interrupted, UserError, run_main
from sae_research.saes import load_sae
from sae_research.text import tokens
from sae_research.training import checkpoints, loop, stage
from sae_research.training.checkpoints import PROGRESS_FILE, progress_path, run_folder
from sae_research.training.recipes.l1 import Standard
from tests.helpers.training import CONFIGS, HOOK, STANDARD, TOP_K

MANY = {
    **{name: dict(config) for name, config in CONFIGS.items()},
    "standard": {**CONFIGS["standard"], "resample_every": 0.1, "resample_window": 0.05},
    "other": {**TOP_K, "hook_name": "blocks.2.hook_mlp_out"},
}
"""Every recipe, with its randomness and its counters at work, at two hooks."""
STATEFUL = {
    name: MANY[name] for name in ("standard", "p_anneal", "hard_concrete", "top_k", "batch_top_k", "jump_relu", "other")
}
"""One of each kind of state."""
FEW = {name: MANY[name] for name in ("standard", "hard_concrete", "other")}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def progress(params):
    return json.loads(progress_path(params).read_text())


def stop_at(step: int, number: int, monkeypatch) -> None:
    """The process gets a signal in the middle of a step."""
    original, calls = loop.train_step, []

    def train_step(member, batch):
        calls.append(member)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return original(member, batch)

    monkeypatch.setattr(loop, "train_step", train_step)


def test_an_interrupted_run_ends_with_the_same_bytes(make_params, tmp_path, monkeypatch, capsys):
    params = make_params(saes=STATEFUL, tokens=2048, dead_fraction=0.05, saved_checkpoints=5)
    stage.train(params, tmp_path / "undisturbed")
    assert not list(run_folder(params).glob("checkpoint_*")) and not (run_folder(params) / "saved").exists()
    assert progress(params)["state"] == "finished"
    for call, number in ((80, signal.SIGTERM), (60, signal.SIGINT)):
        with monkeypatch.context() as patch, pytest.raises(Interrupted, match="go on from there") as stop:
            stop_at(call, number, patch)
            stage.train(params, tmp_path / "out")
        assert stop.value.code == 128 + number and not (tmp_path / "out").exists()
        assert progress(params)["state"] == "interrupted"
    assert progress(params)["checkpoint_step"] == progress(params)["step"] > 15
    stage.train(params, tmp_path / "out")
    assert "going on from the checkpoint of step" in capsys.readouterr().out
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


def test_progress_says_how_far_a_run_is(make_params, tmp_path, monkeypatch):
    params = make_params()
    stop_at(120, signal.SIGTERM, monkeypatch)
    with pytest.raises(Interrupted):
        stage.train(params, tmp_path / "out")
    said = progress(params)
    assert said["step"] == 60 and said["tokens"] == 60 * 64 and 0.4 < said["fraction"] < 0.6
    assert said["total_steps"] == pytest.approx(60 / said["fraction"], rel=0.05)
    assert set(said["saes"]) == {"standard", "topk"} and said["saes"]["topk"]["l0"] == pytest.approx(4, abs=0.1)
    assert "step 60" in said["message"] and said["pid"] == os.getpid()


def killed_at_random(params, output: Path, seconds: float, number: int) -> int:
    """Exit code of a process that trains until it gets a signal, or finishes first."""

    def work() -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        torch.set_num_threads(1)
        run_main(lambda: stage.train(params, output) and 0)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    process.join(seconds)
    if process.is_alive():
        os.kill(process.pid, number)
    process.join()
    return process.exitcode


def ends_as_if_undisturbed(params, tmp_path: Path, kills: int) -> None:
    stage.train(params, tmp_path / "undisturbed")
    began = time.perf_counter()
    assert killed_at_random(params, tmp_path / "timed", 60, signal.SIGKILL) == 0
    duration = time.perf_counter() - began
    moments, codes = random.Random(0), []
    while len(codes) - codes.count(0) < kills:
        assert len(codes) < 5 * kills
        number = (signal.SIGKILL, signal.SIGTERM)[len(codes) % 2]
        codes.append(killed_at_random(params, tmp_path / "out", moments.uniform(0.1, 0.6) * duration, number))
        if codes[-1] == 0:  # done before the signal came: the next one starts afresh
            assert files(tmp_path / "out") == files(tmp_path / "undisturbed")
    assert set(codes) <= {-signal.SIGKILL, 128 + signal.SIGTERM, 0}
    stage.train(params, tmp_path / "out")
    assert files(tmp_path / "out") == files(tmp_path / "undisturbed")


@pytest.mark.slow
def test_a_run_killed_three_times_ends_with_the_same_bytes(make_params, tmp_path):
    ends_as_if_undisturbed(make_params(saes=FEW, tokens=4096, checkpoint_steps=3), tmp_path, 3)


@pytest.mark.slow
def test_a_run_killed_twenty_times_ends_with_the_same_bytes(make_params, tmp_path):
    ends_as_if_undisturbed(make_params(saes=MANY, tokens=12288, checkpoint_steps=3), tmp_path, 20)


@pytest.fixture
def halfway(make_params, tmp_path, monkeypatch):
    """Parameters of a run that was stopped, its checkpoint kept."""
    params = make_params(saes={"topk": TOP_K}, tokens=4096)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(30, signal.SIGTERM, patch)
        stage.train(params, tmp_path / "out")
    return params


def test_a_damaged_checkpoint_is_said_to_be_and_the_run_starts_afresh(halfway, tmp_path, capsys):
    [path] = run_folder(halfway).glob("checkpoint_*/tensors.safetensors")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    stage.train(halfway, tmp_path / "out")
    out = capsys.readouterr().out
    assert "the checkpoint of step 30 is damaged and not used" in out and "going on" not in out
    assert load_sae(tmp_path / "out" / "topk").cfg.provenance["tokens"] > 3000


def test_an_interrupted_start_says_what_is_there_already(halfway, make_params, tmp_path, monkeypatch):
    def stop(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(stage, "load_model", stop)
    with pytest.raises(Interrupted, match="step 30 is kept"):
        stage.train(halfway, tmp_path / "out")
    with pytest.raises(Interrupted, match="before the first step: nothing to keep"):
        stage.train(make_params(tokens=2048), tmp_path / "out")


def test_a_checkpoint_of_other_code_or_settings_is_not_used(halfway, make_params, tmp_path, capsys, monkeypatch):
    [path] = run_folder(halfway).glob("checkpoint_*/state.json")
    written = json.loads(path.read_text())
    path.write_text(json.dumps({**written, "identity": {**written["identity"], "training code": "earlier"}}))
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match="step 30 is kept"):
        stop_at(30, signal.SIGTERM, patch)
        stage.train(halfway, tmp_path / "out")
    assert "step 30 is not used: it was made with another training code" in capsys.readouterr().out
    stage.train(halfway, tmp_path / "out")  # the new one of that step has taken its place
    assert "going on from the checkpoint of step 30" in capsys.readouterr().out
    stage.train(make_params(saes={"topk": {**TOP_K, "k": 3}}, tokens=4096), tmp_path / "out")
    assert "going on" not in capsys.readouterr().out


def test_a_full_disk_costs_a_checkpoint_not_the_run(make_params, tmp_path, monkeypatch, capsys):
    params = make_params(saes={"topk": TOP_K}, tokens=4096, checkpoint_steps=20)
    original, written = safetensors.torch.save_file, []

    def save_file(tensors, path):
        if written and Path(path).parent.name.startswith(".checkpoint"):
            Path(path).write_bytes(b"half")
            raise safetensors.SafetensorError(f"Error while serializing: I/O error: (os error {errno.ENOSPC})")
        written.append(path)
        original(tensors, path)

    monkeypatch.setattr(safetensors.torch, "save_file", save_file)
    stop_at(50, signal.SIGTERM, monkeypatch)
    with pytest.raises(Interrupted, match="step 20 is kept"):
        stage.train(params, tmp_path / "out")
    assert "no checkpoint at step 40: No space left on device; the last good one is kept" in capsys.readouterr().err
    assert [path.name for path in run_folder(params).iterdir() if path.is_dir()] == ["checkpoint_20"]


def test_a_diverging_run_keeps_its_last_good_checkpoint(make_params, tmp_path, monkeypatch):
    params = make_params(saes={"standard": STANDARD}, tokens=4096, checkpoint_steps=10)
    original = Standard.compute

    def diverge(self, x, progress):
        out = original(self, x, progress)
        return out._replace(loss=out.loss * float("nan")) if self.last_fired_F.max() > 0.55 else out

    monkeypatch.setattr(Standard, "compute", diverge)
    with pytest.raises(UserError, match=r"train\.saes\.standard: the loss at step \d+ is not finite"):
        stage.train(params, tmp_path / "out")
    [(step, path)] = checkpoints.saved_checkpoints(run_folder(params))
    assert all(tensor.isfinite().all() for tensor in safetensors.torch.load_file(path / "tensors.safetensors").values())
    assert 20 <= step < 50 and progress(params)["state"] == "failed" and "not finite" in progress(params)["message"]


def test_saved_moments_are_log_spaced_saes(make_params, tmp_path):
    stage.train(make_params(saes={"topk": TOP_K}, saved_checkpoints=4), tmp_path / "out")
    steps = sorted(int(path.name.removeprefix("step_")) for path in (tmp_path / "out/topk/checkpoints").iterdir())
    total = load_sae(tmp_path / "out/topk").cfg.provenance["tokens"] // 64
    assert steps[0] == 0 and steps[1:] == pytest.approx([0.0316 * total, 0.1 * total, 0.316 * total], abs=2)
    early, late = (load_sae(tmp_path / f"out/topk/checkpoints/step_{step}") for step in (steps[0], steps[-1]))
    assert early.cfg.provenance["tokens"] == 0 < late.cfg.provenance["tokens"] and early.cfg.hook_name == HOOK


def test_the_exit_code_is_the_signals(capsys):
    def main() -> None:
        raise Interrupted("the checkpoint of step 3 is kept", signal.SIGTERM)

    with pytest.raises(SystemExit) as exit_:
        run_main(main)
    assert exit_.value.code == 143 and capsys.readouterr().err == "interrupted: the checkpoint of step 3 is kept\n"


# --- what runs leave in `.cache/` -----------------------------------------------------------


def test_a_run_from_a_token_file_is_the_same_run(make_params, tmp_path, monkeypatch, capsys):
    params = make_params(saes={"topk": TOP_K}, tokens=3072)
    stage.train(params, tmp_path / "in_memory")
    monkeypatch.setattr(tokens, "IN_MEMORY_TOKENS", 1000)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(20, signal.SIGTERM, patch)
        stage.train(params, tmp_path / "out")
    [path] = (tmp_path / ".cache/tokens").iterdir()
    monkeypatch.setattr(tokens, "context_chunks", None)  # made once
    stage.train(params, tmp_path / "out")
    assert "going on from the checkpoint of step 20" in capsys.readouterr().out
    assert (path / "tokens.int32").stat().st_size == 3072 * 4 and files(tmp_path / "out") == files(tmp_path / "in_memory")


@pytest.fixture
def interrupted(tmp_path: Path) -> dict[str, Path]:
    """Run folders of 1,000 bytes each, one of them of a run that was finished."""
    root = tmp_path / ".cache/train"
    for name in ("first", "second", "third", "finished"):
        folder = root / name / "checkpoint_5"
        folder.mkdir(parents=True)
        (folder / "tensors.safetensors").write_bytes(bytes(1000))
        (root / name / PROGRESS_FILE).write_text("{}")
    shutil.rmtree(root / "finished" / "checkpoint_5")
    return {path.name: path for path in root.iterdir()}


def test_checkpoints_nobody_goes_on_with_are_bounded(interrupted, make_params, tmp_path, capsys):
    with held(interrupted["first"]), checkpoints.in_use(interrupted["third"], 2.1e-6):
        assert set(tmp_path.joinpath(".cache/train").iterdir()) == set(interrupted.values()) - {interrupted["second"]}
        assert capsys.readouterr().out == (
            "removed the checkpoints of 1 unfinished run: .cache/train held more than "
            "2.1e-06 GB (activation_caching.max_gb)\n"
        )
        with checkpoints.in_use(tmp_path / ".cache/train/new", 1e-6):
            assert checkpoints.saved_checkpoints(interrupted["first"]) and checkpoints.saved_checkpoints(
                interrupted["third"]
            )
    params = make_params(saes={"topk": TOP_K}, tokens=2048).model_copy(
        update={"activation_caching": make_params().activation_caching.model_copy(update={"max_gb": 1e-6})}
    )
    stage.train(params, tmp_path / "out")
    assert not interrupted["first"].exists() and not interrupted["third"].exists()
    assert interrupted["finished"].exists() and progress_path(params).is_file() and run_folder(params).is_dir()
