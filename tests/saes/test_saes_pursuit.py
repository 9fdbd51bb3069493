"""IHTP and matching pursuit against plain reference loops, and what masks, families and signs promise."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sae_research.errors import UserError
from sae_research.instance_sae import IHTPSAE, MPSAE
from sae_research.saes import SAEConfig, encode_each, families

D_IN, D_SAE = 24, 100


def dictionary(d_sae: int = D_SAE, seed: int = 0) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(d_sae, D_IN, generator=g), torch.randn(D_IN, generator=g) / 3


def activations(batch: int = 3, seq: int = 5, seed: int = 1) -> Tensor:
    return torch.randn(batch, seq, D_IN, generator=torch.Generator().manual_seed(seed))


def masked(x: Tensor) -> Tensor:
    mask = torch.rand(x.shape[:2], generator=torch.Generator().manual_seed(2)) > 0.4
    mask[0] = False
    return mask


def reference_ihtp(x: Tensor, W: Tensor, b: Tensor, k: int, mask: Tensor) -> Tensor:
    """Least squares (minimum norm) on the union of each counted token's k best atoms, one sequence at a
    time."""
    W = torch.nn.functional.normalize(W.double(), dim=1)
    z = torch.zeros(*x.shape[:2], len(W), dtype=torch.float64)
    for i in range(len(x)):
        kept = mask[i].nonzero()[:, 0]
        if len(kept) == 0:
            continue
        rows = x[i, kept].double() - b.double()
        support = sorted({int(j) for row in rows for j in (row @ W.T).abs().topk(k).indices})
        solution = torch.linalg.lstsq(W[support].T, rows.T, driver="gelsd").solution.T
        for row, position in enumerate(kept):
            z[i, position, support] = solution[row]
    return z


def reference_pursuit(x: Tensor, W: Tensor, b: Tensor, s: int) -> tuple[Tensor, list[list[int]]]:
    """The greedy loop as the textbook has it, residual and all, in float64."""
    W = torch.nn.functional.normalize(W.double(), dim=1)
    tokens = x.double().reshape(-1, x.shape[-1]) - b.double()
    z, taken = torch.zeros(len(tokens), len(W), dtype=torch.float64), []
    for n, residual in enumerate(tokens):
        atoms = []
        for _ in range(s):
            correlations = W @ residual
            atom = int(correlations.abs().argmax())
            z[n, atom] += correlations[atom]
            residual = residual - correlations[atom] * W[atom]
            atoms.append(atom)
        taken.append(atoms)
    return z.reshape(*x.shape[:-1], len(W)), taken


@pytest.mark.parametrize("k", [1, 3, 20])
def test_ihtp_is_least_squares_on_the_union(k: int) -> None:
    (W, b), x = dictionary(), activations()
    mask = masked(x)
    z = IHTPSAE(W, b, k=k).encode(x, mask)
    expected = reference_ihtp(x, W, b, k, mask)
    assert torch.equal(z != 0, expected != 0)
    torch.testing.assert_close(z.double(), expected, atol=1e-4, rtol=1e-4)


def test_ihtp_of_large_support_interpolates_with_minimum_norm() -> None:
    (W, b), x = dictionary(), activations(batch=1, seq=20)
    sae = IHTPSAE(W, b, k=10)
    z = sae.encode(x)
    support = (z[0] != 0).any(dim=0)
    assert support.sum() >= D_IN
    torch.testing.assert_close(sae.decode(z), x, atol=1e-4, rtol=1e-4)
    # minimum norm: coefficients lie in the row space of the support's atoms
    atoms = sae.W_dec[support].double()
    coefficients = z[0][:, support].double()
    projector = atoms @ torch.linalg.pinv(atoms)
    torch.testing.assert_close(coefficients @ projector, coefficients, atol=1e-5, rtol=1e-5)


def test_ihtp_survives_duplicate_atoms() -> None:
    W, b = dictionary(10)
    W = torch.cat([W, W, -W])
    x = activations()
    sae = IHTPSAE(W, b, k=3)
    z = sae.encode(x)
    assert torch.isfinite(z).all()
    alone = IHTPSAE(W[:10], b, k=1)
    error, error_alone = (sae.decode(z) - x).norm(), (alone.decode(alone.encode(x)) - x).norm()
    torch.testing.assert_close(error, error_alone, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("d_sae", [100, 128])  # below and at a multiple of the compiled kernel's lanes
def test_pursuit_takes_the_reference_atoms(d_sae: int) -> None:
    (W, b), x = dictionary(d_sae), activations()
    for s in (1, 6):
        expected, _ = reference_pursuit(x, W, b, s)
        z = MPSAE(W, b, s=s).encode(x)
        assert torch.equal(z != 0, expected != 0)
        torch.testing.assert_close(z.double(), expected, atol=1e-4, rtol=1e-4)


def test_compiled_steps_equal_the_torch_steps() -> None:
    from sae_research.instance_sae import _steps_numba, _steps_torch

    (W, _), x = dictionary(), activations().reshape(-1, D_IN)
    W = torch.nn.functional.normalize(W, dim=1)
    _, expected = reference_pursuit(x, W, torch.zeros(D_IN), 8)
    for steps in (_steps_numba, _steps_torch):
        atoms, coefficients = steps(x @ W.T, W @ W.T, 8)
        assert atoms.tolist() == expected
        assert coefficients.dtype == torch.float32
    torch.testing.assert_close(_steps_numba(x @ W.T, W @ W.T, 8)[1], _steps_torch(x @ W.T, W @ W.T, 8)[1])


@pytest.mark.parametrize("make", [lambda W, b: IHTPSAE(W, b, k=3), lambda W, b: MPSAE(W, b, s=7)])
class TestBoth:
    def test_flipped_dictionary_flips_the_activations(self, make) -> None:
        (W, b), x = dictionary(), activations()
        sae, flipped = make(W, b), make(-W, b)
        z, z_flipped = sae.encode(x), flipped.encode(x)
        torch.testing.assert_close(z_flipped, -z)
        torch.testing.assert_close(flipped.decode(z_flipped), sae.decode(z))

    def test_masked_tokens_influence_nothing(self, make) -> None:
        (W, b), x = dictionary(), activations()
        mask, sae = masked(x), make(W, b)
        z = sae.encode(x, mask)
        other = torch.where(mask[..., None], x, 1000 * torch.randn_like(x))
        assert not z[~mask].any()
        torch.testing.assert_close(sae.encode(other, mask), z)

    def test_all_masked(self, make) -> None:
        (W, b), x = dictionary(), activations()
        z = make(W, b).encode(x, torch.zeros(x.shape[:2], dtype=torch.bool))
        assert z.shape == (*x.shape[:2], D_SAE) and not z.any()

    def test_batch_size_changes_nothing(self, make) -> None:
        (W, b), x = dictionary(), activations(batch=4)
        mask, sae = masked(x), make(W, b)
        whole = sae.encode(x, mask)
        parts = torch.cat([sae.encode(x[i:i + 1], mask[i:i + 1]) for i in range(len(x))])
        torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)

    def test_b_dec_is_always_subtracted(self, make) -> None:
        """The dictionary of a JumpReLU SAE that does not centre its input still explains what b_dec
        leaves."""
        (W, b), x = dictionary(), activations()
        sae = make(W, b)
        cfg = SAEConfig(
            form=sae.form, d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=False, options=sae.options()
        )
        other = type(sae).from_tensors(cfg, {"W_dec": W, "b_dec": b})
        torch.testing.assert_close(other.encode(x), sae.encode(x))

    def test_dictionary_is_checked(self, make) -> None:
        W, b = dictionary()
        W[3] = 0
        with pytest.raises(UserError, match="1 atoms of the dictionary are zero"):
            make(W, b)


def test_families_equal_solo_encoding() -> None:
    (W, b), (W2, _), x = dictionary(), dictionary(seed=9), activations()
    mask = masked(x)
    saes = {
        "i5": IHTPSAE(W, b, 5),
        "i1": IHTPSAE(W, b, 1),
        "m9": MPSAE(W, b, 9),
        "m2": MPSAE(W.clone(), b, 2),
        "other": MPSAE(W2, b, 2),
    }
    assert families(saes) == [["i5", "i1"], ["m9", "m2"], ["other"]]
    for name, z in encode_each(saes, x, mask):
        torch.testing.assert_close(z, saes[name].encode(x, mask))


def test_dictionaries_that_differ_in_late_rows_are_no_family() -> None:
    W, b = dictionary(800)
    W2 = W.clone()
    W2[700:] *= -1
    assert len(families({"a": MPSAE(W, b, 2), "b": MPSAE(W2, b, 2)})) == 2


@pytest.mark.parametrize(
    ("cls", "size"), [(IHTPSAE, 0), (IHTPSAE, D_SAE + 1), (MPSAE, 0), (MPSAE, D_SAE + 1)]
)
def test_sizes_are_checked(cls: type, size: int) -> None:
    with pytest.raises(UserError, match=f"= {size} must lie between 1 and d_sae = {D_SAE}"):
        cls(*dictionary(), size)


def test_pursuit_refuses_nan() -> None:
    (W, b), x = dictionary(), activations()
    x[1, 1, 1] = torch.nan
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    with pytest.raises(UserError, match="NaN or infinity"):
        MPSAE(W, b, 2).encode(x, mask)
    mask[1, 1] = False
    assert torch.isfinite(MPSAE(W, b, 2).encode(x, mask)).all()


def test_ihtp_of_a_sequence_that_correlates_with_nothing_is_empty() -> None:
    from sae_research.instance_sae import IHTPSAE

    W = torch.nn.functional.normalize(torch.randn(12, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    sae = IHTPSAE(W, torch.zeros(8), k=2)
    x = torch.zeros(2, 5, 8)
    x[1] = 1.0
    z = sae.encode(x)
    assert (z[0] == 0).all()
    assert (z[1] != 0).any()
