"""docs/models.json: what is on record of a family is what its check finds, and no check found wrong numbers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import transformers

from benchmarks import models
from sae_research.lm import LanguageModel
from tests.helpers.dvc_project import ROOT

RECORD: dict[str, Any] = json.loads((ROOT / models.RECORD).read_text())
FEW = ("llama", "gptj", "bert")
"""Tested, without some hooks, refused."""


def test_every_family_is_on_record_with_this_transformers() -> None:
    assert RECORD["transformers"] == transformers.__version__, "python -m benchmarks.models"
    assert list(RECORD["families"]) == models.known_families()


def test_no_check_found_wrong_numbers() -> None:
    wrong = {name: row for name, row in RECORD["families"].items() if "wrong:" in json.dumps(row)}
    assert not wrong


def test_over_forty_families_pass_every_check() -> None:
    rows = RECORD["families"].values()
    assert sum(set(row.get("checks", {}).values()) == {models.OK} for row in rows) >= 40


@pytest.mark.parametrize(
    "family", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in RECORD["families"] if name not in FEW)]
)
def test_a_family_is_as_on_record(family: str) -> None:
    assert models.check(family) == RECORD["families"][family]


def test_a_hook_that_reads_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stream one token late, and an edit that is lost."""
    right = LanguageModel.activations
    monkeypatch.setattr(LanguageModel, "activations", lambda lm, tokens, hook: right(lm, tokens, hook).roll(1, 1))
    found = models.check("llama")["checks"]
    assert found["hook_resid_post"] == "wrong: the stream is not what the layer returns: Tensor-likes are not close!"
    assert found["hook_mlp_out"].startswith("wrong: writing back what was read changes the logits")
    monkeypatch.setattr(LanguageModel, "activations", right)
    monkeypatch.setattr(LanguageModel, "patched_logits", lambda lm, tokens, hook, edit: lm.logits(tokens))
    assert models.check("llama")["checks"]["attn.hook_z"] == "wrong: an edit changes nothing"
