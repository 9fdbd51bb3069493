"""One model under several names."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sae_research.config.params import Params
from sae_research.lm import load_language_model
from sae_research.runtime.errors import UserError
from sae_research.saes.base import SAEConfig
from sae_research.saes.formats.sae_lens import centres_input, model_name
from sae_research.saes.sources import check_fits, same_model
from tests.helpers.tiny_model import make_tiny_model

HOOK = "blocks.1.hook_resid_post"


class _SAE:
    def __init__(self, name: str, **provenance: str) -> None:
        self.cfg = SAEConfig(form="standard", d_in=32, d_sae=8, model_name=name, hook_name=HOOK, provenance=provenance)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Llama-3.1-8B", "Meta-Llama-3.1-8B"),
        ("meta-llama/Meta-Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"),
        ("gpt2", "gpt2-small"),
        ("openai-community/gpt2", "gpt2-small"),
        ("google/gemma-2-2b", "gemma-2-2b"),
        ("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped"),
        ("mistral-7b", "mistralai/Mistral-7B-v0.1"),
        ("pythia-70m@step3000", "EleutherAI/pythia-70m@step3000"),
        ("gpt-neo-small", "EleutherAI/gpt-neo-125M"),
    ],
)
def test_two_names_of_one_model(one: str, other: str) -> None:
    assert same_model(one, other) and same_model(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Llama-3.1-8B", "Llama-3.1-8B-Instruct"),
        ("Llama-3-8B", "Llama-3.1-8B"),
        ("gemma-2b", "gemma-2-2b"),
        ("gpt2", "gpt2-medium"),
        ("pythia-70m", "pythia-70m-deduped"),
        ("pythia-70m", "pythia-70m@step3000"),
        ("nothing", "known"),
    ],
)
def test_two_models(one: str, other: str) -> None:
    assert not same_model(one, other)


def test_a_folder_is_the_model_that_its_path_weights_or_the_user_say(
    tiny_inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = tmp_path / "models--EleutherAI--pythia-70m-deduped" / "snapshots" / "0123abc"
    shutil.copytree(tiny_inputs / "tiny", snapshot)
    lm = load_language_model(str(snapshot), "cpu")
    check_fits("a", _SAE("pythia-70m-deduped"), lm)
    with pytest.raises(UserError, match=r"set model.same_as: \[gpt2-small\]"):
        check_fits("a", _SAE("gpt2-small"), lm)
    check_fits("a", _SAE("gpt2-small"), lm, ["gpt2"])
    check_fits("a", _SAE("gpt2-small", model_fingerprint=lm.fingerprint), lm)
    check_fits("a", _SAE(str(tiny_inputs / "tiny")), lm)  # another folder with the same weights
    with pytest.raises(UserError, match="stands for what mlp puts out; .* no hook here has it"):
        check_fits("a", _SAE(str(tiny_inputs / "tiny"), module="mlp"), lm)  # the stream is another thing
    other = make_tiny_model(tmp_path / "0123abc", seed=1)
    with pytest.raises(UserError, match="was trained on"):
        check_fits("a", _SAE(str(other)), lm)  # a folder of the same name with others
    config = json.loads((snapshot / "config.json").read_text())
    (snapshot / "config.json").write_text(json.dumps(config | {"_name_or_path": "openai-community/gpt2"}))
    check_fits("a", _SAE("gpt2-small"), load_language_model(str(snapshot), "cpu"))
    assert "says that it was saved from openai-community/gpt2" in capsys.readouterr().out


def test_same_as_is_a_parameter() -> None:
    assert Params().model.same_as is None
    assert Params.model_validate({"model": {"same_as": ["gpt2"]}}).model.same_as == ["gpt2"]


@pytest.mark.parametrize(
    "kwargs",
    [
        {"dtype": "bfloat16"},
        {"torch_dtype": "float16", "device_map": "auto"},
        {"n_devices": 2},
        {"device": "cuda", "trust_remote_code": True},
        {"local_files_only": True, "token": None},
        {"revision": "main"},
        {"revision": "a" * 40},
        {"quantization_config": None},
    ],
)
def test_ways_of_loading_that_change_no_activation(kwargs: dict[str, object]) -> None:
    assert not centres_input(kwargs, HOOK, "x")
    assert centres_input(kwargs | {"center_writing_weights": True}, HOOK, "x")
    assert model_name({"model_name": "gpt2", "model_from_pretrained_kwargs": kwargs}) == "gpt2"


@pytest.mark.parametrize(
    "kwargs", [{"fold_ln": True}, {"center_unembed": True}, {"load_in_8bit": True}, {"checkpoint_value": 3}]
)
def test_ways_of_loading_that_change_activations(kwargs: dict[str, object]) -> None:
    with pytest.raises(UserError, match="trained on a model loaded with"):
        centres_input(kwargs, HOOK, "x")


def test_another_revision_is_another_model() -> None:
    metadata = {"model_name": "pythia-70m", "model_from_pretrained_kwargs": {"revision": "step3000"}}
    assert model_name(metadata) == "pythia-70m@step3000"
