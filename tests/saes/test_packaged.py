"""Dictionaries that come with the package: found by name, in half precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sae_research.config.params import BaselineSAE
from sae_research.runtime import packaged
from sae_research.runtime.errors import UserError
from sae_research.saes import load_sae, save_sae
from sae_research.saes.files import WEIGHTS_FILE
from sae_research.saes.sources import open_sae, reference_of
from tests.helpers.tiny_saes import tiny_sae


def test_a_packaged_dictionary_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged, "FOLDER", tmp_path)
    sae = tiny_sae()
    save_sae(sae, tmp_path / "tiny-l1", torch.bfloat16)
    save_sae(sae, tmp_path / "whole")
    half, whole = ((tmp_path / name / WEIGHTS_FILE).stat().st_size for name in ("tiny-l1", "whole"))
    assert half < 0.6 * whole
    block = BaselineSAE.model_validate({"source": "packaged", "name": "tiny_l1"})
    for found in (load_sae("packaged:tiny-l1"), open_sae("packaged:tiny_l1"), open_sae(reference_of(block))):
        assert torch.equal(found.W_dec, sae.W_dec.bfloat16().float()) and found.cfg.dtype == "bfloat16"
    with pytest.raises(UserError, match="packaged:other: no such packaged dictionary; there are tiny-l1, whole"):
        load_sae("packaged:other")
