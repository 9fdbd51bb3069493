"""The four commands as DVC and a user start them: exit codes, one clear line, no torch, quick."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.results import SAES, Lab

PROJECT = Path(__file__).parents[2]
CORE = ["extract_metrics", "core", "eval_results/core", "metrics/core.json"]
COMMANDS = (CORE, ["process_results"], ["visualize_results"], ["generate_report"])
SECONDS, DRAWING_SECONDS = 4.0, 6.0
"""Processor time a command may take with compiled bytecode: an import of torch alone costs 2 to 3 s."""


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """As in a finished installation: bytecode is compiled once and kept beside its source."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHONDONTWRITE", "PYTHONPYCACHE"))}
    return {**kept, "PYTHONPATH": str(PROJECT)}


def start(lab: Lab, command: list[str], environment: dict[str, str], module: bool = False) -> subprocess.CompletedProcess:
    script = ["-m", f"scripts.{command[0]}"] if module else [str(PROJECT / "scripts" / f"{command[0]}.py")]
    return subprocess.run(
        [sys.executable, *script, *command[1:]],
        cwd=lab.root,
        env=environment,
        text=True,
        capture_output=True,
        timeout=60,
        check=False,
    )


def test_all_commands_run_as_modules(lab: Lab, environment: dict[str, str]):
    for command in COMMANDS:
        done = start(lab, command, environment, module=True)
        assert done.returncode == 0, done.stderr
    assert set(lab.read("metrics/core.json")) == {*SAES, "_status"}
    assert (lab.root / "METRICS.md").is_file() and (lab.root / "images/overview.png").is_file()


def test_a_users_mistake_is_one_line_and_exit_1(lab: Lab, environment: dict[str, str]):
    done = start(lab, ["extract_metrics", "core", "nowhere", "out.json"], environment)
    assert done.returncode == 1
    assert done.stderr.startswith("error: nowhere: no such folder") and done.stderr.count("\n") == 1
    assert start(lab, ["generate_report"], environment).returncode == 1


def test_reporting_imports_no_torch_and_no_benchmark():
    heavy = {
        "torch",
        "sae_bench",
        "sae_lens",
        "transformers",
        "transformer_lens",
        "pandas",
        "matplotlib.pyplot",
    }
    assert imported(heavy, "figures", "transfer_figures", "ground_truth_figures", "report", "results", "tables") == set()


def test_only_drawing_imports_matplotlib():
    assert imported({"matplotlib"}, "report", "results", "tables") == set()
    assert imported({"numpy"}, "results", "tables") == set(), "only comparisons compute"


def imported(watched: set[str], *modules: str) -> set[str]:
    """Which of the watched modules come along when reporting modules are imported in a fresh interpreter."""
    names = ", ".join(f"sae_research.reporting.{module}" for module in modules)
    code = f"import sys, {names}; print(*({watched!r} & set(sys.modules)))"
    return set(subprocess.check_output([sys.executable, "-c", code], cwd=PROJECT, text=True).split())


def test_commands_run_as_scripts_and_are_quick(lab: Lab, environment: dict[str, str]):
    """Processor seconds, the least of up to three: a wall clock would measure whoever shares the machine."""
    for command in COMMANDS:
        limit = DRAWING_SECONDS if command[0] == "visualize_results" else SECONDS
        spent: list[float] = []
        while len(spent) < 3 and (not spent or spent[-1] >= limit):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            done = start(lab, command, environment)
            assert done.returncode == 0, done.stderr
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert min(spent) < limit, (command[0], spent)
