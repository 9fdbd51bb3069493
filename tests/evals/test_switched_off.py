"""A stage that is switched off is done before torch could have been imported."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys
from sae_research.config.evaluations import OF_SAES
from sae_research.evals.run import run_evaluation
from sae_research.config.params import Params
for name, one in OF_SAES.items():
    one.on or run_evaluation(name, Params())
print("torch" in sys.modules)
"""


def test_no_torch_for_what_is_switched_off(in_project) -> None:
    done = subprocess.run([sys.executable, "-c", CODE], cwd=in_project, text=True, capture_output=True, check=True)
    assert done.stdout.split()[-1] == "False"
    assert '"disabled"' in (in_project / "eval_results/scr/_status.json").read_text()
