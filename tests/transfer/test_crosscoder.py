"""A crosscoder of both models: equal models, a planted difference, latent scaling and ablations against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from sae_research.config.params import Train
from sae_research.config.transfer import PairCrosscoder
from sae_research.runtime.errors import UserError
from sae_research.saes import SAEConfig, SparseAutoencoder, form_class
from sae_research.transfer.causal import Latents, ablations, checks_of, chosen, crosscoder_report
from sae_research.transfer.crosscoder import (
    LatentSums,
    Made,
    class_of,
    finetuned_share,
    latent_frame,
    latent_scaling,
    matched,
    train_crosscoder,
    trained,
    verdict,
)

D = 16
RECIPES = {"batch_top_k": {"k": 3}, "standard_new": {"l1_coefficient": 0.05}}
MADE = Made("tiny", "blocks.1.hook_resid_post", 24)


def features(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(activations [n, D] of 12 orthogonal directions, each on one token in six; a further direction [D])."""
    g = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(9)))[0]
    strength = (1 + torch.rand(n, 12, generator=g)) * (torch.rand(n, 12, generator=g) < 1 / 6)
    return strength @ directions[:12] + 0.3 * directions[12], directions[13]


def train(rows: Tensor, recipe: str, **config: Any) -> SparseAutoencoder:
    settings = PairCrosscoder.model_validate(
        {
            "recipe": recipe,
            "d_sae": 24,
            "tokens": len(rows),
            "batch_size": 64,
            "learning_rate": 0.01,
            **RECIPES[recipe],
            **config,
        }
    )
    parts = ((len(part), part) for part in rows.split(500))
    return train_crosscoder(parts, settings, Train(precision="float32"), MADE, 0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_equal_models_share_every_latent(recipe: str) -> None:
    x, _ = features(6000)
    sae = train(torch.cat([x, x], 1), recipe)
    assert sae.cfg.hook_names == ("base blocks.1.hook_resid_post", "finetuned blocks.1.hook_resid_post")
    assert (finetuned_share(sae) - 0.5).abs().max() < 1e-3
    sums = LatentSums(sae)
    sums.update(torch.cat([x, x], 1))
    assert min(sums.reconstruction.variance_explained_by_part(2)) > 0.8
    frame = latent_frame(sums)
    assert set(frame["class"]) == {"shared"} and (frame.verdict == "").all()
    alive = frame[frame.firings > 0]
    assert (alive.nu_error - 1).abs().max() < 0.01 and (alive.decoder_cosine > 0.999).all()


@pytest.mark.parametrize("recipe", RECIPES)
def test_planted_difference_is_found(recipe: str) -> None:
    """A direction that the finetuned model alone has, and one that it has lost."""
    x, planted = features(20_000)
    there = (torch.rand(len(x), generator=torch.Generator().manual_seed(3)) < 0.2).float() * 3
    lost = torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(9)))[0][14]
    gone = (torch.rand(len(x), generator=torch.Generator().manual_seed(4)) < 0.2).float() * 3
    rows = torch.cat([x + gone[:, None] * lost, x + there[:, None] * planted], 1)
    sae = train(rows, recipe)
    sums = LatentSums(sae)
    sums.update(rows)
    frame = latent_frame(sums)
    for name, direction, side, where in (("finetuned_only", planted, 1, there), ("base_only", lost, 0, gone)):
        latents = frame[frame["class"] == name].sort_values("firings", ascending=False).latent.tolist()
        cosine = torch.nn.functional.cosine_similarity(sae.W_dec.chunk(2, dim=1)[side][latents[0]], direction, dim=0)
        assert cosine > 0.95 and frame.verdict[latents[0]] == "specific"
        fires = sae.encode(rows[None])[0, :, latents[0]] > 0
        assert (fires == (where > 0)).float().mean() > 0.98
    assert (frame[frame.firings > 0]["class"] == "shared").sum() >= 10


def crosscoder(seed: int = 0, d_hook: int = 32, d_sae: int = 24) -> SparseAutoencoder:
    """A random crosscoder whose latents belong to the models to all degrees."""
    g = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(d_sae, 2, d_hook, generator=g)
    W_dec[:, 0] *= torch.linspace(0.01, 4, d_sae)[:, None]
    cfg = SAEConfig(form="standard", d_in=2 * d_hook, d_sae=d_sae, hook_name="base h + finetuned h", hook_scales=(0.5, 2.0))
    tensors = {
        "W_enc": W_dec.flatten(1).T * 0.05,
        "b_enc": -0.2 * torch.ones(d_sae),
        "b_dec": torch.randn(2 * d_hook, generator=g),
    }
    return form_class("standard")(cfg, W_dec=W_dec.flatten(1), **{k: v.contiguous() for k, v in tensors.items()})


