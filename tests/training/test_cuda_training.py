"""Every recipe on CUDA, simulated or real, and the stage end to end: what the CPU gives, on the device."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_research.config.params import Train
from sae_research.runtime.errors import Interrupted
from sae_research.saes import SAEConfig
from sae_research.training import loop, stage
from sae_research.training.buffer import StreamBatch
from sae_research.training.stream import ActivationStream, ReadAhead
from sae_research.training.training_sae import new_training_sae, start, train_step
from tests.helpers.cuda import DEVICES, covered, cuda
from tests.helpers.training import CONFIGS

STEPS, BATCH = 4, 128


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", covered("recipe"))
def test_a_recipe_takes_the_steps_it_takes_on_the_cpu(name: str, device: str, planted_rows: torch.Tensor) -> None:
    train = Train(saes={"sae": CONFIGS[name]}, precision="float32", batch_size=BATCH)

    def losses(place: str) -> tuple[list[float], bool]:
        rows = planted_rows.to(place)
        sae, found = new_training_sae("sae", train, 16, place), []
        start(sae, rows, 0)
        for step in range(STEPS):
            output = train_step(sae, StreamBatch(rows[step * BATCH :][:BATCH], (step + 0.5) / STEPS))
            assert output.residual.device.type == place
            found.append(float(output.loss))
        exported = sae.recipe.export(1.0, SAEConfig(sae.recipe.form, 16, 64)).tensors()
        assert all(tensor.device.type == "cpu" for tensor in exported.values())
        return found, sae.recipe.draw_noise(1) is not None

    here, noisy = losses("cpu")
    with cuda(device):
        there, _ = losses("cuda")
    # a device draws noise of its own; Adam's first steps enlarge rounding
    assert there == pytest.approx(here, rel=0.2 if noisy else 2e-3), (there, here)


def held_out(folder: Path) -> dict[str, Any]:
    report = json.loads((folder / stage.REPORT_FILE).read_text())
    return {name: sae["held_out"] for name, sae in report["saes"].items()}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cached", [False, True])
def test_the_stage_learns_what_it_learns_on_the_cpu_and_goes_on_after_a_stop(
    cached: bool, device: str, make_params: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(place: str, folder: str) -> Path:
        params = make_params(tokens=6144, device=place)
        model = params.model.model_copy(update={"device": place})
        caching = params.activation_caching.model_copy(update={"enabled": cached})
        stage.train(params.model_copy(update={"model": model, "activation_caching": caching}), tmp_path / folder)
        return tmp_path / folder

    here = held_out(run("cpu", "cpu"))
    with cuda(device):
        whole = run("cuda", "cuda")
        there = held_out(whole)
        stop_at(30, monkeypatch)
        with pytest.raises(Interrupted):
            run("cuda", "resumed")
        resumed = run("cuda", "resumed")
    for name, figures in here.items():
        for key, tolerance in (("l0", 0.5), ("variance_explained", 0.02)):
            assert there[name][key] == pytest.approx(figures[key], abs=tolerance), (name, key)
    if device == "simulated":
        assert files(resumed) == files(whole)


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original, calls = loop.train_step, []

    def step_and_stop(sae: Any, batch: Any) -> Any:
        calls.append(sae)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(sae, batch)

    monkeypatch.setattr(loop, "train_step", step_and_stop)


@pytest.mark.parametrize("device", DEVICES)
def test_a_chunk_is_read_while_another_is_served(device: str) -> None:
    """And its activations are used only once they are there."""
    read: list[int] = []

    class Chunks(ActivationStream):
        """Three chunks that a model need not make."""

        reads_ahead, n_chunks, device = True, 3, torch.device("cuda:0")  # type: ignore[assignment]

        def __init__(self) -> None:
            self.weight = torch.ones(4, device=self.device)

        def read(self, chunk: int) -> dict[str, torch.Tensor]:
            read.append(chunk)
            return {"hook": self.weight * chunk}

    with cuda(device), ReadAhead(Chunks()) as chunks:
        chunks.begin(0)
        for number in range(3):
            acts = chunks.read(number)
            chunks.begin(number + 1)
            if number < 2:
                assert chunks._begun is not None and chunks._begun[1].result() and read[-1] == number + 1
            assert (acts["hook"] + 1).tolist() == [number + 1] * 4
        assert read == [0, 1, 2] and chunks._begun is None
        assert chunks.read(1)["hook"].tolist() == [1] * 4, "a chunk that was not begun"


def test_nothing_is_read_ahead_on_a_cpu() -> None:
    class Plain:
        reads_ahead, n_chunks = False, 2
        asked: list[int] = []

        def read(self, chunk: int) -> dict[str, torch.Tensor]:
            self.asked.append(chunk)
            return {}

    stream = Plain()
    with ReadAhead(stream) as chunks:  # type: ignore[arg-type]
        chunks.begin(0)
        assert stream.asked == []
        chunks.read(0)
        chunks.begin(1)
    assert stream.asked == [0]
