"""IHTP and matching pursuit against plain reference loops, and what masks, families, signs and bad input promise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.saes import SAEConfig, encode_each, families, load_sae, registry, save_sae
from sae_research.saes.pursuit import matching
from sae_research.saes.pursuit.encoders import (
    IHTPSAE,
    MPSAE,
    OMPSAE,
    NonNegativeMPSAE,
    NonNegativeOMPSAE,
    PursuitSAE,
    TopKRefitSAE,
)
from tests.helpers.pursuit_loops import loop_ihtp, loop_matching

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


@pytest.mark.parametrize("k", [1, 3, 20])
def test_ihtp_is_least_squares_on_the_union(k: int) -> None:
    (W, b), x = dictionary(), activations()
    mask = masked(x)
    z = IHTPSAE(W, b, k=k).encode(x, mask)
    expected = loop_ihtp(x - b, W, k, mask)
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


@pytest.mark.parametrize("d_sae", [100, 128])  # below and at a multiple of the compiled kernel's lanes
def test_pursuit_takes_the_reference_atoms(d_sae: int) -> None:
    (W, b), x = dictionary(d_sae), activations()
    for s in (1, 6):
        expected, _ = loop_matching((x - b).reshape(-1, D_IN), W, s)
        z = MPSAE(W, b, s=s).encode(x).reshape(-1, d_sae)
        assert torch.equal(z != 0, expected != 0)
        torch.testing.assert_close(z.double(), expected, atol=1e-4, rtol=1e-4)


ENCODERS = {
    "ihtp": lambda W, b, **options: IHTPSAE(W, b, k=3, **options),
    "ihtp, iterated": lambda W, b, **options: IHTPSAE(W, b, k=1, iterations=3, **options),
    "topk_refit": lambda W, b, **options: TopKRefitSAE(W, b, k=4, **options),
    "topk_refit, iterated": lambda W, b, **options: TopKRefitSAE(W, b, k=4, iterations=3, **options),
    "mpsae": lambda W, b, **options: MPSAE(W, b, s=7, **options),
    "mpsae, stopping": lambda W, b, **options: MPSAE(W, b, s=7, tolerance=0.5, **options),
    "nn_mpsae": lambda W, b, **options: NonNegativeMPSAE(W, b, s=7, **options),
    "omp": lambda W, b, **options: OMPSAE(W, b, s=5, **options),
    "nn_omp": lambda W, b, **options: NonNegativeOMPSAE(W, b, s=5, **options),
}


@pytest.fixture(params=ENCODERS)
def make(request: pytest.FixtureRequest) -> Callable[..., PursuitSAE]:
    return ENCODERS[request.param]


def test_flipped_dictionary_flips_the_activations(make) -> None:
    (W, b), x = dictionary(), activations()
    sae, flipped = make(W, b), make(-W, b)
    if not sae.signed:  # atoms that point the other way explain the other half
        z = sae.encode(x)
        assert (z >= 0).all() and z.any()
        torch.testing.assert_close(make(-W, -b).encode(-x), z)
        return
    z, z_flipped = sae.encode(x), flipped.encode(x)
    torch.testing.assert_close(z_flipped, -z)
    torch.testing.assert_close(flipped.decode(z_flipped), sae.decode(z))


def test_masked_tokens_influence_nothing(make) -> None:
    (W, b), x = dictionary(), activations()
    mask, sae = masked(x), make(W, b)
    z = sae.encode(x, mask)
    other = torch.where(mask[..., None], x, 1000 * torch.randn_like(x))
    assert not z[~mask].any() and z[mask].any()
    torch.testing.assert_close(sae.encode(other, mask), z)


def test_all_masked(make) -> None:
    (W, b), x = dictionary(), activations()
    z = make(W, b).encode(x, torch.zeros(x.shape[:2], dtype=torch.bool))
    assert z.shape == (*x.shape[:2], D_SAE) and not z.any()


def test_batch_size_changes_nothing(make) -> None:
    (W, b), x = dictionary(), activations(batch=4)
    mask, sae = masked(x), make(W, b)
    whole = sae.encode(x, mask)
    parts = torch.cat([sae.encode(x[i : i + 1], mask[i : i + 1]) for i in range(len(x))])
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


def test_b_dec_is_always_subtracted(make) -> None:
    """The dictionary of a JumpReLU SAE that does not centre its input still explains what b_dec leaves."""
    (W, b), x = dictionary(), activations()
    sae = make(W, b)
    cfg = SAEConfig(form=sae.form, d_in=D_IN, d_sae=D_SAE, apply_b_dec_to_input=False, options=sae.options())
    other = type(sae).from_tensors(cfg, {"W_dec": W, "b_dec": b})
    torch.testing.assert_close(other.encode(x), sae.encode(x))


def test_files_keep_every_option(make, tmp_path) -> None:
    (W, b), x = dictionary(), activations()
    sae = make(W, b)
    sae.cfg = sae.cfg.replace(options=sae.options())
    save_sae(sae, tmp_path)
    loaded = load_sae(tmp_path)
    assert type(loaded) is type(sae) and loaded.options() == sae.options()
    torch.testing.assert_close(loaded.encode(x), sae.encode(x))


# --- bad input -------------------------------------------------------------------------------


def test_rows_not_of_unit_norm_are_scaled_and_noted_or_refused(make) -> None:
    (W, b), x = dictionary(), activations()
    unit = torch.nn.functional.normalize(W, dim=1)
    assert make(unit, b).notes == []
    assert make(unit, b, normalise="refuse").options()["normalise"] == "refuse"
    long = unit.clone()
    long[[3, 8]] *= torch.tensor([[2.0], [0.5]])
    sae = make(long, b)
    assert sae.notes == ["2 of 100 atoms are not of unit norm (0.5 to 2): scaled to it"]
    torch.testing.assert_close(sae.W_dec, unit)
    torch.testing.assert_close(sae.encode(x), make(unit, b).encode(x))
    with pytest.raises(UserError, match=f"{sae.form}: 2 of 100 atoms are not of unit norm .0.5 to 2.; pursuit needs unit"):
        make(long, b, normalise="refuse")
    with pytest.raises(UserError, match="normalise must be note or refuse"):
        make(long, b, normalise="perhaps")


def test_zero_atoms_are_never_taken_or_refused(make) -> None:
    (W, b), x = dictionary(), activations()
    W[[0, 40]] = 0
    sae = make(W, b)
    assert "2 of 100 atoms are zero vectors: never taken" in sae.notes
    z = sae.encode(x)
    assert not z[..., [0, 40]].any()
    rest = [i for i in range(D_SAE) if i not in (0, 40)]
    torch.testing.assert_close(z[..., rest], make(W[rest], b).encode(x), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="2 of 100 atoms are zero vectors; pursuit needs unit"):
        make(torch.nn.functional.normalize(W, dim=1), b, normalise="refuse")
    with pytest.raises(UserError, match="every atom of the dictionary is a zero vector"):
        make(torch.zeros_like(W), b)


def test_of_equal_or_opposite_atoms_the_first_stands_for_all(make) -> None:
    (W, b), x = dictionary(), activations()
    repeated = torch.cat([W, W[:30], 2 * W[30:50]])
    sae = make(repeated, b)
    assert sae.notes[-1].startswith("50 atoms repeat another") and sae.notes[-1].endswith(": the first stands for all")
    if sae.signed:
        sae = make(torch.cat([repeated, -W[:30]]), b)
        assert sae.notes[-1] == "80 atoms repeat another up to sign: the first stands for all"
    z = sae.encode(x)
    assert not z[..., D_SAE:].any()
    torch.testing.assert_close(z[..., :D_SAE], make(W, b).encode(x), atol=1e-5, rtol=1e-5)


def test_opposite_atoms_make_non_negative_pursuit_signed() -> None:
    (W, b), x = dictionary(), activations()
    for cls, signed in ((NonNegativeMPSAE, MPSAE), (NonNegativeOMPSAE, None)):
        sae = cls(torch.cat([W, -W]), b, 5)
        assert len(sae.notes) == 1  # their norms
        z = sae.encode(x)
        assert z[..., :D_SAE].any() and z[..., D_SAE:].any()
        if signed:
            torch.testing.assert_close(z[..., :D_SAE] - z[..., D_SAE:], signed(W, b, 5).encode(x), atol=1e-5, rtol=1e-5)


def test_activations_that_are_not_finite(make) -> None:
    (W, b), x = dictionary(), activations()
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    for bad in (torch.nan, torch.inf):
        x[1, 1, 1] = bad
        sae = make(W, b)
        for given in (mask, None):
            with pytest.raises(UserError, match=f"{sae.form}: the activations hold NaN or infinity"):
                sae.encode(x, given)
        without = mask.clone()
        without[1, 1] = False
        assert torch.isfinite(sae.encode(x, without)).all()


def test_tokens_that_correlate_with_nothing_have_no_latents(make) -> None:
    W, b = dictionary()
    W[:, 0] = 0
    x = b.expand(2, 3, D_IN).clone()
    x[0, :, 0] += 5  # orthogonal to every atom
    x[1, 1] += 1
    z = make(W, b).encode(x)
    assert not z[0].any() and z[1, 1].any()


@pytest.mark.parametrize(
    "form", ["ihtp", "topk_refit", "matching_pursuit", "nonnegative_matching_pursuit", "omp", "nonnegative_omp"]
)
@pytest.mark.parametrize("size", [0, D_SAE + 1])
def test_sizes_are_checked(form: str, size: int) -> None:
    with pytest.raises(UserError, match=f"{form}: [ks] = {size} must lie between 1 and d_sae = {D_SAE}"):
        registry[form](*dictionary(), size)


def test_the_largest_sizes_work(make) -> None:
    W, b = dictionary(40)
    x = activations()
    sae = type(make(W, b))(W, b, 40)
    z = sae.encode(x)
    assert torch.isfinite(z).all()
    if sae.form in ("ihtp", "topk_refit", "omp"):
        torch.testing.assert_close(sae.decode(z), x, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (MPSAE, {"tolerance": 1.0}, "tolerance = 1.0 must be at least 0 and less than 1"),
        (OMPSAE, {"tolerance": -0.1}, "tolerance = -0.1 must be"),
        (IHTPSAE, {"iterations": -1}, "iterations = -1 must not be negative"),
        (TopKRefitSAE, {"iterations": -2}, "iterations = -2 must not be negative"),
    ],
)
def test_options_are_checked(cls: type, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        cls(*dictionary(), 3, **options)


# --- families --------------------------------------------------------------------------------


def test_families_equal_solo_encoding() -> None:
    (W, b), (W2, _), x = dictionary(), dictionary(seed=9), activations()
    mask = masked(x)
    saes = {
        "i5": IHTPSAE(W, b, 5),
        "i1": IHTPSAE(W, b, 1),
        "m9": MPSAE(W, b, 9),
        "m2": MPSAE(W.clone(), b, 2),
        "other": MPSAE(W2, b, 2),
        "stopping": MPSAE(W, b, 2, tolerance=0.3),
        "n2": NonNegativeMPSAE(W, b, 2),
        "n6": NonNegativeMPSAE(W, b, 6),
        "o6": OMPSAE(W, b, 6),
        "o3": OMPSAE(W, b, 3),
        "no3": NonNegativeOMPSAE(W, b, 3),
        "no6": NonNegativeOMPSAE(W, b, 6),
        "t3": TopKRefitSAE(W, b, 3),
        "t6": TopKRefitSAE(W, b, 6),
    }
    assert families(saes) == [
        ["i5", "i1"],
        ["m9", "m2"],
        ["other"],
        ["stopping"],
        ["n2", "n6"],
        ["o6", "o3"],
        ["no3", "no6"],
        ["t3", "t6"],
    ]
    for name, z in encode_each(saes, x, mask):
        torch.testing.assert_close(z, saes[name].encode(x, mask), atol=1e-5, rtol=1e-5)


def test_a_family_runs_once_to_its_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    (W, b), x = dictionary(), activations()
    runs, pursue = [], matching.pursue

    def counted(x_ND, dictionary, steps, **options):
        runs.append(steps)
        return pursue(x_ND, dictionary, steps, **options)

    monkeypatch.setattr(matching, "pursue", counted)
    assert len(list(MPSAE.encode_family([MPSAE(W, b, s) for s in (2, 9, 4)], x, None))) == 3
    assert runs == [9]


def test_dictionaries_that_differ_in_late_rows_are_no_family() -> None:
    W, b = dictionary(800)
    W2 = W.clone()
    W2[700:] *= -1
    assert len(families({"a": MPSAE(W, b, 2), "b": MPSAE(W2, b, 2)})) == 2