def test_scaling_is_least_squares() -> None:
    sae = crosscoder()
    rows = torch.randn(200, 64, generator=torch.Generator().manual_seed(1)) * 3
    sums = LatentSums(sae)
    for part in rows.split(70):
        sums.update(part)
    found = latent_scaling(sums)
    z = sae.encode(rows[None])[0].double()
    scales = (0.5, 2.0)
    x = [rows[:, i * 32 : (i + 1) * 32].double() * scales[i] for i in (0, 1)]
    decoders = [sae.W_dec[:, i * 32 : (i + 1) * 32].double() * scales[i] for i in (0, 1)]
    biases = [sae.b_dec[i * 32 : (i + 1) * 32].double() * scales[i] for i in (0, 1)]
    for j in range(24):
        own = int(decoders[1][j].norm() >= decoders[0][j].norm())
        regressor = (z[:, j, None] * decoders[own][j]).flatten()[:, None]
        betas: dict[str, list[float]] = {"error": [], "reconstruction": []}
        for i in (0, 1):
            whole = biases[i] + sum(z[:, k, None] * decoders[i][k] for k in range(24))
            others = biases[i] + sum(z[:, k, None] * decoders[i][k] for k in range(24) if k != j)
            for key, target in (("error", x[i] - others), ("reconstruction", whole)):
                betas[key].append(float(torch.linalg.lstsq(regressor, target.flatten()[:, None]).solution))
        for key, nu in (("error", found.nu_error[j]), ("reconstruction", found.nu_reconstruction[j])):
            assert found.betas[key]["base"][j] == pytest.approx(betas[key][0], rel=1e-3, abs=1e-4)
            assert found.betas[key]["finetuned"][j] == pytest.approx(betas[key][1], rel=1e-3, abs=1e-4)
            if betas[key][own] > 0.05:
                assert float(nu) == pytest.approx(betas[key][1 - own] / betas[key][own], rel=2e-3, abs=1e-3)


def test_artefacts_of_sparsity_are_told() -> None:
    """The base model has the direction too, but no decoder for it there: unexplained, then written by another latent."""
    d = torch.eye(8)
    on = (torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.3).float()
    both = on[:, None] * d[0]
    rows = torch.cat([both, both], 1)
    cfg = SAEConfig(form="standard", d_in=16, d_sae=2, hook_name="base h + finetuned h", hook_scales=(1.0, 1.0))
    own, other = torch.cat([0 * d[0], d[0]]), torch.cat([d[0], 0 * d[0]])
    for second, expected in ((0.0, "shrunk"), (1.0, "decoupled")):
        W_enc = torch.stack([own, second * other], 1)
        sae = form_class("standard")(
            cfg, W_enc=W_enc, W_dec=torch.stack([own, other]), b_enc=torch.zeros(2), b_dec=torch.zeros(16)
        )
        sums = LatentSums(sae)
        sums.update(rows)
        assert latent_frame(sums).verdict[0] == expected


def test_limits() -> None:
    shares = {0.0: "base_only", 0.2: "base_leaning", 0.5: "shared", 0.7: "finetuned_leaning", 0.95: "finetuned_only"}
    assert {share: class_of(share) for share in shares} == shares and class_of(float("nan")) == ""
    assert verdict("shared", 0.0, 0.0) == "" and verdict("base_only", float("nan"), 0.0) == ""
    assert verdict("base_only", 0.1, 0.1) == "specific"


def test_ablations_equal_a_plain_loop(make_pair: Any) -> None:
    pair = make_pair("near", crosscoder={"k": 3, "d_sae": 24, "checked": 2, "checked_tokens": 96})
    sae = crosscoder()
    sums, limit = LatentSums(sae), float("inf")
    text = list(matched(pair, limit, 96, pair.source, 4))
    for part in text:
        sums.update(part.rows)
    frame = latent_frame(sums)
    found = ablations(pair, sae, frame, limit)
    assert found["tokens"] == sum(len(part.index[1]) for part in text) > 50
    lm, hook = pair.finetuned, pair.hook
    for row in found["latents"]:
        total = {"kl": 0.0, "kl_matched": 0.0}
        for part in text:
            tokens = part.batch.finetuned.tokens
            clean = torch.log_softmax(lm.logits(tokens).double(), -1)
            for key, latent in (("kl", row["latent"]), ("kl_matched", row["matched_latent"])):
                edited = part.acts["finetuned"].clone().flatten(0, 1)
                for place, x in zip(part.index[1].tolist(), part.rows, strict=True):
                    edited[place] -= sae.encode(x[None, None])[0, 0, latent] * sae.W_dec[latent, 32:]
                put = edited.view_as(part.acts["finetuned"])
                log_q = torch.log_softmax(lm.edited_logits(tokens, {hook: lambda _, put=put: put}).double(), -1)
                kl = (clean.exp() * (clean - log_q)).sum(-1)
                total[key] += float(kl.flatten()[part.index[1]].sum())
        for key, value in total.items():
            assert row[key] == pytest.approx(value / found["tokens"], rel=2e-3, abs=1e-6)
        assert row["kl"] > 0 and row["kl_direction"] > 0
    group = found["groups"]["finetuned_end"]
    assert group["latents"] == chosen(frame, torch.ones(24), 2)["finetuned_end"]
    check_patches(pair, sae, text, found)


