"""Evaluations of transcoders: figures known beforehand, a plain reference for the core, SAEs beside them, and what has no
meaning for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

import sae_research
from sae_research.config.evaluations import OF_SAES
from sae_research.config.params import Params
from sae_research.evals.harness import PreparedSAEs, by_hook, by_hooks, by_read_hook
from sae_research.evals.run import evaluation_function
from sae_research.lm import LanguageModel, token_mask
from sae_research.lm.activations import collect_hooks
from sae_research.runtime.errors import NotApplicable, UserError
from sae_research.runtime.files import write_json
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SAEConfig, SparseAutoencoder, save_sae
from sae_research.saes.forms import StandardSAE
from sae_research.setup.stage import make_manifest
from tests.evals.test_core_eval import lab, run
from tests.helpers.core_reference import counted, texts
from tests.helpers.evals_saes import everything, small_sections
from tests.helpers.transcoders import READ, WRITTEN, D, TheMLP, random_transcoder, writing


@pytest.fixture
def params(make_params: Any) -> Params:
    """Without the rule of norms: which tokens count is told by their ids."""
    return make_params(token_mask={"outlier_norm_multiple": None})


def test_the_mlp_itself(lm: LanguageModel, params: Params) -> None:
    result = run({"mlp": TheMLP(lm)}, lm, params)["mlp"]
    got = lab(result)
    for metric in ("variance_explained", "variance_explained_per_dim", "cosine_similarity", "loss_recovered"):
        assert got[metric] == pytest.approx(1, abs=1e-5), metric
    assert got["loss_recovered_mean_ablation"] == pytest.approx(1, abs=1e-4)
    assert got["mse"] == pytest.approx(0, abs=1e-9) and got["kl"] == pytest.approx(0, abs=1e-6)
    bench = result["eval_result_metrics"]
    assert bench["model_performance_preservation"]["ce_loss_score"] == pytest.approx(1, abs=1e-5)
    assert bench["reconstruction_quality"]["explained_variance"] == pytest.approx(1, abs=1e-5)
    description = result["sae_cfg_dict"]
    assert (description["hook_name"], description["hook_out"]) == (READ, WRITTEN)


def test_mean_and_zero(lm: LanguageModel, params: Params) -> None:
    tokens = texts(lm, params)
    mean = lm.activations(tokens[6:], WRITTEN)[counted(lm, tokens[6:])].mean(0)
    got = {name: lab(one) for name, one in run({"mean": writing(mean), "zero": writing(0 * mean)}, lm, params).items()}
    assert got["mean"]["variance_explained"] == pytest.approx(0, abs=1e-5)
    assert got["mean"]["loss_recovered_mean_ablation"] == pytest.approx(0, abs=1e-3)
    assert got["zero"]["loss_recovered"] == pytest.approx(0, abs=1e-5)
    assert got["zero"]["variance_explained"] < 0 and got["zero"]["l0"] == got["mean"]["l0"] == 0


@torch.no_grad()
def reference(sae: SparseAutoencoder, lm: LanguageModel, tokens: torch.Tensor) -> dict[str, float]:
    """Core's own definitions once more: whole passes of the model, with an edit at the written hook."""
    x, y = lm.activations(tokens, sae.cfg.hook_name), lm.activations(tokens, sae.cfg.hook_out)
    mask = counted(lm, tokens)
    z = torch.relu(x @ sae.W_enc + sae.b_enc)
    hat = z @ sae.W_dec + sae.b_dec + (0 if sae.W_skip is None else x @ sae.W_skip.T)
    late, early = mask.clone(), mask.clone()
    late[:6], early[6:] = False, False
    mean = y[late].mean(0)
    found = {
        "variance_explained": 1 - float((y - hat)[late].square().sum() / (y[late] - mean).square().sum()),
        "mse": float((y - hat)[late].square().mean()),
        "l0": float((z[late] != 0).float().sum(-1).mean()),
        "cosine_similarity": float(torch.cosine_similarity(y[late], hat[late], dim=-1).mean()),
    }
    logits = {"clean": lm.logits(tokens)}
    for name, value in {"patched": hat, "zero": 0 * y, "mean": mean.expand_as(y)}.items():
        put = torch.where(mask[..., None], value, y)
        logits[name] = lm.patched_logits(tokens, sae.cfg.hook_out, lambda own, put=put: put.to(own.dtype))
    predicted = early[:, :-1]
    ce = {name: float(cross_entropy(own[:, :-1][predicted], tokens[:, 1:][predicted])) for name, own in logits.items()}
    log_p, log_q = log_softmax(logits["clean"][early], -1), log_softmax(logits["patched"][early], -1)
    return found | {
        "ce_delta": ce["patched"] - ce["clean"],
        "kl": float(kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()),
        "loss_recovered": (ce["zero"] - ce["patched"]) / (ce["zero"] - ce["clean"]),
        "loss_recovered_mean_ablation": (ce["mean"] - ce["patched"]) / (ce["mean"] - ce["clean"]),
    }


