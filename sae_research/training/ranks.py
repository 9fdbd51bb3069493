"""One stream, many SAEs, several devices: what a rank of a group does otherwise than a process alone.

Chunk i of the text goes through the language model of rank i mod W. The activations that count reach all ranks, chunk by
chunk in the order of the text, and every rank shuffles them alike, so that batches are those of one process. Each rank takes
the steps of the SAEs that it owns. No gradient travels. Rank 0 holds the other SAEs on the CPU, and brings them up to date
where a checkpoint, a snapshot or the end of the run needs them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae_research.config.params import Params
from sae_research.lm import LanguageModel, pick_device
from sae_research.runtime.errors import UserError
from sae_research.text.tokens import LongContexts, StoredContexts
from sae_research.training.buffer import Calibration, StreamBatch
from sae_research.training.group import Group, OtherRanks
from sae_research.training.loop import row_is_due
from sae_research.training.peers import STOP
from sae_research.training.stream import ActivationStream
from sae_research.training.training_sae import CurveRow, TrainingSAE


def number_of_ranks(params: Params) -> int:
    """Processes that train. Raises `UserError` where there cannot be as many as `cluster.train_ranks` says."""
    asked, train = params.cluster.train_ranks, params.train
    devices = [pick_device(params.model.device), pick_device(train.device or params.model.device)]
    kind, spread = devices[0].type, devices[0].type == "cuda" and params.model.placement == "auto"
    free = devices[0] == devices[1] and devices[0].index is None and not spread
    if params.model.device == "auto" and devices[0].index is not None:  # a sweep gave this run one of the GPUs
        return 1
    if asked is None:
        return max(1, torch.cuda.device_count()) if params.cluster.address and free and kind == "cuda" else 1
    if asked == 1:
        return 1
    if not free:
        raise UserError(
            f"cluster.train_ranks: {asked} ranks have a device each, for the model and their SAEs; set train.device: null, "
            "model.placement: one and a model.device without a number, or cluster.train_ranks: 1"
        )
    if kind == "mps" or (kind == "cuda" and asked > torch.cuda.device_count()):
        count = torch.cuda.device_count() if kind == "cuda" else 1
        raise UserError(f"cluster.train_ranks: {asked} ranks need as many GPUs, this machine has {count}")
    return asked


def device_of_rank(kind: str, rank: int) -> str:
    return f"{kind}:{rank}" if kind == "cuda" else kind


def other_ranks(module: str, params: Params, size: int, dtype: str) -> OtherRanks:
    """Start ranks 1 to size - 1 in a module's `main`. dtype: of the language model's pass. They load the model while rank 0
    does."""
    kind = pick_device(params.model.device).type
    task = {"params": params.model_dump(mode="json"), "kind": kind, "dtype": dtype}
    return OtherRanks(module, size, torch.device(device_of_rank(kind, 0)), params.cluster.cpus_per_worker, task)


def owners(params: Params, size: int) -> dict[str, int]:
    """The rank that trains each SAE: the widest first, each to the rank with the fewest latents so far."""
    load, found = [0] * size, {}
    for name, config in sorted(params.train.saes.items(), key=lambda item: -item[1].d_sae):
        found[name] = min(range(size), key=lambda rank: load[rank])
        load[found[name]] += config.d_sae
    return found


def shared_contexts(group: Group, contexts: LongContexts | None) -> LongContexts:
    """Rank 0's contexts, in all ranks: read from the same files where they are in some."""
    if contexts is not None and isinstance(contexts.tokens, StoredContexts):
        files = [part for part in contexts if isinstance(part, StoredContexts)]
        group.share([[str(file.path), list(file.shape), file.stored.str] for file in files])
        return contexts
    mine = {} if contexts is None else {key: part for key, part in contexts._asdict().items() if isinstance(part, Tensor)}
    about, tensors = group.share(None, mine)
    if about is None:
        return LongContexts(tensors["tokens"], tensors.get("counted"))
    return LongContexts(*(StoredContexts(Path(path), *shape, np.dtype(stored)) for path, shape, stored in about))


