"""`all_finite`: by a sum, and by a closer look where the sum overflows."""

from __future__ import annotations

import pytest
import torch

from sae_research.saes.base import all_finite


@pytest.mark.parametrize(
    ("values", "finite"),
    [
        ([1.0, -2.0], True),
        ([], True),
        ([3e38, 3e38, -1.0], True),
        ([1.0, float("nan")], False),
        ([float("inf"), 1.0], False),
        ([float("inf"), float("-inf")], False),
        ([3e38, 3e38, float("inf")], False),
    ],
)
def test_nan_and_infinity_are_found(values: list[float], finite: bool) -> None:
    assert all_finite(torch.tensor(values)) is finite
