"""Evaluations of crosscoders: core against figures known beforehand and a plain reference; what takes one hook says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div, log_softmax

import sae_research
from sae_research.analysis.context import AnalysisContext
from sae_research.config.evaluations import OF_SAES
from sae_research.config.params import Params
from sae_research.evals.core import evaluate
from sae_research.evals.harness import PreparedSAEs, by_hook, by_read_hook
from sae_research.evals.run import evaluation_function
from sae_research.lm import LanguageModel, token_mask
from sae_research.runtime.errors import NotApplicable, UserError
from sae_research.runtime.files import write_json
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SparseAutoencoder, save_sae
from sae_research.setup.stage import make_manifest
from sae_research.stats.sae_bench import latent_weights
from sae_research.training.end_to_end import finetune
from tests.evals.test_core_eval import lab, run
from tests.helpers.core_reference import counted, texts
from tests.helpers.crosscoders import HOOKS, SCALES, D, random_crosscoder, writing
from tests.helpers.evals_saes import everything, small_sections
from tests.helpers.transcoders import READ, WRITTEN, random_transcoder

NAMES = " \\+ ".join(HOOKS)


@pytest.mark.parametrize("name", [name for name, one in OF_SAES.items() if not one.crosscoders])
def test_evaluations_of_one_hook_say_why_not(name: str, lm: LanguageModel, make_params: Any) -> None:
    saes, stage = {"one": random_crosscoder()}, StageFolder(Path("out"))
    with pytest.raises(NotApplicable, match=rf"it takes the activations of one hook.*: these are crosscoders \({NAMES}\)"):
        list(evaluation_function(name)(saes, lm, make_params(), stage))


def test_objects_in_memory_and_what_refuses_them(lm: LanguageModel, make_params: Any) -> None:
    params, sae = make_params(), random_crosscoder(model_name=lm.name)
    found = sae_research.evaluate({"one": sae}, lm, params)["one"]["core"]
    assert found["variance_explained"] == pytest.approx(
        lab(run({"one": sae}, lm, params)["one"])["variance_explained"], rel=1e-3
    )
    analysis = AnalysisContext.of({"one": sae}, lm, params)
    for refused in (
        lambda: analysis.stats("one"),
        lambda: finetune(sae, lm, params, 1000, 1e-3),
        lambda: analysis.lm.activations(torch.ones(1, 4, dtype=torch.long), sae.cfg.hook_name),
    ):
        with pytest.raises(UserError, match="a crosscoder has several|unknown hook"):
            refused()


def test_they_are_skipped_and_the_rest_is_scored(lm: LanguageModel, make_params: Any, tasks: str) -> None:
    params, stage = make_params(**small_sections(tasks)), StageFolder(Path("out"))
    saes = {"standard": everything()["standard"], "cross": random_crosscoder(), "trans": random_transcoder()}
    assert list(dict(evaluation_function("tpp")(saes, lm, params, stage))) == ["standard"]
    assert set(stage.skipped) == {"cross", "trans"}
    assert stage.skipped["cross"].startswith(f"not applicable to a crosscoder ({' + '.join(HOOKS)})")
    del saes["standard"]
    with pytest.raises(
        NotApplicable, match=rf"these are crosscoders \({NAMES}\); .*these are transcoders \({READ} -> {WRITTEN}\)"
    ):
        list(evaluation_function("tpp")(saes, lm, params, stage))


@pytest.mark.parametrize("group", [by_hook, by_read_hook])
def test_nothing_takes_one_for_an_sae(group: Any) -> None:
    with pytest.raises(UserError, match=f"SAE one reads and writes {NAMES}"):
        group({"one": random_crosscoder()})


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"hook_name": " + ".join((*HOOKS[:2], "blocks.9.hook_resid_post"))},
            "hook blocks.9.hook_resid_post: the model has",
        ),
        ({"hook_name": " + ".join(HOOKS[:2]), "hook_scales": (1.0, 1.0)}, "SAE one reads 48 dimensions, .* has 32 at"),
    ],
)
def test_hooks_that_the_model_has_otherwise(changes: Any, match: str, lm: LanguageModel, tmp_path: Path) -> None:
    sae = random_crosscoder(**changes)
    save_sae(sae, tmp_path / "one")
    write_json(tmp_path / "manifest.json", make_manifest({"one": sae}))
    with pytest.raises(UserError, match=match):
        PreparedSAEs(tmp_path, lm)


@pytest.fixture
def params(make_params: Any) -> Params:
    """Without the rule of norms: which tokens count is told by their ids."""
    return make_params(token_mask={"outlier_norm_multiple": None})


def hooks_of(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Metrics by hook, each as `lab` has them of all hooks."""
    metrics = result["eval_result_unstructured"]["lab_v1"]["metrics"]
    hooks = dict.fromkeys(key.partition("@")[2] for key in metrics if "@" in key)
    return {
        hook: {key.partition("@")[0]: value for key, value in metrics.items() if key.endswith(f"@{hook}")} for hook in hooks
    }


