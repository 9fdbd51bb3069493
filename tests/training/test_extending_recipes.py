"""docs/extending_recipes.md, applied to a copy of the package: the recipe of the page trains."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```python\n# (\S+\.py)(?:, (before|after):( [^\n]+))?\n(.*?)```", re.DOTALL)


def apply(page: str, root: Path) -> list[str]:
    """Write and insert the page's blocks; which files they changed."""
    changed = []
    for name, place, anchor, text in BLOCK.findall(page):
        path = root / name
        if place:
            lines = path.read_text().splitlines(keepends=True)
            at = lines.index(f"{anchor[1:]}\n") + (place == "after")
            inserted = text if place == "after" else f"{text}\n\n"
            path.write_text("".join([*lines[:at], inserted, *lines[at:]]))
        else:
            assert not path.exists()
            path.write_text(text)
        changed.append(name)
    return changed


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the package and of the recipes' tests, which is what `import` finds."""
    shutil.copytree(ROOT / "sae_research", tmp_path / "sae_research", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests/helpers").mkdir(parents=True)
    shutil.copy(ROOT / "tests/helpers/training.py", tmp_path / "tests/helpers")

    def ours() -> list[str]:
        return [name for name in sys.modules if name.partition(".")[0] == "sae_research"]

    before = {name: sys.modules.pop(name) for name in ours()}
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in ours():
        del sys.modules[name]
    sys.modules.update(before)


def test_the_recipe_of_the_page_trains(tiny: tuple[Path, Path], copied: Path) -> None:
    assert len(apply((ROOT / "docs/extending_recipes.md").read_text(), copied)) == 6
    importlib.invalidate_caches()
    training, params, stage = (
        importlib.import_module(name)
        for name in ("sae_research.training", "sae_research.config.params", "sae_research.training.stage")
    )
    spec = importlib.util.spec_from_file_location("copied_helpers", copied / "tests/helpers/training.py")
    assert spec is not None and spec.loader is not None
    helpers = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(helpers)
    assert stage.__file__ == str(copied / "sae_research/training/stage.py")
    assert "tanh" in training.RECIPES and set(helpers.CONFIGS) == set(training.RECIPES)
    sae = {"recipe": "tanh", "d_sae": 64, "l1_coefficient": 0.2, "tanh_scale": 2.0, "learning_rate": 0.003}
    model, text = (str(path) for path in tiny)
    settings = params.Params.model_validate(
        {
            "model": {"name": model, "device": "cpu"},
            "text": {"dataset": text, "context_size": 32},
            "train": {
                "hook_name": helpers.HOOK,
                "tokens": 8192,
                "batch_size": 64,
                "buffer_tokens": 1024,
                "llm_dtype": "float32",
                "held_out_tokens": 512,
                "saes": {"tanh": sae},
            },
        }
    )
    report = stage.train(settings, copied / "out")
    result = json.loads((copied / "out/tanh/eval_results.json").read_text())
    assert report["saes"]["tanh"]["hyper_parameters"]["tanh_scale"] == 2.0
    assert 0 < result["l0"] < 40 and result["variance_explained"] > 0.2
