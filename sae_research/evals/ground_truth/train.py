"""Every recipe on synthetic activations, by the project's own trainer: the stream is another, the steps are the same.

A seed is a hook: its SAEs read its world's batches, and all seeds' SAEs step side by side. What is trained is kept by the
content of what shaped it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from sae_research.cached_files import new_entry, usable
from sae_research.evals.ground_truth.data import World
from sae_research.ground_truth_params import GridPoint, GroundTruth
from sae_research.saes import SAEConfig, SparseAutoencoder, load_sae, save_sae
from sae_research.saes.registry import code_fingerprint
from sae_research.store import fingerprint
from sae_research.store_cache import cache_dir, caches_readable
from sae_research.train_params import Train
from sae_research.training.member import make_member, start
from sae_research.training.progress import PROGRESS_FILE, ProgressFile
from sae_research.training.signals import StopSignals
from sae_research.training.stream import StreamBatch
from sae_research.training.trainer import Trainer

CHUNK = 8192
"""Samples of a world drawn at a time."""


class Planned(NamedTuple):
    """One SAE to train: a point of the grid in the world of a seed."""

    seed: int
    point: GridPoint

    @property
    def hook(self) -> str:
        return hook_of(self.seed)

    @property
    def name(self) -> str:
        return f"{self.hook}_{self.point.name}"


def hook_of(seed: int) -> str:
    return f"seed_{seed}"


class SyntheticStream:
    """A `training.stream.Stream` of worlds, one under each hook: fresh samples, never the same twice."""

    def __init__(self, worlds: Mapping[str, World], samples: int, batch_size: int) -> None:
        self.worlds, self.batch_size = worlds, batch_size
        self.steps = samples // batch_size
        self.n_tokens, self.next_chunk, self.served = self.steps * batch_size, 0, 0
        self.chunk = max(batch_size, CHUNK // batch_size * batch_size)
        self.scale: dict[str, float] = {}
        self.waiting: dict[str, Tensor] = {}
        self.device = next(iter(worlds.values())).device

    @property
    def n_chunks(self) -> int:
        return -(-self.n_tokens // self.chunk)

    @property
    def fraction(self) -> float:
        return self.served / self.steps

    @property
    def expected_rows(self) -> float:
        return self.n_tokens

    def calibrate(self) -> dict[str, Tensor]:
        """Measure the factor of normalisation of every world; returns normalised rows [n, d_in] to start SAEs from."""
        rows = {hook: world.activations(self.chunk, "start") for hook, world in self.worlds.items()}
        self.scale = {hook: float(x_ND.square().sum(1).mean()) ** -0.5 for hook, x_ND in rows.items()}
        return {hook: x_ND * self.scale[hook] for hook, x_ND in rows.items()}

    def read(self, chunk: int) -> dict[str, Tensor]:
        n = min(self.chunk, self.n_tokens - chunk * self.chunk)
        return {hook: world.activations(n, "train", chunk) for hook, world in self.worlds.items()}

    def feed(self, acts: dict[str, Tensor]) -> None:
        self.waiting = {hook: x_ND * self.scale[hook] for hook, x_ND in acts.items()}
        self.next_chunk += 1

    def finish(self) -> None:
        self.next_chunk = self.n_chunks + 1

    def rounds(self) -> Iterator[dict[str, StreamBatch]]:
        waiting, self.waiting = self.waiting, {}
        if not waiting:
            return
        for parts in zip(*(x_ND.split(self.batch_size) for x_ND in waiting.values()), strict=True):
            progress = (self.served + 0.5) / self.steps
            self.served += 1
            yield {hook: StreamBatch(x_BD, progress) for hook, x_BD in zip(waiting, parts, strict=True)}


def train_all(planned: Sequence[Planned], worlds: Mapping[int, World], settings: GroundTruth,
              seed: int) -> dict[Planned, SparseAutoencoder]:
    """Every planned SAE, in its world's own units, from the cache where it was trained before."""
    keys = {item: _key(item, worlds[item.seed], settings, seed) for item in planned}
    folder = cache_dir("ground_truth")
    device = next(iter(worlds.values())).device
    found = {item: load_sae(folder / keys[item]).to(device) for item in planned
             if caches_readable() and usable(folder / keys[item])}
    missing = [item for item in planned if item not in found]
    for item, sae in (_train(missing, worlds, settings, seed, folder) if missing else {}).items():
        with new_entry(folder / keys[item]) as entry:
            save_sae(sae, entry)
        found[item] = sae.to(device)
    return {item: found[item] for item in planned}


def _key(item: Planned, world: World, settings: GroundTruth, seed: int) -> str:
    return fingerprint({
        "sae": item.point.settings.model_dump(), "name": item.name, "world": world.fingerprint, "seed": seed,
        "samples": settings.samples, "batch_size": settings.batch_size, "code": code_fingerprint(__name__)})[:40]


def _train(planned: Sequence[Planned], worlds: Mapping[int, World], settings: GroundTruth, seed: int,
           folder: Path) -> dict[Planned, SparseAutoencoder]:
    saes = {item.name: item.point.settings.model_copy(update={"hook_name": item.hook}) for item in planned}
    train = Train(tokens=settings.samples, batch_size=settings.batch_size, checkpoint_seconds=None, saes=saes)
    here = {hook_of(number): world for number, world in worlds.items() if hook_of(number) in train.hooks}
    stream = SyntheticStream(here, settings.samples, settings.batch_size)
    rows = stream.calibrate()
    members = [make_member(name, train, rows[train.hook_of(name)].shape[1], stream.device) for name in saes]
    for member in members:
        start(member, rows[member.hook], seed)
    progress = ProgressFile(folder / PROGRESS_FILE, str(stream.device))
    Trainer(stream, members, train, progress, StopSignals(), lambda: None).run()
    progress.end("finished")
    by_name = {member.name: member for member in members}
    return {item: by_name[item.name].recipe.export(
        stream.scale[item.hook], _config(item, rows[item.hook].shape[1])) for item in planned}


def _config(item: Planned, d_in: int) -> SAEConfig:
    config: dict[str, Any] = item.point.settings.model_dump(exclude_none=True, exclude={"hook_name"})
    return SAEConfig(form="", d_in=d_in, d_sae=item.point.settings.d_sae, model_name="synthetic",
                     architecture=item.point.settings.recipe,
                     provenance={"source": "ground_truth", "seed": item.seed, "hyper_parameters": config})
