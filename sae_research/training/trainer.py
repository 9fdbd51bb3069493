"""The training loop: one pass over the stream, one step for every SAE on each batch of its hook."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from sae_research.errors import UserError
from sae_research.params import Train
from sae_research.training.member import CurveRow, Member, train_step
from sae_research.training.progress import ProgressFile
from sae_research.training.recipes import StepOutput
from sae_research.training.signals import Stop, StopSignals
from sae_research.training.stack import Stack, grouped
from sae_research.training.stream import ActivationStream, StreamBatch
from sae_research.training.team import Team

CURVE_ROWS = 60
"""Rows of a training curve, spread evenly over the run; only at these does the loop wait for the device."""


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
        """All steps that are left, and a checkpoint of the end. Raises `UserError` naming SAE and step when a loss is no
        longer finite, and `Stop`, with a checkpoint written, when a signal came."""
        self.saved_at, self.saved_step = time.monotonic(), self.step
        groups = grouped(self.members, self.train)
        self.units = [Stack(group) if len(group) > 1 else group[0] for group in groups]
        self.team = Team(len(self.units), self.stream.device)
        with self.team, self.signals.deferred(), tqdm(
            total=self.stream.tokens.numel(), initial=int(self.stream.fraction * self.stream.tokens.numel()),
            desc="training", unit="tok", unit_scale=True, mininterval=1, dynamic_ncols=True,
        ) as bar:
            try:
                self._loop(bar)
            except Stop:
                self.save_checkpoint()
                raise
            self.save_checkpoint()  # what is trained outlives whatever its measurement meets
            self._report(self.stream.fraction)
            self.progress.trained = True
            self.signals.check()

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
            for member, output, batch in self._step(batches):
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

    def _step(self, batches: dict[str, StreamBatch]) -> list[tuple[Member, StepOutput, StreamBatch]]:
        """A step of every SAE whose hook has a batch."""
        def step(unit: Member | Stack) -> list[tuple[Member, StepOutput, StreamBatch]]:
            batch = batches[unit.hook]
            if isinstance(unit, Member):
                return [(unit, train_step(unit, batch), batch)]
            return [(member, output, batch) for member, output in zip(unit.members, unit.step(batch), strict=True)]

        done = self.team.map(step, [unit for unit in self.units if unit.hook in batches])
        return [each for unit in done for each in unit]

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
