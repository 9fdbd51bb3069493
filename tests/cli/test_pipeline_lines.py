"""What a run prints: a line for each stage with what is left, DVC's own lines left out, a stage's own lines kept."""

from __future__ import annotations

import pytest

from sae_research.cli.pipeline import Following, expected_seconds
from sae_research.config.evaluations import OF_SAES
from sae_research.runtime.sources import PROJECT


def test_lines_of_a_run() -> None:
    following = Following({"inputs": 1.0, "train": 60.0, "setup": 20.0, "core_eval": 100.0, "visualize": 1.0})
    given = [
        (0, "Running stage 'inputs':"),
        (0, "> python -m scripts.fingerprint_inputs"),
        (1, "Running stage 'train':"),
        (1, "> python -m scripts.train_saes"),
        (100, "topk: 0.75 explained"),
        (121, "Updating lock file 'dvc.lock'"),
        (121, ""),
        (121, "Stage 'setup' didn't change, skipping"),
        (121, "Running stage 'core_eval':"),
    ]
    said = [line for second, text in given for line in following.lines(text, float(second))]
    assert said == [
        "[1/5] inputs: moments, about 3 min 2 s to the end",
        "[2/5] train: about 1 min 0 s, about 3 min 1 s to the end",
        "topk: 0.75 explained",
        "[4/5] core_eval: about 3 min 18 s, about 3 min 20 s to the end",  # at the pace of train: 121 s for 61
    ]


def test_the_plan_foretells_stages_of_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(PROJECT)
    seconds = expected_seconds(["train.tokens=2000000"])
    assert seconds["train"] > 60 and seconds["core_eval"] > 5 and seconds["absorption_eval"] == 1.0
    assert {f"{name}_eval" for name in OF_SAES} <= set(seconds)
