"""The study behind docs/pursuit.md, on the tiny model: its figures, its pictures, its tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import pursuit_page, pursuit_study
from sae_research.runtime.errors import UserError
from sae_research.saes import SAEConfig, save_sae
from sae_research.saes.pursuit.encoders import IHTPSAE, MPSAE
from tests.helpers.evals_saes import HOOK, D, dictionary, standard

MARKED = "".join(f"<!-- begin {name} -->\nold\n<!-- end {name} -->\n" for name in ("study", "basis", "speed"))


@pytest.fixture
def folder(in_project: Path) -> Path:
    """What setup would have written: a baseline and two untrained dictionaries."""
    names = ["standard", "control_random", "control_data_rows"]
    baseline = standard()
    baseline.cfg = baseline.cfg.replace(role="baseline")
    save_sae(baseline, in_project / "saes" / names[0])
    for seed, name in enumerate(names[1:]):
        cfg = SAEConfig(
            form="matching_pursuit",
            d_in=D,
            d_sae=64,
            hook_name=HOOK,
            role="control",
            options={"s": 4},
            provenance={"kind": name.removeprefix("control_")},
        )
        save_sae(MPSAE(dictionary(5 + seed), torch.zeros(D), 4, cfg), in_project / "saes" / name)
    (in_project / "saes" / "manifest.json").write_text(json.dumps({"order": names}))
    return in_project / "saes"


@pytest.mark.slow
def test_figures_pictures_and_tables(folder: Path, lm: Any, make_params: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {
        name: (cls, tuple(size for size in values if size in (2, 10)))
        for name, (cls, values) in pursuit_study.MEMBERS.items()
    }
    monkeypatch.setattr(pursuit_study, "MEMBERS", sizes)
    monkeypatch.setattr(pursuit_page, "TABLE_SIZES", {name: values[-1:] for name, (_, values) in sizes.items()})
    found = pursuit_study.study(folder, lm, make_params())
    rows = {(row["dictionary"], row["encoder"], row["size"]): row for row in found["rows"]}
    assert len(rows) == 1 + 3 * sum(len(values) for _, values in sizes.values())
    assert rows["", "standard", 0]["variance_explained"] < rows["trained", "omp", 10]["variance_explained"] < 1
    for size in (2, 10):
        assert rows["trained", "omp", size]["l0"] == size == rows["trained", "topk_refit", size]["l0"]
        assert rows["trained", "omp", size]["variance_explained"] > rows["trained", "mpsae", size]["variance_explained"]
    # more tokens name more atoms than the tiny model has dimensions
    assert rows["trained", "ihtp", 10]["interpolating_fraction"] == 1
    assert rows["trained", "ihtp", 10]["variance_explained"] == pytest.approx(1, abs=1e-4)
    assert rows["trained", "ihtp", 10]["loss_recovered"] == pytest.approx(1, abs=1e-2)
    assert rows["trained", "mpsae", 10]["interpolating_fraction"] == 0

    target, page = folder.parent / "docs", folder.parent / "docs.md"
    target.mkdir()
    (target / "study.json").write_text(json.dumps(found))
    page.write_text(MARKED)
    assert [path.name for path in pursuit_page.draw(target)] == [
        "l0.png",
        "variance_explained.png",
        "loss_recovered.png",
        "at_equal_l0.png",
    ]
    assert all(path.stat().st_size > 10_000 for path in target.glob("*.png"))
    pursuit_page.write_tables(page, target)
    text = page.read_text()
    assert "| IHTP | k = 10 | " in text and "\\*" in text and "| standard (its own encoder) |" in text
    assert text.count("old") == 1  # no benchmark was run: its table stays
    (target / "speed.json").write_text(
        json.dumps(
            [
                {
                    "device": "cpu",
                    "threads": 2,
                    "d_in": 576,
                    "d_sae": 4608,
                    "memory": {"GB/s": 12.5},
                    "against": {"matching": {"ours_seconds": 0.1, "loop_seconds": 2.5, "ratio": 25.0}},
                    "tokens_per_second": {"omp": 12345.0},
                }
            ]
        )
    )
    pursuit_page.write_tables(page, target)
    assert "| matching | 0.1 s | 2.5 s | 25× |" in page.read_text() and "| omp | 12,345 |" in page.read_text()
    page.write_text("no marks")
    with pytest.raises(UserError, match="the marks <!-- begin study --> and <!-- end study --> are missing"):
        pursuit_page.write_tables(page, target)


def test_loss_recovered_is_that_of_the_core_evaluation(folder: Path, lm: Any, make_params: Any) -> None:
    """The study's figures on its contexts equal the core evaluation's on the same ones."""
    from sae_research.evals.core import evaluation
    from sae_research.lm.activations import HookActivations
    from sae_research.text.tokens import reorder_evenly, token_contexts

    params = make_params(
        core_eval={"batch_size_prompts": 4, "n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 4}
    )
    W, b = dictionary(), torch.zeros(D)
    saes = {"ihtp": IHTPSAE(W, b, 1), "mpsae": MPSAE(W, b, 5)}
    for sae in saes.values():
        sae.cfg = sae.cfg.replace(hook_name=HOOK)
    expected = {
        name: result["eval_result_unstructured"]["lab_v1"]["metrics"]
        for name, result in evaluation.evaluate(saes, lm, params)
    }
    tokens = reorder_evenly(
        token_contexts(lm.tokenizer, lm.separator_id, params.text, "core_eval", 20 * params.text.context_size), 4
    ).tokens
    members = {pursuit_study.Member("trained", name, 1): sae for name, sae in saes.items()}
    for member, figures in pursuit_study._measure(members, HookActivations(lm, HOOK, tokens, params)).items():
        for key in ("l0", "variance_explained", "loss_recovered", "support"):
            assert figures[key] == pytest.approx(expected[member.encoder][key], rel=1e-4), (member, key)


def test_what_is_missing_is_named(folder: Path, lm: Any, make_params: Any) -> None:
    (folder / "manifest.json").write_text(json.dumps({"order": ["standard", "control_random"]}))
    with pytest.raises(UserError, match="needs a baseline and controls data_rows"):
        pursuit_study.study(folder, lm, make_params())
