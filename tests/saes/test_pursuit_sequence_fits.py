"""Least squares of sequences: against the pseudo-inverse, and alike however many run and whatever else is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sae_research.saes.pursuit import sequence_fits, thresholding
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


def test_numbers_do_not_depend_on_which_other_k_are_asked_for() -> None:
    d = made(unit(96, 0.05))
    together = thresholding.fit_sequences(sequences(), d, KS)
    for k, fits in zip(KS, together, strict=True):
        (alone,) = thresholding.fit_sequences(sequences(), d, [k])
        assert all(torch.equal(a.z, b.z) and torch.equal(a.support, b.support) for a, b in zip(fits, alone, strict=True))


def test_a_singular_matrix_has_no_solution_here() -> None:
    atoms = torch.eye(4).double()
    atoms[3] = atoms[2]
    x = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).double()
    for support, wanted in (([0, 2], [[1.0, 3.0]]), ([0, 1, 2, 3], None)):
        rows = torch.tensor(support)
        z = sequence_fits.solve_on_support(atoms @ atoms.T, rows, x @ atoms[rows].T, 1e-5)
        assert (None if z is None else z.tolist()) == wanted


def test_an_error_in_a_thread_is_raised_and_threads_stay() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="third"):
            sequence_fits.one_thread_each(lambda i: int("third" if i == 3 else i), range(8))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
