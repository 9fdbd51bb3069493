"""The CUDA kernels: interpreted on the CPU where Triton is installed, compiled where a GPU is at hand."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = """
import torch
from sae_research.saes.pursuit import kernels_triton, matching
from sae_research.saes.pursuit.dictionary import Dictionary

g = torch.Generator().manual_seed(0)
W = torch.nn.functional.normalize(torch.randn(300, 24, generator=g), dim=1)
x = torch.randn(5, 24, generator=g)
x[2] = 2 * W[9]
kernels_triton.BLOCK = 128
for in_registers in (16384, 64):
    kernels_triton.IN_REGISTERS = in_registers
    for options in ({}, {"nonnegative": True}, {"tolerance": 0.3}):
        found = []
        for steps in (matching._steps_torch, matching._steps_triton):
            matching._backend = lambda run, gram, n, steps=steps: steps
            found.append(matching.pursue(x, Dictionary(W, torch.ones(300, dtype=torch.bool)), 8, **options))
        assert torch.equal(found[0][0], found[1][0]), (in_registers, options)
        torch.testing.assert_close(found[0][1], found[1][1])
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed (it comes with CUDA torch)")
def test_interpreted_kernels_equal_the_torch_steps() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.stdout.strip() == "equal", done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize(("d_in", "d_sae"), [(64, 300), (256, 4096), (128, 20_000)])
@pytest.mark.parametrize("nonnegative", [False, True])
def test_cuda_kernels_equal_the_torch_steps(
    d_in: int, d_sae: int, nonnegative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sae_research.saes.pursuit import matching
    from sae_research.saes.pursuit.dictionary import Dictionary

    g = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=g), dim=1)
    x = torch.randn(64, d_in, generator=g)
    dictionary = Dictionary(W.cuda(), torch.ones(d_sae, dtype=torch.bool, device="cuda"))
    for options in ({}, {"tolerance": 0.2}):
        atoms, coefficients = matching.pursue(x.cuda(), dictionary, 16, nonnegative=nonnegative, **options)
        with monkeypatch.context() as patch:
            patch.setattr(matching, "_backend", lambda *_: matching._steps_torch)
            expected = matching.pursue(x.cuda(), dictionary, 16, nonnegative=nonnegative, **options)
        # another order of summing may swap atoms of nearly equal correlation, rarely
        assert (atoms == expected[0]).float().mean() > 0.99
        left = [
            (x - torch.zeros(64, d_sae).scatter_add_(1, a.cpu(), c.cpu()) @ W).norm(dim=1)
            for a, c in ((atoms, coefficients), expected)
        ]
        torch.testing.assert_close(left[0], left[1], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_every_encoder_runs_on_cuda_as_on_cpu() -> None:
    from sae_research.saes.pursuit.encoders import IHTPSAE, MPSAE, OMPSAE, NonNegativeMPSAE, NonNegativeOMPSAE, TopKRefitSAE

    g = torch.Generator().manual_seed(0)
    W, b, x = torch.randn(500, 64, generator=g), torch.randn(64, generator=g), torch.randn(4, 20, 64, generator=g)
    mask = torch.rand(4, 20, generator=g) > 0.3
    for cls in (IHTPSAE, MPSAE, OMPSAE, NonNegativeMPSAE, NonNegativeOMPSAE, TopKRefitSAE):
        here, there = cls(W, b, 5), cls(W, b, 5).cuda()
        z = there.encode(x.cuda(), mask.cuda()).cpu()
        torch.testing.assert_close(here.decode(z)[mask], here.decode(here.encode(x, mask))[mask], rtol=1e-3, atol=1e-3)
