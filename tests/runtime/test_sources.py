"""Results computed by other code, or by another library, are other results: what keys and stages depend on."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from sae_research.cli import dependencies
from sae_research.runtime.sources import PROJECT, library_version, sources

CORE, PROBING, POOL = (
    "sae_research.evals.core.evaluation",
    "sae_research.evals.sparse_probing.evaluation",
    "sae_research.lm.activations",
)
TRAIN, IHTP = "sae_research.training.stage", "sae_research.saes.pursuit.encoders"
ROOTS = {
    "core": [CORE, "sae_research.saes.forms"],
    "core_ihtp": [CORE, IHTP],
    "activations": [POOL],
    "train": [TRAIN],
    "probing": [PROBING, "sae_research.saes.forms"],
    "dashboard": ["sae_research.analysis.dashboard.site"],
}
LM = {"core", "core_ihtp", "activations", "train", "probing", "dashboard"}
REACHED_BY: dict[str, set[str]] = {
    "lm/model.py": LM,
    "lm/hooks.py": LM,
    "lm/parts.py": LM,
    "lm/activations.py": LM,
    "runtime/files.py": LM,
    "config/inputs.py": LM,
    "saes/base.py": LM - {"activations"},
    "stats/predictions.py": {"core", "core_ihtp", "train"},
    "stats/intervals.py": {"core", "core_ihtp", "probing"},
    "evals/core/metrics.py": {"core", "core_ihtp"},
    "saes/pursuit/kernels_triton.py": {"core", "core_ihtp", "probing", "train"},
    "training/products.py": {"train"},
    "training/recipes/gated.py": {"train"},
    "saes/forms.py": LM - {"activations"},
    "reporting/report.py": set(),
    "analysis/steer.py": set(),
    "analysis/dashboard/templates/latent.html": {"dashboard"},
    "analysis/dashboard/static/core.js": {"dashboard"},
}
BY_NAME: dict[str, tuple[str, ...]] = {"sae_research.saes.registry": ()}
FINGERPRINTS = """
import json, sys
from sae_research.runtime.sources import sources_fingerprint
roots, by_name = json.load(sys.stdin)
print(json.dumps([sources_fingerprint(*modules, by_name=by_name) for modules in roots]))
"""


def test_all_code_that_computes_a_value_is_found() -> None:
    closures = {name: sources(*modules, by_name=BY_NAME).files for name, modules in ROOTS.items()}
    package = PROJECT / "sae_research"
    found = {file: {name for name, files in closures.items() if package / file in files} for file in REACHED_BY}
    assert found == REACHED_BY


def test_an_edit_is_another_key_wherever_the_project_lies(tmp_path: Path) -> None:
    def fingerprints(project: Path) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", FINGERPRINTS],
            input=json.dumps([list(ROOTS.values()), BY_NAME]),
            cwd=project,
            text=True,
            capture_output=True,
            check=True,
            env={"PYTHONPATH": str(project)},
        )
        return json.loads(done.stdout)

    copy = tmp_path / "else where"
    shutil.copytree(PROJECT / "sae_research", copy / "sae_research", ignore=shutil.ignore_patterns("__pycache__"))
    here = [sources(*modules, by_name=BY_NAME).fingerprint() for modules in ROOTS.values()]
    assert fingerprints(copy) == here
    with (copy / "sae_research/lm/model.py").open("a") as stream:
        stream.write("# changed\n")
    assert not set(fingerprints(copy)) & set(here)


def test_every_way_to_import_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "mine_pkg"
    (package / "inner").mkdir(parents=True)
    (package / "data").mkdir()
    files = {
        "__init__.py": "",
        "inner/__init__.py": "",
        "inner/deep.py": "from .. import relative",
        "top.py": "from typing import TYPE_CHECKING\nimport importlib, numpy\nfrom mine_pkg import plain\n"
        "if TYPE_CHECKING:\n    from mine_pkg import only_types\nelse:\n    import mine_pkg.otherwise\n"
        "def late():\n    import mine_pkg.lazy\n    importlib.import_module('mine_pkg.by_string')\n"
        "    TABLE = {'a': 'mine_pkg.in_table:Class'}\n    importlib.import_module(f'mine_pkg.inner.{late}')\n",
        "plain.py": "import sklearn.linear_model",
        "only_types.py": "",
        "otherwise.py": "",
        "lazy.py": "",
        "relative.py": "",
        "by_string.py": "",
        "in_table.py": "",
        "unused.py": "",
        "data/table.json": "{}",
        "inner/page.html": "",
        ".hidden": "",
    }
    for name, text in files.items():
        (package / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    found = sources("mine_pkg.top")
    inside = {path.relative_to(package).as_posix() for path in found.files}
    assert inside == set(files) - {"only_types.py", "unused.py", ".hidden"}
    assert found.libraries == ("numpy", "sklearn")
    known = sources("mine_pkg.top", by_name={"mine_pkg.top": ["mine_pkg.unused"]})
    inside = {path.relative_to(package).as_posix() for path in known.files}
    assert "unused.py" in inside and "in_table.py" not in inside and "inner/deep.py" not in inside
    before = found.fingerprint()
    (package / "data/table.json").write_text("[]")
    assert sources("mine_pkg.top").fingerprint() != before
    with pytest.raises(ModuleNotFoundError, match="mine_pkg.absent"):
        sources("mine_pkg.absent")


def test_another_version_of_a_library_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    probing = sources("sae_research.evals.sae_probes.evaluation", by_name={"sae_research.saes.registry": ()})
    assert {"torch", "transformers", "numpy", "scipy", "sklearn"} <= set(probing.libraries)
    assert library_version("sklearn") == f"scikit-learn {importlib.metadata.version('scikit-learn')}"
    library_version.cache_clear()
    before, real = probing.fingerprint(), importlib.metadata.version
    for library in ("transformers", "scikit-learn"):
        with monkeypatch.context() as patch:
            patch.setattr(importlib.metadata, "version", lambda name, of=library: "0" if name == of else real(name))
            library_version.cache_clear()
            assert probing.fingerprint() != before
    library_version.cache_clear()


@pytest.fixture(scope="module")
def stages() -> dict[str, dict[str, Any]]:
    return YAML(typ="safe").load((PROJECT / "dvc.yaml").read_text())["stages"]


def test_dependencies_of_every_stage_are_what_its_code_reaches(stages: dict[str, dict[str, Any]]) -> None:
    text = (PROJECT / "dvc.yaml").read_text()
    assert dependencies.written(text) == text, "run `python -m sae_research.cli.dependencies`"
    for name, stage in stages.items():
        code = {dep for dep in stage["deps"] if dep.startswith(("sae_research/", "scripts/"))}
        reached = dependencies._code(stage)
        missing = [file for file in reached if not any(file == dep or file.startswith(f"{dep}/") for dep in code)]
        assert not missing, f"{name} does not depend on {missing}"
        for_nothing = [dep for dep in code if not any(file == dep or file.startswith(f"{dep}/") for file in reached)]
        assert not for_nothing, f"{name} would rerun for nothing after a change of {for_nothing}"


@pytest.mark.parametrize(
    ("file", "concerned"),
    [
        ("sae_research/reporting/report.py", {"generate_report"}),
        (
            "sae_research/text/local.py",
            {"train", "setup", "core_eval", "sparse_probing_eval", "unlearning_eval", "dashboards"},
        ),
        ("sae_research/text/hub.py", {"train", "core_eval"}),
        (
            "sae_research/runtime/files.py",
            {"inputs", "train", "core_metrics", "aggregate_metrics", "visualize", "generate_report"},
        ),
        ("sae_research/config/evaluation_params.py", {"inputs", "train", "core_eval", "ravel_eval"}),
        ("sae_research/training/products.py", {"train", "transfer_eval"}),
        ("sae_research/evals/ravel/data/ravel_city_attribute_to_prompts.json", {"ravel_eval"}),
    ],
)
def test_an_edit_marks_the_stages_it_concerns(stages: dict[str, dict[str, Any]], file: str, concerned: set[str]) -> None:
    marked = {
        name for name, stage in stages.items() if any(file == dep or file.startswith(f"{dep}/") for dep in stage["deps"])
    }
    assert concerned <= marked
    if "ravel" in file:
        assert marked == concerned
