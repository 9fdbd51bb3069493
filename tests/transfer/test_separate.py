"""Separate SAEs of either model: matching against plain loops, planted differences, ablations in either model, the stage."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_research.config.reporting import Visualization
from sae_research.reporting import transfer_figures, transfer_separate
from sae_research.reporting.transfer import extract_transfer, transfer
from sae_research.runtime.errors import UserError
from sae_research.saes import SAEConfig, SparseAutoencoder, form_class, load_sae
from sae_research.transfer import separate
from sae_research.transfer.causal import checks_of, energies
from sae_research.transfer.crosscoder import matched
from sae_research.transfer.repair import further_trained, repair
from sae_research.transfer.separate import (
    CrossMoments,
    SeparateLatents,
    ablations,
    best,
    chosen,
    class_of,
    compared,
    decoder_cosines,
    separate_report,
    summary,
)
from sae_research.transfer.stage import RESULTS, run_stage
from tests.helpers.tiny_saes import tiny_sae
from tests.transfer.conftest import HOOK

NO_LIMIT = float("inf")


def relu_sae(directions: Tensor, thresholds: float = 0.1) -> SparseAutoencoder:
    """Latents that read and write unit directions [d_sae, d_in]."""
    d_sae, d_in = directions.shape
    cfg = SAEConfig(form="standard", d_in=d_in, d_sae=d_sae, hook_name=HOOK, apply_b_dec_to_input=True)
    rows = torch.nn.functional.normalize(directions, dim=1)
    tensors = {"W_enc": rows.T.contiguous(), "W_dec": rows.clone(), "b_enc": torch.full((d_sae,), -thresholds)}
    return form_class("standard")(cfg, **tensors, b_dec=torch.zeros(d_in))


def frame_of(saes: dict[str, SparseAutoencoder], x: dict[str, Tensor]) -> Any:
    moments = CrossMoments(saes["base"], saes["finetuned"])
    for part in zip(x["base"].split(70), x["finetuned"].split(70), strict=True):
        moments.update(*(sae.encode(rows[None])[0] for sae, rows in zip(saes.values(), part, strict=True)))
    return compared(moments, saes)


def test_matching_is_a_plain_loop() -> None:
    g = torch.Generator().manual_seed(0)
    saes = {"base": relu_sae(torch.randn(7, 8, generator=g)), "finetuned": relu_sae(torch.randn(9, 8, generator=g))}
    with torch.no_grad():
        saes["finetuned"].b_enc[3] = -100.0  # it never fires
    x = {model: torch.randn(200, 8, generator=g) for model in saes}
    frame = frame_of(saes, x)
    z = [saes[model].encode(x[model][None])[0].double() for model in saes]
    rows = [saes[model].W_dec.double() for model in saes]
    for own, other in ((0, 1), (1, 0)):
        model = ("base", "finetuned")[own]
        for i, row in enumerate(frame[frame.sae == model].itertuples()):
            cosines, correlations = [], []
            for j in range(len(rows[other])):
                cosines.append(float(torch.nn.functional.cosine_similarity(rows[own][i], rows[other][j], dim=0)))
                with np.errstate(invalid="ignore", divide="ignore"):
                    correlations.append(float(np.corrcoef(z[own][:, i], z[other][:, j])[0, 1]))
            assert row.firings == int((z[own][:, i] > 0).sum())
            assert row.cosine == pytest.approx(max(cosines), abs=1e-5) and row.cosine_latent == int(np.argmax(cosines))
            if np.isnan(correlations).all():
                assert np.isnan(row.correlation) and row.correlation_latent == -1
                continue
            assert row.correlation == pytest.approx(np.nanmax(correlations), abs=1e-5)
            assert row.correlation_latent == int(np.nanargmax(correlations))
            smaller = np.minimum(cosines, correlations)
            assert row.match == pytest.approx(np.nanmax(smaller), abs=1e-5)
            assert row.match_latent == int(np.nanargmax(smaller))
    assert frame[(frame.sae == "finetuned") & (frame.latent == 3)]["class"].tolist() == [""]


def test_what_was_planted_is_found() -> None:
    """Of ten directions eight are in both models, one in either alone, and one fires on other tokens."""
    g = torch.Generator().manual_seed(1)
    axes = torch.linalg.qr(torch.randn(16, 16, generator=g))[0]
    n = 4000
    strength = (1 + torch.rand(n, 10, generator=g)) * (torch.rand(n, 10, generator=g) < 0.15)
    other = (1 + torch.rand(n, 3, generator=g)) * (torch.rand(n, 3, generator=g) < 0.15)
    base = torch.cat([strength[:, :9], other[:, :1]], 1) @ axes[:10]  # 0-7, 8 that moves, 9 that is lost
    fine = torch.cat([strength[:, :8], other[:, 1:]], 1) @ axes[[*range(8), 8, 10]]  # 8 on other tokens, 10 is made
    saes = {"base": relu_sae(axes[:10]), "finetuned": relu_sae(axes[[*range(8), 8, 10]])}
    frame = frame_of(saes, {"base": base, "finetuned": fine})
    classes = {model: frame[frame.sae == model]["class"].tolist() for model in saes}
    assert classes == {"base": ["kept"] * 8 + ["changed", "lost"], "finetuned": ["kept"] * 8 + ["changed", "made"]}
    found = summary(frame)
    assert found["base"]["classes"] == {"kept": 8, "changed": 1, "lost": 1}
    assert found["finetuned"]["classes"] == {"kept": 8, "changed": 1, "made": 1} and found["base"]["dead"] == 0
    assert all(sum(values["histograms"]["cosine"]["counts"]) == values["fire"] for values in found.values())
    same = frame_of({"base": saes["base"], "finetuned": saes["base"]}, {"base": base, "finetuned": base})
    assert set(same["class"]) == {"kept"} and same.match.min() > 0.999 and (same.match_latent == same.latent).all()


def test_limits() -> None:
    nan = float("nan")
    assert [class_of("base", *values) for values in ((0.9, 0.9, 0.8), (0.9, 0.1, 0.1), (0.3, nan, nan))] == [
        "kept",
        "changed",
        "lost",
    ]
    assert class_of("finetuned", 0.39, 0.39, 0.2) == "made"
    found = best(torch.tensor([[0.5, torch.nan], [torch.nan, torch.nan]]), torch.tensor([[0.1, 0.9], [torch.nan, 0.2]]))
    assert found.cosine_latent.tolist() == [0, -1] and found.correlation_latent.tolist() == [1, 1]
    assert found.match_latent.tolist() == [0, -1] and float(found.match[0]) == pytest.approx(0.1)


def test_ablations_and_patches_equal_a_plain_loop(make_pair: Any) -> None:
    pair = make_pair("near", separate={"checked": 2, "checked_tokens": 240})
    saes = {"base": pair.saes["base"], "finetuned": tiny_sae("topk", seed=5)}
    text = list(matched(pair, NO_LIMIT, 240, pair.source, 4))
    moments = CrossMoments(*saes.values())
    for part in text:
        moments.update(*(separate.activations(sae, part, model) for model, sae in saes.items()))
    frame = compared(moments, saes)
    for own, sae in saes.items():
        other = "base" if own == "finetuned" else "finetuned"
        found = ablations(pair, sae, own, frame, NO_LIMIT)
        assert found["tokens"] == sum(len(part.index[1]) for part in text) and found["contexts"] == 10
        rows = {row["latent"]: row for row in found["latents"]}
        for latent, row in rows.items():
            for key, model, which in (("kl", own, latent), ("kl_other", other, latent)):
                assert row[key] == pytest.approx(plain_kl(pair, text, sae, model, which).mean(), rel=3e-3, abs=1e-6)
        group = found["groups"][f"{own}_end"]
        assert len(group["latents"]) == 2 and group["kl"] > 0
        each = np.mean([plain_kl(pair, text, sae, own, latent) for latent in group["latents"]], axis=0)
        check_interval(group["over_direction"], each.mean() - group["kl_direction"])
        clean, patched = (plain_patch(pair, text, sae, latents) for latents in ([], group["latents"]))
        assert found["kl_base"] == pytest.approx(clean.mean(), rel=3e-3)
        assert group["kl_patched_base"] == pytest.approx(patched.mean(), rel=3e-3)
        check_interval(group["patch_gain"], (clean - patched).mean())


def check_interval(found: dict[str, float], value: float) -> None:
    assert found["value"] == pytest.approx(value, rel=0.01, abs=1e-6) and found["low"] <= found["value"] <= found["high"]


def kl_of(clean: Tensor, edited: Tensor, places: Tensor) -> np.ndarray:
    p, q = (torch.log_softmax(logits.double(), -1) for logits in (clean, edited))
    return (p.exp() * (p - q)).sum(-1).flatten()[places].numpy()


def plain_kl(pair: Any, text: list[Any], sae: SparseAutoencoder, model: str, latent: int) -> np.ndarray:
    """Token by token, the latent's contribution taken out."""
    lm, side, found = pair.models[model], ("base", "finetuned").index(model), []
    for part in text:
        tokens = part.batch.sides[model].tokens
        put = part.acts[model].clone()
        for place in part.index[side].tolist():
            row, column = divmod(place, tokens.shape[1])
            put[row, column] -= sae.encode(part.acts[model][row, column][None, None])[0, 0, latent] * sae.W_dec[latent]
        edited = lm.edited_logits(tokens, {pair.hook: lambda _, put=put: put})
        found.append(kl_of(lm.logits(tokens), edited, part.index[side]))
    return np.concatenate(found)


