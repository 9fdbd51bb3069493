"""A short finetune of the base SAE on the other model's activations: how many tokens close half of the gap?

The same finetune on the base model's activations runs beside it, from the same text: an SAE that was trained briefly gets
better by any further training, and only what exceeds that is repair. Variance explained is compared at the L0 that the base
SAE has on its own model: on another model more latents fire, and reconstruct more.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from sae_research.config.params import Train
from sae_research.config.recipes import StandardRecipe, TopKRecipe
from sae_research.runtime.errors import UserError
from sae_research.saes import SparseAutoencoder, encode_each
from sae_research.stats.reconstruction import ReconstructionStats
from sae_research.training.recipes.base import Recipe
from sae_research.training.recipes.l1 import Standard
from sae_research.training.recipes.top_k import TopK
from sae_research.transfer.loading import MODELS, Pair, masks
from sae_research.transfer.text import batches, token_bar

TRAIN_SPLIT = "sae_train"
FORMS = ("standard", "topk")
UNIT_ROWS = 1e-3
"""Decoder rows' norms this near to 1 count as unit."""
NO_GAP = 0.005
"""Differences in variance explained below this are no gap to close."""
EVAL_ROWS = 1024
SHIFT_ROWS = 4096
"""Rows that the common shift of biases is found on."""
_START_COEFFICIENT = 0.05
_HOLD_RATE = 0.05


class HeldL0(Standard):
    """`standard` with a penalty that is adjusted after every step so that L0 stays where it was: what a released SAE's own
    coefficient was is seldom known, and variance explained compares at equal L0 only."""

    coefficient = _START_COEFFICIENT
    target_l0 = 1.0

    def penalty(self, progress: float) -> float:
        return self.coefficient

    def hold(self, l0: float) -> None:
        """Raise the coefficient where more latents than wanted were active, lower it where fewer."""
        self.coefficient *= math.exp(_HOLD_RATE * max(-1.0, min(1.0, l0 / self.target_l0 - 1)))


def repair(pair: Pair, limit: float) -> dict[str, Any]:
    """Variance explained at equal L0, and L0 before that was made equal, on held-out text after every batch of tokens.

    limit: largest norm at the SAE's hook that is no outlier. `finetuned`: trained on the finetuned model's activations,
    measured on both models'; `base`: trained on the base model's, measured on those. `tokens_to_half`: tokens read until
    half of the gap between the base SAE on its own model and on the finetuned one is closed (between two measurements,
    interpolated); None where that did not happen.
    """
    sae, config = pair.saes["base"], pair.params.transfer.repair
    if why := cannot_be_trained(sae):
        return {"status": "not_applicable", "message": why}
    held_out = {
        model: torch.cat(rows) for model, rows in _gathered(pair, limit, config.held_out_tokens, pair.source.split).items()
    }
    target = figures(sae, held_out["base"], None)["l0"]
    before = {model: figures(sae, rows, target) for model, rows in held_out.items()}
    curves: dict[str, list[dict[str, float]]] = {"finetuned": [_row(0, before, MODELS)], "base": [_row(0, before, ["base"])]}
    read = 0
    for read, arms in _training(pair, limit, target, "repair"):
        for model, arm in arms.items():
            shown = MODELS if model == "finetuned" else ("base",)
            after = arm.export(sae)
            curves[model].append(_row(read, {m: figures(after, held_out[m], target) for m in shown}, shown))
    return {
        "status": "ok",
        "tokens": read,
        "held_out_tokens": {m: len(rows) for m, rows in held_out.items()},
        "curves": curves,
        **_gap(curves),
    }


def cannot_be_trained(sae: SparseAutoencoder) -> str:
    """Why an SAE cannot be trained further here, in a line; empty where it can."""
    if sae.form not in FORMS:
        return f"the form {sae.form} cannot be trained further here; {' and '.join(FORMS)} can"
    if sae.form == "topk" and (sae.W_dec.norm(dim=1) - 1).abs().max() > UNIT_ROWS:
        return "a topk SAE is trained further with decoder rows of unit norm, which would change its latents here"
    return ""