@pytest.mark.parametrize(
    "hooks",
    [
        (READ, WRITTEN),
        ("blocks.1.hook_mlp_in", WRITTEN),
        ("blocks.1.ln2.hook_normalized", WRITTEN),
        ("blocks.1.hook_resid_pre", "blocks.1.hook_resid_post"),
        ("blocks.1.hook_resid_pre", "blocks.1.hook_attn_out"),
    ],
)
@pytest.mark.parametrize("skip", [True, False])
def test_core_against_a_plain_reference(hooks: tuple[str, str], skip: bool, lm: LanguageModel, params: Params) -> None:
    sae = random_transcoder(skip=skip, hook_name=hooks[0], hook_out=hooks[1])
    expected, got = reference(sae, lm, texts(lm, params)), lab(run({"sae": sae}, lm, params)["sae"])
    assert {key: got[key] for key in expected} == pytest.approx(expected, rel=2e-3, abs=2e-5)


def test_a_token_counts_where_neither_hook_is_an_outlier(lm: LanguageModel, make_params: Any) -> None:
    params, hook = make_params(token_mask={"outlier_norm_multiple": 1.1}), "blocks.1.hook_mlp_in"
    tokens = texts(lm, params)
    pools = collect_hooks(lm, [hook, WRITTEN], tokens, 4, params.activation_caching)
    each = []
    for pool in pools.values():
        acts = pool.flat.reshape(15, 24, D)
        median = acts[counted(lm, tokens)].norm(dim=-1).median()
        each.append(token_mask(lm, tokens, acts, params.token_mask, float(median))[6:])
    assert 0 < (each[0] & each[1]).sum() < min(each[0].sum(), each[1].sum())
    got = lab(run({"sae": random_transcoder(hook_name=hook)}, lm, params)["sae"])
    assert got["fraction_tokens_kept"] == pytest.approx(float((each[0] & each[1]).float().mean()))


def test_beside_saes_in_one_call(lm: LanguageModel, make_params: Any) -> None:
    params = make_params()
    one, other, higher = random_transcoder(), random_transcoder(1, skip=True), random_transcoder(2)
    higher.cfg = higher.cfg.replace(hook_name="blocks.1.hook_mlp_in")
    mixed = everything() | {"one": one, "other": other, "higher": higher}
    together = run(mixed, lm, params)
    assert list(together) == list(mixed)
    for name, sae in mixed.items():
        assert run({name: sae}, lm, params)[name] == together[name]
    assert [len(group.infos) for group in by_hooks(mixed)] == [len(everything()), 2, 1]
    assert [group.hook for group in by_read_hook({"one": one, "higher": higher})] == [READ, "blocks.1.hook_mlp_in"]
    with pytest.raises(UserError, match=f"SAE one reads and writes {READ} -> {WRITTEN}"):
        by_hook(mixed)
    metrics = sae_research.evaluate({"one": one, "standard": everything()["standard"]}, lm, params)
    assert metrics["one"]["core"]["variance_explained"] == pytest.approx(
        lab(together["one"])["variance_explained"], rel=1e-3
    )


def test_hooks_are_part_of_what_a_result_is_kept_under(lm: LanguageModel, params: Params) -> None:
    """One set of weights at two places: two results."""
    sae, moved = random_transcoder(), random_transcoder()
    moved.cfg = moved.cfg.replace(hook_name="blocks.2.mlp.hook_in", hook_out="blocks.2.hook_mlp_out")
    got = [lab(run({"sae": one}, lm, params)["sae"])["variance_explained"] for one in (sae, moved)]
    assert got[0] != got[1]