def plain_patch(pair: Any, text: list[Any], sae: SparseAutoencoder, latents: list[int]) -> np.ndarray:
    """KL(finetuned || base) with what the latents write in the finetuned model in the base model's stream."""
    found = []
    for part in text:
        tokens, put = part.batch.base.tokens, part.acts["base"].clone()
        z = {model: sae.encode(part.acts[model]) for model in pair.models}
        for place in part.index[0].tolist():
            row, column = divmod(place, tokens.shape[1])
            for latent in latents:
                change = z["finetuned"][row, column, latent] - z["base"][row, column, latent]
                put[row, column] += change * sae.W_dec[latent]
        edited = pair.base.edited_logits(tokens, {pair.hook: lambda _, put=put: put})
        found.append(kl_of(pair.finetuned.logits(tokens), edited, part.index[1]))
    return np.concatenate(found)


def test_controls_are_kept_latents_of_the_same_sae(make_pair: Any) -> None:
    pair = make_pair("near", separate={"checked": 3, "checked_tokens": 240})
    latents = SeparateLatents(pair.saes["base"], "base")
    energy = energies(latents, separate.CheckedText(pair, NO_LIMIT, 240))
    moments = CrossMoments(pair.saes["base"], pair.saes["base"])
    for part in matched(pair, NO_LIMIT, 240, pair.source, 4):
        z = separate.activations(pair.saes["base"], part, "base")
        moments.update(z, z)
    frame = compared(moments, {"base": pair.saes["base"], "finetuned": pair.saes["base"]})
    own = frame[frame.sae == "base"].reset_index(drop=True)
    groups = chosen(own, energy, "base", 3)
    assert groups["lost"] == [] and len(groups["base_end"]) == 3
    kept = torch.tensor((own["class"] == "kept").to_numpy())
    for latent, check in checks_of(latents, kept, energy, groups, 0).items():
        assert check.matched is not None and check.matched != latent and kept[check.matched]


