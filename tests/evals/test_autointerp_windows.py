"""Autointerp: which latents and which windows of text are chosen."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from sae_research.evals import autointerp
from sae_research.evals.autointerp import windows
from sae_research.evals.autointerp.windows import Windows, collect_windows
from sae_research.lm import LanguageModel
from sae_research.lm.activations import HookActivations
from sae_research.saes import SparseAutoencoder, encode_each
from sae_research.saes.forms import StandardSAE
from sae_research.saes.pursuit.encoders import MPSAE
from tests.fixtures import make_autointerp as fixture
from tests.helpers.autointerp_lab import BUFFER, TOP, WEIGHTED, activations, sparse, windows_of
from tests.helpers.evals_saes import D, config, dictionary, everything, standard


def dense_codes(sae: SparseAutoencoder, acts: HookActivations) -> torch.Tensor:
    """Absolute codes of all contexts as bfloat16 [contexts, seq, d_sae]."""
    batch = acts.pool.batch(range(len(acts)))
    ((_, z),) = encode_each({"sae": sae}, batch.acts, acts.lab_mask(batch))
    return z.abs().to(torch.bfloat16)


@pytest.mark.parametrize("name", ["sparse", "mpsae_s3", "identity"])
def test_windows_are_those_of_the_definition(name: str, lm: LanguageModel, settings: Any) -> None:
    """Against a plain search through the dense codes."""
    params, sae = settings(), {**everything(), "sparse": sparse()}[name]
    acts, got = activations(lm, params), windows_of(sae, lm, params)
    z, size = dense_codes(sae, acts), 24
    assert len(got.latents) == 5
    assert got.alive == ((z != 0).sum((0, 1)) > 15).sum()
    for number, latent in enumerate(got.latents):
        code = z[..., latent]
        assert got.firings[number] == (code != 0).sum()
        inner = code[:, BUFFER:-BUFFER].float().numpy()
        rows, columns = np.unravel_index(np.lexsort((np.arange(inner.size), -inner.ravel())), inner.shape)
        top: list[tuple[int, int]] = []
        for row, column in zip(rows.tolist(), (columns + BUFFER).tolist(), strict=True):
            if len(top) < TOP and all(row != r or abs(column - c) > BUFFER for r, c in top):
                top.append((row, column))
        places = [(p // size, p % size) for p in got.positions[number].tolist()]
        assert places[:TOP] == top
        weakest = code[top[-1]]
        for row, column in places[TOP : TOP + WEIGHTED]:
            assert 0 < code[row, column] < weakest
        assert len(set(places[TOP : TOP + WEIGHTED])) == WEIGHTED
        for place, values in zip(places, got.values[number], strict=True):
            assert BUFFER <= place[1] < size - BUFFER
            assert torch.equal(values, code[place[0], place[1] - BUFFER : place[1] + BUFFER + 1])


def test_weighted_windows_are_drawn_by_the_squared_activation(lm: LanguageModel, settings: Any) -> None:
    """The first of them, over many seeds, against the probabilities of the definition."""
    params = settings(override_latents=[3], total_tokens=480)
    acts, sae = activations(lm, params), standard()
    code = dense_codes(sae, acts)[..., 3].float()
    firsts = []
    for seed in range(120):
        chosen = collect_windows({"sae": sae}, acts, params.autointerp, seed)["sae"]
        firsts.append(chosen.positions[0, TOP].item())
    weakest = code.flatten()[chosen.positions[0, TOP - 1]]
    weight = torch.where(code < weakest, code, 0.0)
    weight[:, :BUFFER] = weight[:, -BUFFER:] = 0
    probability = (weight.square() / weight.square().sum()).flatten()
    strongest = probability.argsort(descending=True)[:5]
    for place in strongest.tolist():
        expected = probability[place].item()
        spread = (expected * (1 - expected) / len(firsts)) ** 0.5
        assert abs(firsts.count(place) / len(firsts) - expected) < 4 * spread
    assert probability[strongest].sum() > 0.1
    assert set(firsts) <= set(probability.nonzero()[:, 0].tolist())


def same(one: Windows, other: Windows) -> bool:
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, other, strict=True))


def test_batches_and_neighbours_change_no_window(lm: LanguageModel, settings: Any, make_params: Any) -> None:
    params = settings()
    wide = params.model_copy(update={"model": params.model.model_copy(update={"llm_batch_size": 7})})
    saes = {name: everything()[name] for name in ("standard", "mpsae_s3", "mpsae_s6", "ihtp_k1")}
    together = autointerp.find_windows(saes, lm, params, fixture.tokens_of(lm, params))
    for name, sae in saes.items():
        assert same(windows_of(sae, lm, params), together[name]), name
        assert same(windows_of(sae, lm, wide), together[name]), name
    kept = autointerp.find_windows(saes, lm, params, fixture.tokens_of(lm, params))
    assert all(same(kept[name], together[name]) for name in together), "read from the cache"


def test_sign_changes_no_window_of_a_signed_code(lm: LanguageModel, settings: Any) -> None:
    one, other = (
        windows_of(MPSAE(sign * dictionary(), torch.zeros(D), 5, config("matching_pursuit", s=5)), lm, settings())
        for sign in (1, -1)
    )
    assert same(one, other)


def test_dead_latents_are_passed_over_and_the_search_goes_on(
    lm: LanguageModel, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four in five latents are dead: the first ones followed hold too few, another pass finds the rest."""
    params, passes = settings(n_latents=8), []
    monkeypatch.setattr(windows, "_SPARE", 0)
    take = windows._Search.take
    monkeypatch.setattr(windows._Search, "take", lambda self, follower: passes.append(1) or take(self, follower))
    dead = torch.zeros(64, dtype=torch.bool)
    dead[np.random.default_rng(0).permutation(64)[:51]] = True
    sae = standard()
    sae.b_enc[dead] = -1e6
    chosen = windows_of(sae, lm, params)
    assert len(passes) == 2
    assert chosen.alive == 13
    assert len(chosen.latents) == 8
    assert not dead[chosen.latents].any()
    order = np.random.default_rng(42).permutation(64).tolist()
    assert chosen.latents == sorted([latent for latent in order if not dead[latent]][:8])
    assert chosen.passed_over == order.index([latent for latent in order if not dead[latent]][7]) + 1 - 8
    everything_alive = windows_of(sae, lm, settings(n_latents=40))
    assert everything_alive.latents == sorted((~dead).nonzero()[:, 0].tolist())


def test_latents_asked_for_by_number(lm: LanguageModel, settings: Any) -> None:
    chosen = windows_of(standard(), lm, settings(override_latents=[40, 3, 3, 64]))
    assert chosen.latents == [3, 40]
    assert chosen.passed_over == 1, "there is no latent 64"


def test_a_latent_with_one_strength_only_is_passed_over(lm: LanguageModel, settings: Any) -> None:
    """Nothing weaker than its strongest windows: no weighted ones to draw."""

    class Binary(StandardSAE):
        def encode(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return (super().encode(x, mask) > 0).float()

    sae = standard()
    sae.__class__ = Binary
    chosen = windows_of(sae, lm, settings())
    assert chosen.latents == []
    assert chosen.passed_over == 64
    assert chosen.alive > 0