def further_trained(pair: Pair, limit: float, progress: str | None = None) -> dict[str, SparseAutoencoder]:
    """The SAEs at the end of `repair`: `finetuned`, the base SAE trained on the finetuned model's activations, and `base`,
    the control that was trained as long on the base model's. Raises `UserError` for one that `cannot_be_trained`."""
    sae, config = pair.saes["base"], pair.params.transfer.repair
    if why := cannot_be_trained(sae):
        raise UserError(f"transfer.repair: {why}")
    rows = torch.cat(_gathered(pair, limit, config.held_out_tokens, pair.source.split)["base"])
    *_, (_, arms) = _training(pair, limit, figures(sae, rows, None)["l0"], progress)
    return {model: arm.export(sae) for model, arm in arms.items()}


def _training(pair: Pair, limit: float, target_l0: float, progress: str | None) -> Iterator[tuple[int, dict[str, _Arm]]]:
    """(tokens read, both SAEs in training by the model they are trained on) after every batch of text."""
    sae, config = pair.saes["base"], pair.params.transfer.repair
    generator, read = torch.Generator().manual_seed(pair.params.random_seed), 0
    arms: dict[str, _Arm] = {}
    with token_bar(config.tokens, progress) as bar:
        for n_tokens, rows in _rows(pair, limit, config.tokens, TRAIN_SPLIT):
            read += n_tokens
            for model in ("finetuned", "base"):
                if model not in arms:
                    arms[model] = _Arm(sae, rows[model], pair, target_l0)
                arms[model].train(rows[model], generator, min(1.0, read / config.tokens))
            yield read, arms
            bar.update(n_tokens)


def _row(tokens: int, figures: dict[str, dict[str, float]], shown: Any) -> dict[str, float]:
    return {
        "tokens": tokens,
        **{f"{key}_on_{model}": figures[model][key] for model in shown for key in ("variance_explained", "l0")},
    }


