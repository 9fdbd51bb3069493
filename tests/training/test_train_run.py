"""The stage: stream, loop, outputs."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from sae_research.config.params import Train
from sae_research.config.recipes import TrainedSAE
from sae_research.lm import LanguageModel, load_language_model
from sae_research.runtime.errors import UserError
from sae_research.saes import load_sae
from sae_research.text.tokens import token_contexts
from sae_research.training import loop, stage, training_sae
from sae_research.training.buffer import StreamBatch, StreamingPCA, pca_variance_explained
from sae_research.training.recipes.l1 import Standard
from sae_research.training.stream import ActivationStream
from tests.helpers.training import HOOK, STANDARD, TOP_K


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def curve(folder):
    lines = (folder / "training_curve.tsv").read_text().splitlines()
    return [dict(zip(lines[0].split("\t"), map(float, line.split("\t")), strict=True)) for line in lines[1:]]


def test_a_run_learns_and_writes_what_it_says(make_params, tmp_path, capsys):
    report = stage.train(make_params(), tmp_path / "out")
    assert sorted(files(tmp_path / "out")) == [
        f"{name}/{file}"
        for name in ("standard", "topk")
        for file in ("cfg.json", "eval_results.json", "sae_weights.safetensors", "training_curve.tsv")
    ] + ["training_report.json"]
    for name in ("standard", "topk"):
        rows = curve(tmp_path / "out" / name)
        assert 40 <= len(rows) <= 61
        assert rows[-1]["variance_explained"] > rows[0]["variance_explained"] + 0.05
        sae = load_sae(tmp_path / "out" / name)
        assert torch.allclose(sae.W_dec.norm(dim=1), torch.ones(64), atol=1e-6)
        assert (sae.cfg.hook_name, sae.cfg.context_size, sae.cfg.role) == (
            "blocks.1.hook_resid_post",
            32,
            "comparison",
        )
        assert sae.cfg.provenance["tokens"] == report["tokens"] > 6000
    assert curve(tmp_path / "out" / "topk")[-1]["loss"] < curve(tmp_path / "out" / "topk")[0]["loss"]
    written = json.loads((tmp_path / "out" / "training_report.json").read_text())
    assert written["saes"]["topk"]["held_out"]["l0"] == pytest.approx(4, abs=0.5)  # by threshold, k on average
    assert written["saes"]["topk"]["held_out"]["variance_explained"] > 0.2
    assert 0.9 < written["hooks"][HOOK]["fraction_tokens_kept"] < 1 and written["saes"]["topk"]["hook_name"] == HOOK
    assert "held-out text" in capsys.readouterr().out


def test_two_runs_write_the_same_bytes(make_params, tmp_path):
    stage.train(make_params(), tmp_path / "a")
    stage.train(make_params(), tmp_path / "b")  # this one reads the activation cache
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_an_sae_does_not_depend_on_its_companions(make_params, tmp_path):
    stage.train(make_params(), tmp_path / "both")
    stage.train(make_params(saes={"more": {**TOP_K, "k": 2}, "topk": TOP_K}), tmp_path / "other")
    assert files(tmp_path / "both" / "topk") == files(tmp_path / "other" / "topk")


def test_the_seed_matters(make_params, tmp_path):
    stage.train(make_params(), tmp_path / "a")
    stage.train(make_params().model_copy(update={"random_seed": 1}), tmp_path / "b")
    assert files(tmp_path / "a")["topk/sae_weights.safetensors"] != files(tmp_path / "b")["topk/sae_weights.safetensors"]


def test_seeds_of_one_recipe_share_its_id_and_nothing_else_does(make_params, tmp_path):
    entries = {"a": {**TOP_K, "seed": 1}, "b": {**TOP_K, "seed": 2}, "c": {**TOP_K, "seed": 1, "k": 2}}
    stage.train(make_params(saes=entries), tmp_path / "out")
    a, b, c = (load_sae(tmp_path / "out" / name) for name in "abc")
    assert a.cfg.provenance["recipe_id"] == b.cfg.provenance["recipe_id"] != c.cfg.provenance["recipe_id"]
    assert (a.cfg.provenance["seed"], b.cfg.provenance["seed"]) == (1, 2)
    assert not torch.equal(a.W_dec, b.W_dec)


def test_the_model_reads_each_text_once_for_all_saes(make_params, tmp_path, monkeypatch):
    seen = []
    original = LanguageModel.activations
    monkeypatch.setattr(
        LanguageModel,
        "activations",
        lambda self, tokens, hook: (seen.append(tokens.numel()), original(self, tokens, hook))[1],
    )
    params = make_params()
    load_language_model(params.model.name, "cpu")
    seen.clear()
    stage.train(params, tmp_path / "out")
    check_at_load = 8
    assert sum(seen) == 8192 + 512 + check_at_load
    seen.clear()
    stage.train(params, tmp_path / "again")
    assert sum(seen) == check_at_load


def test_without_the_cache_the_result_is_the_same(make_params, tmp_path):
    stage.train(make_params(), tmp_path / "a")
    params = make_params()
    caching = params.activation_caching.model_copy(update={"enabled": False})
    stage.train(params.model_copy(update={"activation_caching": caching}), tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_hooks_share_a_pass_and_change_nothing_for_one_another(make_params, tmp_path, monkeypatch):
    """Each SAE comes out as in a run with its hook alone; the sink rule goes by each hook's own norms."""
    other = "blocks.2.hook_mlp_out"
    entries = {"standard": STANDARD, "topk": TOP_K, "deeper": {**TOP_K, "hook_name": other}}
    seen = []
    original = LanguageModel.activations_at
    monkeypatch.setattr(
        LanguageModel,
        "activations_at",
        lambda self, tokens, hooks: (seen.append((tokens.numel(), sorted(hooks))), original(self, tokens, hooks))[1],
    )
    caching = {"activation_caching": make_params().activation_caching.model_copy(update={"enabled": False})}
    report = stage.train(make_params(saes=entries).model_copy(update=caching), tmp_path / "both")
    assert sum(n for n, _ in seen) == 8192 + 512 and {tuple(hooks) for _, hooks in seen} == {(HOOK, other)}
    stage.train(make_params(saes={"topk": TOP_K}), tmp_path / "one")
    stage.train(make_params(saes={"deeper": TOP_K}, hook_name=other), tmp_path / "two")
    assert files(tmp_path / "both" / "topk") == files(tmp_path / "one" / "topk")
    assert files(tmp_path / "both" / "deeper") == files(tmp_path / "two" / "deeper")
    assert load_sae(tmp_path / "both" / "deeper").cfg.hook_name == report["saes"]["deeper"]["hook_name"] == other
    assert list(report["hooks"]) == [HOOK, other] and report["saes"]["deeper"]["held_out"]["variance_explained"] > 0.2
    with pytest.raises(UserError, match="train.saes.deeper: hook blocks.7.hook_mlp_out: the model has layers 0 to"):
        stage.train(make_params(saes={"deeper": {**TOP_K, "hook_name": "blocks.7.hook_mlp_out"}}), tmp_path / "none")


