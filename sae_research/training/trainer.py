"""The training loop: one pass over the stream, one step for every SAE on each batch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from sae_research.errors import UserError
from sae_research.params import Train
from sae_research.store import fingerprint
from sae_research.training.recipes import RECIPES, Recipe, StepOutput
from sae_research.training.stream import ActivationStream, StreamBatch

CURVE_ROWS = 60
"""Rows of a training curve, spread evenly over the run; only at these does the loop wait for the device."""


class CurveRow(NamedTuple):
    """One row of `training_curve.tsv`."""

    step: int
    tokens: int
    loss: float
    """Mean over the steps since the last row."""
    l0: float
    """On this step's batch, as is the next."""
    variance_explained: float


@dataclass
class Member:
    """One SAE in training: its recipe, its optimiser, and what is noted on the way."""

    name: str
    recipe: Recipe
    optimiser: torch.optim.Adam
    loss_sum: Tensor
    """Of the steps since the last row of the curve."""
    bad_step: Tensor
    """First step whose loss was not finite, 0 while there is none."""
    curve: list[CurveRow] = field(default_factory=list)

    @property
    def fraction_silent(self) -> float:
        """Fraction of latents that did not fire in the last `dead_fraction` of the run."""
        since = self.recipe.last_fired_F.max() - self.recipe.train_config.dead_fraction
        return float((self.recipe.last_fired_F < since).float().mean())


def make_member(name: str, train: Train, rows_ND: Tensor, random_seed: int) -> Member:
    """An SAE ready to train, started from normalised activations `rows_ND`.

    Its randomness comes from `random_seed` and its own name, so that other SAEs in the run change nothing.
    """
    config = train.saes[name]
    generator = torch.Generator().manual_seed(sae_seed(name, random_seed))
    recipe = RECIPES[config.recipe](rows_ND.shape[1], config, train).to(rows_ND.device)
    recipe.initialise(rows_ND, generator)
    # fused: one pass over parameters and moments; 7 times faster than foreach on CPU
    optimiser = torch.optim.Adam(
        recipe.parameters(), lr=config.learning_rate, betas=recipe.betas, fused=rows_ND.device.type != "mps"
    )
    zero = torch.zeros((), device=rows_ND.device)
    return Member(name, recipe, optimiser, zero.clone(), zero.clone().long())


def sae_seed(name: str, random_seed: int) -> int:
    return int(fingerprint([random_seed, "sae", name])[:12], 16)


def train_members(stream: ActivationStream, members: list[Member]) -> int:
    """Train all members on one pass of the stream. Returns how many tokens each was trained on.

    Raises `UserError` naming SAE and step when a loss is no longer finite.
    """
    step = n_trained = 0
    with tqdm(
        total=stream.tokens.numel(),
        desc="training",
        unit="tok",
        unit_scale=True,
        mininterval=1,
        dynamic_ncols=True,
    ) as bar:
        for batch in stream:
            step, n_trained = step + 1, n_trained + len(batch.acts)
            outputs = [train_step(member, batch, step) for member in members]
            if int(batch.progress * CURVE_ROWS) > len(members[0].curve) - 1:
                log_rows(members, outputs, batch, step, n_trained)
                bar.set_postfix_str(postfix(members))
            bar.update(int(n_trained / stream.expected_rows * bar.total) - bar.n)
    raise_if_diverged(members)
    return n_trained


def train_step(member: Member, batch: StreamBatch, step: int) -> StepOutput:
    """Loss, gradient, and an Adam step that keeps the decoder's rows at unit norm."""
    recipe, optimiser = member.recipe, member.optimiser
    optimiser.param_groups[0]["lr"] = recipe.learning_rate(batch.progress)
    output = recipe.compute(batch.acts, batch.progress)
    optimiser.zero_grad(set_to_none=True)
    output.loss.backward()
    if recipe.unit_rows:
        recipe.project_gradient()
    if recipe.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(recipe.parameters(), recipe.clip_norm)
    optimiser.step()
    if recipe.unit_rows:
        recipe.normalise_rows()
    recipe.after_step(optimiser, batch.acts, output, batch.progress)
    loss = output.loss.detach()
    member.loss_sum += loss
    # without branching on a value that may still be on its way from a GPU
    bad = ~torch.isfinite(loss) & (member.bad_step == 0)
    member.bad_step.masked_fill_(bad, step)
    return output


def log_rows(
    members: Iterable[Member], outputs: Iterable[StepOutput], batch: StreamBatch, step: int, tokens: int
) -> None:
    """Add a row to every member's curve."""
    members = list(members)
    raise_if_diverged(members)
    variance = (batch.acts - batch.acts.mean(0)).square().sum()
    for member, output in zip(members, outputs, strict=True):
        steps = step - (member.curve[-1].step if member.curve else 0)
        explained = 1 - output.residual.square().sum() / variance
        member.curve.append(
            CurveRow(step, tokens, float(member.loss_sum) / steps, float(output.l0), float(explained))
        )
        member.loss_sum.zero_()


def raise_if_diverged(members: Iterable[Member]) -> None:
    for member in members:
        if int(member.bad_step):
            raise UserError(
                f"train.saes.{member.name}: the loss at step {int(member.bad_step)} is not finite; lower "
                "its learning_rate, or set train.llm_dtype: float32 if activations overflow"
            )


def postfix(members: Iterable[Member]) -> str:
    """`name: loss 0.21 L0 32.0 VE 0.78` for each member, for the progress bar."""
    return " | ".join(
        f"{member.name}: loss {row.loss:.3g} L0 {row.l0:.3g} VE {row.variance_explained:.3f}"
        for member in members
        for row in member.curve[-1:]
    )
