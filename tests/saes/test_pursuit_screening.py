"""Screening by bfloat16 products finds what float32 products find, also where bfloat16 cannot tell atoms apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from sae_research.pursuit import thresholding
from sae_research.pursuit.dictionary import Dictionary
from sae_research.pursuit.screening import largest

D_IN, TOKENS = 48, 200


def near_copies(g: torch.Generator) -> Tensor:
    """Forty directions, each eight times with differences far below a bfloat16 step."""
    base = torch.randn(40, D_IN, generator=g).repeat_interleave(8, 0)
    return normalize(base + 1e-4 * torch.randn(base.shape, generator=g), dim=1)


def random(g: torch.Generator) -> Tensor:
    return normalize(torch.randn(300, D_IN, generator=g), dim=1)


@pytest.mark.parametrize("atoms", [random, near_copies])
@pytest.mark.parametrize("k", [1, 5, 40])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_equals_the_ranking_of_exact_products(atoms, k: int, scale: float) -> None:
    g = torch.Generator().manual_seed(3)
    W = atoms(g)
    d = Dictionary(W, torch.ones(len(W), dtype=torch.bool))
    x = scale * torch.randn(TOKENS, D_IN, generator=g)
    values, chosen = largest(x, d, k)
    exact = (x.double() @ d.atoms.double().T).abs()
    wanted = exact.topk(k, dim=1).values
    torch.testing.assert_close(values.double(), wanted, rtol=1e-5, atol=1e-6 * scale)
    torch.testing.assert_close(exact.gather(1, chosen), wanted, rtol=1e-5, atol=1e-6 * scale)
    assert all(len(row.unique()) == k for row in chosen)
    assert (values[:, :-1] >= values[:, 1:]).all()


def test_one_bfloat16_product_alone_would_choose_other_atoms() -> None:
    g = torch.Generator().manual_seed(3)
    W, x = near_copies(g), torch.randn(TOKENS, D_IN, generator=g)
    exact = (x @ W.T).abs().argmax(1)
    assert ((x.bfloat16() @ W.bfloat16().T).float().abs().argmax(1) != exact).float().mean() > 0.5
    assert (largest(x, Dictionary(W, torch.ones(len(W), dtype=torch.bool)), 1)[1][:, 0] == exact).float().mean() > 0.98


def test_tokens_of_zeros_correlate_with_nothing() -> None:
    d = Dictionary(random(torch.Generator().manual_seed(0)), torch.ones(300, dtype=torch.bool))
    values, _ = largest(torch.zeros(3, D_IN), d, 4)
    assert (values == 0).all()


def test_sequences_are_fitted_alike_with_and_without(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(5)
    W = random(g)
    d = Dictionary(W, torch.ones(len(W), dtype=torch.bool))
    x = list(torch.randn(3, 7, D_IN, generator=g))
    fits = {}
    for screens in (True, False):
        monkeypatch.setattr(thresholding, "can_screen", lambda _, screens=screens: screens)
        fits[screens] = thresholding.fit_sequences(x, d, [1, 3])
    for screened, plain in zip(fits[True], fits[False], strict=True):
        for a, b in zip(screened, plain, strict=True):
            assert torch.equal(a.support, b.support)
            torch.testing.assert_close(a.z, b.z, rtol=1e-4, atol=1e-5)
