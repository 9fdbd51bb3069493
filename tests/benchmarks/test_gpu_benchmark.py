"""`make gpu`: what it needs, what it writes, that docs/gpu.md says what the record says. Without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu, gpu_bundle, gpu_page
from sae_research.runtime.errors import UserError

ROOT = Path(__file__).parents[2]
BARE = """
import sys, importlib.abc

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name.partition(".")[0])

sys.meta_path.insert(0, Missing())
from benchmarks import gpu, gpu_evaluations, gpu_page, gpu_training, pursuit
from sae_research.evals.run import evaluation_function
evaluation_function("core")
print("imported")
"""
ABSENT = {"scipy", "pandas", "pyarrow", "numba", "sklearn", "threadpoolctl", "dvc", "matplotlib", "dotenv"} | {
    "sae_lens",
    "sae_bench",
    "sae_probes",
    "transformer_lens",
    "datasets",
    "ray",
    "openai",
    "omegaconf",
}


def test_docs_say_what_the_record_says() -> None:
    text = gpu.PAGE.read_text()
    shown = text.partition(gpu_page.BEGIN)[2].partition(gpu_page.END)[0].strip()
    assert shown == gpu_page.shown(gpu.RECORD).strip()
    if not gpu.RECORD.is_file():
        assert shown.startswith("Not measured")


@pytest.mark.slow
def test_few_packages_are_needed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BARE.format(absent=ABSENT)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "imported", done.stderr[-2000:]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu_bundle"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = {line.partition("==")[0] for line in done.stdout.split()}
    assert {"pydantic", "pydantic-core", "ruamel-yaml"} <= names and not names & {"torch", "scipy", "pandas", "numba"}


def test_the_tests_of_a_gpu_are_found_and_counted(tmp_path: Path) -> None:
    found = gpu.gpu_tests()
    assert {"tests/saes", "tests/training", "tests/evals", "tests/analysis"} <= set(found)
    assert "tests/saes/test_pursuit_triton.py" in found["tests/saes"]
    report = tmp_path / "report.xml"
    report.write_text(
        '<testsuites><testsuite tests="3" failures="1" errors="0" skipped="1"><testcase name="a"/>'
        '<testcase name="b"><failure/></testcase><testcase name="c"><skipped/></testcase></testsuite></testsuites>'
    )
    assert gpu.counted(report) == {"tests": 3, "failures": 1, "errors": 0, "skipped": 1, "failed": ["b"]}


def test_a_closure_holds_what_is_required() -> None:
    assert {"pydantic", "pydantic-core"} <= gpu_bundle._closure({"pydantic"})
    assert gpu_bundle._closure({"no-such-distribution"}) == set()


def test_without_a_device_one_line_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    assert gpu.main() == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_what_fails_is_recorded_and_the_rest_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = gpu.Run("cpu", True, 5, tmp_path / "record.json")

    def fails(_: gpu.Run) -> dict[str, int]:
        raise RuntimeError("no kernel\nof this kind")

    def lacks(_: gpu.Run) -> dict[str, int]:
        raise ModuleNotFoundError("No module named 'x'", name="x")

    def refused(_: gpu.Run) -> dict[str, int]:
        raise UserError("too small")

    for name, part in (("a", fails), ("b", lacks), ("c", refused), ("d", lambda _: {"found": 1})):
        run.part(name, part)
    run.ends = 0
    run.part("e", lambda _: {"found": 2})
    written = json.loads((tmp_path / "record.json").read_text())
    assert written["failed"] == {"a": "RuntimeError: no kernel"} and written["d"] == {"found": 1} and "e" not in written
    assert run.left_out == {"b": "needs x", "c": "too small", "e": "the time was up"}
    shown = gpu_page.shown(tmp_path / "record.json")
    assert shown.startswith("Measured on cpu") and "- a failed: RuntimeError: no kernel" in shown and "- b: needs x" in shown


@pytest.mark.slow
def test_all_of_it_runs_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--small", "--out", str(tmp_path / "record.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads((tmp_path / "record.json").read_text())
    assert not record["failed"]
    from sae_research.config.evaluations import EVALUATIONS
    from sae_research.training import RECIPES

    assert {row["recipe"] for row in record["training"]} > set(RECIPES)
    assert set(record["evaluations"]["by_evaluation"]) | set(record["left_out"]) >= set(EVALUATIONS)
    assert all(row["tokens_per_second"] > 0 for row in record["training"])
    for part in ("Pursuit", "seconds per SAE", "SAE-tokens/s"):
        assert part in gpu_page.shown(tmp_path / "record.json")
