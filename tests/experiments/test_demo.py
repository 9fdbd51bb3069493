"""The demo on a tiny model: from one command to SAEs, figures and picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from sae_research.config.recipes import recipe_model
from sae_research.experiments.demo import LADDERS, demo_saes, main
from sae_research.runtime.errors import UserError
from sae_research.saes import load_sae
from tests.helpers.training import HOOK


def test_every_ladder_is_six_settings_its_recipe_takes() -> None:
    saes = demo_saes(list(LADDERS), [3], [4096], None, 0.001)
    assert len(saes) == 6 * len(LADDERS) == len({json.dumps(sae) for sae in saes.values()})
    for name, sae in saes.items():
        config = recipe_model(sae["recipe"]).model_validate(sae)
        assert config.learning_rate == 0.001 and config.hook_name == "blocks.3.hook_resid_post"
        assert name.startswith("layer_3_") and name.replace("_", "").isalnum()
    assert saes["layer_3_gated_l1_0p012"]["recipe"] == "gated_rajamanoharan"
    several = demo_saes(["top_k"], [1, 2], [64, 256], [0, 1], None)
    assert len(several) == 2 * 2 * (2 + 4)  # at width 64 only 20 and 40 fit
    assert several["layer_2_top_k_w256_seed1_k160"] == {
        "recipe": "top_k",
        "d_sae": 256,
        "hook_name": "blocks.2.hook_resid_post",
        "k": 160,
        "seed": 1,
    }
    with pytest.raises(UserError, match="too narrow"):
        demo_saes(["top_k"], [1], [4], None, None)


@pytest.fixture
def arguments(tiny_inputs: Path, in_project: Path) -> list[str]:
    return [
        "--save_dir",
        "saes",
        "--model_name",
        str(tiny_inputs / "tiny"),
        "--text",
        str(tiny_inputs / "texts"),
        "--layers",
        "0",
        "1",
        "--architectures",
        "standard",
        "top_k",
        "--widths",
        "48",
        "--tokens",
        "2048",
        "--context_size",
        "32",
        "--batch_size",
        "64",
        "--device",
        "cpu",
    ]


def test_one_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--save_checkpoints"]) == 0
    out = capsys.readouterr().out
    folder = Path("saes")
    results = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("*/eval_results.json")}
    assert len(results) == 2 * (6 + 2) and all("loss_recovered" in values for values in results.values())
    assert {values["hook_name"] for values in results.values()} == {HOOK, HOOK.replace("1", "0")}
    assert "layer_1_top_k_k20" in out and out.rstrip().endswith("saes/pareto.png")
    with Image.open(folder / "pareto.png") as picture:
        assert picture.width > 1000 and len(picture.convert("RGB").getcolors(1_000_000)) > 20  # two panels, drawn
    snapshots = sorted((folder / "layer_1_top_k_k20" / "checkpoints").iterdir())
    assert len(snapshots) >= 3 and load_sae(snapshots[0]).cfg.d_sae == 48


def test_a_dry_run_trains_nothing_and_mistakes_come_first(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments, "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("16 SAEs on ") and "blocks.0.hook_resid_post standard: standard_l1_0p012" in out
    assert not Path("saes").exists()
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ACCESS_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="--hf_repo_id needs a token"):
        main([*arguments, "--hf_repo_id", "org/saes"])
    Path("saes").mkdir()
    Path("saes/thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        main(arguments)
    with pytest.raises(UserError, match="demo: .*learning_rate"):
        main([*arguments, "--learning_rate", "-1"])
    with pytest.raises(SystemExit):
        main([*arguments, "--architectures", "no_such"])
