"""Latent statistics gathered in a stream, against the same figures from all activations at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from sae_research.analysis import collect as stats_module
from sae_research.analysis.accumulate import Accumulator, firings, joined
from sae_research.analysis.collect import SAMPLE_LEVELS, LatentStats, collect_stats, load_stats, store_folder
from sae_research.analysis.store import N_BINS, histogram_quantile
from sae_research.config.params import Params
from sae_research.lm import LanguageModel, token_mask
from sae_research.runtime.errors import UserError
from sae_research.saes import SparseAutoencoder
from sae_research.saes.pursuit.encoders import IHTPSAE
from sae_research.text.tokens import context_chunks, token_contexts
from tests.helpers.analysis import LATE, SIZE, biased
from tests.helpers.damage import flip
from tests.helpers.tiny_saes import D_SAE, tiny_sae

N_TOKENS = 4_000


def plain(sae: SparseAutoencoder, lm: LanguageModel, params: Params, stats: LatentStats) -> tuple[np.ndarray, np.ndarray]:
    """(activations [n, S, F], mask [n, S]) of the whole text at once."""
    tokens = token_contexts(lm.tokenizer, lm.separator_id, params.text, "sae_train", N_TOKENS).tokens
    acts = lm.activations(tokens, LATE)
    mask = token_mask(lm, tokens, acts, params.token_mask, stats.about["mask"]["median_norm"])
    return sae.encode(acts, mask).numpy(), mask.numpy()


@pytest.mark.parametrize("form", ["standard", "topk", "linear"])
def test_streamed_figures_are_the_plain_ones(
    form: str, lm: LanguageModel, params: Params, in_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats_module, "SHARD_TOKENS", 1024)
    monkeypatch.setattr(stats_module, "ENCODE_ELEMENTS", 3 * SIZE * D_SAE)
    sae = biased(form, 30.0)
    stats = collect_stats({"it": sae}, lm, params)["it"]
    z, mask = plain(sae, lm, params, stats)
    assert stats.tokens == mask.sum() and len(stats.about["shards"]) > 2
    np.testing.assert_array_equal(
        stats.token_ids, token_contexts(lm.tokenizer, lm.separator_id, params.text, "sae_train", N_TOKENS).tokens
    )
    fires = z != 0
    np.testing.assert_array_equal(stats.count, fires.sum((0, 1)))
    np.testing.assert_array_equal(stats.contexts_firing, fires.any(1).sum(0))
    np.testing.assert_allclose(stats.density, fires.sum((0, 1)) / mask.sum())
    assert stats.signed == (form == "linear") == bool((z < 0).any())
    assert form == "linear" or (stats.count == 0).any(), "the case of a dead latent is meant to occur"
    for latent in range(0, D_SAE, 5):
        values = z[..., latent][fires[..., latent]]
        numbers, held = stats.activations(latent)
        dense = np.zeros(z[..., latent].size, np.float32)
        dense[numbers] = held
        np.testing.assert_allclose(dense, z[..., latent].reshape(-1), rtol=1e-4, atol=1e-5)
        assert stats.histogram[latent].sum() == len(values)
        if not len(values):
            assert stats.max[latent] == 0 and stats.quantile(0.5)[latent] == 0 and stats.top(latent) == []
            assert stats.kind[latent] == "dead"
            continue
        np.testing.assert_allclose(
            [stats.max[latent], stats.min[latent], stats.mean[latent]],
            [values.max(), values.min(), values.mean()],
            rtol=1e-3,
            atol=1e-4,
        )
        np.testing.assert_allclose(stats.standard_deviation[latent], values.std(), rtol=1e-3, atol=1e-4)
        for q in (0.1, 0.5, 0.99):
            exact = np.quantile(values, [max(0, q - 1 / len(values)), min(1, q + 1 / len(values))])
            got = stats.quantile(q, [latent])[0]
            assert exact.min() - 0.03 * abs(exact.min()) - 1e-5 <= got <= exact.max() + 0.03 * abs(exact.max()) + 1e-5


@pytest.mark.parametrize(
    ("firings", "kinds"),
    [
        ([0, 10, 10, 10, 10], ["dead"] + ["between"] * 4),  # a healthy SAE of high L0: nobody is dense
        ([1, 20_000] + [200] * 498, ["rare", "dense"] + ["between"] * 498),
        ([0, 900, 900], ["dead", "dense", "dense"]),
    ],
)
def test_kinds_are_relative_to_the_density_of_equals(firings: list[int], kinds: list[str]) -> None:
    stats = object.__new__(LatentStats)
    stats.__dict__ |= {"count": np.array(firings), "tokens": 1_000 if len(firings) < 9 else 100_000, "d_sae": len(firings)}
    assert stats.kind.tolist() == kinds
    assert stats.expected_density == pytest.approx(np.mean(firings) / stats.tokens)


def test_top_and_sampled_contexts(lm: LanguageModel, params: Params, in_project: Path) -> None:
    sae = biased("standard", 20.0)
    stats = collect_stats({"it": sae}, lm, params)["it"]
    z, _ = plain(sae, lm, params, stats)
    for latent in np.flatnonzero(stats.count > 30)[:6].tolist():
        top = stats.top(latent)
        best = [
            z[..., latent][stats.document == document].max()
            for document in range(len(stats.documents))
            if (stats.document == document).any()
        ]
        np.testing.assert_allclose([c.value for c in top], sorted(best, reverse=True)[:4], rtol=1e-4)
        assert len({c.document for c in top}) == len(top), "one text shows once"
        for c in (*top, *stats.samples(latent)):
            np.testing.assert_allclose(c.activations, z[c.context, :, latent], rtol=1e-4, atol=1e-5)
            assert c.activations[c.position] == pytest.approx(c.value)
            assert c.tokens == [lm.tokenizer.decode([i]) for i in c.token_ids]
        limits = [stats.quantile(part / SAMPLE_LEVELS)[latent] for part in range(1, SAMPLE_LEVELS)]
        for c in stats.samples(latent):
            assert sum(c.value > limit for limit in limits) == c.level
        assert {c.level for c in stats.samples(latent)} == set(range(SAMPLE_LEVELS))
        assert [c.level for c in stats.samples(latent, 1)] == [1] * len(stats.samples(latent, 1))
    positions, latents, values = stats.of_context(3)
    there = np.nonzero(z[3])
    np.testing.assert_array_equal(np.stack([positions, latents]), np.stack(there))
    np.testing.assert_allclose(values, z[3][there], rtol=1e-4, atol=1e-5)


def test_an_interrupted_pass_goes_on_and_ends_the_same(
    lm: LanguageModel, params: Params, in_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats_module, "SHARD_TOKENS", 1024)
    saes = {"one": biased("standard", 10.0), "two": biased("topk", 10.0)}
    whole = {name: stats.folder for name, stats in collect_stats(saes, lm, params).items()}
    kept = {name: folder.rename(in_project / name) for name, folder in whole.items()}
    real, passes = LanguageModel.activations, []

    def failing(self: LanguageModel, tokens: torch.Tensor, hook: str) -> torch.Tensor:
        passes.append(len(tokens))
        if len(passes) == 9:
            raise KeyboardInterrupt
        return real(self, tokens, hook)

    monkeypatch.setattr(LanguageModel, "activations", failing)
    with pytest.raises(KeyboardInterrupt):
        collect_stats({"one": saes["one"]}, lm, params)
    with pytest.raises(UserError, match="is unfinished"):
        load_stats(whole["one"])
    done, passes[:] = len(passes), [0] * 10
    again = collect_stats(saes, lm, params)
    assert done == 9 and len(passes) > 10
    for name, stats in again.items():
        files = sorted(path.relative_to(kept[name]) for path in kept[name].rglob("*") if path.is_file())
        assert files == sorted(path.relative_to(stats.folder) for path in stats.folder.rglob("*") if path.is_file())
        for file in files:
            assert (stats.folder / file).read_bytes() == (kept[name] / file).read_bytes(), file
    passes.clear()
    collect_stats(saes, lm, params)
    assert passes == [], "a finished store is read, not computed"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["shards/00000/value.npy", "count.npy"])
def test_a_damaged_store_is_collected_again(
    name: str, lm: LanguageModel, params: Params, in_project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saes = {"it": biased("standard", 10.0)}
    folder = collect_stats(saes, lm, params)["it"].folder
    clean = contents(folder)
    flip(folder / name)
    with pytest.raises(UserError, match=f"{name} has another checksum"):
        load_stats(folder)
    assert contents(collect_stats(saes, lm, params)["it"].folder) == clean
    assert f"{name} has another checksum" in capsys.readouterr().out


@pytest.mark.parametrize("pattern", ["shards/*/token.npy", "progress.json"])
def test_an_interrupted_pass_does_not_go_on_from_damage(
    pattern: str, lm: LanguageModel, params: Params, in_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stats_module, "SHARD_TOKENS", 1024)
    saes = {"it": biased("standard", 10.0)}
    folder = collect_stats(saes, lm, params)["it"].folder
    clean, real, passes = contents(folder), LanguageModel.activations, []
    shutil.rmtree(folder)

    def failing(self: LanguageModel, tokens: torch.Tensor, hook: str) -> torch.Tensor:
        passes.append(len(tokens))
        if len(passes) == 12:
            raise KeyboardInterrupt
        return real(self, tokens, hook)

    monkeypatch.setattr(LanguageModel, "activations", failing)
    with pytest.raises(KeyboardInterrupt):
        collect_stats(saes, lm, params)
    flip(next(folder.glob(pattern)))
    assert contents(collect_stats(saes, lm, params)["it"].folder) == clean


def test_the_switch_passes_over_a_store(
    lm: LanguageModel, params: Params, in_project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saes = {"it": biased("standard", 10.0)}
    collect_stats(saes, lm, params)
    monkeypatch.setenv("SAE_RESEARCH_NO_CACHE", "1")
    monkeypatch.setattr(LanguageModel, "activations", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        collect_stats(saes, lm, params)


def test_chunks_are_the_contexts(lm: LanguageModel, params: Params) -> None:
    whole = token_contexts(lm.tokenizer, lm.separator_id, params.text, "sae_train", N_TOKENS)
    chunks = list(context_chunks(lm.tokenizer, lm.separator_id, params.text, "sae_train", N_TOKENS, 7))
    assert torch.equal(torch.cat([c.tokens for c in chunks]), whole.tokens)
    assert torch.equal(torch.cat([c.doc_ids for c in chunks]), whole.doc_ids)
    assert chunks[-1].documents[: len(whole.documents)] == whole.documents
    with pytest.raises(UserError, match="the split sae_train ends after"):
        list(context_chunks(lm.tokenizer, lm.separator_id, params.text, "sae_train", 10_000_000, 64))


def test_an_encoder_over_whole_sequences(lm: LanguageModel, params: Params, in_project: Path) -> None:
    """IHTP: signed, neither per token nor causal; it is given whole contexts."""
    base = biased("standard")
    sae = IHTPSAE(base.W_dec, base.b_dec, 2, base.cfg.replace(form="ihtp", options={"k": 2}))
    stats = collect_stats({"ihtp": sae}, lm, params)["ihtp"]
    z, mask = plain(sae, lm, params, stats)
    np.testing.assert_array_equal(stats.count, (z != 0).sum((0, 1)))
    assert stats.signed and not stats.about["sae"]["causal"] and (stats.min < 0).any()
    latent = int(np.argmin(stats.min))
    strongest = np.abs(z[..., latent]).max()
    assert abs(stats.top(latent, 1)[0].value) == pytest.approx(strongest, rel=1e-4), "signed latents rank by magnitude"


def test_joined_firings_are_those_of_the_whole() -> None:
    z = torch.randn(6, 5, 9, generator=torch.Generator().manual_seed(0)).relu()
    whole, parts = firings(z), joined([firings(z[:2]), firings(z[2:5]), firings(z[5:])], [0, 10, 25])
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_array_equal(one, other)


def test_quantiles_of_signed_histograms() -> None:
    values = torch.randn(2, 500, 1, generator=torch.Generator().manual_seed(1))
    gathered = Accumulator(1, 500, True, 3, 3, 0)
    gathered.add(firings(values), np.zeros(1000, np.int64), 0)
    assert gathered.histogram.shape == (1, 2 * N_BINS + 1)
    for q in (0.02, 0.3, 0.5, 0.9):
        got = histogram_quantile(gathered.histogram, gathered.edges, q, gathered.min, gathered.max)[0]
        assert got == pytest.approx(np.quantile(values.numpy(), q), rel=0.05, abs=0.01)


def test_refusals(lm: LanguageModel, params: Params, in_project: Path) -> None:
    sae = biased("standard", 10.0)
    other = tiny_sae("standard", hook_name="blocks.0.hook_resid_post")
    with pytest.raises(UserError, match="one pass serves one hook"):
        collect_stats({"a": sae, "b": other}, lm, params)
    with pytest.raises(UserError, match="is not there"):
        load_stats("nowhere")
    stats = collect_stats({"it": sae}, lm, params)["it"]
    with pytest.raises(UserError, match="latent 64: the SAE has latents 0 to 63"):
        stats.top(64)
    with (
        stats_module._alone(store_folder(sae, lm, params)),
        pytest.raises(UserError, match="another process"),
        stats_module._alone(store_folder(sae, lm, params)),
    ):
        pass
