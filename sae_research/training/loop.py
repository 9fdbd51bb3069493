"""The training loop: one pass over the stream, one step for every SAE on each batch of its hook.

`Trainer` comes first. Below it stands what it uses: rows of the training curves, a pool of threads in which SAEs step side
by side, snapshots of SAEs on the way, and signals that stop a run between two steps.
"""

from __future__ import annotations

import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from sae_research.config.params import Train
from sae_research.runtime.errors import UserError
from sae_research.saes import SparseAutoencoder, save_sae
from sae_research.training.buffer import StreamBatch
from sae_research.training.checkpoints import ProgressFile
from sae_research.training.peers import GO, SAVE, STOP, Alone, Peers
from sae_research.training.recipes import StepOutput
from sae_research.training.stack import Stack, in_stacks
from sae_research.training.stream import ReadAhead, Stream
from sae_research.training.training_sae import CurveRow, TrainingSAE, train_step

Item = TypeVar("Item")
Result = TypeVar("Result")

CURVE_ROWS = 60
"""Rows of a training curve, spread evenly over the run; only at these does the loop wait for the device."""
SAES_SHOWN = 3
"""Most SAEs that a progress bar names one by one."""


@dataclass
class Trainer:
    """The loop over a stream, with what happens around the steps."""

    stream: Stream
    saes: list[TrainingSAE]
    """Of this rank; in rank 0 all."""
    train: Train
    progress: ProgressFile
    signals: StopSignals
    save: Callable[[], None]
    """Write a checkpoint of stream and SAEs as they stand."""
    at_step: Callable[[float], None] = lambda fraction: None
    """Called before the first step and after every step with the fraction of the run done."""
    peers: Peers = field(default_factory=Alone)
    at_outputs: Callable[[list[tuple[TrainingSAE, StepOutput, StreamBatch]]], None] = lambda outputs: None
    """Called after every step with what this rank's SAEs made of their batches, before `at_step`."""

    def run(self) -> None:
        """All steps that are left, and a checkpoint of the end. Raises `UserError` naming SAE and step when a loss is no
        longer finite, and `Stop`, with a checkpoint written, when a signal came."""
        self.saved_at, self.saved_step = time.monotonic(), self.step
        self.own = [sae for sae in self.saes if self.peers.owns(sae)]
        groups = in_stacks(self.own, self.train)
        self.units = [Stack(group) if len(group) > 1 else group[0] for group in groups]
        self.stepper = ThreadPoolStepper(len(self.units), self.stream.device)
        with (
            self.stepper,
            ReadAhead(self.stream) as self.chunks,
            self.signals.deferred(),
            tqdm(
                total=self.stream.n_tokens,
                initial=int(self.stream.fraction * self.stream.n_tokens),
                desc="training",
                unit="tok",
                unit_scale=True,
                mininterval=1,
                dynamic_ncols=True,
                disable=not self.peers.leads,
            ) as bar,
        ):
            try:
                self._loop(bar)
            except Stop:
                self.peers.stop()
                self.save_checkpoint()
                raise
            self.save_checkpoint()  # what is trained outlives whatever its measurement meets
            self._report(self.stream.fraction)
            self.progress.trained = True
            self.signals.check()

    @property
    def step(self) -> int:
        """Steps of the SAE that has done most; hooks differ by the few tokens that their norms rule out."""
        return max((sae.step for sae in self.saes), default=0)

    def _loop(self, bar: Any) -> None:
        stream = self.stream
        self.chunks.begin(stream.next_chunk)
        self._rounds(bar)
        while stream.next_chunk < stream.n_chunks:
            with self.signals.at_once():
                acts = self.chunks.read(stream.next_chunk)
            self._agree()
            stream.feed(acts)
            del acts
            self.chunks.begin(stream.next_chunk)
            self._rounds(bar)
        if stream.next_chunk == stream.n_chunks:
            stream.finish()
        self._rounds(bar)

    def _rounds(self, bar: Any) -> None:
        for batches in self.stream.rounds():
            if self.step == 0:
                self.at_step(0.0)
            done = self._step(batches)
            self.at_outputs(done)
            logged = [(sae, output, batch) for sae, output, batch in done if row_is_due(sae, batch)]
            for row in logged:
                log_row(*row)
            if self.peers.stepped(batches, [sae for sae, _, _ in logged]):
                bar.set_postfix_str(postfix(self.saes), refresh=False)
            fraction = self.stream.fraction
            self.at_step(fraction)
            bar.update(int(fraction * bar.total) - bar.n)
            self._report(fraction)
            self._agree()

    def _agree(self) -> None:
        """Between two steps, with nothing half done: go on, save, or stop. Raises `Stop`."""
        self.signals.check()
        word = self.peers.word(SAVE if self.peers.leads and self._due() else GO)
        if word == STOP:
            raise Stop(0)
        if word == SAVE:
            self.save_checkpoint()

    def _step(self, batches: dict[str, StreamBatch]) -> list[tuple[TrainingSAE, StepOutput, StreamBatch]]:
        """A step of every SAE whose hook has a batch."""

        def step(unit: TrainingSAE | Stack) -> list[tuple[TrainingSAE, StepOutput, StreamBatch]]:
            batch = batches[unit.hook]
            if isinstance(unit, TrainingSAE):
                return [(unit, train_step(unit, batch), batch)]
            return [(sae, output, batch) for sae, output in zip(unit.saes, unit.step(batch), strict=True)]

        done = self.stepper.map(step, [unit for unit in self.units if unit.hook in batches])
        return [each for unit in done for each in unit]

    def _due(self) -> bool:
        by_steps, by_time = self.train.checkpoint_steps, self.train.checkpoint_seconds
        return (by_steps is not None and self.step - self.saved_step >= by_steps) or (
            by_time is not None and time.monotonic() - self.saved_at >= by_time
        )

    def save_checkpoint(self) -> None:
        """Keep this moment. Never a diverged one; on a full disk the last good one stays and the run goes on."""
        raise_if_diverged(self.own)
        self.peers.gather()
        if self.progress.values["checkpoint_step"] == self.step:
            return
        try:
            self.save()
            self.progress.values["checkpoint_step"] = self.step
        except OSError as error:
            print(
                f"\nno checkpoint at step {self.step}: {error.strerror or error}; the last good one is kept",
                file=sys.stderr,
                flush=True,
            )
        self.saved_at, self.saved_step = time.monotonic(), self.step

    def _report(self, fraction: float) -> None:
        rows = int(self.stream.expected_rows)
        self.progress.update(
            fraction,
            step=self.step,
            tokens=max((sae.tokens for sae in self.saes), default=0),
            total_steps=rows // self.train.batch_size,
            total_tokens=rows,
            saes={
                sae.name: {"step": row.step, "loss": row.loss, "l0": row.l0, "variance_explained": row.variance_explained}
                for sae in self.saes
                for row in sae.curve[-1:]
            },
        )


