"""`make bench` prepares what it needs, or says in one line why it cannot."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from benchmarks.__main__ import prepare_saes
from sae_research.runtime.errors import UserError

FAILS = "stages:\n  setup:\n    cmd: exit 3\n    outs: [downloaded_saes]\n"
WORKS = FAILS.replace("exit 3", "mkdir downloaded_saes && echo x > downloaded_saes/manifest.json")


@pytest.mark.slow
def test_saes_are_prepared_where_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no DVC project"):
        prepare_saes(tmp_path)
    for command in (["git", "init", "-q"], ["dvc", "init", "-q"]):
        subprocess.run(command, cwd=tmp_path, check=True)
    (tmp_path / "dvc.yaml").write_text(FAILS)
    with pytest.raises(UserError, match="could not be prepared"):
        prepare_saes(tmp_path)
    (tmp_path / "dvc.yaml").write_text(WORKS)
    prepare_saes(tmp_path)
    assert (tmp_path / "downloaded_saes/manifest.json").is_file()
