"""Linear layers by oneDNN: the same products, to rounding, wherever weights are not differentiated."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from sae_research.lm import products


@pytest.fixture
def layer() -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(48, 40).requires_grad_(False)
    products.use_onednn(layer)
    return layer


@pytest.mark.parametrize("shape", [(2, 64, 48), (128, 48), (3, 48), (0, 48)])
def test_products_are_those_of_torch(layer: nn.Linear, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x), linear(x, layer.weight, layer.bias), atol=1e-6, rtol=1e-5)


def test_onednn_is_used(layer: nn.Linear, monkeypatch) -> None:
    x = torch.randn(128, 48)
    monkeypatch.setattr(nn.Linear, "forward", lambda *_: pytest.fail("MKL was asked"))
    assert layer(x).shape == (128, 40)


def test_gradients_reach_the_input(layer: nn.Linear) -> None:
    x, weights = torch.randn(128, 48, requires_grad=True), torch.randn(128, 40)
    y = layer(x)
    (y * weights).sum().backward()
    torch.testing.assert_close(y, linear(x, layer.weight, layer.bias), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(x.grad, weights @ layer.weight, atol=1e-6, rtol=1e-5)


def test_weights_that_learn_get_their_gradients(layer: nn.Linear) -> None:
    layer.requires_grad_(True)
    x = torch.randn(128, 48)
    layer(x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, x.sum(0).expand(40, 48), atol=1e-5, rtol=1e-5)


def test_weights_may_change_and_be_copied(layer: nn.Linear) -> None:
    x = torch.randn(128, 48)
    copied = copy.deepcopy(layer)
    copied.weight.mul_(2)
    torch.testing.assert_close(copied(x) - layer.bias, 2 * (layer(x) - layer.bias), atol=1e-5, rtol=1e-5)
    assert copied.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
