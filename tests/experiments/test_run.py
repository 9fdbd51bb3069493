"""`run` on the tiny model, and what a sweep says without starting anything."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from sae_research.cli import experiments
from sae_research.cli.main import main
from sae_research.config.params import load_params
from sae_research.runtime.errors import UserError
from sae_research.saes import load_sae
from tests.helpers.experiments import README_CONFIG, tiny_params

SMALL = [
    "data.context_length=24",
    "saes.sae_positions=[blocks.1.hook_resid_pre,blocks.2.hook_resid_pre]",
    "saes.dict_size_to_input_ratio=2",
    "data.n_eval_samples=10",
]


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_a_foreign_file_trains(params_only: Path, tiny_inputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(params_only / "relu.yaml", README_CONFIG)
    arguments = [
        "--config_path",
        config,
        "--device",
        "cpu",
        "--wandb_project",
        "null",
        "--model",
        str(tiny_inputs / "tiny"),
        "--text",
        str(tiny_inputs / "texts"),
        "--tokens",
        "3000",
        *SMALL,
    ]
    assert experiments.main("run", [*arguments, "--dry_run"]) == 0
    assert not (params_only / "output").exists()
    assert experiments.main("run", arguments) == 0
    said = capsys.readouterr().out
    assert "note: saes.sparsity_coeff" in said
    (folder,) = (params_only / "output").iterdir()
    assert folder.name.startswith("relu_lr_0.001_sparsity_0.1_")
    params = load_params(folder / "params.yaml")
    assert params.tracking.project is None and params.train.tokens == 3000
    for name, config_of_sae in params.train.saes.items():
        sae = load_sae(folder / "trained_saes" / name)
        assert sae.cfg.d_sae == 64 == config_of_sae.d_sae and sae.cfg.hook_name == config_of_sae.hook_name
        rms = float(sae.cfg.activation_norm) if hasattr(sae.cfg, "activation_norm") else None
        assert rms is None or 0.05 / rms < config_of_sae.l1_coefficient < 0.2 / rms
    record = json.loads((params_only / ".cache/jobs" / f"run-{folder.name}.json").read_text())
    assert json.loads(Path(record["progress"]).read_text())["state"] == "finished"
    assert main(["monitor"]) == 0
    assert f"done     {folder.name}" in capsys.readouterr().out


def test_our_own_file_is_overrides_of_params_yaml(params_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(params_only / "mine.yaml", "train:\n  saes:\n    mine: {recipe: top_k, d_sae: 32, k: 2}\n")
    assert main(["run", "--config_path", config, "--dry_run", "train.tokens=2000"]) == 0
    assert "mine on" in capsys.readouterr().out
    with pytest.raises(UserError, match="write model.name="):
        main(["run", "--config_path", config, "--model", "x"])
    with pytest.raises(UserError, match="did you mean batch_size"):
        main(["run", "--config_path", config, "--dry_run", "train.bacth_size=2"])


def test_devices_are_shown_alone(params_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", "--show_devices"]) == 0
    assert "cpu " in capsys.readouterr().out
    with pytest.raises(UserError, match="--sweep_config"):
        main(["sweep", "--devices", "cpu"])


def test_a_dry_run_plans_and_starts_nothing(params_only: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep = write(params_only / "k.yaml", "train.saes.topk.k: [2, 4]\ntrain.tokens: [2000, 3000]\nmax_experiments: 3\n")
    assert main(["sweep", "--sweep_config", sweep, "--devices", "cpu", "--dry_run", "--no_tmux"]) == 0
    said = capsys.readouterr().out
    assert "3 of 4 points, 5 SAEs in 2 runs; 0 SAEs are finished, 5 to train in 2 runs on cpu" in said
    assert "there is no tmux to turn off" in said
    assert main(["sweep", "--sweep_config", sweep, "--devices", "cpu,cpu", "--limit", "1", "--dry_run"]) == 0
    assert "1 of 4 points, 2 SAEs in 1 runs" in capsys.readouterr().out
    assert not (params_only / ".dvc").exists()
    with pytest.raises(UserError, match="no DVC project"):
        main(["sweep", "--sweep_config", sweep, "--devices", "cpu"])


def test_a_hook_that_the_model_lacks_is_refused_before_anything_starts(params_only: Path) -> None:
    sweep = write(params_only / "k.yaml", "train.hook_name: [blocks.1.hook_resid_post, blocks.99.hook_resid_post]\n")
    with pytest.raises(UserError, match=r"k.yaml, .*hook blocks.99.hook_resid_post: .* has layers 0 to \d+"):
        main(["sweep", "--sweep_config", sweep, "--devices", "cpu", "--dry_run"])


def test_a_sweep_in_one_format_over_a_base_in_the_other_is_refused(params_only: Path) -> None:
    base = write(params_only / "relu.yaml", README_CONFIG)
    sweep = write(params_only / "k.yaml", "train.tokens: [2000, 3000]\n")
    with pytest.raises(UserError, match="write both in one"):
        main(["sweep", "--base_config", base, "--sweep_config", sweep, "--devices", "cpu", "--dry_run"])


def test_the_tiny_project_follows_the_repository(tiny_inputs: Path) -> None:
    """The parameters that these tests shrink are still parameters."""
    path = tiny_inputs / "check.yaml"
    with path.open("w") as handle:
        YAML().dump(tiny_params(tiny_inputs), handle)
    assert load_params(path).train.tokens == 3000
