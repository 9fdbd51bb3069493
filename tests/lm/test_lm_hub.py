"""A model by its hub name, through the real client, from a server on the loopback address."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.helpers.hub_server import hub_env, serve_hub

PROGRAM = """
import time
time.sleep = lambda seconds: None  # the client's patience is not under test
from sae_research.runtime.errors import UserError
from sae_research.lm import load_language_model
lm = load_language_model("someone/tiny", "cpu")
print(lm.d_model, lm.n_layers, lm.can_resume)
try:
    load_language_model("someone/absent", "cpu")
except UserError as error:
    print("one line:", "\\n" not in str(error), "someone/absent" in str(error))
"""


def test_a_model_by_its_hub_name(tiny_inputs: Path, tmp_path: Path) -> None:
    asked: list[str] = []
    with serve_hub({"models": {"someone/tiny": tiny_inputs / "tiny"}}, asked) as url:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=os.environ | hub_env(url, tmp_path),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["32 3 True", "one line: True True"]
    assert any("model.safetensors" in line for line in asked)