def test_a_step_in_parts_is_the_same_step(make_params, planted_rows, tmp_path):
    batch, gradients = StreamBatch(planted_rows[:96], 0.5), []
    for parts in (1, 4):
        config = TypeAdapter(TrainedSAE).validate_python(STANDARD)
        recipe = Standard(16, config, Train(batch_size=96, accumulation_steps=parts, precision="float32"))
        recipe.initialise(planted_rows, torch.Generator().manual_seed(0))
        output = training_sae._gradients(recipe, batch)
        gradients.append([output.loss, output.residual, output.l0, *(p.grad for p in recipe.parameters())])
    for whole, part in zip(*gradients, strict=True):
        torch.testing.assert_close(part, whole, rtol=1e-5, atol=1e-7)
    stage.train(make_params(tokens=1024, accumulation_steps=4), tmp_path / "out")
    rows = curve(tmp_path / "out" / "topk")
    assert [row["tokens"] for row in rows] == [64 * row["step"] for row in rows]
    with pytest.raises(ValueError, match="equal parts"):
        make_params(accumulation_steps=3)


def test_the_buffer_never_grows(make_params):
    """Contexts longer than the buffer, batches as large as half of it: whatever comes in, it holds what it was given."""
    params = make_params(tokens=12288, buffer_tokens=64, batch_size=16)
    lm = load_language_model(params.model.name, "cpu")
    tokens = token_contexts(lm.tokenizer, lm.separator_id, params.text, "sae_train", 12288).tokens
    stream = ActivationStream(lm, tokens.reshape(-1, 256), params)
    stream.calibrate()
    buffer = stream.buffers[HOOK]
    rows = sum(len(batches[HOOK].acts) for batches in stream)
    assert len(buffer.bank) == 64 + 256 and rows == buffer.rows_read // 16 * 16


def test_nothing_to_train_loads_no_model(make_params, tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "load_model", lambda *_, **__: pytest.fail("loaded a model"))
    stage.train(make_params(saes={}), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "training_report.json").read_text())["saes"] == {}