def test_clean_and_ablated_passes_are_shared_and_early_layers_stand_still(
    lm: LanguageModel, params: Params, monkeypatch: Any
) -> None:
    assert lm.d_in(READ) == lm.d_in(WRITTEN) == D  # what MLP and attention are is looked for once
    passes, early = [], []
    real = LanguageModel.resume
    monkeypatch.setattr(LanguageModel, "resume", lambda *args, **kwargs: passes.append(1) or real(*args, **kwargs))
    saes = {f"t{seed}": random_transcoder(seed) for seed in range(3)}
    handle = lm.layers[0].register_forward_hook(lambda *_: early.append(1))
    run(saes, lm, params)
    handle.remove()
    assert len(passes) == 2 * (4 + 2 * len(saes)), "clean, zero twice (two definitions), mean; each transcoder twice"
    assert len(early) == 4, "15 contexts, 4 at a time, for all three hooks at once"


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * ("prob" in name)) for name in OF_SAES])
def test_every_evaluation_takes_them_or_says_why_not(name: str, lm: LanguageModel, make_params: Any, tasks: str) -> None:
    if name == "autointerp":
        pytest.skip("needs an endpoint; its latents come from `by_read_hook` as in the probing evaluations")
    params = make_params(**small_sections(tasks))
    saes = {"one": random_transcoder(), "other": random_transcoder(1, skip=True)}
    stage = StageFolder(Path("out"))
    results = evaluation_function(name)(saes, lm, params, stage)
    if OF_SAES[name].one_hook:
        with pytest.raises(NotApplicable, match=f"{OF_SAES[name].one_hook}: these are transcoders"):
            list(results)
        return
    found = dict(results)
    assert set(found) == set(saes) and not stage.skipped
    json.dumps(found, allow_nan=False)


def test_probing_sees_what_an_sae_with_that_encoder_shows(lm: LanguageModel, make_params: Any, tasks: str) -> None:
    one = random_transcoder(skip=True)
    cfg = SAEConfig("standard", D, 64, hook_name=READ, apply_b_dec_to_input=False)
    sae = StandardSAE(cfg, W_enc=one.W_enc, b_enc=one.b_enc, W_dec=one.W_dec, b_dec=torch.zeros(D))
    params = make_params(sparse_probing=small_sections(tasks)["sparse_probing"])
    score = evaluation_function("sparse_probing")
    found = dict(score({"one": one, "sae": sae}, lm, params, StageFolder(Path("out"))))
    assert found["one"]["eval_result_metrics"] == found["sae"]["eval_result_metrics"]
    assert found["one"]["eval_result_unstructured"] == found["sae"]["eval_result_unstructured"]


def test_what_edits_the_hook_it_reads_skips_transcoders_and_scores_the_rest(
    lm: LanguageModel, make_params: Any, tasks: str
) -> None:
    params, stage = make_params(**small_sections(tasks)), StageFolder(Path("out"))
    saes = {"standard": everything()["standard"], "one": random_transcoder()}
    found = dict(evaluation_function("tpp")(saes, lm, params, stage))
    assert list(found) == ["standard"]
    assert stage.skipped == {"one": f"not applicable to a transcoder ({READ} -> {WRITTEN}): {OF_SAES['tpp'].one_hook}"}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hook_out": "blocks.2.hook_mlp_out"}, "SAE one: it reads .* a transcoder's hooks belong to one layer"),
        ({"hook_name": WRITTEN, "hook_out": READ}, "SAE one: it reads .* are the two exchanged"),
        ({"hook_out": "blocks.1.attn.hook_v"}, "SAE one: unknown hook"),
    ],
)
def test_hooks_that_do_not_belong_together(changes: dict[str, str], match: str, lm: LanguageModel, tmp_path: Path) -> None:
    sae = random_transcoder(**changes)
    save_sae(sae, tmp_path / "one")
    write_json(tmp_path / "manifest.json", make_manifest({"one": sae}))
    with pytest.raises(UserError, match=match):
        PreparedSAEs(tmp_path, lm)


def test_prepared_saes_of_two_kinds(lm: LanguageModel, tmp_path: Path) -> None:
    saes = {"one": random_transcoder(), "standard": everything()["standard"]}
    for name, sae in saes.items():
        save_sae(sae, tmp_path / name)
    write_json(tmp_path / "manifest.json", make_manifest(saes))
    prepared = PreparedSAEs(tmp_path, lm)
    assert list(prepared.only(["standard"])) == ["standard"] and list(prepared) == ["one", "standard"]
    rows = json.loads((tmp_path / "manifest.json").read_text())["saes"]
    assert (rows["one"]["hook_name"], rows["one"]["hook_out"]) == (READ, WRITTEN)
    assert rows["standard"]["hook_name"] == rows["standard"]["hook_out"]
