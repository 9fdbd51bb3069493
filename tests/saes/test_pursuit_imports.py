"""Compilers are imported when something is to be compiled, and what they compiled lies with the other caches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
import sae_research.saes.pursuit.encoders
print(sorted({"numba", "llvmlite", "triton"} & set(sys.modules)))
import sae_research.saes.pursuit.kernels_numba
import numba
print(numba.config.CACHE_DIR)
"""


def test_encoders_are_imported_without_numba(in_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)  # this process may have set it
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", str(in_project / ".cache/numba")]
