"""Fine-tuning on the model's predictions: the loss against a plain loop, and what it does to an SAE."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ruamel.yaml import YAML

from sae_research.config.params import Params, load_params
from sae_research.lm import LanguageModel, load_configured
from sae_research.lm.pairs import PairedActivations
from sae_research.runtime.errors import UserError
from sae_research.saes import SAEConfig, SparseAutoencoder, form_class, load_sae, save_sae
from sae_research.training import end_to_end
from sae_research.training.end_to_end import finetune, learnable
from tests.helpers.experiments import ENV, tiny_params

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture
def params(in_project: Path, tiny_inputs: Path) -> Params:
    with (in_project / "params.yaml").open("w") as handle:
        YAML().dump(tiny_params(tiny_inputs), handle)
    return load_params(in_project / "params.yaml")


def sae_of(form: str, width: int, hook_out: str | None = None, **options: int) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(48, width, generator=generator), dim=1)
    cfg = SAEConfig(form, width, 48, "tiny", HOOK, options=options)
    tensors = {"W_enc": rows.T.contiguous(), "b_enc": torch.zeros(48), "W_dec": rows, "b_dec": torch.zeros(width)}
    tensors["threshold"] = torch.full((48,), 0.05)
    cls = form_class(form)
    return cls(cfg=cfg, **{name: tensors[name] for name in cls.tensor_names}, **options)


def test_the_loss_is_that_of_a_plain_loop(params: Params) -> None:
    lm = load_configured(params.model)
    sae = sae_of("topk", lm.d_in(HOOK), k=4)
    tokens = torch.randint(5, 50, (3, 12), generator=torch.Generator().manual_seed(1))
    texts = PairedActivations(lm, HOOK, HOOK, tokens, params)
    batch = texts.shown([0, 1, 2], resumed=True)
    mse, kl = _with_gradient(sae, lm, batch)
    expected_mse, expected_kl, counted = 0.0, 0.0, 0
    clean = lm.logits(tokens).double().log_softmax(-1)
    x = lm.activations(tokens, HOOK).float()
    edited = torch.where(batch.lab_mask[..., None], sae.reconstruct(x, batch.lab_mask), x).detach()
    patched = lm.patched_logits(tokens, HOOK, lambda _: edited).double().log_softmax(-1)
    for row in range(3):
        for place in range(12):
            if batch.lab_mask[row, place]:
                counted += 1
                expected_mse += float((x[row, place] - edited[row, place]).square().sum())
                p, q = clean[row, place], patched[row, place]
                expected_kl += float((p.exp() * (p - q)).sum())
    assert counted > 20
    assert float(mse) == pytest.approx(expected_mse / counted, rel=1e-4)
    assert float(kl) == pytest.approx(expected_kl / counted, rel=1e-3)


def _with_gradient(sae: SparseAutoencoder, lm: LanguageModel, batch: object) -> tuple[torch.Tensor, torch.Tensor]:
    sae.W_dec.requires_grad_()
    found = end_to_end._losses(sae, lm, batch)
    sae.W_dec.requires_grad_(False)
    return found


@pytest.mark.parametrize("form", ["topk", "jumprelu"])
def test_predictions_come_nearer_and_latents_stay_where_they_must(form: str, params: Params) -> None:
    lm = load_configured(params.model)
    options = {"k": 4} if form == "topk" else {}
    sae = sae_of(form, lm.d_in(HOOK), **options)
    encoder = sae.W_enc.clone()
    result = finetune(sae, lm, params, 4000, 3e-2, say=lambda _: None)
    assert result.after.kl < 0.8 * result.before.kl and result.after.unexplained < result.before.unexplained
    assert (sae.W_enc == encoder).all() == (form == "jumprelu")
    if form == "jumprelu":
        assert result.after.l0 == result.before.l0 and result.trained == ["W_dec", "b_dec"]
    else:
        assert result.after.l0 <= 4
    assert not sae.W_dec.requires_grad


def test_forms_that_cannot_learn_say_so(params: Params) -> None:
    assert learnable(sae_of("topk", 8, k=2)) == ["W_enc", "b_enc", "W_dec", "b_dec"]
    assert learnable(sae_of("topk", 8, k=2), "decoder") == ["W_dec", "b_dec"]
    with pytest.raises(UserError, match="its encoder reads the decoder's rows"):
        learnable(sae_of("matching_pursuit", 8, s=2))


def test_the_command_writes_an_sae(in_project: Path, params: Params) -> None:
    lm = load_configured(params.model)
    sae = sae_of("topk", lm.d_in(HOOK), k=4)
    sae.cfg = sae.cfg.replace(model_name=params.model.name)
    save_sae(sae, in_project / "mine")
    command = [sys.executable, "-m", "sae_research", "finetune", "mine", "out/mine", "--tokens", "1000"]
    done = subprocess.run(command, cwd=in_project, env=ENV, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "KL" in done.stdout, done.stderr
    written = load_sae(in_project / "out/mine")
    assert written.cfg.provenance["finetuned"]["tokens"] == 1000 and not torch.equal(written.W_dec, sae.W_dec)
    for arguments in (["nothing", "out"], ["mine", "."], ["mine", "out"], ["mine", "out/new", "--tokens", "nan"]):
        refused = subprocess.run(
            [*command[:4], *arguments], cwd=in_project, env=ENV, capture_output=True, text=True, check=False
        )
        assert refused.returncode == 1 and refused.stderr.count("\n") == 1, refused.stderr
    assert (in_project / "params.yaml").is_file() and (in_project / "out/mine/cfg.json").is_file()
