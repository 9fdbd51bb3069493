"""What each SAE's eval_results.json holds, against core evaluation's own path; curves sent to Weights & Biases."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sae_research.lm import load_language_model
from sae_research.lm.mask import token_mask
from sae_research.runtime.errors import UserError
from sae_research.saes import load_sae
from sae_research.text.tokens import token_contexts
from sae_research.training import loop, stage, tracking
from tests.helpers.training import CONFIGS, STANDARD, TOP_K

UPPER = "blocks.2.hook_resid_post"


def results_of(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/eval_results.json")}


def test_figures_equal_a_plain_recomputation(make_params, tmp_path):
    saes = {"standard": STANDARD, "upper": {**TOP_K, "hook_name": UPPER}, "gates": CONFIGS["hard_concrete"]}
    params = make_params(saes=saes, tokens=2048, evaluate_tokens=256, held_out_tokens=1024)
    report = stage.train(params, tmp_path / "out")
    results = results_of(tmp_path / "out")
    assert set(results) == set(saes)
    lm = load_language_model(params.model.name, "cpu", "float32")
    contexts = token_contexts(lm.tokenizer, lm.separator_id, params.text, "core_eval", 1024).tokens
    tokens = contexts[torch.linspace(0, len(contexts) - 1, 8).round().long()]

    def ce(logits: torch.Tensor, mask: torch.Tensor) -> float:
        lost = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return float(lost[mask[:, :-1].flatten()].double().mean())

    for name, result in results.items():
        sae, hook = load_sae(tmp_path / "out" / name), params.train.hook_of(name)
        acts = lm.activations(tokens, hook)
        # the norm rule drops nothing of this model's, so that the median it compares with does not matter
        mask = token_mask(lm, tokens, acts, params.token_mask)
        keep = mask[..., None]
        with torch.no_grad():
            x_hat = sae.decode(sae.encode(acts, mask))
        clean = ce(lm.logits(tokens), mask)
        zero = ce(lm.patched_logits(tokens, hook, lambda x, keep=keep: torch.where(keep, 0.0, x)), mask)
        patched = ce(lm.patched_logits(tokens, hook, lambda x, keep=keep, x_hat=x_hat: torch.where(keep, x_hat, x)), mask)
        expected = {"ce_clean": clean, "ce_zero_ablated": zero, "ce_patched": patched}
        assert {key: result[key] for key in expected} == pytest.approx(expected, rel=1e-3)
        assert result["loss_recovered"] == pytest.approx((zero - patched) / (zero - clean), rel=0.05, abs=0.02)
        held_out = report["saes"][name]["held_out"]
        assert result["l0"] == pytest.approx(held_out["l0"], rel=1e-3) and result["hook_name"] == hook
        assert result["recipe"] == saes[name]["recipe"] and result["training_tokens"] == report["saes"][name]["tokens"]
        histogram = result["density_histogram"]
        assert sum(histogram["counts"]) + histogram["dead"] == 64
        assert histogram["dead"] == round(64 * (1 - result["fraction_alive"]))


def test_predictions_can_be_left_out(make_params, tmp_path, capsys):
    stage.train(make_params(evaluate_tokens=0, saes={"gates": CONFIGS["hard_concrete"]}), tmp_path / "out")
    result = results_of(tmp_path / "out")["gates"]
    assert "loss_recovered" not in result and "ce_clean" not in result and result["l0"] > 0
    report = json.loads((tmp_path / "out" / "training_report.json").read_text())
    assert report["diagnose"]["text"] == []
    assert "gates: SAELens 6.54.12 has no form hard_concrete" in capsys.readouterr().out


# --- Weights & Biases --------------------------------------------------------------------------


def with_tracking(params: Any, **values: Any) -> Any:
    return params.model_copy(update={"tracking": params.tracking.model_copy(update=values)})


class FakeRun:
    """Stands in where W&B itself must misbehave."""

    def __init__(self, fail_after: int = 10**9) -> None:
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self.artifacts: list[tuple[str, list[str], list[str]]] = []
        self.exit_code: int | None = None
        self.fail_after = fail_after

    def log_artifact(self, artifact: Any, aliases: list[str]) -> None:
        self.artifacts.append((artifact.name, aliases, list(artifact.manifest.entries)))

    def log(self, values: dict[str, Any], step: int | None) -> None:
        if len(self.rows) >= self.fail_after:
            raise ConnectionError("gone, with key abc123secret")
        self.rows.append({**values, "step": step})

    def finish(self, exit_code: int = 0) -> None:
        self.exit_code = exit_code


@pytest.fixture
def fake_runs(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeRun]:
    runs = {"standard": FakeRun(), "topk": FakeRun(fail_after=3)}
    monkeypatch.setattr(tracking, "_start", lambda params, names: dict(runs))
    return runs


def test_curves_go_out_while_training_and_failures_cost_nothing(make_params, tmp_path, fake_runs, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "abc123secret")
    stage.train(with_tracking(make_params(tokens=2048), project="p"), tmp_path / "tracked")
    curve = (tmp_path / "tracked" / "standard" / "training_curve.tsv").read_text().splitlines()[1:]
    standard, topk = fake_runs["standard"], fake_runs["topk"]
    assert [row["step"] for row in standard.rows] == [int(line.split("\t")[0]) for line in curve]
    assert set(standard.rows[0]) == {"train/loss", "train/l0", "train/variance_explained", "tokens", "step"}
    assert standard.exit_code == 0 and 0 < standard.summary["eval/variance_explained"] <= 1
    assert standard.summary["diagnose"]
    assert len(topk.rows) == 3 and topk.exit_code is None
    warning = capsys.readouterr().err
    assert "topk is no longer tracked: logging failed" in warning and "abc123secret" not in warning
    stage.train(make_params(tokens=2048), tmp_path / "plain")
    assert {p.name: p.read_bytes() for p in (tmp_path / "plain" / "topk").iterdir()} == {
        p.name: p.read_bytes() for p in (tmp_path / "tracked" / "topk").iterdir()
    }


def test_rows_at_a_frequency_are_those_of_single_steps(make_params, tmp_path, fake_runs, monkeypatch):
    """Beside the losses that a run without tracking sums up in its curve, read off step by step."""
    losses: list[tuple[int, float]] = []
    real = loop.train_step

    def noted(sae: Any, batch: Any) -> Any:
        output = real(sae, batch)
        if sae.name == "standard":
            losses.append((sae.step, float(output.loss)))
        return output

    monkeypatch.setattr(loop, "train_step", noted)
    stage.train(with_tracking(make_params(tokens=2048), project="p", log_every=3), tmp_path / "tracked")
    rows = fake_runs["standard"].rows
    assert [(row["step"], row["train/loss"]) for row in rows] == [pair for pair in losses if pair[0] % 3 == 0] and rows
    assert all(0 < row["train/learning_rate"] <= 0.003 for row in rows)


def test_histograms_and_checkpoints_go_out(make_params, tmp_path, fake_runs, monkeypatch):
    pytest.importorskip("wandb")
    fake_runs["topk"].fail_after = 10**9
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def noted(sae: Any, rows: torch.Tensor) -> torch.Tensor:
        density = tracking.density_on(sae, rows)
        pre = (rows - sae.b_dec) @ sae.W_enc + sae.b_enc
        if sae.cfg.form == "standard":
            seen.append((density, (pre > 0).float().mean(0)))
        return density

    monkeypatch.setattr(stage, "density_on", noted)
    params = make_params(tokens=2048, saved_checkpoints=2)
    asked = with_tracking(params, project="p", histogram_every=4, checkpoints=True)
    stage.train(asked, tmp_path / "tracked")
    run = fake_runs["standard"]
    drawn = {row["step"]: row["train/log10_density"] for row in run.rows if "train/log10_density" in row}
    assert list(drawn) == list(range(4, 4 * len(seen) + 1, 4)) and len(seen) >= 2
    for (density, expected), histogram in zip(seen, drawn.values(), strict=True):
        torch.testing.assert_close(density, expected)
        assert sum(histogram.histogram) == int((expected > 0).sum())
    last = results_of(tmp_path / "tracked")["standard"]["density_histogram"]
    assert [row["eval/log10_density"].histogram for row in run.rows if "eval/log10_density" in row] == [last["counts"]]
    assert [(name, aliases) for name, aliases, _ in run.artifacts] == [
        ("sae-standard", [alias]) for alias in ("step_0", run.artifacts[1][1][0], "trained")
    ]
    assert all({"cfg.json", "sae_weights.safetensors"} <= set(files) for _, _, files in run.artifacts)
    stage.train(params, tmp_path / "plain")
    for path in (tmp_path / "plain").rglob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "tracked" / path.relative_to(tmp_path / "plain")).read_bytes()


def test_a_failed_training_ends_its_runs_as_failed(make_params, tmp_path, fake_runs):
    with pytest.raises(UserError, match="fewer than one batch"):
        stage.train(with_tracking(make_params(tokens=512, batch_size=512), project="p"), tmp_path / "out")
    assert fake_runs["standard"].exit_code == 1


def test_asked_for_and_missing(make_params, tmp_path, monkeypatch):
    params = with_tracking(make_params(), project="p")
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb is not installed"):
        stage.train(params, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_service_that_cannot_be_used_costs_the_tracking_only(make_params, monkeypatch, capsys):
    def refuse(**_: Any) -> None:
        raise OSError("no route to host")

    module = SimpleNamespace(Settings=lambda **_: None, init=refuse, login=lambda prompt: False, __spec__=object())
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(UserError, match="there is no key: set WANDB_API_KEY"),
        tracking.tracked(with_tracking(make_params(), project="p")),
    ):
        pytest.fail("trained without a key")
    monkeypatch.setenv("WANDB_API_KEY", "k")
    with tracking.tracked(with_tracking(make_params(), project="p")) as tracker:
        assert tracker.runs == {}
    assert "the training goes on without it (OSError: no route to host)" in capsys.readouterr().err


def test_names_of_runs(make_params):
    params = make_params()
    config = params.train.saes["topk"]
    assert tracking.run_name("{recipe}_lr_{learning_rate}_k{k}_s{seed}", "topk", config, params) == "top_k_lr_0.003_k4_s42"
    assert tracking.run_name("{sae}{l1_coefficient}", "topk", config, params) == "topk"  # its recipe has none
    for wrong in ("{sae.__class__}", "{nothing}", "{", "{0}"):
        with pytest.raises(UserError, match="tracking.name"):
            tracking.run_name(wrong, "topk", config, params)


@pytest.mark.slow
def test_the_real_library_offline(make_params, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    more = {"histogram_every": 3, "checkpoints": True, "log_every": 2}
    params = with_tracking(make_params(tokens=2048), project="lab", tags=["tiny"], name="{recipe}_{seed}", **more)
    stage.train(params, tmp_path / "out")
    wandb.teardown()
    files = sorted(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2
    logged = b"".join(path.read_bytes() for path in files)
    for expected in (
        b"train/log10_density",
        b"sae-topk",
        b"train/variance_explained",
        b"standard_42",
        b"top_k_42",
        b"lab",
        b"tiny",
        b"eval/loss_recovered",
    ):
        assert expected in logged