def _gap(curves: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    repaired, further = curves["finetuned"], curves["base"]
    gap = repaired[0]["variance_explained_on_base"] - repaired[0]["variance_explained_on_finetuned"]
    found: dict[str, Any] = {
        "gap": gap,
        "gap_closed": None,
        "tokens_to_half": None,
        "gap_after_equal_training": further[-1]["variance_explained_on_base"]
        - repaired[-1]["variance_explained_on_finetuned"],
    }
    if gap < NO_GAP:
        return found
    start = repaired[0]["variance_explained_on_finetuned"]
    found["gap_closed"] = (repaired[-1]["variance_explained_on_finetuned"] - start) / gap
    for one, two in zip(repaired, repaired[1:], strict=False):
        low, high = (row["variance_explained_on_finetuned"] for row in (one, two))
        if high >= start + gap / 2:
            share = (start + gap / 2 - low) / (high - low)
            found["tokens_to_half"] = one["tokens"] + share * (two["tokens"] - one["tokens"])
            break
    return found


# --- activations -----------------------------------------------------------------------------


def _rows(pair: Pair, limit: float, n_tokens: int, split: str) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """(tokens read, activations of either model's kept tokens [n, d_in]) batch by batch."""
    source = pair.source._replace(split=split)
    for batch in batches(pair.base, pair.finetuned, source, n_tokens, pair.params.transfer.batch_size):
        acts = {m: lm.activations(batch.sides[m].tokens, pair.hook).float() for m, lm in pair.models.items()}
        kept = masks(pair, batch, acts, limit).kept
        yield batch.n_tokens, {model: acts[model][kept[model]] for model in MODELS}


def _gathered(pair: Pair, limit: float, n_tokens: int, split: str) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {model: [] for model in MODELS}
    for _, rows in _rows(pair, limit, n_tokens, split):
        for model in MODELS:
            found[model].append(rows[model])
    return found


# --- training --------------------------------------------------------------------------------


class _Arm:
    """One SAE in training, begun from the base SAE's weights."""

    def __init__(self, sae: SparseAutoencoder, rows: Tensor, pair: Pair, target_l0: float) -> None:
        config = pair.params.transfer.repair
        self.batch_size = config.batch_size
        rows = sae.target(rows)
        mean_square = float(rows.square().sum(1).mean())
        if not mean_square > 0:
            raise UserError(f"transfer.repair: activations at {pair.hook} are all zero")
        self.scale = mean_square**-0.5
        self.recipe = _recipe(sae, self.scale, config.learning_rate, target_l0, pair.params.train).to(rows.device)
        self.recipe.generator = torch.Generator().manual_seed(pair.params.random_seed)
        self.optimiser = torch.optim.Adam(self.recipe.parameters(), lr=config.learning_rate)
        self.sae = sae

    def train(self, rows: Tensor, generator: torch.Generator, progress: float) -> None:
        """Once through `rows` [n, d_in], in an order of the generator's choice; a last part batch is left out, unless
        there is no other."""
        order = torch.randperm(len(rows), generator=generator).to(rows.device)
        parts = order.split(self.batch_size)
        for index in parts[:-1] if len(parts) > 1 and len(parts[-1]) < self.batch_size else parts:
            x = self.sae.target(rows[index]) * self.scale
            with torch.enable_grad():
                output = self.recipe.compute(x, progress)
                self.optimiser.zero_grad(set_to_none=True)
                output.loss.backward()
            self.recipe.project_gradient()
            self.optimiser.step()
            self.recipe.normalise_rows()
            if isinstance(self.recipe, HeldL0):
                self.recipe.hold(float(output.l0))
            if not torch.isfinite(output.loss):
                raise UserError("transfer.repair: the loss is not finite; lower its learning_rate")

    def export(self, sae: SparseAutoencoder) -> SparseAutoencoder:
        return self.recipe.export(self.scale, sae.cfg).to(sae.W_dec.device)


@torch.no_grad()
def _recipe(sae: SparseAutoencoder, scale: float, learning_rate: float, target_l0: float, train: Train) -> Recipe:
    """The recipe of the SAE's form with the SAE's weights, in units of normalised activations; `export` undoes this."""
    d_sae, d_in = sae.W_dec.shape
    if sae.form == "topk":
        recipe: Recipe = TopK(
            d_in,
            TopKRecipe(
                recipe="top_k", d_sae=d_sae, learning_rate=learning_rate, k=int(sae.options()["k"]), inference="top_k"
            ),
            train,
        )
    else:
        recipe = HeldL0(
            d_in,
            StandardRecipe(recipe="standard", d_sae=d_sae, learning_rate=learning_rate, l1_coefficient=_START_COEFFICIENT),
            train,
        )
        recipe.target_l0 = max(target_l0, 1e-3)
        known = sae.cfg.provenance.get("hyper_parameters") or {}
        recipe.coefficient = float(known.get("l1_coefficient") or _START_COEFFICIENT)
    norms = sae.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)
    recipe.W_enc.copy_(sae.W_enc.T * norms)
    recipe.b_enc.copy_(sae.b_enc * norms[:, 0] * scale)
    recipe.W_dec.copy_(sae.W_dec / norms)
    recipe.b_dec.copy_(sae.b_dec * scale)
    recipe.reads_b_dec = sae.cfg.apply_b_dec_to_input  # ty: ignore[invalid-assignment]
    return recipe


@torch.no_grad()
def figures(sae: SparseAutoencoder, rows: Tensor, target_l0: float | None) -> dict[str, float]:
    """Statistics on rows [n, d_in]: the SAE's own `l0`, all others at an L0 of `target_l0`, which a ReLU SAE reaches by
    moving every encoder bias by one amount; a TopK SAE's L0 is its own."""
    if target_l0 is None or sae.form != "standard":
        return _measured(sae, rows)
    sample = rows[:SHIFT_ROWS]
    pre = torch.addmm(sae.b_enc, sae.centred(sample), sae.W_enc).flatten()
    wanted = min(max(1, round(target_l0 * len(sample))), pre.numel())
    moved = copy.deepcopy(sae)
    moved.b_enc -= pre.topk(wanted, sorted=False).values.min()
    return {**_measured(moved, rows), "l0": _measured(sae, rows)["l0"]}


def _measured(sae: SparseAutoencoder, rows: Tensor) -> dict[str, float]:
    stats = ReconstructionStats(sae.cfg.d_in, sae.cfg.d_sae, rows.device)
    for part in rows.split(EVAL_ROWS):
        x = part[None]
        mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
        ((_, z),) = encode_each({"sae": sae}, x, mask)
        stats.update(sae.target(x), sae.decode(z), z, mask)
    return stats.metrics()
