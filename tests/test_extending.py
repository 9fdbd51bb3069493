"""docs/extending.md, block by block, on a copy of the project: its evaluation and its metrics are computed, stored, reported
and drawn."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from sae_research.config.evaluations import EVALUATIONS
from sae_research.runtime.files import write_json
from sae_research.saes import save_sae
from tests.helpers.dvc_project import ENV, ROOT, copy_files, set_params
from tests.helpers.evals_saes import standard

BLOCK = re.compile(r"<!-- (?P<file>[\w./]+), (?P<how>.*?) -->\n```\w+\n(?P<text>.*?)```\n", re.DOTALL)
RUN = """
import runpy, sys
sys.path.insert(0, "")
for command in sys.argv[1:]:
    sys.argv = command.split()[2:]
    try:
        runpy.run_module(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
"""


def apply(project: Path, file: str, how: str, text: str) -> None:
    """One block of the document."""
    path = project / file
    if how == "new":
        path.parent.mkdir()
        path.write_text(text)
        return
    lines = path.read_text().splitlines(keepends=True)
    if how == "at the end":
        at = len(lines)
    elif how == "before the last line":
        at = len(lines) - 1
    else:
        where, _, marker = how.partition(": ")
        (found,) = (i for i, line in enumerate(lines) if line.strip().startswith(marker))
        at = found + (where == "after")
    path.write_text("".join([*lines[:at], text, *lines[at:]]))


def commands(project: Path) -> list[str]:
    """Of the stages that matter, in order: the other evaluations are switched off, and say so."""
    stages = YAML(typ="safe").load((project / "dvc.yaml").read_text())["stages"]
    of_saes = stages["aggregate_metrics"]["cmd"].split()[4:-1]
    names = [Path(file).stem for file in of_saes]
    chosen = [f"{name}_eval" for name in names] + [f"{name}_metrics" for name in names]
    return [
        stages[name]["cmd"] for name in (*chosen, "aggregate_metrics", "process_results", "visualize", "generate_report")
    ]


def python(project: Path, *arguments: str) -> None:
    done = subprocess.run([sys.executable, *arguments], cwd=project, env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_record_has_its_stages() -> None:
    stages = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
    assert {f"{name}_{kind}" for name in EVALUATIONS for kind in ("eval", "metrics")} <= set(stages)
    toggles = YAML(typ="safe").load((ROOT / "params.yaml").read_text())["eval_types"]
    assert list(toggles) == [*EVALUATIONS, "dashboards"]


@pytest.mark.slow
def test_the_evaluation_and_the_metrics_of_the_document(tiny_inputs: Path, tmp_path: Path) -> None:
    copy_files(tmp_path)
    blocks = [match.groupdict() for match in BLOCK.finditer((ROOT / "docs/extending.md").read_text())]
    assert len(blocks) == 10
    for block in blocks:
        apply(tmp_path, **block)
    set_params(
        tmp_path,
        {
            "model": {"name": str(tiny_inputs / "tiny"), "device": "cpu", "llm_batch_size": 8},
            "text": {"dataset": str(tiny_inputs / "texts"), "context_size": 24},
            "eval_types": {"sparse_probing": False, "ground_truth": False},
            "core_eval": {
                "batch_size_prompts": 3,
                "n_eval_reconstruction_batches": 1,
                "n_eval_sparsity_variance_batches": 1,
            },
        },
    )
    saes = tmp_path / "downloaded_saes"
    save_sae(standard(), saes / "one")
    save_sae(standard(sign=-1), saes / "flipped")
    write_json(
        saes / "manifest.json",
        {"order": ["one", "flipped"], "saes": {name: {"role": "comparison"} for name in ("one", "flipped")}},
    )
    python(tmp_path, "-m", "sae_research.cli.dependencies")
    stage = YAML(typ="safe").load((tmp_path / "dvc.yaml").read_text())["stages"]["redundancy_eval"]
    assert {"sae_research/evals/redundancy", "sae_research/config"} <= set(stage["deps"])
    assert "sae_research/evals/core" not in stage["deps"]
    python(tmp_path, "-c", RUN, *commands(tmp_path))

    metrics = json.loads((tmp_path / "metrics/all_metrics.json").read_text())
    assert metrics["one"]["redundancy"] == metrics["flipped"]["redundancy"], "signs do not count"
    assert 0 < metrics["one"]["redundancy"]["redundancy"] < 1
    assert 0 < metrics["one"]["core"]["support_fraction"] < 1
    report = (tmp_path / "METRICS.md").read_text()
    assert "| Redundancy ↓ |" in report and "\n## Redundancy\n" in report and "images/l0_vs_redundancy.png" in report
    assert "Mean fraction of the latents that one sequence uses." in report
    rows = list(csv.DictReader((tmp_path / "metrics/results.csv").open()))
    assert {("redundancy", "redundancy"), ("core", "support_fraction")} <= {(row["eval"], row["metric"]) for row in rows}
    for key in ("redundancy", "support_fraction"):
        assert (tmp_path / f"images/l0_vs_{key}.png").is_file()
        drawn = json.loads((tmp_path / f"metrics/plots/{key}.json").read_text())
        assert {row["sae"] for row in drawn} == {"one", "flipped"} and all(key in row for row in drawn)
