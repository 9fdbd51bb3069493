"""The simulated device refuses what CUDA refuses, and the record of what runs on it fits the registries."""

from __future__ import annotations

import threading

import pytest
import torch

from tests.helpers.cuda import NOT_APPLICABLE, REGISTRIES
from tests.helpers.simulated_cuda import SimulatedError, simulated_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a real CUDA device is here")


def test_every_exception_names_an_entry_and_its_reason() -> None:
    assert NOT_APPLICABLE.keys() == REGISTRIES.keys()
    for kind, reasons in NOT_APPLICABLE.items():
        assert reasons.keys() <= set(REGISTRIES[kind]), kind
        assert all(reasons.values()), kind


def test_devices_are_told_apart() -> None:
    with simulated_cuda():
        x = torch.arange(6.0, device="cuda").view(2, 3)
        assert x.is_cuda and x.device == torch.device("cuda:0") and str((x @ x.T).device) == "cuda:0"
        for refused in (
            lambda: x + torch.ones(2, 3),
            lambda: torch.ones(2, 3)[x > 1],
            lambda: torch.ones(2, 3).add_(x),
            lambda: torch.cat([x, torch.ones(1, 3)]),
            lambda: x.index_put_((torch.tensor([0]),), torch.ones(1, 3)),
        ):
            with pytest.raises(SimulatedError):
                refused()
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        assert (x * 2 + torch.tensor(1.0)).cpu().tolist() == [[1, 3, 5], [7, 9, 11]]  # a number may come from the CPU
        assert x[[1]].tolist() == x[torch.tensor([1])].tolist() == [[3, 4, 5]]
    assert not torch.cuda.is_available() and type(torch.ones(1)) is torch.Tensor


def test_a_stream_must_wait_for_another() -> None:
    with simulated_cuda():
        x, side = torch.ones(3, device="cuda"), torch.cuda.Stream()
        with torch.cuda.stream(side):
            with pytest.raises(SimulatedError, match="another stream"):
                x + 1
            side.wait_stream(torch.cuda.default_stream())
            y = x + 1
            done = side.record_event()
        with pytest.raises(SimulatedError, match="another stream"):
            y + 1
        torch.cuda.current_stream().wait_event(done)
        assert (y + 1).tolist() == [3, 3, 3]
        with torch.cuda.stream(side):
            z = y * 2
            z.cpu()  # waits for the stream
        assert (z + 1).tolist() == [5, 5, 5]


def test_threads_have_the_device_too() -> None:
    found = []
    with simulated_cuda():
        worker = threading.Thread(target=lambda: found.append(torch.zeros(2, device="cuda").is_cuda))
        worker.start()
        worker.join()
    assert found == [True]