# --- training curves ---------------------------------------------------------------------------


def row_is_due(sae: TrainingSAE, batch: StreamBatch) -> bool:
    """Whether the step on `batch` is one that an SAE's curve shows."""
    return int(batch.progress * CURVE_ROWS) > len(sae.curve) - 1


def log_row(sae: TrainingSAE, output: StepOutput, batch: StreamBatch) -> None:
    """Add a row to a sae's curve: its loss, and what is explained of plain activations. Raises `UserError` when its loss was
    not finite."""
    raise_if_diverged([sae])
    steps = sae.step - (sae.curve[-1].step if sae.curve else 0)
    sae.curve.append(
        CurveRow(sae.step, sae.tokens, float(sae.loss_sum) / steps, float(output.l0), variance_explained(sae, output, batch))
    )
    sae.loss_sum.zero_()


def variance_explained(sae: TrainingSAE, output: StepOutput, batch: StreamBatch) -> float:
    """The share of a batch's variance, of plain activations, that a step explained."""
    acts = sae.recipe.written(batch.acts)
    variance = (acts - acts.mean(0)).square().sum()
    residual = output.residual if sae.recipe.whitening is None else sae.recipe.whitening.undone(output.residual)
    return float(1 - residual.square().sum() / variance)


def raise_if_diverged(saes: Iterable[TrainingSAE]) -> None:
    for sae in saes:
        if int(sae.bad_step):
            raise UserError(
                f"train.saes.{sae.name}: the loss at step {int(sae.bad_step)} is not finite; lower "
                "its learning_rate, or set train.llm_dtype: float32 if activations overflow"
            )


def postfix(saes: Sequence[TrainingSAE]) -> str:
    """`name: loss 0.21 L0 32.0 VE 0.78` for each SAE, for the progress bar; the range of all where there are many."""
    rows = [(sae.name, row) for sae in saes for row in sae.curve[-1:]]
    if len(rows) > SAES_SHOWN:
        l0, explained = sorted(row.l0 for _, row in rows), sorted(row.variance_explained for _, row in rows)
        return f"{len(rows)} SAEs: L0 {l0[0]:.3g} to {l0[-1]:.3g}, VE {explained[0]:.3f} to {explained[-1]:.3f}"
    return " | ".join(f"{name}: loss {row.loss:.3g} L0 {row.l0:.3g} VE {row.variance_explained:.3f}" for name, row in rows)


