"""What SAEs are called and where their folders lie."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from sae_research.config.params import Params
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import NAME_LIMIT
from sae_research.saes import save_sae
from sae_research.saes.sources import folder_names, open_sae
from tests.helpers.tiny_saes import tiny_sae


def named(*patterns: str) -> dict[str, str]:
    return {path.as_posix(): name for path, name in folder_names(patterns).items()}


def test_names_have_as_many_parts_as_tell_them_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in (
        "runs/a/trainer_0",
        "runs/b/trainer_0",
        "runs/b/trainer_1",
        "x/checkpoints/step_10",
        "y/checkpoints/step_10",
        "x/checkpoints/step_20",
    ):
        (tmp_path / folder).mkdir(parents=True)
    assert named("runs/*/trainer_*") == {
        "runs/a/trainer_0": "a_trainer_0",
        "runs/b/trainer_0": "b_trainer_0",
        "runs/b/trainer_1": "trainer_1",
    }
    assert named("*/checkpoints/step_*") == {
        "x/checkpoints/step_10": "x_checkpoints_step_10",
        "x/checkpoints/step_20": "step_20",
        "y/checkpoints/step_10": "y_checkpoints_step_10",
    }
    assert named("runs/b/*", "runs/*/trainer_1") == named("runs/b/*")  # each folder once
    long = tmp_path / "long" / ("n" * 240)
    long.mkdir(parents=True)
    assert len(named("long/*")[f"long/{'n' * 240}"]) == NAME_LIMIT


def test_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_sae(tiny_sae(), tmp_path / "saes" / "mine")
    assert list(folder_names(["~/saes/*"]).values()) == ["mine"]
    assert open_sae(next(iter(folder_names(["~/saes/*"])))).cfg.form == "standard"
    with pytest.raises(UserError, match="no such home folder"):
        folder_names(["~nobody_of_that_name/*"])


@pytest.mark.parametrize("length", [240, 300])
def test_a_name_too_long_is_refused_before_any_work(length: int) -> None:
    trained = {"x" * length: {"recipe": "top_k", "d_sae": 64, "k": 4}}
    for sections in ({"baseline_sae": {"name": "x" * length}}, {"train": {"saes": trained}}):
        with pytest.raises(ValidationError, match=f"{NAME_LIMIT}"):
            Params.model_validate(sections)
