"""Rules for outliers, the file of known models, and what is listed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sae_research.config.transfer import Outliers
from sae_research.runtime.errors import UserError
from sae_research.transfer.statistics import Norms, OutlierLog, chosen_limit, limits
from sae_research.transfer.sweep import sweep

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("model", "d_in", "rule", "limit"),
    [
        # equivalent raw limits of the published file: multiple * base / scalar
        ("gpt2-small", 768, "relative", 204.2),
        ("google/gemma-2b", 2048, "relative", 289.4),
        ("mistralai/Mistral-7B-v0.1", 4096, "absolute", 200.0),
    ],
)
def test_known_models(model: str, d_in: int, rule: str, limit: float) -> None:
    config = Outliers(rule=rule, config_file=str(ROOT / "outlier_cfg.json"))
    found = limits(config, model, d_in, Norms(median=100.0, mean=123.0))
    assert chosen_limit(config, found, model) == pytest.approx(limit, rel=1e-3)


def test_other_models_are_measured(tmp_path: Path) -> None:
    config = Outliers(rule="relative", config_file=str(tmp_path / "none.json"))
    found = limits(config, "tiny", 64, Norms(median=10.0, mean=25.0))
    assert found == pytest.approx({"median": 30.0, "relative": 50.0})
    assert chosen_limit(Outliers(rule="none"), found, "tiny") == float("inf")
    with pytest.raises(UserError, match="needs absolute_threshold"):
        chosen_limit(Outliers(rule="absolute"), found, "tiny")
    assert (
        chosen_limit(Outliers(rule="absolute"), limits(Outliers(absolute_threshold=7.0), "tiny", 64, Norms(1, 1)), "tiny")
        == 7.0
    )


def test_largest_are_listed_in_context(base: Any) -> None:
    tokens = torch.arange(24).reshape(2, 12) + 60
    norms = torch.ones(2, 12)
    norms[0, 3], norms[1, 11], norms[1, 2] = 50.0, 90.0, 70.0
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 2] = False
    log = OutlierLog({"median": 3.0, "absolute": 60.0}, limit=3.0, listed=2, device=torch.device("cpu"))
    for _ in range(2):
        log.update("base", norms, mask, tokens, base.tokenizer)
    report = log.report()
    assert report["fraction_removed"]["base"] == pytest.approx({"median": 4 / 46, "absolute": 2 / 46})
    assert [(item["norm"], item["position"]) for item in report["listed"]] == [(90.0, 11), (90.0, 11)]
    assert report["listed"][0]["token"] == base.tokenizer.decode([int(tokens[1, 11])])
    assert sum(report["norm_histogram"]["base"]) == 46


def test_a_rule_that_removes_too_much(make_pair: Any) -> None:
    pair = make_pair("near", outliers={"rule": "absolute", "absolute_threshold": 1e-3})
    with pytest.raises(UserError, match=r"the rule absolute removes 100 % of tokens"):
        sweep(pair, 300)


def test_no_rule_keeps_all(make_pair: Any) -> None:
    statistics = sweep(make_pair("near", outliers={"rule": "none"}), 300)
    assert all(stats.removed.n == 0 < stats.kept.n for stats in statistics.hooks.values())
