"""What pursuit computes, against plain loops: in float64 atom for atom, in float32 to 1e-5 of the reconstruction error;
and that chunks, memory limits and Gram rows on demand change nothing."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tests.helpers.pursuit_loops as loops
from sae_research.saes.pursuit import kernels_numba, matching, orthogonal, thresholding
from sae_research.saes.pursuit.dictionary import Dictionary, GramRows, shared_dictionary

D_IN, D_SAE, TOKENS = 24, 150, 40
Pursuit = Callable[..., Tensor]


def atoms(d_sae: int = D_SAE, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return loops.unit(torch.randn(d_sae, D_IN, generator=torch.Generator().manual_seed(seed))).to(dtype)


def tokens(n: int = TOKENS, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(n, D_IN, generator=torch.Generator().manual_seed(1)).to(dtype)


def make(W: Tensor, **limits: int) -> Dictionary:
    return Dictionary(W, torch.ones(len(W), dtype=torch.bool), **limits)


def spread(W: Tensor, chosen: Tensor, coefficients: Tensor) -> Tensor:
    """Coefficients [tokens, d_sae]."""
    return torch.zeros(len(chosen), len(W), dtype=W.dtype).scatter_add_(1, chosen, coefficients)


def matching_z(x: Tensor, d: Dictionary, s: int, **options) -> Tensor:
    return spread(d.atoms, *matching.pursue(x, d, s, **options))[:, : d.d_sae]


def omp_z(x: Tensor, d: Dictionary, s: int, pursuit=orthogonal.orthogonal, **options) -> Tensor:
    chosen, fits = pursuit(x, d, [s], **options)
    return spread(d.atoms, chosen, fits[0])[:, : d.d_sae]


def nn_omp_z(x: Tensor, d: Dictionary, s: int, **options) -> Tensor:
    return omp_z(x, d, s, orthogonal.nonnegative_orthogonal, **options)


def refit_z(x: Tensor, d: Dictionary, k: int, **options) -> Tensor:
    return spread(d.atoms, *thresholding.fit_tokens(x, d, [k], **options)[0])[:, : d.d_sae]


def ihtp_z(x: Tensor, d: Dictionary, k: int, **options) -> Tensor:
    fits = thresholding.fit_sequences(list(x.split(8)), d, [k], **options)[0]
    return torch.cat([spread(d.atoms, fit.support.expand(len(fit.z), -1), fit.z) for fit in fits])[:, : d.d_sae]


def ihtp_loop(x: Tensor, W: Tensor, k: int, **options) -> Tensor:
    x_BSD = x.reshape(-1, 8, D_IN)
    return loops.loop_ihtp(x_BSD, W, k, torch.ones(x_BSD.shape[:2], dtype=torch.bool), **options).reshape(len(x), -1)


def nonnegative(pursuit: Pursuit) -> Pursuit:
    return lambda x, d, s, **options: pursuit(x, d, s, nonnegative=True, **options)


ALL = {
    "matching": (matching_z, lambda x, W, s: loops.loop_matching(x, W, s)[0], 12),
    "nonnegative matching": (nonnegative(matching_z), lambda x, W, s: loops.loop_matching(x, W, s, True)[0], 12),
    "orthogonal": (omp_z, lambda x, W, s: loops.loop_orthogonal(x, W, s)[0], 8),
    "nonnegative orthogonal": (nn_omp_z, lambda x, W, s: loops.loop_orthogonal(x, W, s, True)[0], 8),
    "top-k refit": (refit_z, loops.loop_topk_refit, 6),
    "sequence": (ihtp_z, ihtp_loop, 2),
    "sequence, interpolating": (ihtp_z, ihtp_loop, 6),
}


@pytest.fixture(params=ALL)
def member(request: pytest.FixtureRequest) -> tuple[Pursuit, Pursuit, int]:
    return ALL[request.param]


def test_float64_equals_the_plain_loop_atom_for_atom(member) -> None:
    pursuit, loop, size = member
    W, x = atoms(dtype=torch.float64), tokens(dtype=torch.float64)
    z, expected = pursuit(x, make(W), size), loop(x, W, size)
    assert torch.equal(z != 0, expected != 0)
    # coordinate descent stops short of the optimum by a little; everything else is exact
    torch.testing.assert_close(z, expected, atol=1e-9, rtol=1e-9)


def test_float32_reconstructs_as_well_as_the_plain_loop(member) -> None:
    pursuit, loop, size = member
    W, x = atoms(), tokens()
    error = loops.relative_error(x, pursuit(x, make(W), size), W)
    expected = loops.relative_error(x, loop(x, W, size), W)
    np.testing.assert_allclose(error, expected, rtol=1e-5, atol=1e-5)


def test_chunks_change_nothing(member) -> None:
    pursuit, _, size = member
    W, x = atoms(), tokens()
    whole = pursuit(x, make(W), size)
    small = pursuit(x, make(W, max_chunk_bytes=4 * 192 * 12), size)
    assert torch.equal(small != 0, whole != 0)
    torch.testing.assert_close(small, whole, atol=1e-5, rtol=1e-5)


def test_gram_rows_on_demand_change_nothing(member) -> None:
    pursuit, _, size = member
    W, x = atoms(), tokens()
    limited = make(W, max_gram_bytes=4 * 192 * 30)
    assert not limited.gram_fits
    z = pursuit(x, limited, size)
    torch.testing.assert_close(z, pursuit(x, make(W), size), atol=1e-5, rtol=1e-5)
    assert not limited._rows or limited.gram().table.shape == (30, 192)


@pytest.mark.parametrize("name", ["matching", "nonnegative matching", "orthogonal", "nonnegative orthogonal"])
def test_compiled_steps_equal_the_torch_steps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pursuit, _, size = ALL[name]
    W, x = atoms(), tokens()
    compiled = pursuit(x, make(W), size, tolerance=0.3)
    monkeypatch.setattr(matching, "_backend", lambda *_: matching._steps_torch)
    monkeypatch.setattr(orthogonal, "_compiled", lambda x_ND, dictionary: False)
    plain = pursuit(x, make(W), size, tolerance=0.3)
    assert torch.equal(compiled != 0, plain != 0)
    torch.testing.assert_close(compiled, plain, atol=2e-5, rtol=2e-5)


def test_steps_come_in_the_order_taken() -> None:
    W, x = atoms(), tokens()
    _, taken = loops.loop_matching(x, W, 9)
    chosen, coefficients = matching.pursue(x, make(W), 9)
    assert chosen.tolist() == taken
    assert coefficients.dtype == torch.float32
    _, taken = loops.loop_orthogonal(x, W, 9)
    assert orthogonal.orthogonal(x, make(W), [9])[0].tolist() == taken


@pytest.mark.parametrize(("threads", "n"), [(1, 7), (2, 0), (2, 1), (2, 7), (3, 100)])
def test_threads_share_all_tokens(threads: int, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    done = kernels_numba.in_threads(lambda begin, end, offset: list(range(begin + offset, end + offset)), n, 5)
    assert sum(done, []) == list(range(5, n + 5))
    assert len(done) <= max(1, threads * kernels_numba.PARTS_PER_THREAD)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(item, Tensor) and item._base is None:
                self.bytes = max(self.bytes, item.numel() * item.element_size())
        return result


def test_no_allocation_exceeds_the_limits(member) -> None:
    """Beside input, dictionary and result, nothing larger than the chunk limit comes to be."""
    pursuit, _, size = member
    W, x = atoms(), tokens(160)
    limit = 40_000
    dictionary = make(W, max_chunk_bytes=limit, max_gram_bytes=20_000)
    with Largest() as seen:
        pursuit(x, dictionary, size)
    result = len(x) * len(dictionary.atoms) * 4
    assert seen.bytes == result  # spread() makes it; what pursuit made is smaller
    with Largest() as seen:
        if pursuit is ihtp_z:
            thresholding.fit_sequences(list(x.split(8)), dictionary, [size])
        elif pursuit is refit_z:
            thresholding.fit_tokens(x, dictionary, [size])
        elif pursuit in (omp_z, nn_omp_z):
            orthogonal.orthogonal(x, dictionary, [size])
            orthogonal.nonnegative_orthogonal(x, dictionary, [size])
        else:
            matching.pursue(x, dictionary, size)
    assert 0 < seen.bytes <= max(limit, x.numel() * 8)


@pytest.mark.parametrize("iterations", [0, 2])
def test_a_long_sequence_goes_in_parts(iterations: int) -> None:
    W, x = atoms(1500), tokens(300)
    limit = 45_000
    ((whole,),) = thresholding.fit_sequences([x], make(W), [1], iterations=iterations)
    dictionary = make(W, max_chunk_bytes=limit)
    _ = dictionary.gram(), dictionary.coherence, dictionary.precise_gram  # once per dictionary, within their own limits
    with Largest() as seen:
        ((parts,),) = thresholding.fit_sequences([x], dictionary, [1], iterations=iterations)
    assert torch.equal(whole.support, parts.support)
    torch.testing.assert_close(parts.z, whole.z, atol=1e-5, rtol=1e-5)
    # the one problem's own equations, in float64, are the only larger thing
    assert seen.bytes <= 8 * len(x) * len(x) < 4 * len(x) * len(W)


def test_gram_table_refills_when_full() -> None:
    W = atoms()
    rows = GramRows(W, 4 * D_SAE * 10, 4 * D_SAE * 3)
    assert rows.capacity == 10 and not rows.complete
    for wanted in ([1, 2, 3, 4, 5, 6], [4, 90, 91], [7, 8, 9, 10, 11, 12]):
        rows.fetch(torch.tensor(wanted))
        torch.testing.assert_close(rows.table[rows.slot[wanted].long()], W[wanted] @ W.T)
        assert (rows.slot >= 0).sum() <= 10
    with pytest.raises(RuntimeError, match="11 Gram rows"):
        rows.fetch(torch.arange(11))


def test_encoders_over_one_dictionary_share_its_gram_matrix() -> None:
    W, usable = atoms(), torch.ones(D_SAE, dtype=torch.bool)
    first = shared_dictionary("a", W, usable)
    assert shared_dictionary("a", W.clone(), usable) is first
    assert shared_dictionary("b", W, usable) is not first
    del first
    assert shared_dictionary("a", W.double(), usable).atoms.dtype == torch.float64


@pytest.mark.parametrize("pursuit", [matching_z, nonnegative(matching_z), omp_z, nn_omp_z])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_token_rests_once_its_residual_is_small(pursuit: Pursuit, dtype: torch.dtype) -> None:
    W, x = atoms(dtype=dtype), tokens(12, dtype=dtype)
    x[0] = 3 * W[7]  # explained by one atom
    x[1] = 0
    z = pursuit(x, make(W), 12, tolerance=0.5)
    error, count = loops.relative_error(x[2:], z[2:], W), (z != 0).sum(1)
    assert (error <= 0.5).all()
    assert (z[0] != 0).nonzero()[:, 0].tolist() == [7] and count[1] == 0
    fewer = [pursuit(x[n : n + 1], make(W), max(int(count[n]) - 1, 1)) for n in range(2, 8)]
    assert all(
        loops.relative_error(x[n : n + 1], z_n, W)[0] > 0.5
        for n, z_n in zip(range(2, 8), fewer, strict=True)
        if int(count[n]) > 1 and int((z_n != 0).sum()) == int(count[n]) - 1
    )
    assert ((pursuit(x, make(W), 12) != 0).sum(1) > count)[2:].all()


def test_orthogonal_pursuit_passes_over_dependent_atoms() -> None:
    """Atoms that differ by rounding are one direction; more steps than dimensions end when all are used."""
    W, g = atoms(30), torch.Generator().manual_seed(3)
    twins = torch.nn.functional.normalize(W + 1e-7 * torch.randn(30, D_IN, generator=g), dim=1)
    x = tokens(10)
    chosen, (fit,) = orthogonal.orthogonal(x, make(torch.cat([W, twins])), [28])
    assert (loops.relative_error(x, spread(torch.cat([W, twins]), chosen, fit), torch.cat([W, twins])) < 1e-3).all()
    assert fit.abs().max() < 100
    z = omp_z(x.double(), make(W.double()), 28)
    assert ((z != 0).sum(1) <= D_IN).all()
    torch.testing.assert_close(z @ W.double(), x.double(), atol=1e-9, rtol=1e-9)


def test_orthogonal_members_are_prefixes() -> None:
    W, x = atoms(), tokens()
    for pursuit in (orthogonal.orthogonal, orthogonal.nonnegative_orthogonal):
        chosen, fits = pursuit(x, make(W), [7, 2, 4])
        for size, fit in zip([7, 2, 4], fits, strict=True):
            alone, (fit_alone,) = pursuit(x, make(W), [size])
            torch.testing.assert_close(spread(W, chosen[:, :size], fit), spread(W, alone, fit_alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rounds", [1, 5])
def test_iterations_are_hard_thresholding_pursuit(rounds: int) -> None:
    W, x = atoms(60, torch.float64), tokens(dtype=torch.float64)
    torch.testing.assert_close(refit_z(x, make(W), 4, iterations=rounds), loops.loop_topk_refit(x, W, 4, rounds))
    torch.testing.assert_close(ihtp_z(x, make(W), 1, iterations=rounds), ihtp_loop(x, W, 1, iterations=rounds))
    assert (refit_z(x, make(W), 4, iterations=rounds) != refit_z(x, make(W), 4)).any()


def test_iterations_recover_a_sparse_code() -> None:
    """What thresholding alone misses: with few coherent atoms the true support is found by correcting."""
    W = atoms(40, torch.float64)
    g = torch.Generator().manual_seed(5)
    truth = torch.zeros(60, 40, dtype=torch.float64)
    for row in truth:
        row[torch.randperm(40, generator=g)[:2]] = 1 + torch.rand(2, generator=g, dtype=torch.float64)
    x = truth @ W
    found = [int((refit_z(x, make(W), 2, iterations=n) - truth).abs().amax(1).lt(1e-9).sum()) for n in (0, 10)]
    assert found[1] > found[0]


def test_badly_conditioned_supports_are_solved_with_minimum_norm() -> None:
    W = atoms(10, torch.float64)
    W = torch.cat([W, W + 1e-9])  # twins that differ by less than float32 knows
    W = W / W.norm(dim=1, keepdim=True)
    x = tokens(16, torch.float64)
    z = ihtp_z(x, make(W), 6)
    assert z.abs().max() < 50
    expected = loops.relative_error(x, ihtp_loop(x, W[:10], 10), W[:10])
    np.testing.assert_allclose(loops.relative_error(x, ihtp_z(x, make(W), 20), W), expected, atol=1e-6)


def test_coherence_is_the_largest_cosine_of_two_atoms() -> None:
    W = atoms(300)
    cosines = (W @ W.T).abs().fill_diagonal_(0)
    assert make(W).coherence == pytest.approx(float(cosines.max()), rel=1e-6)


@pytest.mark.parametrize("precise", [True, False])
def test_coherent_supports_are_solved_in_float64(precise: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs of atoms of cosine 0.9999: float32 equations would be off by percents; with and without a kept Gram matrix."""
    g = torch.Generator().manual_seed(4)
    base = torch.randn(8, D_IN, generator=g)
    W = torch.nn.functional.normalize(torch.cat([base, base + 0.01 * torch.randn(8, D_IN, generator=g)]), dim=1)
    d = make(W)
    assert d.coherence > 0.999
    if not precise:
        monkeypatch.setattr(type(d), "precise_gram", None)
    x = torch.randn(5, D_IN, generator=g)
    ((fitted,),) = thresholding.fit_sequences([x], d, [len(W)])
    wanted = torch.linalg.lstsq(W.double().T, x.double().T).solution.T
    torch.testing.assert_close(fitted.z.double(), wanted, rtol=1e-4, atol=1e-4)
