"""The benchmark's plain loops return what our encoders return, and its rows are complete."""

from __future__ import annotations

import torch

from benchmarks import pursuit
from sae_research.saes.pursuit.encoders import IHTPSAE, MPSAE

SHAPE = pursuit.Shape(d_in=24, d_sae=150, sequences=8, seq=10)


def test_both_sides_do_the_same() -> None:
    W, b, x = pursuit._inputs(SHAPE, "cpu")
    torch.testing.assert_close(pursuit.plain_matching(x, W, 12), MPSAE(W, b, 12).encode(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(pursuit.plain_ihtp(x, W, 1), IHTPSAE(W, b, 1).encode(x), atol=1e-3, rtol=1e-3)


def test_rows(monkeypatch) -> None:
    monkeypatch.setattr(pursuit, "BANDWIDTH_NUMBERS", 100_000)
    rows = pursuit.measured(SHAPE)
    assert list(rows) == ["matching pursuit, s = 100", "IHTP, k = 5", "IHTP, four k", "IHTP, k = 5, the fits alone"]
    assert all(ours > 0 and loop > 0 for ours, loop in rows.values())
    traffic = pursuit.memory_traffic(SHAPE)
    assert traffic["bytes a step"] == 192 * 4
    assert all(value > 0 for value in pursuit.speeds(SHAPE).values())