def test_equal_models_make_and_lose_nothing(make_pair: Any) -> None:
    pair = make_pair("self", separate={"tokens": 480, "checked": 2, "checked_tokens": 96})
    result = separate_report(pair, pair.saes["base"], None, NO_LIMIT)["result"]
    for model, alone in separate.ALONE.items():
        classes = result["saes"][model]["classes"]
        assert classes[alone] == classes["changed"] == 0 < classes["kept"]
        assert result["ablations"][model]["kl_base"] == pytest.approx(0, abs=1e-6)
        assert result["ablations"][model]["groups"][alone] == {"latents": []}


def test_each_model_with_its_own_tokenizer(make_pair: Any) -> None:
    """Tokens that both read are compared; ids differ, so nothing is patched from model to model."""
    pair = make_pair("other_tokenizer", own=True, separate={"tokens": 240, "checked": 1, "checked_tokens": 96})
    result = separate_report(pair, tiny_sae("topk", seed=5), tiny_sae("topk", seed=6), NO_LIMIT)["result"]
    text = list(matched(pair, NO_LIMIT, 240, pair.source, 8))
    assert result["tokens"] == sum(len(part.rows) for part in text) < sum(int(part.batch.base.real.sum()) for part in text)
    for model in ("base", "finetuned"):
        ablated = result["ablations"][model]
        assert "kl_base" not in ablated and ablated["groups"][f"{model}_end"]["kl"] > 0
        assert result["control"][model]["fire"] > 0