def test_exact_mean_and_zero_reconstructions(lm: LanguageModel, params: Params) -> None:
    late = texts(lm, params)[6:]
    mean = torch.cat([lm.activations(late, hook)[counted(lm, late)].mean(0) for hook in HOOKS])
    saes = {"exact": writing(1, 0 * mean), "mean": writing(0, mean), "zero": writing(0, 0 * mean)}
    found = run(saes, lm, params)
    for of_hooks in (lab(found["exact"]), *hooks_of(found["exact"]).values()):
        assert of_hooks["variance_explained"] == pytest.approx(1, abs=1e-5)
        assert of_hooks["loss_recovered"] == pytest.approx(1, abs=1e-5) and of_hooks["kl"] == pytest.approx(0, abs=1e-6)
    for of_hooks in (lab(found["mean"]), *hooks_of(found["mean"]).values()):
        assert of_hooks["variance_explained"] == pytest.approx(0, abs=1e-5)
        assert of_hooks["loss_recovered_mean_ablation"] == pytest.approx(0, abs=1e-3)
    for of_hooks in (lab(found["zero"]), *hooks_of(found["zero"]).values()):
        assert of_hooks["loss_recovered"] == pytest.approx(0, abs=1e-5) and of_hooks["variance_explained"] < 0
    assert found["exact"]["sae_cfg_dict"]["hook_name"] == " + ".join(HOOKS)
    bench = found["exact"]["eval_result_metrics"]
    assert bench["model_performance_preservation"]["ce_loss_score"] == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def reference(
    sae: SparseAutoencoder, lm: LanguageModel, tokens: torch.Tensor, replaced: tuple[int, ...]
) -> dict[str, float]:
    """Core's own definitions once more: whole passes of the model, with hooks on its modules."""
    acts = [lm.activations(tokens, hook) for hook in HOOKS]
    mask = counted(lm, tokens)
    z = torch.relu(sum(own @ sae.W_enc[D * h : D * (h + 1)] for h, own in enumerate(acts)) + sae.b_enc)
    hats = [z @ sae.W_dec[:, D * h : D * (h + 1)] + sae.b_dec[D * h : D * (h + 1)] for h in range(3)]
    late, early = mask.clone(), mask.clone()
    late[:6], early[6:] = False, False
    left = sum(SCALES[h] ** 2 * (acts[h] - hats[h])[late].square().sum() for h in replaced)
    total = sum(SCALES[h] ** 2 * (acts[h][late] - acts[h][late].mean(0)).square().sum() for h in replaced)
    modules = [lm.layers[0], lm.layers[1].mlp, lm.layers[2]]
    logits = {}
    for name in ("clean", "patched", "zero", "mean"):
        handles = []
        for h in replaced if name != "clean" else ():
            put = {"patched": hats[h], "zero": 0 * hats[h], "mean": acts[h][late].mean(0).expand_as(hats[h])}[name]

            def after(_: Any, __: Any, output: Any, put: torch.Tensor = put) -> Any:
                own = output[0] if isinstance(output, tuple) else output
                own = torch.where(mask[..., None], put, own)
                return (own, *output[1:]) if isinstance(output, tuple) else own

            handles.append(modules[h].register_forward_hook(after))
        logits[name] = lm.model(input_ids=tokens).logits.float()
        for handle in handles:
            handle.remove()
    predicted = early[:, :-1]
    ce = {name: float(cross_entropy(own[:, :-1][predicted], tokens[:, 1:][predicted])) for name, own in logits.items()}
    log_p, log_q = log_softmax(logits["clean"][early], -1), log_softmax(logits["patched"][early], -1)
    return {
        "variance_explained": 1 - float(left / total),
        "ce_delta": ce["patched"] - ce["clean"],
        "kl": float(kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()),
        "loss_recovered": (ce["zero"] - ce["patched"]) / (ce["zero"] - ce["clean"]),
        "loss_recovered_mean_ablation": (ce["mean"] - ce["patched"]) / (ce["mean"] - ce["clean"]),
    }


