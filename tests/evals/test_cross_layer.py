"""Core of cross-layer transcoders: figures known beforehand, a plain reference, one layer against a transcoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

import sae_research
from sae_research.analysis.context import AnalysisContext
from sae_research.config.evaluations import OF_SAES
from sae_research.config.params import Params
from sae_research.evals.run import evaluation_function
from sae_research.lm import LanguageModel
from sae_research.runtime.errors import NotApplicable, UserError
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SAEConfig, SparseAutoencoder
from sae_research.saes.cross_layer import CrossLayerTranscoder
from sae_research.saes.forms import JumpReLUSAE
from sae_research.saes.sources import check_widths
from sae_research.stats.sae_bench import latent_weights
from sae_research.training.end_to_end import finetune
from tests.evals.test_core_eval import lab, run
from tests.evals.test_crosscoders import hooks_of
from tests.helpers.core_reference import counted, texts
from tests.helpers.cross_layer import LAYERS, PAIRS, READ, WRITTEN, D, F, TheMLPs, config, random_clt, writing
from tests.helpers.evals_saes import everything, small_sections
from tests.helpers.transcoders import random_transcoder

FIGURES = ("variance_explained", "ce_delta", "kl", "loss_recovered", "loss_recovered_mean_ablation")


@pytest.fixture
def params(make_params: Any) -> Params:
    """Without the rule of norms: which tokens count is told by their ids."""
    return make_params(token_mask={"outlier_norm_multiple": None})


def test_exact_mean_and_zero_reconstructions(lm: LanguageModel, params: Params) -> None:
    late = texts(lm, params)[6:]
    mean = torch.cat([lm.activations(late, hook)[counted(lm, late)].mean(0) for hook in WRITTEN])
    found = run({"exact": TheMLPs(lm), "mean": writing(mean), "zero": writing(0 * mean)}, lm, params)
    for of_hooks in (lab(found["exact"]), *hooks_of(found["exact"]).values()):
        assert of_hooks["variance_explained"] == pytest.approx(1, abs=1e-5)
        assert of_hooks["loss_recovered"] == pytest.approx(1, abs=1e-5) and of_hooks["kl"] == pytest.approx(0, abs=1e-6)
    for of_hooks in (lab(found["mean"]), *hooks_of(found["mean"]).values()):
        assert of_hooks["variance_explained"] == pytest.approx(0, abs=1e-5)
        assert of_hooks["loss_recovered_mean_ablation"] == pytest.approx(0, abs=1e-3)
    for of_hooks in (lab(found["zero"]), *hooks_of(found["zero"]).values()):
        assert of_hooks["loss_recovered"] == pytest.approx(0, abs=1e-5) and of_hooks["variance_explained"] <= 0
    bench = found["exact"]["eval_result_metrics"]["model_performance_preservation"]
    assert bench["ce_loss_score"] == pytest.approx(1, abs=1e-5)
    assert found["exact"]["sae_cfg_dict"]["hook_out"] == " + ".join(WRITTEN) and list(hooks_of(found["exact"])) == [*WRITTEN]


def by_hand(sae: CrossLayerTranscoder, layer: int, read: list[Tensor], mask: Tensor) -> Tensor:
    """What is written in a layer [batch, seq, D], from what was read up to it, a pair of layers at a time."""
    out, at = sae.b_dec[layer * D : (layer + 1) * D].expand_as(read[0]), layer * (layer + 1) // 2 * F
    for source in range(layer + 1):
        own = slice(source * F, (source + 1) * F)
        pre = read[source] @ sae.W_enc[:, own] + sae.b_enc[own]
        z = torch.where(pre > sae.threshold[own], pre, 0) * mask[..., None]
        out = out + z @ sae.W_dec[at + source * F : at + (source + 1) * F]
    return out if sae.W_skip is None else out + read[layer] @ sae.W_skip[layer * D : (layer + 1) * D].T


@torch.no_grad()
def reference(sae: CrossLayerTranscoder, lm: LanguageModel, tokens: Tensor, alone: int | None) -> dict[str, float]:
    """Core's definitions once more: whole passes of the model with hooks on its modules. alone: the one layer that is
    replaced, from the clean pass; None: all are, each encoder reading what the pass gives it."""
    x, y = ([lm.activations(tokens, hook) for hook in hooks] for hooks in (READ, WRITTEN))
    mask = counted(lm, tokens)
    hats = [by_hand(sae, layer, x, mask) for layer in range(LAYERS)]
    late, early = mask.clone(), mask.clone()
    late[:6], early[6:] = False, False
    replaced = range(LAYERS) if alone is None else [alone]
    left = sum((y[m] - hats[m])[late].square().sum() for m in replaced)
    total = sum((y[m][late] - y[m][late].mean(0)).square().sum() for m in replaced)
    logits = {}
    for name in ("clean", "patched", "zero", "mean"):
        handles, read = [], []
        for m in range(LAYERS):

            def before(_: Any, args: Any, kept: list[Tensor] = read) -> None:
                kept.append(args[0])

            def after(_: Any, __: Any, output: Tensor, m: int = m, name: str = name, kept: list[Tensor] = read) -> Tensor:
                if name == "clean" or m not in replaced:
                    return output
                put = {
                    "patched": lambda: hats[m] if alone is not None else by_hand(sae, m, kept, mask),
                    "zero": lambda: torch.zeros_like(output),
                    "mean": lambda: y[m][late].mean(0).expand_as(output),
                }[name]()
                return torch.where(mask[..., None], put, output)

            handles += [
                lm.layers[m].mlp.register_forward_pre_hook(before),
                lm.layers[m].mlp.register_forward_hook(after),
            ]
        logits[name] = lm.model(input_ids=tokens).logits.float()
        for handle in handles:
            handle.remove()
    predicted = early[:, :-1]
    ce = {name: float(cross_entropy(own[:, :-1][predicted], tokens[:, 1:][predicted])) for name, own in logits.items()}
    log_p, log_q = log_softmax(logits["clean"][early], -1), log_softmax(logits["patched"][early], -1)
    values = (
        1 - float(left / total),
        ce["patched"] - ce["clean"],
        float(kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()),
        (ce["zero"] - ce["patched"]) / (ce["zero"] - ce["clean"]),
        (ce["mean"] - ce["patched"]) / (ce["mean"] - ce["clean"]),
    )
    return dict(zip(FIGURES, values, strict=True))


@pytest.mark.parametrize("skip", [False, True])
def test_core_against_a_plain_reference(skip: bool, lm: LanguageModel, params: Params) -> None:
    sae, tokens = random_clt(skip=skip), texts(lm, params)
    found = run({"sae": sae}, lm, params)["sae"]
    expected = reference(sae, lm, tokens, None)
    assert {key: lab(found)[key] for key in expected} == pytest.approx(expected, rel=2e-3, abs=2e-5)
    clean = run({"sae": sae}, lm, params)["sae"]
    assert clean == found
    for number, hook in enumerate(WRITTEN):
        expected = reference(sae, lm, tokens, number)
        assert {key: hooks_of(found)[hook][key] for key in expected} == pytest.approx(expected, rel=2e-3, abs=2e-5)


def of_one_layer(skip: bool) -> tuple[CrossLayerTranscoder, JumpReLUSAE]:
    """The same weights as a cross-layer transcoder of one layer and as a transcoder."""
    g = torch.Generator().manual_seed(1)
    tensors = {
        "W_enc": torch.randn(D, F, generator=g) / 6,
        "b_enc": torch.randn(F, generator=g) / 10,
        "W_dec": torch.randn(F, D, generator=g) / 20,
        "b_dec": torch.randn(D, generator=g) / 50,
        "threshold": torch.rand(F, generator=g) / 4,
        **({"W_skip": torch.randn(D, D, generator=g) / 20} if skip else {}),
    }
    about = {"hook_name": READ[0], "hook_out": WRITTEN[0], "apply_b_dec_to_input": False}
    return CrossLayerTranscoder(config(layers=1), **tensors), JumpReLUSAE(SAEConfig("jumprelu", D, F, **about), **tensors)


@pytest.mark.parametrize("skip", [False, True])
def test_one_layer_is_a_transcoder(skip: bool, lm: LanguageModel, params: Params) -> None:
    clt, transcoder = of_one_layer(skip)
    assert not clt.cfg.is_cross_layer and clt.cfg.kind == "transcoder"
    found = run({"clt": clt, "transcoder": transcoder}, lm, params)
    for key in ("eval_result_metrics", "eval_result_details", "eval_result_unstructured"):
        assert found["clt"][key] == found["transcoder"][key]


def test_beside_others_in_one_call(lm: LanguageModel, make_params: Any) -> None:
    params = make_params()
    mixed = everything() | {"one": random_clt(), "two": random_clt(1), "trans": random_transcoder()}
    together = run(mixed, lm, params)
    for name in ("standard", "one", "two", "trans"):
        assert run({name: mixed[name]}, lm, params)[name] == together[name]


def test_clean_and_ablated_passes_are_shared(lm: LanguageModel, params: Params, monkeypatch: Any) -> None:
    passes, real = [], LanguageModel.edited_logits
    monkeypatch.setattr(LanguageModel, "edited_logits", lambda *args, **kwargs: passes.append(1) or real(*args, **kwargs))
    saes = {f"clt{seed}": random_clt(seed) for seed in range(2)}
    run(saes, lm, params)
    shared, own = 4 + 2 * LAYERS, 2 + LAYERS
    assert len(passes) == 2 * (shared + own * len(saes)), "clean, zero twice, mean; each layer's zeros and means; each alone"


def part(**changes: Any) -> CrossLayerTranscoder:
    """Layer 1 of `random_clt`, without the others."""
    whole = random_clt()
    about = {"hook_name": READ[1], "hook_out": " + ".join(WRITTEN[1:]), "apply_b_dec_to_input": False}
    own = slice(F, 2 * F)
    return CrossLayerTranscoder(
        SAEConfig("cross_layer", D, F, d_out=2 * D, **about | {"options": {"part": True}} | changes),
        part=True,
        W_enc=whole.W_enc[:, own],
        b_enc=whole.b_enc[own],
        threshold=whole.threshold[own],
        W_dec=torch.cat([whole.decoder(1)[own], whole.decoder(2)[own]]),
        b_dec=torch.zeros(2 * D),
    )


@pytest.mark.parametrize("name", [name for name, one in OF_SAES.items() if not one.crosscoders])
def test_evaluations_of_one_hook_say_why_not(name: str, lm: LanguageModel, make_params: Any) -> None:
    with pytest.raises(NotApplicable, match=r"activations of one hook, and a cross-layer transcoder has several: these are"):
        list(evaluation_function(name)({"one": random_clt()}, lm, make_params(), StageFolder(Path("out"))))


def test_a_layer_alone_is_read_for_its_latents(lm: LanguageModel, make_params: Any) -> None:
    whole, own, x = random_clt(), part(), torch.randn(2, 5, LAYERS * D, generator=torch.Generator().manual_seed(0))
    z = whole.encode(x)
    assert torch.equal(own.encode(x[..., D : 2 * D]), z[..., F : 2 * F])
    assert own.cfg.is_part and own.cfg.sources == (1, 1)
    taken = [name for name, one in OF_SAES.items() if not (one.parts or one.one_hook)]
    assert {"sparse_probing", "autointerp"} <= set(taken)
    for name in set(OF_SAES) - set(taken):
        with pytest.raises(NotApplicable, match=r"these are cross-layer transcoder's layers"):
            list(evaluation_function(name)({"one": own}, lm, make_params(), StageFolder(Path("out"))))


def test_probing_a_layer_alone_sees_its_latents(lm: LanguageModel, make_params: Any, tasks: str) -> None:
    """Those of an SAE-like transcoder with the same encoder."""
    own = part()
    about = {"hook_name": READ[1], "hook_out": WRITTEN[1], "apply_b_dec_to_input": False}
    same = {name: getattr(own, name) for name in ("W_enc", "b_enc", "threshold")}
    transcoder = JumpReLUSAE(SAEConfig("jumprelu", D, F, **about), **same, W_dec=own.decoder(0), b_dec=torch.zeros(D))
    params = make_params(sparse_probing=small_sections(tasks)["sparse_probing"])
    score = evaluation_function("sparse_probing")
    found = dict(score({"part": own, "transcoder": transcoder}, lm, params, StageFolder(Path("out"))))
    assert found["part"]["eval_result_metrics"] == found["transcoder"]["eval_result_metrics"]


def test_objects_in_memory_and_what_refuses_them(lm: LanguageModel, make_params: Any) -> None:
    params = make_params()
    for sae in (random_clt(model_name=lm.name), part(model_name=lm.name)):
        if not sae.cfg.is_part:
            assert sae_research.evaluate({"one": sae}, lm, params)["one"]["core"]["l0"] > 0
        analysis = AnalysisContext.of({"one": sae}, lm, params)
        refusal = "which read and write one hook; a cross-layer transcoder.* has several"
        with pytest.raises(UserError, match=refusal):
            analysis.stats("one")
        with pytest.raises(UserError, match=refusal):
            finetune(sae, lm, params, 1000, 1e-3)


def test_weights_are_compared_within_a_layer() -> None:
    found = latent_weights(random_clt())
    sae = random_clt()
    for layer in range(LAYERS):
        rows = torch.cat([sae.decoder(m)[layer * F : (layer + 1) * F] for m in range(layer, LAYERS)], dim=1)
        unit = torch.nn.functional.normalize(rows, dim=1)
        nearest = (unit @ unit.T - 2 * torch.eye(F)).amax(1)
        torch.testing.assert_close(found.max_decoder_cosine[layer * F : (layer + 1) * F], nearest)
    torch.testing.assert_close(found.encoder_norm, sae.W_enc.norm(dim=0))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hook_out": " + ".join(WRITTEN[:2])}, "writes one hook in every layer that it reads"),
        ({"hook_out": " + ".join((WRITTEN[1], WRITTEN[0], WRITTEN[2]))}, "in the order of their layers"),
        ({"hook_out": WRITTEN[0]}, "a cross-layer transcoder writes one for each that it reads"),
        ({"apply_b_dec_to_input": True}, "apply_b_dec_to_input must be false"),
        ({"hook_scales": (1.0, 1.0, 1.0)}, "hook_scales belong to a crosscoder"),
        ({"hook_name": " + ".join(WRITTEN), "hook_out": " + ".join(READ)}, "are the two exchanged"),
        ({"hook_name": " + ".join((*READ[:2], "blocks.7.mlp.hook_in"))}, "in every layer that it reads"),
        ({"options": {"part": True}}, "one layer of a cross-layer transcoder writes its own layer and later ones"),
    ],
)
def test_hooks_that_do_not_belong_together(changes: dict[str, Any], match: str, lm: LanguageModel) -> None:
    with pytest.raises(UserError, match=match):
        check_widths("one", config(**changes), lm)


def test_decoders_are_packed_by_what_they_write() -> None:
    sae: SparseAutoencoder = random_clt()
    assert sae.W_dec.shape == (PAIRS * F, D) and sae.cfg.sources == (1, 2, 3)
