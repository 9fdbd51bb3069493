"""The notebook: what it keeps shows something, and so does a run in a project in which nothing ran before."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")
from benchmarks.notebook import NOTEBOOK, executed  # noqa: E402 - it needs both

ROOT = Path(__file__).parents[2]
RATE = re.compile(r"strength (\S+): target rate (\S+) \[(\S+), (\S+)\]")


def printed(notebook: nbformat.NotebookNode) -> str:
    return "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))


def pictures(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


def test_the_kept_outputs_are_of_one_run_and_name_no_place() -> None:
    notebook = nbformat.read(NOTEBOOK, 4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert all(cell.outputs for cell in cells), "every cell shows something"
    assert pictures(notebook) == sum("Image(" in cell.source for cell in cells) == 4
    texts = printed(notebook) + "".join(str(output.get("data", {}).get("text/html", "")) for output in outputs)
    assert not re.search(r"/(home|root|tmp|work|Users)/", texts)


def test_the_kept_outputs_show_an_effect() -> None:
    shows_an_effect(printed(nbformat.read(NOTEBOOK, 4)))


def shows_an_effect(said: str) -> None:
    plain, *steered = [tuple(map(float, found[1:])) for found in RATE.findall(said)]
    assert max(low for _, low, _ in steered) > plain[2], "a target rate above the baseline, intervals apart"
    before, after = map(float, re.findall(r"^P\(.*?\) ([\d.]+), without latents .*: ([\d.]+)$", said, re.MULTILINE)[0])
    assert after < before / 2, "the answer without the latents that carry it"
    metric, explained = map(float, re.findall(r"metric (\S+); explained (\S+) =", said)[0])
    parts = sum(map(float, re.findall(r"latents (\S+), error (\S+), bias (\S+)", said)[0]))
    assert explained == pytest.approx(parts, abs=0.02) and metric > 0
    assert float(re.findall(r"correlation with real ablations: (\S+)", said)[0]) > 0.8


@pytest.mark.slow
def test_the_workshop_runs_where_nothing_ran_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DVC_ROOT", str(tmp_path))
    (tmp_path / ".cache").mkdir()
    if (ROOT / ".cache/models").is_dir():  # dequantising takes a while
        (tmp_path / ".cache/models").symlink_to(ROOT / ".cache/models")
    shutil.copy2(ROOT / "params.yaml", tmp_path)
    shutil.copy2(NOTEBOOK, tmp_path / "workshop.ipynb")
    notebook = executed(tmp_path / "workshop.ipynb", tmp_path)
    assert (tmp_path / "analysis_results/workshop/site/index.html").is_file()
    said = printed(notebook)
    assert said.startswith("smollm2_135m_l8: 2,304 latents") and pictures(notebook) == 4
    shows_an_effect(said)
