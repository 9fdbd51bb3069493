"""The presets of the three published pairs name SAEs and hooks that fit together."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from sae_research.cli.main import read_preset
from sae_research.config.params import Params
from sae_research.saes.formats.sae_lens import convert
from sae_research.saes.sources import same_model
from sae_research.transfer.statistics import Norms, chosen_limit, limits

ROOT = Path(__file__).parents[2]
PAIRS = {
    "transfer-gpt2-portuguese": "gpt2-small",
    "transfer-gemma-2b-python": "gemma-2b",
    "transfer-mistral-7b-metamath": "mistral-7b",
}


def test_a_released_sae_names_its_text() -> None:
    values = {
        "architecture": "standard",
        "d_in": 2,
        "d_sae": 3,
        "metadata": {
            "hook_name": "blocks.1.hook_resid_post",
            "model_name": "gpt2-small",
            "dataset_path": "Skylion007/openwebtext",
        },
    }
    tensors = {"W_enc": torch.ones(2, 3), "b_enc": torch.zeros(3), "W_dec": torch.ones(3, 2), "b_dec": torch.zeros(2)}
    text = convert(values, tensors, "here").cfg.provenance["text"]
    assert text == "Skylion007/openwebtext", "transfer.dataset: null takes it"


def released_ids(release: str) -> set[str]:
    """Ids under a release in SAELens' directory, read by line: parsing the whole file takes seconds."""
    spec = importlib.util.find_spec("sae_lens")
    text = (Path(spec.submodule_search_locations[0]) / "pretrained_saes.yaml").read_text()
    part = re.search(rf"^{re.escape(release)}:\n((?:[ ].*\n|-.*\n)+)", text, re.MULTILINE)
    return set(re.findall(r"- id: (\S+)", part[1]))


@pytest.mark.parametrize("preset", PAIRS)
def test_preset(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    values: dict = {}
    for override in read_preset(preset):
        where, _, text = override.partition("=")
        section = values
        *parents, last = where.split(".")
        for key in parents:
            section = section.setdefault(key, {})
        section[last] = YAML(typ="safe").load(text)
    params = Params.model_validate(values)
    config = params.transfer
    assert params.eval_types.transfer and config.sae.source == "sae_lens" and config.finetuned_model
    assert config.sae.sae_id in released_ids(config.sae.release)
    assert same_model(params.model.name, PAIRS[preset]), "the SAE's card names its model so"
    assert config.sae.sae_id == params.train.hook_name and config.sae.release == params.baseline_sae.release
    known = limits(config.outliers, params.model.name, 2048, Norms(1.0, 1.0))
    assert chosen_limit(config.outliers, known, params.model.name) > 100, "the file of outliers knows the model"
