"""Several SAEs in one step: stacks equal their in_training alone, and so do SAEs side by side on a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_research.config.params import Train
from sae_research.training import stack, stage
from sae_research.training.buffer import StreamBatch
from sae_research.training.loop import ThreadPoolStepper
from sae_research.training.recipes import RECIPES
from sae_research.training.stack import Stack, in_stacks
from sae_research.training.training_sae import TrainingSAE, new_training_sae, start, train_step
from tests.helpers.training import CONFIGS, STANDARD, TOP_K

SPARSITIES = {
    "l1_coefficient": [0.05, 0.1, 0.02],
    "l0_coefficient": [0.003, 0.006, 0.001],
    "k": [2, 6, 4],
    "target_l0": [4, 2, 6],
    "sparsity_coefficient": [1.0, 2.0, 0.5],
}
STACKABLE = [name for name, recipe in RECIPES.items() if recipe.stackable]
STEPS = 15


def trio(name: str, **train: Any) -> Train:
    """Three SAEs of one recipe that differ in sparsity, seed and learning rate."""
    config = CONFIGS[name]
    key = next(key for key in SPARSITIES if key in config)
    extra = {"resample_every": 0.1, "resample_window": 0.05} if key == "l1_coefficient" else {}
    saes = {
        f"s{i}": {**config, **extra, key: value, "seed": i, "learning_rate": (3e-3, 3e-3, 1e-3)[i]}
        for i, value in enumerate(SPARSITIES[key])
    }
    return Train(saes=saes, batch_size=128, dead_fraction=0.05, **{"precision": "float32", **train})


def in_training_of(train: Train, rows: torch.Tensor) -> list[TrainingSAE]:
    """In double precision: what differs is then arithmetic, not the order of sums."""
    in_training = [new_training_sae(name, train, rows.shape[1]) for name in train.saes]
    for i, sae in enumerate(in_training):
        sae.recipe.double()
        start(sae, rows, i)
        with torch.no_grad():  # no pre-activation right at a limit that was read off these rows, no two latents alike
            for parameter in sae.recipe.parameters():
                parameter += 1e-4 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            sae.recipe.normalise_rows()
    return in_training


def batches(rows: torch.Tensor, first: int, last: int) -> list[StreamBatch]:
    generators = [torch.Generator().manual_seed(step) for step in range(last)]
    return [
        StreamBatch(rows[torch.randint(len(rows), (128,), generator=generators[step])], (step + 0.5) / STEPS)
        for step in range(first, last)
    ]


def tensors(in_training: list[TrainingSAE]) -> list[torch.Tensor]:
    return [tensor.clone() for sae in in_training for tensor in sae.state()[1].values()]


@pytest.mark.parametrize(("name", "parts"), [*((name, 1) for name in STACKABLE), ("top_k", 2), ("hard_concrete", 2)])
def test_a_stack_takes_the_steps_its_saes_would(name, parts, planted_rows, monkeypatch):
    rows = planted_rows.double()
    train = trio(name, accumulation_steps=parts)
    alone, together = in_training_of(train, rows), in_training_of(train, rows)
    monkeypatch.setattr(stack, "STACKED_ON", ("cpu",))
    (group,) = in_stacks(together, train)
    stacked = Stack(group)
    for batch in batches(rows, 0, STEPS):
        outputs = [train_step(sae, batch) for sae in alone]
        for ours, theirs in zip(stacked.step(batch), outputs, strict=True):
            torch.testing.assert_close(ours.loss, theirs.loss.detach(), rtol=1e-7, atol=0)
            torch.testing.assert_close(ours.l0, theirs.l0)
    for sae, other in zip(together, alone, strict=True):
        assert sae.state()[0] == other.state()[0]  # steps, dead latents, counters
        assert sae.recipe.generator.get_state().equal(other.recipe.generator.get_state())
        for (key, ours), theirs in zip(sae.recipe.state_dict().items(), other.recipe.state_dict().values(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, msg=key, equal_nan=True)


@pytest.mark.parametrize("name", ["standard", "top_k", "gated_hard_concrete"])
def test_a_stack_goes_on_from_a_checkpoint_bit_for_bit(name, planted_rows):
    train, rows = trio(name), planted_rows.double()
    whole, first, rest = (in_training_of(train, rows) for _ in range(3))
    stacked, beginning = Stack(whole), Stack(first)
    for batch in batches(rows, 0, STEPS):
        stacked.step(batch)
    for batch in batches(rows, 0, 6):
        beginning.step(batch)
    for sae, before in zip(rest, first, strict=True):
        values, saved = before.state()
        sae.restore(values, {key: tensor.clone() for key, tensor in saved.items()})
    ending = Stack(rest)
    for batch in batches(rows, 6, STEPS):
        ending.step(batch)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(tensors(rest), tensors(whole), strict=True))


def test_only_what_has_one_shape_and_one_loss_is_stacked(planted_rows, monkeypatch):
    saes = {
        "a": TOP_K,
        "b": {**TOP_K, "k": 9, "seed": 3, "learning_rate": 0.1},
        "wide": {**TOP_K, "d_sae": 128},
        "c": {**TOP_K, "aux_k_coefficient": 0.5},
        "elsewhere": {**TOP_K, "hook_name": "blocks.0.hook_resid_post"},
        "d": STANDARD,
        "e": {**STANDARD, "l1_coefficient": 0.3},
        "m": CONFIGS["matching_pursuit"],
        "n": CONFIGS["matching_pursuit"],
        "f": TOP_K,
    }

    def names(device: str) -> list[list[str]]:
        monkeypatch.setattr(stack, "STACKED_ON", (device,))
        train = Train(saes=saes, batch_size=128)
        return [
            [sae.name for sae in group] for group in in_stacks([new_training_sae(name, train, 16) for name in saes], train)
        ]

    together = [["a", "b", "f"], ["wide"], ["c"], ["elsewhere"], ["d", "e"], ["m"], ["n"]]
    assert names("cpu") == together
    assert names("cuda") == [[name] for name in saes]
    monkeypatch.setattr(stack, "LARGEST", 2 * 128 * 64)
    assert names("cpu") == [["a", "b"], ["f"], *together[1:]]


def test_stacks_in_a_run_learn_what_single_saes_learn(make_params, tmp_path, monkeypatch):
    saes = {"k4": TOP_K, "k2": {**TOP_K, "k": 2}, "k3": {**TOP_K, "k": 3}, "one": STANDARD}
    for device in ("cpu", "cuda"):
        monkeypatch.setattr(stack, "STACKED_ON", (device,))
        stage.train(make_params(saes=saes, tokens=4096), tmp_path / device)
    for name in saes:
        rows = [
            [
                [float(value) for value in line.split("\t")]
                for line in (tmp_path / device / name / "training_curve.tsv").read_text().splitlines()[1:]
            ]
            for device in ("cpu", "cuda")
        ]
        assert rows[0][:3] == [pytest.approx(row, rel=1e-3) for row in rows[1][:3]]
        assert rows[0][-1] == pytest.approx(rows[1][-1], rel=0.05)


def test_saes_side_by_side_are_those_of_one_at_a_time(planted_rows):
    torch.set_num_threads(2)  # put back by the fixture
    train = trio("top_k")
    weights = []
    for stepper in (ThreadPoolStepper(1, torch.device("cpu")), ThreadPoolStepper(3, torch.device("cpu"))):
        assert (stepper.pool is None) == (not weights)
        in_training = in_training_of(train, planted_rows.double())
        with stepper:
            for batch in batches(planted_rows.double(), 0, STEPS):
                stepper.map(lambda sae, batch=batch: train_step(sae, batch), in_training)
        weights.append(tensors(in_training))
        assert torch.get_num_threads() == 2
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_an_error_in_one_item_waits_for_the_others_and_is_raised():
    torch.set_num_threads(2)
    done = []

    def work(item: int) -> int:
        if item == 0:
            raise ValueError("zero")
        done.append(item)
        return item

    with ThreadPoolStepper(4, torch.device("cpu")) as stepper, pytest.raises(ValueError, match="zero"):
        stepper.map(work, range(4))
    assert sorted(done) == [1, 2, 3] and torch.get_num_threads() == 2


@pytest.mark.gpu
@pytest.mark.parametrize("name", STACKABLE)
def test_a_stack_on_a_gpu_takes_the_steps_its_saes_would(name, planted_rows):
    train, rows = trio(name), planted_rows.cuda()
    sides = []
    for _ in range(2):
        in_training = [new_training_sae(key, train, 16, "cuda") for key in train.saes]
        for i, sae in enumerate(in_training):
            start(sae, rows, i)
        sides.append(in_training)
    stacked = Stack(sides[1])
    for batch in batches(rows, 0, 5):
        outputs = [train_step(sae, batch) for sae in sides[0]]
        for ours, theirs in zip(stacked.step(batch), outputs, strict=True):
            torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-3, atol=1e-5)
