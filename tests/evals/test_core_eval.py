"""Core evaluation: SAEs whose figures are known beforehand, invariances, shared work, caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_research.evals import harness
from sae_research.evals.core import evaluation, predictions
from sae_research.lm import LanguageModel
from sae_research.runtime.errors import UserError
from sae_research.saes import SparseAutoencoder
from sae_research.saes.pursuit.encoders import MPSAE
from sae_research.text.tokens import reorder_evenly, token_contexts
from tests.helpers.evals_saes import HOOK, D, config, dictionary, everything, identity, mean_predictor, standard


def run(saes: dict[str, SparseAutoencoder], lm: LanguageModel, params: Any, **kwargs: Any) -> dict[str, dict[str, Any]]:
    return dict(evaluation.evaluate(saes, lm, params, **kwargs))


def lab(result: dict[str, Any]) -> dict[str, float]:
    return result["eval_result_unstructured"]["lab_v1"]["metrics"]


def test_identity_and_mean(lm: LanguageModel, make_params: Any) -> None:
    params = make_params()
    result = run({"identity": identity()}, lm, params)["identity"]
    got = lab(result)
    assert got["variance_explained"] == got["loss_recovered"] == 1
    assert abs(got["kl"]) < 1e-6
    assert abs(got["ce_delta"]) < 1e-6
    bench = result["eval_result_metrics"]
    assert bench["model_performance_preservation"]["ce_loss_score"] == pytest.approx(1, abs=1e-6)
    assert bench["model_behavior_preservation"]["kl_div_with_sae"] == pytest.approx(0, abs=1e-6)
    assert bench["reconstruction_quality"]["explained_variance"] == 1

    tokens = reorder_evenly(token_contexts(lm.tokenizer, lm.separator_id, params.text, "core_eval", 15 * 24), 6).tokens[:15]
    counted = lm.activations(tokens[6:], HOOK)[:, 1:].reshape(-1, D)
    unmasked = make_params(token_mask={"outlier_norm_multiple": None})
    keep = ~torch.isin(tokens[6:, 1:].reshape(-1), lm.special_ids)
    mean = lab(run({"mean": mean_predictor(counted[keep].mean(0))}, lm, unmasked)["mean"])
    assert mean["variance_explained"] == pytest.approx(0, abs=1e-5)
    assert mean["l0"] == 0
    assert mean["loss_recovered_mean_ablation"] == pytest.approx(0, abs=1e-3)


def test_one_sae_equals_many_and_cold_equals_warm(lm: LanguageModel, make_params: Any, monkeypatch: Any) -> None:
    params = make_params()
    together = run(everything(), lm, params)
    for name, sae in everything().items():
        assert run({name: sae}, lm, params)[name] == together[name]
    monkeypatch.setenv("SAE_RESEARCH_NO_CACHE", "1")
    cold = run(everything(), lm, params)
    for name, result in cold.items():
        assert lab(result) == pytest.approx(lab(together[name]), rel=1e-5, abs=1e-6)


def test_bars_move_inside_one_sae(lm: LanguageModel, make_params: Any, monkeypatch: Any) -> None:
    moved: dict[str, int] = {}

    class Bar(harness.tqdm):
        def update(self, n: float | None = 1) -> bool | None:
            moved[self.desc] = moved.get(self.desc, 0) + int(n or 0)
            return super().update(n)

    monkeypatch.setattr(harness, "tqdm", Bar)
    run({"standard": standard()}, lm, make_params())
    assert moved["sparsity and variance"] == 3


def test_added_sae_pays_only_for_itself(lm: LanguageModel, make_params: Any, monkeypatch: Any) -> None:
    params = make_params()
    run(everything(), lm, params)
    encoded: list[int] = []
    original = MPSAE.encode_family.__func__
    monkeypatch.setattr(
        MPSAE,
        "encode_family",
        classmethod(lambda cls, members, x, mask: encoded.extend(m.s for m in members) or original(cls, members, x, mask)),
    )
    more = everything() | {"mpsae_s9": MPSAE(dictionary(), torch.zeros(D), 9, config("matching_pursuit", s=9))}
    assert set(run(more, lm, params)) == set(more)
    assert set(encoded) == {9}


def test_interruption_keeps_what_was_finished(lm: LanguageModel, make_params: Any, monkeypatch: Any) -> None:
    params = make_params()
    want = run(everything(), lm, make_params(activation_caching={"enabled": False}))
    for path in harness.ResultCache("core_predictions").folder.iterdir():
        path.unlink()
    real, calls = predictions.SharedPredictions._made, []

    def failing(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(predictions.SharedPredictions, "_made", failing)
    with pytest.raises(KeyboardInterrupt):
        run(everything(), lm, params)
    monkeypatch.setattr(predictions.SharedPredictions, "_made", lambda *args: calls.append(1) or real(*args))
    calls.clear()
    assert run(everything(), lm, params) == want
    assert len(calls) == 1, "the first batch came from the cache"


def test_sign_flip_changes_no_signed_encoder(lm: LanguageModel, make_params: Any) -> None:
    W, b = dictionary(), torch.zeros(D)
    for make in (lambda W: MPSAE(W, b, 5, config("matching_pursuit", s=5)),):
        one, other = (run({"sae": make(sign * W)}, lm, make_params())["sae"] for sign in (1, -1))
        assert lab(one) == pytest.approx(lab(other), rel=1e-5, abs=1e-6)
    # SAE Bench counts positive activations only, so its densities do change: that is the quirk ours mends
    positive = sum(record["feature_density"] for record in one["eval_result_details"])
    assert positive < 0.8 * lab(one)["l0"]


def test_batch_size_changes_nothing_of_ours(lm: LanguageModel, make_params: Any) -> None:
    wide = make_params(
        core_eval={"batch_size_prompts": 6, "n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 2}
    )
    narrow = make_params(
        core_eval={"batch_size_prompts": 3, "n_eval_reconstruction_batches": 2, "n_eval_sparsity_variance_batches": 4}
    )
    for name, result in run(everything(), lm, wide).items():
        got, want = lab(result), lab(run(everything(), lm, narrow)[name])
        assert got == pytest.approx(want, rel=1e-4, abs=1e-5), name


def test_masked_tokens_keep_the_models_own_activations(lm: LanguageModel, make_params: Any) -> None:
    params = make_params()
    tokens = token_contexts(lm.tokenizer, lm.separator_id, params.text, "core_eval", 15 * 24).tokens[:15].clone()
    tokens[:, 1:] = lm.separator_id  # every token is special
    result = lab(run({"standard": standard()}, lm, params, tokens=tokens)["standard"])
    assert result["fraction_tokens_kept"] == 0
    assert "variance_explained" not in result
    assert "kl" not in result, "no position counts, so there is no figure rather than a made-up one"


def test_interpolating_is_flagged(lm: LanguageModel, make_params: Any) -> None:
    results = run(everything(), lm, make_params())
    flags = {name: r["eval_result_unstructured"]["lab_v1"]["interpolating"] for name, r in results.items()}
    assert flags == {
        "standard": False,
        "identity": True,
        "mpsae_s3": False,
        "mpsae_s6": False,
        "ihtp_k1": False,
        "ihtp_k4": True,
    }
    assert lab(results["ihtp_k4"])["variance_explained"] > 0.99


def test_sae_bench_types_accept_the_result(lm: LanguageModel, make_params: Any) -> None:
    from pydantic import TypeAdapter
    from sae_bench.evals.core.eval_output import CoreEvalOutput

    result = run({"standard": standard()}, lm, make_params())["standard"]
    read = TypeAdapter(CoreEvalOutput).validate_python(result)
    assert len(read.eval_result_details) == 64
    assert read.sae_cfg_dict["form"] == "standard"


def test_bad_encoders_are_one_clear_line(lm: LanguageModel, make_params: Any) -> None:
    class NaN(type(standard())):
        def encode(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return super().encode(x, mask) * torch.nan

    class Narrow(type(standard())):
        def encode(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
            return super().encode(x, mask)[..., :3]

    for cls, message in ((NaN, "NaN or infinity"), (Narrow, "returned shape")):
        sae = standard()
        sae.__class__ = cls
        with pytest.raises(UserError, match=message):
            run({"bad": sae}, lm, make_params())
