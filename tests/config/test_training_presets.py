"""SAE Bench's training presets against its published settings, and what they come to here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from dvc.utils.hydra import apply_overrides

from sae_research.cli.main import read_preset
from sae_research.config.params import Params, load_params

ROOT = Path(__file__).parents[2]
L1 = [0.012, 0.015, 0.02, 0.03, 0.04, 0.06]
PENALTIES = {
    "standard": L1,
    "standard_new": L1,
    "p_anneal": [0.006, 0.008, 0.01, 0.015, 0.02, 0.025],
    "gated_rajamanoharan": [0.012, 0.018, 0.024, 0.04, 0.06, 0.08],
}
TARGETS = [20, 40, 80, 160, 320, 640]
TOKENS, BATCH, CONTEXT = 500_000_000, 2048, 1024
RUNS = {
    "sae-bench-training": ("pythia-160m-deduped", 8, 4096, 32, "float32"),
    "sae-bench-training-gemma-2-2b": ("gemma-2-2b", 12, 16384, 4, "bfloat16"),
}
"""Model, layer, width, contexts of a pass, its precision."""


@pytest.fixture(params=RUNS)
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[tuple, Params]:
    monkeypatch.chdir(ROOT)
    path = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)
    apply_overrides(path, read_preset(request.param))
    return RUNS[request.param], load_params(path)


def test_published_settings(run: tuple[tuple, Params]) -> None:
    (model, layer, width, contexts, dtype), params = run
    train = params.train
    assert (params.model.name, train.hook_name) == (model, f"blocks.{layer}.hook_resid_post")
    assert (params.model.llm_batch_size, params.text.context_size, train.llm_dtype) == (contexts, CONTEXT, dtype)
    assert (train.tokens, train.batch_size, train.buffer_tokens) == (TOKENS, BATCH, 250_000)
    steps = TOKENS / BATCH
    assert train.warmup_fraction == pytest.approx(1_000 / steps, rel=1e-2)
    assert train.sparsity_warmup_fraction == pytest.approx(5_000 / steps, rel=1e-2)
    assert train.decay_fraction == 0.2 and train.dead_fraction == pytest.approx(10_000_000 / TOKENS)
    saes = list(train.saes.values())
    assert len(saes) == 48 and all((sae.d_sae, sae.learning_rate, sae.seed) == (width, 3e-4, None) for sae in saes)
    for recipe, penalties in PENALTIES.items():
        assert [sae.l1_coefficient for sae in saes if sae.recipe == recipe] == penalties
    assert [sae.target_l0 for sae in saes if sae.recipe == "jump_relu"] == TARGETS
    for recipe in ("top_k", "batch_top_k", "matryoshka_batch_top_k"):
        assert [sae.k for sae in saes if sae.recipe == recipe] == TARGETS
    assert {params.baseline_sae.name, *params.comparison_saes.trained} <= set(train.saes)
    assert params.baseline_sae.hook_layer == layer