def test_a_diverging_sae_is_named_and_the_old_output_stays(make_params, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    original = Standard.compute

    def diverge(self, x, progress):
        out = original(self, x, progress)
        return out._replace(loss=out.loss * math.nan) if progress > 0.5 else out

    monkeypatch.setattr(Standard, "compute", diverge)
    with pytest.raises(UserError, match=r"train\.saes\.standard: the loss at step \d+ is not finite"):
        stage.train(make_params(), tmp_path / "out")
    assert [p.name for p in tmp_path.glob("*out*")] == ["out"]
    assert (tmp_path / "out" / "old").exists()


def test_text_that_runs_out_is_a_user_error(make_params, tmp_path):
    with pytest.raises(UserError, match="ends after"):
        stage.train(make_params(tokens=1_000_000), tmp_path / "out")


def test_fewer_tokens_than_a_batch_is_a_user_error(make_params, tmp_path):
    with pytest.raises(UserError, match="fewer than one batch"):
        stage.train(make_params(tokens=512, batch_size=512, buffer_tokens=1024), tmp_path / "out")


@pytest.fixture
def stream(make_params):
    params = make_params()
    lm = load_language_model(params.model.name, "cpu")
    contexts = token_contexts(lm.tokenizer, lm.separator_id, params.text, "sae_train", 8192)
    return ActivationStream(lm, contexts.tokens, params)


def served(stream):
    """All batches at `HOOK`, and the calibration rows."""
    rows = stream.calibrate()[HOOK]
    return [batches[HOOK] for batches in stream], rows


def test_the_stream_serves_each_counted_token_once_and_shuffled(stream):
    batches, in_order = served(stream)
    rows = torch.cat([batch.acts for batch in batches])
    assert len(rows) == stream.buffers[HOOK].rows_read // 64 * 64
    assert len(rows.unique(dim=0)) > 0.95 * len(rows)  # equal text at equal positions gives equal rows
    assert rows.square().sum(1).mean() == pytest.approx(1, abs=0.05)
    assert not torch.allclose(batches[0].acts, in_order[:64])
    progress = [batch.progress for batch in batches]
    assert progress == sorted(progress) and 0 < progress[0] < 0.02 and 0.97 < progress[-1] < 1
    again = served(ActivationStream(stream.lm, stream.tokens, stream.params))[0]
    assert torch.equal(rows, torch.cat([batch.acts for batch in again]))


def test_a_buffer_smaller_than_two_batches_still_serves_everything(make_params):
    params = make_params(buffer_tokens=64, batch_size=256)
    lm = load_language_model(params.model.name, "cpu")
    contexts = token_contexts(lm.tokenizer, lm.separator_id, params.text, "sae_train", 4096)
    small = ActivationStream(lm, contexts.tokens, params)
    batches, _ = served(small)
    assert sum(len(batch.acts) for batch in batches) == small.buffers[HOOK].rows_read // 256 * 256


def test_the_stream_drops_first_and_special_tokens(stream):
    tokens = stream.tokens
    special = torch.isin(tokens, stream.lm.special_ids)
    special[:, 0] = True
    served(stream)
    assert stream.buffers[HOOK].rows_read <= int((~special).sum())


def test_pca_explains_what_svd_does():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 12, generator=generator) * torch.arange(1, 13) + 3
    pca = StreamingPCA(12)
    for part in x.split(64):
        pca.update(part)
    explained = pca_variance_explained(pca, x, (2, 12, 40))
    singular = torch.linalg.svdvals(x - x.mean(0)).square()
    assert explained[2] == pytest.approx(float(singular[:2].sum() / singular.sum()), abs=1e-4)
    assert explained[12] == pytest.approx(1, abs=1e-4)
    assert 40 not in explained


def test_sae_lens_reads_the_folders(make_params, tmp_path):
    from sae_lens import SAE

    stage.train(make_params(), tmp_path / "out")
    x = torch.randn(3, 7, 32, generator=torch.Generator().manual_seed(0)) * 5
    for name in ("standard", "topk"):
        ours, theirs = load_sae(tmp_path / "out" / name), SAE.load_from_disk(str(tmp_path / "out" / name))
        z = ours.encode(x)
        torch.testing.assert_close(theirs.encode(x), z, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(theirs.decode(theirs.encode(x)), ours.decode(z), rtol=1e-5, atol=1e-4)


def test_seeds_differ_by_name_and_run():
    assert len({training_sae.sae_seed(name, seed) for name in ("a", "b") for seed in (0, 1)}) == 4


def test_standard_config_is_listed(make_params):
    params = make_params()
    listed = params.train.hyper_parameters("standard")
    assert listed["l1_coefficient"] == STANDARD["l1_coefficient"] and "k" not in listed and listed["batch_size"] == 64


@pytest.mark.gpu
def test_saes_on_another_device_than_the_model_learn_the_same(make_params, tmp_path):
    here = stage.train(make_params(), tmp_path / "here")
    there = stage.train(make_params(device="cuda:0"), tmp_path / "there")
    for name in ("standard", "topk"):
        for key, tolerance in (("l0", 0.5), ("variance_explained", 0.02)):
            assert there["saes"][name]["held_out"][key] == pytest.approx(
                here["saes"][name]["held_out"][key], abs=tolerance
            ), (name, key)
        assert curve(tmp_path / "there" / name)[0]["loss"] == pytest.approx(
            curve(tmp_path / "here" / name)[0]["loss"], rel=1e-4
        )


def test_a_progress_bar_names_few_saes_and_sums_up_many() -> None:
    def done(name: str, l0: float, explained: float) -> SimpleNamespace:
        row = SimpleNamespace(loss=0.25, l0=l0, variance_explained=explained)
        return SimpleNamespace(name=name, curve=[row])

    saes: list[Any] = [done("a", 32.0, 0.7), done("b", 8.0, 0.5)]
    assert loop.postfix(saes) == "a: loss 0.25 L0 32 VE 0.700 | b: loss 0.25 L0 8 VE 0.500"
    many = [*saes, done("c", 128.0, 0.9), SimpleNamespace(name="before its first row", curve=[]), done("d", 1.0, 0.6)]
    assert loop.postfix(many) == "4 SAEs: L0 1 to 128, VE 0.500 to 0.900"