# --- threads -----------------------------------------------------------------------------------


class ThreadPoolStepper:
    """Workers for so many items at a time; on a GPU, whose operations queue up, the calling thread alone."""

    def __init__(self, n_items: int, device: torch.device) -> None:
        self.threads = torch.get_num_threads()
        workers = min(self.threads, n_items) if device.type == "cpu" else 1
        self.each = self.threads // max(1, workers)
        self.pool = ThreadPoolExecutor(workers, "sae") if workers > 1 else None

    def map(self, function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """`function` of every item, in order; the first error, once all are done."""
        if self.pool is None:
            return [function(item) for item in items]

        def with_own_share(item: Item) -> Result:
            torch.set_num_threads(self.each)  # by every worker: torch holds part of it for each thread, part for all
            return function(item)

        futures = [self.pool.submit(with_own_share, item) for item in items]
        wait(futures)
        torch.set_num_threads(self.threads)
        return [future.result() for future in futures]

    def __enter__(self) -> ThreadPoolStepper:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.pool is not None:
            self.pool.shutdown()


# --- snapshots ---------------------------------------------------------------------------------

FOLDER = "checkpoints"
"""Below an SAE's own folder, where nothing looks for SAEs unasked."""


def snapshot_fractions(n: int) -> list[float]:
    """The start, and the last n - 1 of ..., 0.001, 10^-2.5, 0.01, 10^-1.5, 0.1, 10^-0.5 of the run."""
    return [0.0, *(10 ** (-k / 2) for k in range(n - 1, 0, -1))] if n else []


class Moments:
    """When SAEs are kept on the way; what a run that goes on has behind it, up to `resumed_at`, comes no more."""

    def __init__(self, n: int, resumed_at: float | None) -> None:
        self.left = [f for f in snapshot_fractions(n) if resumed_at is None or f > resumed_at]

    def come(self, fraction: float) -> bool:
        """Whether the run has just come past one."""
        left = [f for f in self.left if f > fraction]
        found, self.left = len(left) < len(self.left), left
        return found


class Snapshots:
    """Saves every sae's SAE below `folder` when a moment has come, once `gather` has brought them to where they stand;
    `resumed_at` of the run is done already."""

    def __init__(
        self,
        folder: Path,
        n: int,
        saes: list[TrainingSAE],
        export: Callable[[TrainingSAE], SparseAutoencoder],
        resumed_at: float | None,
        gather: Callable[[], None] = lambda: None,
    ) -> None:
        self.folder, self.saes, self.export, self.gather = folder, saes, export, gather
        self.moments = Moments(n, resumed_at)

    def at_step(self, fraction: float) -> dict[str, Path]:
        """Save if the run has just come past a moment; where each SAE lies then."""
        if not self.moments.come(fraction):
            return {}
        self.gather()
        saved = {sae.name: self.folder / sae.name / f"step_{sae.step}" for sae in self.saes}
        for sae in self.saes:
            save_sae(self.export(sae), saved[sae.name])
        return saved

    def move_into(self, output: Path) -> None:
        """Put what was saved, in this process or one before it, below each SAE's folder in `output`."""
        for sae in self.saes:
            if (self.folder / sae.name).is_dir():
                shutil.copytree(self.folder / sae.name, output / sae.name / FOLDER)


# --- signals -----------------------------------------------------------------------------------

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop(KeyboardInterrupt):
    """The run was asked to stop, and stands where it can: `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(f"signal {number}")
        self.number = number


class StopSignals:
    """Within this context the first signal raises `Stop` at once where nothing is being changed, else at `check`.

    A second one acts as it did before: somebody is in a hurry.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._deferred = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # others may not set handlers
            self._before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        self._hand_back()

    def _hand_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = number
        self._hand_back()
        if not self._deferred:
            raise Stop(number)

    def check(self) -> None:
        """Raises `Stop` if a signal came while stopping was deferred."""
        if self.received is not None:
            raise Stop(self.received)

    def carry_through(self) -> None:
        """From here on a first signal changes nothing: the rest is short, and leaves all done or all as it was."""
        self.check()
        self._deferred = True

    @contextmanager
    def deferred(self) -> Generator[None]:
        """A stretch in which state changes: a signal waits for the next `check`."""
        with self._set(True):
            yield

    @contextmanager
    def at_once(self) -> Generator[None]:
        """A stretch inside a deferred one that may be left at any point."""
        with self._set(False):
            self.check()
            yield

    @contextmanager
    def _set(self, deferred: bool) -> Generator[None]:
        before, self._deferred = self._deferred, deferred
        try:
            yield
        finally:
            self._deferred = before