def check_patches(pair: Any, sae: SparseAutoencoder, text: list[Any], found: dict[str, Any]) -> None:
    """Against token after token."""
    latents = found["groups"]["base_end"]["latents"]
    total = {"without": 0.0, "with": 0.0}
    for part in text:
        tokens, acts = part.batch.finetuned.tokens, part.acts["base"]
        clean = torch.log_softmax(pair.finetuned.logits(tokens).double(), -1)
        edited = acts.clone().flatten(0, 1)
        for place, x in zip(part.index[0].tolist(), part.rows, strict=True):
            z = sae.encode(x[None, None])[0, 0]
            for latent in latents:
                edited[place] += z[latent] * (sae.W_dec[latent, 32:] - sae.W_dec[latent, :32])
        for key, put in (("without", acts), ("with", edited.view_as(acts))):
            log_q = torch.log_softmax(pair.base.edited_logits(tokens, {pair.hook: lambda _, put=put: put}).double(), -1)
            kl = (clean.exp() * (clean - log_q)).sum(-1)
            total[key] += float(kl.flatten()[part.index[1]].sum())
    assert found["kl_base"] == pytest.approx(total["without"] / found["tokens"], rel=2e-3)
    assert found["groups"]["base_end"]["kl_patched_base"] == pytest.approx(total["with"] / found["tokens"], rel=2e-3)


def test_each_model_with_its_own_tokenizer(make_pair: Any) -> None:
    """Only tokens that both read are trained on; ids differ, so nothing is patched from model to model."""
    sizes = {"d_sae": 48, "k": 4, "tokens": 2400, "batch_size": 64, "held_out_tokens": 240}
    pair = make_pair("other_tokenizer", own=True, crosscoder={**sizes, "checked": 1, "checked_tokens": 96})
    text = list(matched(pair, float("inf"), 96, pair.source, 4))
    assert all(len(part.rows) < part.batch.base.real.sum() for part in text)
    found, again = (crosscoder_report(pair, trained(pair, float("inf"), None), float("inf")) for _ in range(2))
    assert found == again, "equal runs give equal results"
    ablated = found["result"]["ablations"]
    assert ablated["tokens"] == sum(len(part.rows) for part in text) and "kl_base" not in ablated
    assert ablated["groups"]["finetuned_end"]["kl"] > 0


def test_controls_of_an_ablation() -> None:
    sae = crosscoder()
    sums = LatentSums(sae)
    sums.update(torch.randn(200, 64, generator=torch.Generator().manual_seed(1)) * 3)
    frame, energy = latent_frame(sums), torch.arange(24, dtype=torch.float64)
    groups = chosen(frame, energy, 3)
    shared = frame[frame["class"] == "shared"].latent.tolist()
    assert groups["shared"] == sorted(shared)[:-4:-1] and 0 not in sum(groups.values(), [])
    controls = torch.tensor((frame["class"] == "shared").to_numpy())
    checks = checks_of(Latents(sae), controls, energy, groups, 0)
    assert sorted(checks) == sorted(set(sum(groups.values(), [])))
    for latent, check in checks.items():
        assert check.matched in shared and check.matched != latent
        assert float(check.direction.norm()) == pytest.approx(float(sae.W_dec[latent, 32:].norm()), rel=1e-5)


def test_what_cannot_be() -> None:
    with pytest.raises(ValidationError, match="batch_top_k needs k and takes no l1_coefficient"):
        PairCrosscoder(l1_coefficient=0.1)
    with pytest.raises(ValidationError, match="standard_new needs l1_coefficient"):
        PairCrosscoder(recipe="standard_new", k=3)
    with pytest.raises(ValidationError, match="exceeds d_sae"):
        PairCrosscoder(k=30, d_sae=24)
    x, _ = features(100)
    with pytest.raises(UserError, match="less than a batch of 128"):
        train(torch.cat([x, x], 1), "batch_top_k", batch_size=128, tokens=1000)
    with pytest.raises(UserError, match="finetuned .* are all zero"):
        train(torch.cat([x, 0 * x], 1), "batch_top_k")
