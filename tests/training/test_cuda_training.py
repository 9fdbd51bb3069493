"""Every recipe on CUDA, simulated or real, and the stage end to end: what the CPU gives, on the device."""

from __future__ import annotations

import pytest
import torch

from sae_research.config.params import Train
from sae_research.saes import SAEConfig
from sae_research.training.stream import StreamBatch
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