def test_core_against_a_plain_reference(lm: LanguageModel, params: Params) -> None:
    sae, tokens = random_crosscoder(), texts(lm, params)
    found = run({"sae": sae}, lm, params)["sae"]
    expected = reference(sae, lm, tokens, (0, 1, 2))
    assert {key: lab(found)[key] for key in expected} == pytest.approx(expected, rel=2e-3, abs=2e-5)
    for number, hook in enumerate(HOOKS):
        expected = reference(sae, lm, tokens, (number,))
        assert {key: hooks_of(found)[hook][key] for key in expected} == pytest.approx(expected, rel=2e-3, abs=2e-5)


def test_every_figure_at_a_hook_has_its_interval(lm: LanguageModel, make_params: Any) -> None:
    """Each context is a cluster: sums over it, by a loop, and the interval around the figure."""
    core_eval = {"batch_size_prompts": 6, "n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 1}
    params = make_params(token_mask={"outlier_norm_multiple": None}, core_eval=core_eval)
    sae, tokens = random_crosscoder(), texts(lm, params)[:12]
    ((_, result),) = evaluate({"sae": sae}, lm, params, tokens=tokens)
    got = result["eval_result_unstructured"]["lab_v1"]
    keys = {"variance_explained", "kl", "ce_delta", "loss_recovered", "loss_recovered_mean_ablation"}
    assert {key for key in got["intervals"] if "@" in key} == {f"{key}@{hook}" for key in keys for hook in HOOKS}
    for key, (low, high) in got["intervals"].items():
        sums = got["cluster_sums"][key]
        assert len(sums["numerator"]) == 6 and low < got["metrics"][key] < high
        assert sum(sums["numerator"]) / sum(sums["denominator"]) == pytest.approx(got["metrics"][key], rel=1e-4)
    late = tokens[6:]
    acts, mask = torch.cat([lm.activations(late, hook) for hook in HOOKS], -1), counted(lm, late)
    errors, spread = (acts - sae.reconstruct(acts)).square(), (acts - acts[mask].mean(0)).square()
    for number, hook in enumerate(HOOKS):
        side = slice(D * number, D * (number + 1))
        left, total = ([float(own[m][:, side].sum()) for own, m in zip(x, mask, strict=True)] for x in (errors, spread))
        sums, unit = got["cluster_sums"][f"variance_explained@{hook}"], SCALES[number] ** 2
        assert sums["denominator"] == pytest.approx([unit * value for value in total], rel=1e-4)
        explained = [unit * (whole - part) for whole, part in zip(total, left, strict=True)]
        assert sums["numerator"] == pytest.approx(explained, rel=1e-3)


def test_beside_others_in_one_call_and_with_other_scales(lm: LanguageModel, make_params: Any) -> None:
    params = make_params()
    one, scaled = random_crosscoder(), random_crosscoder()
    scaled.cfg = scaled.cfg.replace(hook_scales=(1.0, 1.0, 1.0))
    mixed = everything() | {"one": one, "scaled": scaled, "trans": random_transcoder()}
    together = run(mixed, lm, params)
    for name, sae in mixed.items():
        assert run({name: sae}, lm, params)[name] == together[name]
    ours, theirs = (lab(together[name]) for name in ("one", "scaled"))
    assert ours["variance_explained"] != theirs["variance_explained"] and ours["kl"] == theirs["kl"]
    assert hooks_of(together["one"])[HOOKS[0]] == pytest.approx(hooks_of(together["scaled"])[HOOKS[0]])


def test_a_token_counts_where_it_does_at_every_hook(lm: LanguageModel, make_params: Any) -> None:
    params = make_params(token_mask={"outlier_norm_multiple": 1.1})
    tokens, each = texts(lm, params), []
    for hook in HOOKS:
        acts = lm.activations(tokens, hook)
        median = acts[counted(lm, tokens)].norm(dim=-1).median()
        each.append(token_mask(lm, tokens, acts, params.token_mask, float(median))[6:])
    together = each[0] & each[1] & each[2]
    assert 0 < together.sum() < min(mask.sum() for mask in each)
    got = lab(run({"sae": random_crosscoder()}, lm, params)["sae"])
    assert got["fraction_tokens_kept"] == pytest.approx(float(together.float().mean()))


def test_weights_are_measured_on_normalised_activations() -> None:
    sae = random_crosscoder()
    scale = torch.tensor(SCALES).repeat_interleave(D)
    encoder, decoder = sae.W_enc.T / scale, sae.W_dec * scale
    found = latent_weights(sae)
    torch.testing.assert_close(found[1], encoder.norm(dim=1))
    torch.testing.assert_close(found[2], torch.cosine_similarity(encoder, decoder, dim=1))
