"""Two kinds of project: one with parameters alone, and a clone of this pipeline with a tiny model for real sweeps."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.helpers.experiments import ROOT, run, tiny_params


@pytest.fixture
def params_only(in_project: Path, tiny_inputs: Path) -> Path:
    """An empty project whose params.yaml trains on the tiny model."""
    with (in_project / "params.yaml").open("w") as handle:
        YAML().dump(tiny_params(tiny_inputs), handle)
    return in_project


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path) -> Path:
    """A repository with this code and one commit; nothing was run in it."""
    folder = tmp_path_factory.mktemp("clone") / "repo"
    for name in ("sae_research", "scripts", "custom_saes"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("dvc.yaml", ".gitignore", ".dvcignore", ".dvc/config", ".dvc/.gitignore"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    shutil.copytree(ROOT / ".dvc" / "plots", folder / ".dvc" / "plots")
    with (folder / "params.yaml").open("w") as handle:
        YAML().dump(tiny_params(tiny_inputs), handle)
    for command in (
        ["init", "-q"],
        ["config", "user.name", "t"],
        ["config", "user.email", "t@example.com"],
        ["add", "-A"],
        ["commit", "-qm", "tiny"],
    ):
        assert run(folder, "git", *command).returncode == 0
    return folder