class SharedStream(ActivationStream):
    """The stream of `ActivationStream`, whose chunks the ranks read in turn."""

    def __init__(
        self, lm: LanguageModel, contexts: LongContexts, params: Params, device: torch.device, group: Group
    ) -> None:
        super().__init__(lm, contexts.tokens, params, device, contexts.counted)
        self.group = group
        for buffer in self.buffers.values():
            buffer.follow_pca = group.number == 0
        self._own: tuple[int, dict[str, Tensor]] | None = None
        """The chunk that this rank has read, and its counted activations by hook."""

    def calibrate(self) -> dict[str, Tensor]:
        """As measured by rank 0; returns normalised rows [n, d_in] by hook."""
        rows = super().calibrate() if self.group.number == 0 else dict.fromkeys(self.buffers)
        measured, _ = self.group.share(
            {hook: list(b.calibration) for hook, b in self.buffers.items() if rows[hook] is not None}
        )
        for hook, buffer in self.buffers.items():
            buffer.calibration = Calibration(*measured[hook])
        return {
            hook: self.group.share_rows(rows[hook], buffer.width, torch.float32, 0) for hook, buffer in self.buffers.items()
        }

    def read(self, chunk: int) -> dict[str, Tensor]:
        """Read this rank's chunk of the W that `chunk` belongs to, where that is still to come. Returns what was read now,
        the activations that count [n, d_in] by hook; `feed` has it anyway."""
        own = chunk // self.group.size * self.group.size + self.group.number
        if not chunk <= own < self.n_chunks or (self._own is not None and self._own[0] == own):
            return {}
        acts, tokens, of_roles = super().read(own), self._chunk_tokens(own), self._chunk_counted(own)
        rows = {hook: buffer.counted(tokens, acts[hook], of_roles) for hook, buffer in self.buffers.items()}
        self._own = own, rows
        return rows

    def feed(self, acts: dict[str, Tensor]) -> None:
        """Take in the next chunk, from the rank that has read it."""
        source = self.next_chunk % self.group.size
        read = self._own[1] if self._own is not None and self._own[0] == self.next_chunk else dict.fromkeys(self.buffers)
        n_tokens = self._chunk_tokens(self.next_chunk).numel()
        for hook, buffer in self.buffers.items():
            buffer.take(n_tokens, self.group.share_rows(read[hook], buffer.width, self.lm.dtype, source))
        self.next_chunk += 1
        self._first = None


class Together:
    """The ranks of a group in the training loop.

    saes: of rank 0 all, of another those it owns.
    """

    def __init__(self, group: Group, params: Params, saes: list[TrainingSAE]) -> None:
        self.group, self.owner, self.saes = group, owners(params, group.size), saes
        self.leads = group.number == 0
        self.lent = [sae for sae in saes if not self.owns(sae)]
        """In rank 0, the SAEs of the others."""

    def owns(self, sae: TrainingSAE) -> bool:
        return self.owner[sae.name] == self.group.number

    def word(self, word: int) -> int:
        return self.group.share_number(word)

    def stop(self) -> None:
        if self.leads:
            self.group.share_number(STOP)

    def stepped(self, batches: dict[str, StreamBatch], logged: list[TrainingSAE]) -> bool:
        if not self.leads:
            if logged:
                self.group.send({sae.name: list(sae.curve[-1]) for sae in logged}, {}, 0)
            return bool(logged)
        from_ranks = set()
        for sae in self.lent:
            if sae.hook in batches:
                if row_is_due(sae, batches[sae.hook]):
                    from_ranks.add(self.owner[sae.name])
                sae.step += 1
                sae.tokens += len(batches[sae.hook].acts)
        rows: dict[str, Any] = {}
        for rank in sorted(from_ranks):
            rows |= self.group.receive(rank)[0]
        for sae in self.lent:
            if sae.name in rows:
                sae.curve.append(CurveRow(*rows[sae.name]))
        return bool(logged or rows)

    def gather(self) -> None:
        if not self.leads:
            for sae in self.saes:
                self.group.send(*sae.state(), 0)
        for sae in self.lent:
            sae.restore(*self.group.receive(self.owner[sae.name]))
