"""Results computed by other code are other results: what of the source a key covers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from evals_saes import everything

from sae_research import pursuit
from sae_research.evals.inputs import result_key
from sae_research.lm import LanguageModel


@pytest.mark.parametrize("file", ["screening.py", "kernels_triton.py", "a_new_file.py"])
def test_a_change_anywhere_in_pursuit_is_another_result(file: str, lm: LanguageModel, tmp_path: Path,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    saes = {name: everything()[name] for name in ("ihtp_k1", "mpsae_s3", "standard")}

    def keys() -> dict[str, str]:
        return {name: result_key(sae, lm, [], []) for name, sae in saes.items()}

    installed = keys()
    copy = shutil.copytree(Path(pursuit.__file__).parent, tmp_path / "pursuit")
    monkeypatch.setattr(pursuit, "__path__", [str(copy)])
    assert keys() == installed, "where the files lie is no part of it"
    with (copy / file).open("a") as stream:
        stream.write("# changed\n")
    changed = {name for name, key in keys().items() if key != installed[name]}
    assert changed == {"ihtp_k1", "mpsae_s3"}
