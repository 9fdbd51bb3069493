"""A stage that is switched off is done before torch could have been imported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

CODE = """
import sys
from sae_research.config.evaluations import OF_SAES
from sae_research.evals.run import run_evaluation
from sae_research.config.params import Params
for name, one in OF_SAES.items():
    one.on or run_evaluation(name, Params())
from scripts import run_dashboards, run_transfer
run_transfer.main()
run_dashboards.main()
print("torch" in sys.modules)
"""
ROOT = Path(__file__).parents[2]


def test_no_torch_for_what_is_switched_off(in_project: Path) -> None:
    shutil.copy(ROOT / "params.yaml", in_project)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", CODE], cwd=in_project, env=env, text=True, capture_output=True, check=True)
    assert done.stdout.split()[-1] == "False"
    for folder in ("eval_results/scr", "eval_results/transfer", "dashboards"):
        assert '"disabled"' in (in_project / folder / "_status.json").read_text()
