"""What pursuit does otherwise on a device: against what it does on the CPU, and how much it asks of the device."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from sae_research.config.params import Train
from sae_research.saes.pursuit import dictionary, matching, orthogonal, thresholding
from sae_research.saes.pursuit.dictionary import Dictionary, unit_atoms
from sae_research.saes.pursuit.encoders import MPSAE, NonNegativeOMPSAE
from sae_research.training.buffer import StreamBatch
from sae_research.training.training_sae import new_training_sae, start, train_step
from tests.helpers.simulated_cuda import MEMORY, simulated_cuda
from tests.helpers.training import CONFIGS

simulated = pytest.mark.skipif(torch.cuda.is_available(), reason="a real CUDA device is here")


def random_rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


# --- repeated atoms --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("signed", [True, False])
def test_repeated_rows_are_those_found_one_by_one(signed: bool, dtype: torch.dtype) -> None:
    signs = torch.tensor(np.array(np.meshgrid(*[[-1.0, 1.0]] * 8)).reshape(8, -1).T, dtype=torch.float32)  # all of 8 signs
    rows = torch.cat([random_rows(60, 8), signs, random_rows(60, 8)[10:30], -random_rows(60, 8)[:5], torch.zeros(2, 8)])
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))].to(dtype)
    atoms, usable = unit_atoms(rows, signed)
    seen: set[tuple[float, ...]] = set()
    for row, taken in zip((atoms + 0.0).tolist(), usable.tolist(), strict=True):
        fresh = tuple(row) not in seen and not (signed and tuple(-v + 0.0 for v in row) in seen) and any(row)
        assert taken == fresh, row
        seen.add(tuple(row))
    assert 0 < int(usable.sum()) < len(rows)


# --- Gram rows -------------------------------------------------------------------------------


@simulated
def test_dictionaries_on_a_device_share_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_cuda():
        made = []
        for seed in range(5):
            W = torch.nn.functional.normalize(random_rows(128, 16, seed), dim=1).cuda()
            made.append(Dictionary(W, torch.ones(128, dtype=torch.bool, device="cuda")))
        assert made[0].max_gram_bytes == MEMORY // 4
        room = 2 * 128 * 128 * 4
        for one in made:
            one.max_gram_bytes = room
        first = made[0].gram().table.cpu()
        for one in made:
            assert one.gram().complete
            made[0].gram()  # in use all the while
            assert sum(other.gram_bytes for other in made) <= room
        assert made[0].gram_bytes and not made[1].gram_bytes, "the one used least recently makes room"
        assert torch.equal(made[0].gram().table.cpu(), first)
        x = random_rows(3, 16).cuda()
        found = [matching.pursue(x, one, 4)[0].tolist() for one in made]
        assert found == [
            matching.pursue(x.cpu(), Dictionary(one.atoms.cpu(), torch.ones(128).bool()), 4)[0].tolist() for one in made
        ]


# --- compiled steps --------------------------------------------------------------------------


def a_run(d_sae: int = 64) -> tuple[matching._Run, Any]:
    W = torch.nn.functional.normalize(random_rows(d_sae, 16), dim=1).double()
    one, x = Dictionary(W, torch.ones(d_sae, dtype=torch.bool)), random_rows(30, 16, 1).double()
    atoms, values = torch.zeros(30, 5, dtype=torch.long), torch.zeros(30, 5, dtype=torch.float64)
    return matching._Run(x, one, atoms, values, False, 0.0), one.gram()


def test_compiled_steps_are_held_against_plain_ones() -> None:
    run, gram = a_run()
    before = run.correlations.clone()

    def wrong(trial: Any, gram: Any, steps: int) -> None:
        matching._steps_torch(trial, gram, steps)
        trial.energy += 0.1

    def broken(trial: Any, gram: Any, steps: int) -> None:
        raise ValueError("no kernel image\nfor this device")

    assert matching.check_steps(matching._steps_torch, run, gram, 5) == ""
    assert "energies apart by" in matching.check_steps(wrong, run, gram, 5)
    assert matching.check_steps(broken, run, gram, 5) == "the compiled steps failed (ValueError: no kernel image)"
    assert torch.equal(run.correlations, before) and not run.atoms.any()


@simulated
def test_steps_that_fail_are_replaced_with_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(matching, "triton_there", lambda: True)
    monkeypatch.setattr(matching, "_steps_triton", broken)
    monkeypatch.setattr(matching, "SERVES", {})
    W, x = torch.nn.functional.normalize(random_rows(64, 16), dim=1), random_rows(9, 16, 1)
    here = MPSAE(W, torch.zeros(16), 4).encode(x[None])
    with simulated_cuda():
        sae = MPSAE(W, torch.zeros(16), 4).cuda()
        there = [sae.encode(x.cuda()[None]).cpu() for _ in range(2)]
    for z in there:
        torch.testing.assert_close(z, here, rtol=1e-4, atol=1e-4)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "uses plain torch on cuda:0: the compiled steps failed (RuntimeError: illegal" in said


# --- least squares ---------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "d_in", "common"), [(1, 8, 0.0), (12, 16, 1.0), (30, 40, 3.0), (16, 12, 0.0)])
def test_active_sets_are_the_least_squares_that_scipy_finds(steps: int, d_in: int, common: float) -> None:
    g = torch.Generator().manual_seed(0)
    atoms = torch.randn(40, steps, d_in, generator=g) + common * torch.randn(40, 1, d_in, generator=g)
    atoms = torch.nn.functional.normalize(atoms, dim=2)
    x = (torch.rand(40, 1, steps, generator=g) @ atoms)[:, 0] + 0.3 * torch.randn(40, d_in, generator=g)

    def fitted(given: torch.Tensor) -> torch.Tensor:
        rows = [nnls(a.T.double().numpy(), row.double().numpy())[0] for a, row in zip(given, x, strict=True)]
        return torch.tensor(np.array(rows)).float()

    begin = (
        torch.nn.functional.pad(fitted(atoms[:, : steps // 2]), (0, steps - steps // 2)) if steps > 1 else torch.zeros(40, 1)
    )
    found, want = orthogonal.active_set(atoms, x, begin, x.norm(dim=1)), fitted(atoms)
    left = [(x - (z[:, None] @ atoms)[:, 0]).norm(dim=1) for z in (found, want)]
    torch.testing.assert_close(*left, rtol=1e-4, atol=1e-4)
    if steps <= d_in:  # else many fits are as good
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-3)
    assert (found >= 0).all()


def test_dependent_atoms_are_left_to_coordinate_descent() -> None:
    one = torch.nn.functional.normalize(random_rows(3, 8), dim=1)
    atoms = torch.stack([one[0], one[1], one[0]])[None]
    x = (2 * one[0] + one[1])[None]
    found = orthogonal.active_set(atoms, x, torch.tensor([[1.0, 0.0, 1.0]]), x.norm(dim=1))
    torch.testing.assert_close((found[:, None] @ atoms)[:, 0], x, rtol=1e-4, atol=1e-4)


@simulated
def test_non_negative_fits_ask_little_of_the_device() -> None:
    W, x = random_rows(200, 24), random_rows(50, 24, 1)[None]
    here = NonNegativeOMPSAE(W, torch.zeros(24), 10).encode(x)
    with simulated_cuda() as counts:
        sae, given = NonNegativeOMPSAE(W, torch.zeros(24), 10).cuda(), x.cuda()
        sae.dictionary().gram()
        counts.operations = 0
        there = sae.encode(given)
        assert counts.operations < 2_500  # coordinate descent takes 20,000
    torch.testing.assert_close(there.cpu(), here, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("width", [6, 30])
def test_singular_problems_together_are_singular_problems_one_by_one(width: int) -> None:
    g = torch.Generator().manual_seed(0)
    atoms = torch.randn(10, width, 4, generator=g).double() @ torch.randn(10, 4, 12, generator=g).double()
    atoms = torch.nn.functional.normalize(atoms, dim=2)
    atoms[:, -2:] = 0
    x = torch.randn(10, 5, 12, generator=g).double()
    found = thresholding.least_norm(atoms, x)
    torch.testing.assert_close(found, x @ torch.linalg.pinv(atoms, rtol=thresholding.RANK_TOLERANCE), rtol=1e-6, atol=1e-6)
    assert not found[..., -2:].any()


@simulated
def test_singular_supports_on_a_device_are_those_of_the_cpu() -> None:
    W = torch.nn.functional.normalize(random_rows(40, 4) @ random_rows(4, 16, 1), dim=1)
    one = dictionary.Dictionary(W, torch.ones(40, dtype=torch.bool))
    support = torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(i))[:9] for i in range(6)])
    support[0, -3:] = -1
    x = random_rows(18, 16, 2).view(6, 3, 16)
    rhs = (x @ one.atoms[support.clamp_min(0)].mT) * (support >= 0)[:, None]
    here = thresholding.fit(one, support, x, rhs)
    with simulated_cuda():
        away = dictionary.Dictionary(W.cuda(), torch.ones(40, dtype=torch.bool, device="cuda"))
        there = thresholding.fit(away, support.cuda(), x.cuda(), rhs.cuda()).cpu()
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)


# --- training --------------------------------------------------------------------------------


@simulated
def test_training_through_pursuit_keeps_its_dictionary_on_the_device() -> None:
    train = Train(saes={"sae": CONFIGS["matching_pursuit"]}, precision="float32", batch_size=32)
    with simulated_cuda() as counts:
        rows = random_rows(64, 16).cuda()
        sae = new_training_sae("sae", train, 16, "cuda")
        start(sae, rows, 0)
        train_step(sae, StreamBatch(rows[:32], 0.5))
        counts.bytes_to_host = counts.waits = 0
        train_step(sae, StreamBatch(rows[32:], 0.6))
        assert counts.bytes_to_host == 0 and counts.waits <= 4