def test_further_training_ends_where_repair_does(make_pair: Any) -> None:
    pair = make_pair("near", form="standard")
    saes = further_trained(pair, NO_LIMIT)
    curves = repair(pair, NO_LIMIT)["curves"]
    rows = {m: torch.cat(parts) for m, parts in separate_rows(pair).items()}
    from sae_research.transfer.repair import figures

    target = figures(pair.saes["base"], rows["base"], None)["l0"]
    for arm, model in (("finetuned", "finetuned"), ("base", "base")):
        found = figures(saes[arm], rows[model], target)
        assert found["variance_explained"] == pytest.approx(curves[arm][-1][f"variance_explained_on_{model}"], abs=1e-9)


def separate_rows(pair: Any) -> dict[str, list[Tensor]]:
    from sae_research.transfer.repair import _gathered

    return _gathered(pair, NO_LIMIT, pair.params.transfer.repair.held_out_tokens, pair.source.split)


def test_more_pairs_than_memory_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(separate, "LARGEST", 60)
    sae = relu_sae(torch.eye(8))
    with pytest.raises(UserError, match="8 latents with 8 are more than 60 pairs; compare narrower SAEs"):
        CrossMoments(sae, sae)
    assert decoder_cosines(sae, sae).diagonal().tolist() == [1.0] * 8


def test_the_stage(make_params: Any, in_project: Path, models_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_stage(
        make_params(
            finetuned_model=str(models_folder / "near"),
            controls={"names": []},
            tokens=480,
            patched_tokens=96,
            repair={"enabled": False, "tokens": 480, "held_out_tokens": 240, "batch_size": 64},
            separate={"tokens": 480, "checked": 2, "checked_tokens": 144},
        )
    )
    folder = in_project / RESULTS
    found = json.loads((folder / "finetuned_eval_results.json").read_text())["separate"]
    with (folder / "separate_latents.tsv").open(newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))
    for model in ("base", "finetuned"):
        own = [row for row in rows if row["sae"] == model]
        assert len(own) == 64 and load_sae(folder / f"sae_trained_on_{model}").cfg.d_sae == 64
        counts = {name: sum(row["class"] == name for row in own) for name in found["saes"][model]["classes"]}
        assert counts == found["saes"][model]["classes"] and sum(counts.values()) == found["saes"][model]["fire"]
        assert found["ablations"][model]["groups"][f"{model}_end"]["kl"] >= 0
    assert set(found["control"]) == {"base", "finetuned"} and found["finetuned_sae"].startswith("the base SAE")
    text = transfer(in_project)
    kept = found["saes"]["base"]["classes"]["kept"]
    row = next(line for line in text.splitlines() if line.startswith("| base model's SAE"))
    assert [cell.strip() for cell in row.split("|")[2:4]] == [str(found["saes"]["base"]["fire"]), str(kept)]
    assert "images/transfer/separate_matches.png" in text and "crosscoder_shares" not in text
    extract_transfer(folder, in_project / "metrics/transfer.json")
    figures = json.loads((in_project / "metrics/transfer.json").read_text())["finetuned"]
    assert figures["separate_base_kept"] == kept and "separate_control_base_kept" in figures
    monkeypatch.setattr(transfer_figures, "FIGURES", {})  # test_stage.py draws those
    assert [path.stem for path in transfer_figures.draw_transfer(Visualization(), in_project)] == ["separate_matches"]


def result_with(lost: int, low: float | None, control: int | None = None) -> dict[str, Any]:
    """What `_claims` reads, of SAEs whose base side lost some latents."""
    sides = {"base": {"classes": {"lost": lost}, "fire": 10}, "finetuned": {"classes": {"made": 0}, "fire": 9}}
    group = {} if low is None else {"over_matched": {"value": low + 1, "low": low, "high": low + 2}}
    found: dict[str, Any] = {"saes": sides, "ablations": {"base": {"groups": {"lost": group}}}}
    return found if control is None else {**found, "control": {"base": {"classes": {"lost": control}}}}


@pytest.mark.parametrize(
    ("found", "match"),
    [
        (result_with(0, None), "No latent of the base model's SAE is lost"),
        (result_with(3, 0.1, 1), r"3 of 10 latents .* are lost \(the control: 1\)\. Ablated, they matter more"),
        (result_with(3, -5.0), r"are lost\. Ablated, they matter less"),
        (result_with(3, -1.0), "the text is too short to say"),
        (result_with(3, None), "None of them could be set against a kept latent"),
    ],
)
def test_claims_are_no_stronger_than_their_intervals(found: dict[str, Any], match: str) -> None:
    said = " ".join(transfer_separate._claims(found))
    assert re.search(match, said) and "No latent of the finetuned model's SAE is made" in said
