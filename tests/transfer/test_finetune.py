"""The finetune the stage makes, the perturbed control, and how far both moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sae_research.config.params import Text
from sae_research.config.transfer import OwnFinetune
from sae_research.runtime.cache import cache_dir
from sae_research.runtime.errors import UserError
from sae_research.transfer.finetune import finetuned_model, outputs_moved, perturbed_model, weights_moved
from tests.helpers.damage import flip


def text_of(params: Any) -> Text:
    return Text(dataset=params.text.dataset, context_size=24)


def test_made_once_and_only_below_the_hook(base: Any, make_params: Any) -> None:
    params = make_params()
    config = OwnFinetune(source=None, steps=12, learning_rate=0.01)
    before = {name: p.clone() for name, p in base.model.named_parameters()}
    made = finetuned_model(base, config, text_of(params), "blocks.1.hook_resid_post", "cpu", 0)
    folders = list(cache_dir("models").iterdir())
    assert len(folders) == 1 and folders[0].name.startswith("finetuned-")
    stamp = (folders[0] / "model.safetensors").stat().st_mtime_ns
    again = finetuned_model(base, config, text_of(params), "blocks.1.hook_resid_post", "cpu", 0)
    assert again.fingerprint == made.fingerprint and (folders[0] / "model.safetensors").stat().st_mtime_ns == stamp
    other = finetuned_model(base, config, text_of(params), "blocks.1.hook_resid_post", "cpu", 1)
    assert len(list(cache_dir("models").iterdir())) == 2 and other.name != made.name
    assert all(torch.equal(p, before[name]) for name, p in base.model.named_parameters()), "the base model is left alone"
    moved = weights_moved(base, made)
    assert moved["by_layer"]["layer 2"] == 0 < min(moved["by_layer"][f"layer {i}"] for i in (0, 1))
    assert moved["missing"] == [] and 0 < moved["relative_change"] < 1
    rows = torch.randint(60, 400, (6, 24), generator=torch.Generator().manual_seed(0))
    outputs = outputs_moved(base, made, rows)
    assert outputs["kl"] > 0 and 0 <= outputs["same_top_token"] < 1
    itself = outputs_moved(base, base, rows)
    assert itself["kl"] == pytest.approx(0, abs=1e-6) and itself["same_top_token"] == 1
    assert weights_moved(base, base)["relative_change"] == 0


def test_a_changed_finetune_is_made_again(
    base: Any, make_params: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def made() -> Any:
        return finetuned_model(
            base, OwnFinetune(source=None, steps=2), text_of(make_params()), "blocks.1.hook_resid_post", "cpu", 0
        )

    first, tokens = made(), torch.arange(12)[None]
    want, [folder] = first.logits(tokens), cache_dir("models").iterdir()
    flip(folder / "model.safetensors")
    again = made()
    assert again.fingerprint == first.fingerprint and torch.equal(again.logits(tokens), want)
    assert "model.safetensors has another checksum" in capsys.readouterr().out
    monkeypatch.setenv("SAE_RESEARCH_NO_CACHE", "1")
    stamp = (folder / "model.safetensors").stat().st_ino
    assert made().fingerprint == first.fingerprint and (folder / "model.safetensors").stat().st_ino != stamp


@pytest.mark.slow
def test_training_lowers_the_loss(base: Any, make_params: Any) -> None:
    import copy

    from sae_research.transfer.finetune import _rows, train

    config = OwnFinetune(source=None, steps=30, learning_rate=0.01)
    losses = train(copy.deepcopy(base.model), _rows(base, config, text_of(make_params())), config, 3, 0)
    assert sum(losses[-5:]) < sum(losses[:5]) - 1


def test_perturbation_is_strong_and_repeatable(base: Any) -> None:
    one, two = (perturbed_model(base, 0.5, "blocks.1.hook_resid_post", 3) for _ in range(2))
    assert weights_moved(one, two)["relative_change"] == 0
    by_layer = weights_moved(base, one)["by_layer"]
    assert by_layer["layer 0"] == pytest.approx(0.5, abs=0.05) and by_layer["layer 2"] == 0


def test_unknown_source(base: Any, make_params: Any, in_project: Path) -> None:
    with pytest.raises(UserError, match=r"has no context of 24 tokens of the source 'poems'"):
        finetuned_model(base, OwnFinetune(source="poems"), text_of(make_params()), "blocks.1.hook_resid_post", "cpu", 0)
    assert not any(cache_dir("models").iterdir())
