"""Grids of params.yaml, points into runs, and the overrides by which DVC gets them."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.hydra import apply_overrides
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from sae_research.config.params import check_params, load_params
from sae_research.experiments.config_files import flatten, names_sections, over, with_values
from sae_research.experiments.grid import Grid, expand, hydra, make_jobs, sae_keys, set_params, without, write_wandb_sweep
from sae_research.experiments.sae_interpretability import Changes
from sae_research.runtime.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def params_yaml() -> dict[str, Any]:
    return YAML(typ="safe").load((ROOT / "params.yaml").read_text())


def grid_of(params_yaml: dict[str, Any], sweep: dict[str, Any], base: dict[str, Any] | None = None, **more: Any) -> Grid:
    def nothing(*_: Any) -> Any:
        raise AssertionError("overrides of params.yaml need no model")

    return expand(base or {}, sweep, params_yaml, Changes(), nothing, **more)


def test_points_of_one_stream_become_one_run(params_yaml: dict[str, Any]) -> None:
    sweep = {"train.saes.topk.k": [16, 32], "train": {"tokens": [1000, 2000]}}
    jobs = make_jobs(grid_of(params_yaml, sweep).points, ["core"], "my sweep", "sweep.yaml")
    assert [(job.saes, job.label) for job in jobs] == [
        (["standard", "topk_k_16", "topk_k_32"], f"train.tokens={tokens}") for tokens in (1000, 2000)
    ]
    for job in jobs:
        assert job.params.train.saes["topk_k_16"].k == 16
        assert job.params.comparison_saes.trained == ["all"] and job.params.baseline_sae.name == "standard"
        assert [name for name, on in job.params.eval_types.model_dump().items() if on] == ["core"]
        assert job.targets[0] == "core_metrics" and set(job.targets[1:]) == {  # these to say that they are off
            "ground_truth_metrics",
            "sparse_probing_metrics",
        }
        assert job.name.startswith("my-sweep-")
    parts = make_jobs(grid_of(params_yaml, sweep).points, ["core"], "s", "s", saes_per_run=2)
    assert [len(job.saes) for job in parts] == [2, 1, 2, 1]
    assert parts[1].params.baseline_sae.name == "topk_k_32"


def test_a_shared_setting_becomes_each_sae_s_own(params_yaml: dict[str, Any]) -> None:
    values = copy.deepcopy(params_yaml)
    values["train"]["saes"]["topk"].pop("learning_rate", None)
    sweep = {"train.learning_rate": [1e-3, 3e-4], "train.hook_name": ["blocks.1.hook_resid_post", "blocks.2.hook_mlp_out"]}
    (job,) = make_jobs(grid_of(values, sweep).points, ["core"], "s", "s")
    own_rate = values["train"]["saes"]["standard"]["learning_rate"]
    rates = {name: sae.learning_rate for name, sae in job.params.train.saes.items()}
    assert rates["topk_lr_0_001_hook_name_blocks_1_hook_resid_post"] == 1e-3
    assert {rate for name, rate in rates.items() if name.startswith("standard")} == {own_rate}
    assert job.params.train.hooks == sweep["train.hook_name"]
    assert check_params(over(values, {"train.learning_rate": 1e-5}), "x").train.saes["topk"].learning_rate == 1e-5


def test_a_file_that_defines_saes_trains_no_others(params_yaml: dict[str, Any]) -> None:
    mine = {"train": {"saes": {"mine": {"recipe": "top_k", "d_sae": 64, "k": 2}}}}
    assert list(over(params_yaml, mine)["train"]["saes"]) == ["mine"]
    assert list(over(params_yaml, {"train.saes.topk.k": 2})["train"]["saes"]) == list(params_yaml["train"]["saes"])
    assert names_sections(mine) and not names_sections({"saes": {}, "data": {}, "lr": 1})


@pytest.mark.parametrize(
    ("sweep", "line"),
    [
        ({"train.saes.topk.kk": [1, 2]}, "kk, did you mean k?"),
        ({"trian.tokens": [1, 2]}, "did you mean train.tokens?"),
        ({"train.saes.tpok.k": [1, 2]}, "did you mean topk?"),
        ({"train.saes.topk.k": []}, "lists no value"),
        ({"train.saes.topk.k": [0]}, "train.saes.topk.k"),
        ({"train.saes.topk.learning_rate": [1e-3, 1.00000001e-3]}, "two different SAEs would be called"),
        ({"train.tokens": [1000], "max_experiments": "many"}, "max_experiments"),
        ({"train.tokens": [1000, 2000], "controls.names": [[], ["random"]]}, "controls.names changes no SAE and no figure"),
    ],
)
def test_what_cannot_be_swept_is_one_line(params_yaml: dict[str, Any], sweep: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as error:
        make_jobs(grid_of(params_yaml, sweep).points, ["core"], "s", "sweep.yaml")
    assert line in str(error.value)
    with pytest.raises(UserError, match="unknown evaluation cor, did you mean core"):
        make_jobs(grid_of(params_yaml, {"train.tokens": [1000]}).points, ["cor"], "s", "s")


def test_dvc_makes_of_the_overrides_what_was_meant(tmp_path: Path, params_yaml: dict[str, Any]) -> None:
    """Also from a params.yaml whose lists and comments DVC's writer is known to damage."""
    base = {
        "train.saes.my_sae": {"recipe": "hard_concrete", "d_sae": 8, "l0_coefficient": 1e-5, "stretch": [-0.2, 1.2]},
        "tracking.name": "it's {sae}: a, b",
        "text.dataset": "C:\\texts (1)",
        "random_seed": 7,
    }
    workspace = copy.deepcopy(params_yaml)
    workspace["comparison_saes"]["python"] = ["custom_saes.example:AbsTopK"]
    path = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text()
    path.write_text(text.replace("  python: []  ", "  python: # mine\n    - custom_saes.example:AbsTopK\n  #", 1))
    assert YAML(typ="safe").load(path.read_text()) == workspace
    for job in make_jobs(grid_of(workspace, {"train.tokens": [1000, 2000]}, base).points, ["core"], "s", "s"):
        copied = tmp_path / f"{job.name}.yaml"
        copied.write_text(path.read_text())
        apply_overrides(copied, set_params(workspace, job.values))
        assert load_params(copied) == job.params
        assert list(load_params(copied).train.saes) == ["my_sae"]
    assert hydra({"a": [1, None, True, "x'y"]}) == "{a:[1,null,true,'x\\'y']}"


