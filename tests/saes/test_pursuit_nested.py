"""Least squares of nested supports: what one factorisation gives for all k, against each k by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sae_research.saes.pursuit import nested, thresholding
from sae_research.saes.pursuit.dictionary import Dictionary

D_IN, KS = 48, [3, 1, 2]


def unit(n: int, spread: float = 1.0) -> Tensor:
    """Atoms; those of a small spread are nearly alike two by two."""
    g = torch.Generator().manual_seed(n)
    base = torch.randn(n // 2, D_IN, generator=g)
    return torch.nn.functional.normalize(torch.cat([base, base + spread * torch.randn(n // 2, D_IN, generator=g)]), dim=1)


def sequences() -> list[Tensor]:
    g = torch.Generator().manual_seed(1)
    return [torch.randn(length, D_IN, generator=g) for length in (5, 1, 40, 9, 0, 12)]


def made(W: Tensor) -> Dictionary:
    return Dictionary(W, torch.ones(len(W), dtype=torch.bool))


@pytest.mark.parametrize("spread", [1.0, 0.05], ids=["float32", "float64"])
def test_all_k_at_once_equal_each_k_by_svd(spread: float) -> None:
    """Supports without an atom, below and beyond d_in among them."""
    W = unit(128, spread)
    d = made(W)
    assert (d.coherence < thresholding.COHERENT) == (spread == 1.0)
    sizes = set()
    for k, fits in zip(KS, thresholding.fit_sequences(sequences(), d, KS), strict=True):
        for x, (support, z) in zip(sequences(), fits, strict=True):
            named = (x @ W.T).abs().topk(k, dim=-1).indices.unique()
            assert torch.equal(support, named)
            wanted = x.double() @ torch.linalg.pinv(W[support].double())
            torch.testing.assert_close(z.double(), wanted, rtol=1e-3, atol=1e-3)
            sizes.add(len(support))
    assert 0 in sizes and max(sizes) > D_IN > sorted(sizes)[1]


def test_numbers_do_not_depend_on_the_threads() -> None:
    d, before = made(unit(96, 0.05)), torch.get_num_threads()
    x = sequences() * 3
    correlations = [d.correlations(x_TD) for x_TD in x]
    supports = [[c.abs().topk(k, dim=-1).indices.unique() for c in correlations] for k in KS]
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(thresholding._fit_together(d, supports, x, correlations))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for fits, wanted in zip(other, found[0], strict=True):
            assert all(torch.equal(a.z, b.z) for a, b in zip(fits, wanted, strict=True))


def test_a_singular_leading_block_spoils_no_other() -> None:
    """The larger support holds two equal atoms: it has no factor, the smaller one's solution stands."""
    atoms = torch.eye(4).double()
    atoms[3] = atoms[2]
    order, sizes = nested.order_of([torch.tensor([0, 2]), torch.tensor([0, 1, 2, 3])]) or pytest.fail("they are nested")
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).double()
    small, large = nested.solve(atoms @ atoms.T, order, sizes, x @ atoms[order].T, 1e-5)
    assert small is not None and small.tolist() == [[1.0, 3.0]]
    assert large is None


def test_supports_that_are_not_nested_are_told() -> None:
    assert nested.order_of([torch.tensor([0, 2]), torch.tensor([1, 2, 3])]) is None
    assert nested.order_of([]) is None
    order, sizes = nested.order_of([torch.tensor([4]), torch.tensor([1, 4, 7]), torch.tensor([1, 4, 7])]) or pytest.fail()
    assert (order.tolist(), sizes) == ([4, 1, 7], [1, 3, 3])


def test_an_error_in_a_thread_is_raised_and_threads_stay() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="third"):
            nested.one_thread_each(lambda i: int("third" if i == 3 else i), range(8))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
