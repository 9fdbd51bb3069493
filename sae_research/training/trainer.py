"""The training loop: one pass over the stream, one step for every SAE on each batch of its hook."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from sae_research.errors import UserError
from sae_research.params import Train
from sae_research.store import fingerprint
from sae_research.training.progress import ProgressFile
from sae_research.training.recipes import RECIPES, Recipe, StepOutput
from sae_research.training.signals import Stop, StopSignals
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
    hook: str = ""
    step: int = 0
    tokens: int = 0
    """Trained on so far."""
    curve: list[CurveRow] = field(default_factory=list)

    @property
    def fraction_silent(self) -> float:
        """Fraction of latents that did not fire in the last `dead_fraction` of the run."""
        since = self.recipe.last_fired_F.max() - self.recipe.train_config.dead_fraction
        return float((self.recipe.last_fired_F < since).float().mean())

    # --- checkpoints ---

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """(plain values, tensors) from which `restore` goes on exactly here."""
        values = {"step": self.step, "tokens": self.tokens, "curve": [list(row) for row in self.curve],
                  "recipe": self.recipe.extra_state()}
        tensors = {f"recipe/{key}": tensor for key, tensor in self.recipe.state_dict().items()}
        tensors |= {"loss_sum": self.loss_sum, "generator": self.recipe.generator.get_state()}
        for key, parameter in self.recipe.named_parameters():
            tensors |= {f"adam/{key}/{moment}": tensor for moment, tensor in self.optimiser.state[parameter].items()}
        return values, tensors

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        self.step, self.tokens = values["step"], values["tokens"]
        self.curve = [CurveRow(*row) for row in values["curve"]]
        self.recipe.load_state_dict({key.removeprefix("recipe/"): tensor for key, tensor in tensors.items()
                                     if key.startswith("recipe/")})
        self.recipe.load_extra_state(values["recipe"])
        self.recipe.generator.set_state(tensors["generator"])
        self.loss_sum.copy_(tensors["loss_sum"])
        for key, parameter in self.recipe.named_parameters():
            prefix = f"adam/{key}/"
            for name, tensor in tensors.items():
                if name.startswith(prefix):
                    like = torch.zeros((), device=parameter.device) if tensor.dim() == 0 else torch.zeros_like(parameter)
                    self.optimiser.state[parameter][name.removeprefix(prefix)] = like.copy_(tensor)


def make_member(name: str, train: Train, d_in: int, device: torch.device | str = "cpu") -> Member:
    """An SAE and its optimiser; call `start` or `Member.restore` next."""
    config = train.saes[name]
    recipe = RECIPES[config.recipe](d_in, config, train).to(device)
    recipe.generator = torch.Generator()
    # fused: one pass over parameters and moments; 7 times faster than foreach on CPU
    optimiser = torch.optim.Adam(
        recipe.parameters(), lr=config.learning_rate, betas=recipe.betas, fused=torch.device(device).type != "mps")
    zero = torch.zeros((), device=device)
    return Member(name, recipe, optimiser, zero.clone(), zero.clone().long(), train.hook_of(name))


def start(member: Member, rows_ND: Tensor, random_seed: int) -> None:
    """Initialise from normalised activations `rows_ND`.

    Its randomness comes from `random_seed` and its own name, so that other SAEs in the run change nothing.
    """
    member.recipe.initialise(rows_ND, torch.Generator().manual_seed(sae_seed(member.name, random_seed)))


def sae_seed(name: str, random_seed: int) -> int:
    return int(fingerprint([random_seed, "sae", name])[:12], 16)


def train_step(member: Member, batch: StreamBatch) -> StepOutput:
    """Loss, gradient, and an Adam step that keeps the decoder's rows at unit norm where the recipe asks for it."""
    recipe, optimiser = member.recipe, member.optimiser
    optimiser.param_groups[0]["lr"] = recipe.learning_rate(batch.progress)
    optimiser.zero_grad(set_to_none=True)
    output = _gradients(recipe, batch)
    if recipe.unit_rows:
        recipe.project_gradient()
    if recipe.clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(recipe.parameters(), recipe.clip_norm)
    optimiser.step()
    if recipe.unit_rows:
        recipe.normalise_rows()
    recipe.after_step(optimiser, batch.acts, output, batch.progress)
    member.step += 1
    member.tokens += len(batch.acts)
    member.loss_sum += output.loss
    # without branching on a value that may still be on its way from a GPU
    bad = ~torch.isfinite(output.loss) & (member.bad_step == 0)
    member.bad_step.masked_fill_(bad, member.step)
    return output


def _gradients(recipe: Recipe, batch: StreamBatch) -> StepOutput:
    """Gradients of the mean loss over the parts of a batch, and what the recipe says of it, without a graph."""
    n_parts = recipe.train_config.accumulation_steps
    outputs = []
    for part_BD in batch.acts.chunk(n_parts):
        output = recipe.compute(part_BD, batch.progress)
        (output.loss if n_parts == 1 else output.loss / n_parts).backward()
        outputs.append(output._replace(loss=output.loss.detach()))
    if n_parts == 1:
        return outputs[0]
    losses, residuals, l0s = zip(*outputs, strict=True)
    return StepOutput(torch.stack(losses).mean(), torch.cat(residuals), torch.stack(l0s).mean())