def test_any_list_can_be_emptied_in_a_file_that_dvc_wrote_before(tmp_path: Path, params_yaml: dict[str, Any]) -> None:
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    apply_overrides(path, ["train.tokens=1000"])  # block lists now stand at their key's own indentation
    written = path.read_text()
    lists = [key for key, value in flatten(params_yaml).items() if isinstance(value, list) and value]
    assert len(lists) > 20
    damaged = []
    for key in lists:
        apply_overrides(path, [f"{key}=[]"])
        try:
            assert flatten(YAML(typ="safe").load(path.read_text()))[key] == []
        except YAMLError:  # by ruamel.yaml
            with pytest.raises(UserError, match=r"not valid YAML.*write KEY=null"):
                load_params(path)
            damaged.append(key)
        path.write_text(written)
    assert len(damaged) < 5, "a comment on every key keeps most lists whole"
    for key in damaged:
        apply_overrides(path, [f"{key}=null"])
        assert flatten(YAML(typ="safe").load(path.read_text()))[key] is None
        path.write_text(written)
    emptied = ["comparison_saes.trained", "sae_variants.ihtp.k_values", "controls.names"]
    wanted = with_values(params_yaml, {"train.tokens": 1000, **{key: [] for key in emptied}})
    overrides = set_params(YAML(typ="safe").load(written), wanted)
    assert sorted(overrides) == sorted(f"++{key}=null" for key in emptied)
    apply_overrides(path, overrides)
    found = load_params(path)
    assert found.comparison_saes.trained == [] == found.sae_variants.ihtp.k_values and found.train.tokens == 1000
    assert check_params(wanted, "x") == found


def test_finished_saes_are_told_by_all_that_shaped_them(params_yaml: dict[str, Any]) -> None:
    (job,) = make_jobs(grid_of(params_yaml, {"train.saes.topk.k": [16, 32]}).points, ["core"], "s", "s")
    keys = sae_keys(job.params)
    rest = without(job, ["standard", "topk_k_16"], ["core"], "s", "s")
    assert rest is not None and rest.saes == ["topk_k_32"] and rest.name != job.name
    assert sae_keys(rest.params)["topk_k_32"] == keys["topk_k_32"]
    assert without(job, job.saes, ["core"], "s", "s") is None
    assert without(job, [], ["core"], "s", "s") is job

    def changed(**sections: Any) -> dict[str, str]:
        return sae_keys(
            job.params.model_copy(
                update={name: getattr(job.params, name).model_copy(update=values) for name, values in sections.items()}
            )
        )

    assert changed(model={"device": "cpu"}, visualization={"dpi": 50}, sparse_probing={"k_values": [3]}) == keys
    for other in (
        changed(model={"name": "x"}),
        changed(train={"tokens": 5}),
        changed(core_eval={"batch_size_prompts": 1}),
        changed(text={"dataset": "x"}),
    ):
        assert not set(other.values()) & set(keys.values())


def test_a_sweep_for_the_cloud_lists_every_value(tmp_path: Path, params_yaml: dict[str, Any]) -> None:
    grid = grid_of(params_yaml, {"train.saes.topk.k": [16, 32], "train.tokens": [1000, 2000]}, limit=3)
    path = tmp_path / "wandb.yaml"
    write_wandb_sweep(path, grid.points, grid.total, Path("base.yaml"), ["--tokens", "5"], "proj")
    sweep = YAML(typ="safe").load(path.read_text())
    assert sweep["parameters"] == {"train.saes.topk.k": {"values": [16, 32]}, "train.tokens": {"values": [1000, 2000]}}
    assert sweep["method"] == "grid" and sweep["run_cap"] == 3 and sweep["project"] == "proj"
    assert sweep["command"][-4:] == ["base.yaml", "--tokens", "5", "${args_no_hyphens}"]
    with pytest.raises(UserError, match="needs --base_config"):
        write_wandb_sweep(path, grid.points, grid.total, None, [], None)


def test_watching_runs_needs_no_torch() -> None:
    code = "import sys, sae_research.experiments.sweep, sae_research.experiments.single; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
