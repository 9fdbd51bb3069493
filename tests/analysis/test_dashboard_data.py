"""What a site's data files say, against the store and plain computations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_research.analysis.context import AnalysisContext
from sae_research.analysis.dashboard.compare import compare
from sae_research.analysis.dashboard.latents import Shown, significant
from sae_research.analysis.dashboard.neighbours import match_by_activation, match_by_decoder, nearest
from sae_research.analysis.dashboard.neuronpedia_batch import Batch
from sae_research.analysis.dashboard.site import NEURONPEDIA, run_stage, write_dashboard
from sae_research.analysis.store import LatentStats
from sae_research.config.params import Params
from sae_research.lm import LanguageModel
from sae_research.lm.generate import unembedding
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import write_json
from sae_research.runtime.stages import read_status
from sae_research.saes import save_sae
from tests.helpers.dashboards import content, small
from tests.helpers.tiny_model import make_tiny_model
from tests.helpers.tiny_saes import tiny_sae


def dense(stats: LatentStats) -> np.ndarray:
    """[F, tokens]"""
    z = np.zeros((stats.d_sae, stats.token_ids.size))
    for latent in range(stats.d_sae):
        tokens, values = stats.activations(latent)
        z[latent, tokens] = values
    return z


def test_significant_digits_are_those_of_formatting() -> None:
    values = np.random.default_rng(0).normal(size=300) * 10.0 ** np.arange(-15, 15).repeat(10)
    assert significant(values).tolist() == [float(f"{v:.4g}") for v in values] and significant(1 / 3) == 0.3333
    assert significant(np.array([0.0, -0.0, 99995.0])).tolist() == [0.0, 0.0, 100000.0]


def test_a_latent_file_says_what_the_store_says(analysis: AnalysisContext, in_project: Path) -> None:
    analysis.saes["late"].b_enc[:8] -= 100  # dead
    page = write_dashboard(analysis, in_project / "site", small())
    stats, sae = analysis.stats("late"), analysis.saes["late"]
    assert page == in_project / "site/index.html"
    files = sorted((in_project / "site/late/data").glob("0*.js"))
    assert len(files) == 4  # 64 latents, 16 a file
    latents = [latent | {"strings": part["strings"]} for part in map(content, files) for latent in part["latents"]]
    assert [latent["id"] for latent in latents] == list(range(64))
    assert {latent["kind"] for latent in latents} >= {"dead", "dense"}
    z = dense(stats).reshape(64, *stats.token_ids.shape)
    for latent in latents:
        i, contexts = latent["id"], latent["contexts"]
        assert latent["count"] == (z[i] != 0).sum() == sum(sum(side["counts"]) for side in latent["bars"])
        assert latent["density"] == pytest.approx(stats.density[i], rel=1e-3)
        assert len(contexts) == len(stats.top(i)) + len(stats.samples(i))
        for one, known in zip(contexts, stats.top(i) + stats.samples(i), strict=True):
            window = slice(one["from"], one["from"] + len(one["t"]))
            assert [latent["strings"][t] for t in one["t"]] == known.tokens[window] and len(one["t"]) <= 11
            acts = np.zeros(len(one["t"]))
            acts[one["i"]] = one["a"]
            np.testing.assert_allclose(acts, known.activations[window], rtol=1e-3)
            assert one["from"] + one["at"] == known.position and acts[one["at"]] == one["v"]
            assert one["level"] == (-1 if known.level is None else known.level) and one["source"] == known.source
    direct = unembedding(analysis.lm).logits(sae.W_dec)
    direct = direct - direct.mean(1, keepdim=True)
    for latent in latents[::9]:
        raised, lowered = latent["logits"]["raised"], latent["logits"]["lowered"]
        row = direct[latent["id"]]
        np.testing.assert_allclose([v for _, v in raised], row.sort(descending=True).values[:3], rtol=1e-3)
        np.testing.assert_allclose([v for _, v in lowered], row.sort().values[:3], rtol=1e-3)
        assert raised[0][0] == stats.vocabulary[int(row.argmax())] and sum(latent["logits"]["counts"]) == len(row)


def test_equal_runs_write_equal_bytes_and_foreign_folders_stay(analysis: AnalysisContext, in_project: Path) -> None:
    def read(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    for name in ("one", "two", "one"):  # the third time over the first
        write_dashboard(analysis, in_project / name, small())
    assert read(in_project / "one") == read(in_project / "two")
    for path in (in_project / "one").rglob("*.html"):
        assert "http://" not in path.read_text()
    mine = in_project / "three/late/precious.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    with pytest.raises(UserError, match="no part of a dashboard"):
        write_dashboard(analysis, in_project / "three", small())
    assert mine.read_text() == "mine"
    page = in_project / "home/index.html"
    page.parent.mkdir()
    page.write_text("my home page")
    with pytest.raises(UserError, match="no dashboard's"):
        write_dashboard(analysis, in_project / "home", small())
    assert page.read_text() == "my home page" and [path.name for path in page.parent.iterdir()] == ["index.html"]
    with pytest.raises(UserError, match="none of static, compare"):
        write_dashboard(
            AnalysisContext.of({"compare": analysis.saes["late"]}, analysis.lm, analysis.params),
            in_project / "four",
            small(),
        )


def test_matches_are_the_plain_ones(two: AnalysisContext) -> None:
    one, other = two.stats("early"), two.stats("late")
    found = match_by_activation(one, other)
    both = np.asarray(one.counted & other.counted).reshape(-1)
    a, b = dense(one)[:, both], dense(other)[:, both]
    with np.errstate(invalid="ignore", divide="ignore"):
        plain = np.nan_to_num(np.corrcoef(a, b)[:64, 64:])
    alive = plain.max(1) > 0
    np.testing.assert_allclose(found.score[alive], plain.max(1)[alive], atol=1e-9)
    assert (found.partner[alive] == plain.argmax(1)[alive]).all() and (found.partner[~alive] == -1).all()
    itself = match_by_activation(other, other)
    assert (itself.partner[other.count > 0] == np.flatnonzero(other.count > 0)).all()
    sae = two.saes["late"]
    assert (match_by_decoder(sae, sae).partner == np.arange(64)).all()
    latents, cosines = nearest(sae.W_dec, 5)
    unit = torch.nn.functional.normalize(sae.W_dec, dim=1)
    plain_cosine = (unit @ unit.T).fill_diagonal_(-2)
    np.testing.assert_allclose(cosines, plain_cosine.sort(1, descending=True).values[:, :5], atol=1e-5)
    assert (latents != np.arange(64)[:, None]).all()


def test_comparisons_need_text_or_a_hook_in_common(two: AnalysisContext, lm: LanguageModel, params: Params) -> None:
    settings = small()
    shown = {name: Shown(name, sae, lm, two.stats(name), settings) for name, sae in two.saes.items()}
    pair = compare(shown["early"], shown["late"])
    assert pair.score == "correlation" and len(pair.content["partner"]) == 64
    other_text = params.model_copy(update={"analysis": params.analysis.model_copy(update={"tokens": 2_000})})
    elsewhere = AnalysisContext.of(two.saes, lm, other_text)
    apart = {name: Shown(name, sae, lm, elsewhere.stats(name), settings) for name, sae in two.saes.items()}
    with pytest.raises(UserError, match="neither text nor hook"):
        compare(shown["early"], apart["late"])
    same = compare(shown["late"], apart["late"])
    assert same.content["partner"].tolist() == list(range(64)) and same.content["score"] == [None] * 64
    with pytest.raises(UserError, match="cannot compare nobody"):
        write_dashboard(two, "site", settings, pairs=[("late", "nobody")])


@pytest.mark.slow
def test_latents_outside_the_residual_stream_have_no_logits(lm: LanguageModel, params: Params, in_project: Path) -> None:
    sae = tiny_sae("standard", hook_name="blocks.1.attn.hook_z")
    write_dashboard(AnalysisContext.of({"heads": sae}, lm, params), in_project / "site", small(neuronpedia=True))
    about = content(in_project / "site/heads/data/about.js")
    assert about["no_logits"].startswith("blocks.1.attn.hook_z is not in the residual stream")
    latents = content(in_project / "site/heads/data/00000.js")["latents"]
    assert all(latent["logits"] is None and latent["contexts"] for latent in latents)
    batch = Batch.model_validate_json((in_project / "site" / NEURONPEDIA / "heads/batch-0.json").read_text())
    assert batch.features[0].pos_str == []


@pytest.mark.slow
def test_one_sae_on_two_models_side_by_side(analysis: AnalysisContext, in_project: Path) -> None:
    other = make_tiny_model(in_project / "twin", seed=1)
    write_dashboard(analysis, in_project / "site", small(other_model=str(other)))
    pair = content(in_project / "site/compare/late_and_late_on_twin/data.js")
    assert pair["partner"] == list(range(64)) and (in_project / "site/late_on_twin/latent.html").is_file()
    there = LatentStats(
        next(
            path.parent
            for path in (in_project / ".cache/latents").glob("*/about.json")
            if json.loads(path.read_text())["sae"]["name"] == "late_on_twin"
        )
    )
    here, both = analysis.stats("late"), np.asarray(there.counted & analysis.stats("late").counted).reshape(-1)
    for latent in np.flatnonzero((here.count > 9) & (there.count > 9))[::7]:
        plain = np.corrcoef(dense(here)[latent, both], dense(there)[latent, both])[0, 1]
        assert pair["score"][latent] == pytest.approx(plain, abs=1e-3)


def test_neuronpedia_files_keep_its_schema(two: AnalysisContext, in_project: Path) -> None:
    write_dashboard(two, in_project / "site", small(neuronpedia=True))
    folder = in_project / "site" / NEURONPEDIA / "late"
    found = [Batch.model_validate_json(path.read_text()) for path in sorted(folder.glob("batch-*.json"))]
    stats = two.stats("late")
    features = {feature.feature_index: feature for batch in found for feature in batch.features}
    dead: list[int] = json.loads((folder / "skipped_indexes.json").read_text())["skipped_indexes"]
    assert sorted([*features, *dead]) == list(range(64)) and dead == np.flatnonzero(stats.count == 0).tolist()
    assert (found[0].model_id, found[0].layer, found[0].sae_set) == ("tiny", 1, "late")
    for index, feature in features.items():
        assert sum(feature.freq_hist_data_bar_heights) == stats.count[index]
        first, best = feature.activations[0], stats.top(index)[0]
        assert (first.bin_min, first.bin_contains) == (-1, -1)
        assert first.values[first.qualifying_token_index] == pytest.approx(best.value, rel=1e-3)
        assert first.tokens[first.qualifying_token_index] == best.tokens[best.position]
    broken: dict[str, Any] = json.loads((folder / "batch-0.json").read_text())
    broken["features"][0]["frac_nonzero"] = 40.0
    with pytest.raises(ValueError, match="frac_nonzero"):
        Batch.model_validate(broken)


def test_the_stage_writes_a_site_or_says_why_not(analysis: AnalysisContext, params: Params, in_project: Path) -> None:
    name = "late"
    save_sae(analysis.saes[name], in_project / "downloaded_saes" / name)
    write_json(in_project / "downloaded_saes/manifest.json", {"order": [name], "saes": {name: {"role": "baseline"}}})
    write_json(in_project / "metrics/core.json", {"_status": {}, name: {"variance_explained": 0.4321}})
    on = params.model_copy(
        update={"eval_types": params.eval_types.model_copy(update={"dashboards": True}), "dashboards": small()}
    )
    run_stage(on)
    assert read_status(Path("dashboards"))["status"] == "ok"
    assert "0.4321" in Path("dashboards/late/index.html").read_text()
    with pytest.raises(UserError, match="nobody; downloaded_saes/ holds late"):
        run_stage(on.model_copy(update={"dashboards": small(saes=["nobody"])}))
    assert read_status(Path("dashboards"))["status"] == "failed"


def test_one_bad_sae_is_left_out_of_the_site(lm: LanguageModel, params: Params, in_project: Path) -> None:
    bad, said = tiny_sae(seed=1), {}
    bad.b_enc.fill_(torch.nan)
    analysis = AnalysisContext.of({"bad": bad, "good": tiny_sae()}, lm, params)
    write_dashboard(analysis, "site", small(), pairs=[("good", "bad")], skip=said.__setitem__)
    assert list(said) == ["bad"] and "NaN" in said["bad"]
    assert Path("site/good/index.html").is_file() and not Path("site/bad").exists()
    with pytest.raises(UserError, match="NaN"):  # nowhere to list it
        write_dashboard(analysis, "site", small())