def log_row(member: Member, output: StepOutput, batch: StreamBatch) -> None:
    """Add a row to a member's curve. Raises `UserError` when its loss was not finite."""
    raise_if_diverged([member])
    variance = (batch.acts - batch.acts.mean(0)).square().sum()
    steps = member.step - (member.curve[-1].step if member.curve else 0)
    explained = 1 - output.residual.square().sum() / variance
    member.curve.append(
        CurveRow(member.step, member.tokens, float(member.loss_sum) / steps, float(output.l0), float(explained)))
    member.loss_sum.zero_()


def raise_if_diverged(members: Iterable[Member]) -> None:
    for member in members:
        if int(member.bad_step):
            raise UserError(
                f"train.saes.{member.name}: the loss at step {int(member.bad_step)} is not finite; lower "
                "its learning_rate, or set train.llm_dtype: float32 if activations overflow")


@dataclass
class Trainer:
    """The loop over a stream, with what happens around the steps."""

    stream: ActivationStream
    members: list[Member]
    train: Train
    progress: ProgressFile
    signals: StopSignals
    save: Callable[[], None]
    """Write a checkpoint of stream and members as they stand."""
    at_step: Callable[[float], None] = lambda fraction: None
    """Called before the first step and after every step with the fraction of the run done."""

    def run(self) -> None:
        """All steps that are left. Raises `UserError` naming SAE and step when a loss is no longer finite, and `Stop`,
        with a checkpoint written, when a signal came."""
        self.saved_at, self.saved_step = time.monotonic(), self.step
        with self.signals.deferred(), tqdm(
            total=self.stream.tokens.numel(), initial=int(self.stream.fraction * self.stream.tokens.numel()),
            desc="training", unit="tok", unit_scale=True, mininterval=1, dynamic_ncols=True,
        ) as bar:
            try:
                self._loop(bar)
            except Stop:
                self.save_checkpoint()
                raise
        raise_if_diverged(self.members)

    @property
    def step(self) -> int:
        """Steps of the SAE that has done most; hooks differ by the few tokens that their norms rule out."""
        return max(member.step for member in self.members)

    def _loop(self, bar: Any) -> None:
        stream = self.stream
        self._rounds(bar)
        while stream.next_chunk < stream.n_chunks:
            with self.signals.at_once():
                acts = stream.read(stream.next_chunk)
            stream.feed(acts)
            del acts
            self._rounds(bar)
        if stream.next_chunk == stream.n_chunks:
            stream.finish()
        self._rounds(bar)

    def _rounds(self, bar: Any) -> None:
        for batches in self.stream.rounds():
            if self.step == 0:
                self.at_step(0.0)
            for member in self.members:
                if (batch := batches.get(member.hook)) is not None:
                    output = train_step(member, batch)
                    if int(batch.progress * CURVE_ROWS) > len(member.curve) - 1:
                        log_row(member, output, batch)
                        bar.set_postfix_str(postfix(self.members), refresh=False)
            fraction = self.stream.fraction
            self.at_step(fraction)
            bar.update(int(fraction * bar.total) - bar.n)
            self._report(fraction)
            if self._due():
                self.save_checkpoint()
            self.signals.check()

    def _due(self) -> bool:
        by_steps, by_time = self.train.checkpoint_steps, self.train.checkpoint_seconds
        return ((by_steps is not None and self.step - self.saved_step >= by_steps)
                or (by_time is not None and time.monotonic() - self.saved_at >= by_time))

    def save_checkpoint(self) -> None:
        """Keep this moment. Never a diverged one; on a full disk the last good one stays and the run goes on."""
        raise_if_diverged(self.members)
        if self.progress.values["checkpoint_step"] == self.step:
            return
        try:
            self.save()
            self.progress.values["checkpoint_step"] = self.step
        except OSError as error:
            print(f"\nno checkpoint at step {self.step}: {error.strerror or error}; the last good one is kept",
                  file=sys.stderr, flush=True)
        self.saved_at, self.saved_step = time.monotonic(), self.step

    def _report(self, fraction: float) -> None:
        buffers, size = self.stream.buffers.values(), self.train.batch_size
        self.progress.update(
            fraction, step=self.step, tokens=max(member.tokens for member in self.members),
            total_steps=max(int(buffer.expected_rows) for buffer in buffers) // size,
            total_tokens=max(int(buffer.expected_rows) for buffer in buffers),
            saes={member.name: {"step": row.step, "loss": row.loss, "l0": row.l0,
                                "variance_explained": row.variance_explained}
                  for member in self.members for row in member.curve[-1:]})


def postfix(members: Iterable[Member]) -> str:
    """`name: loss 0.21 L0 32.0 VE 0.78` for each member, for the progress bar."""
    return " | ".join(
        f"{member.name}: loss {row.loss:.3g} L0 {row.l0:.3g} VE {row.variance_explained:.3f}"
        for member in members
        for row in member.curve[-1:]
    )
