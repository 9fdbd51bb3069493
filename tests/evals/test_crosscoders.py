"""Evaluations of crosscoders: what has no meaning for them says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sae_research.config.evaluations import OF_SAES
from sae_research.evals.harness import PreparedSAEs, by_hook, by_hooks, by_read_hook
from sae_research.evals.run import evaluation_function
from sae_research.lm import LanguageModel
from sae_research.runtime.errors import NotApplicable, UserError
from sae_research.runtime.files import write_json
from sae_research.runtime.stages import StageFolder
from sae_research.saes import save_sae
from sae_research.setup.stage import make_manifest
from tests.helpers.crosscoders import HOOKS, random_crosscoder
from tests.helpers.evals_saes import everything, small_sections
from tests.helpers.transcoders import READ, WRITTEN, random_transcoder

NAMES = " \\+ ".join(HOOKS)


@pytest.mark.parametrize("name", OF_SAES)
def test_evaluations_of_one_hook_say_why_not(name: str, lm: LanguageModel, make_params: Any) -> None:
    saes, stage = {"one": random_crosscoder()}, StageFolder(Path("out"))
    with pytest.raises(NotApplicable, match=rf"it takes the activations of one hook.*: these are crosscoders \({NAMES}\)"):
        list(evaluation_function(name)(saes, lm, make_params(), stage))


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


@pytest.mark.parametrize("group", [by_hook, by_read_hook, by_hooks])
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
