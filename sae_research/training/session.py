"""What a run consists of, fresh or from its checkpoint: a stream, the SAEs in training, and how to keep them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_research.lm import LanguageModel, pick_device
from sae_research.params import Params
from sae_research.precision import has_bfloat16
from sae_research.recipe_params import SAERecipe
from sae_research.sources import sources_fingerprint
from sae_research.text.stored import StoredContexts, contexts_sha256
from sae_research.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from sae_research.training.member import Member, make_member, start
from sae_research.training.progress import run_folder
from sae_research.training.stream import ActivationStream


@dataclass
class Session:
    """One run of `params`."""

    stream: ActivationStream
    members: list[Member]
    folder: Path
    identity: dict[str, Any]
    resumed_at: int | None
    """Step of the checkpoint this process started from."""

    def save(self) -> None:
        """Write a checkpoint. Raises `OSError` on a full disk; the last good one then stays."""
        values, tensors = self.stream.state()
        state: dict[str, Any] = {"stream": values, "members": {}}
        everything = {f"stream/{key}": tensor for key, tensor in tensors.items()}
        for member in self.members:
            state["members"][member.name], own = member.state()
            everything |= {f"{member.name}/{key}": tensor for key, tensor in own.items()}
        step = max(member.step for member in self.members)
        save_checkpoint(self.folder, Checkpoint(step, self.identity, state, everything))


def open_session(lm: LanguageModel, tokens: Tensor | StoredContexts, params: Params) -> Session:
    """Start a run, or go on from its last good checkpoint, bit for bit where the device computes so.

    tokens: contexts [n, context_size]. A checkpoint that was made with other weights, text or code is not used, and a
    line says so.
    """
    device = lm.device if params.train.device is None else pick_device(params.train.device)
    if params.train.precision == "bfloat16" and not has_bfloat16(device):
        print(f"train.precision: bfloat16 is no faster on this {device.type} device; products stay float32", flush=True)
        train = params.train.model_copy(update={"precision": "float32"})
    else:
        train = params.train
    stream = ActivationStream(lm, tokens, params, device)
    members = [make_member(name, train, stream.buffers[params.train.hook_of(name)].d_in, device)
               for name in params.train.saes]
    folder, identity = run_folder(params), _identity(lm, tokens, device, train.precision)
    checkpoint = load_checkpoint(folder, identity)
    if checkpoint is None:
        rows = stream.calibrate()
        for member in members:
            start(member, rows[member.hook], training_seed(params.train.saes[member.name], params))
        return Session(stream, members, folder, identity, None)
    stream.restore(checkpoint.state["stream"], _below("stream", checkpoint.tensors))
    for member in members:
        member.restore(checkpoint.state["members"][member.name], _below(member.name, checkpoint.tensors))
    print(f"going on from the checkpoint of step {checkpoint.step}", flush=True)
    return Session(stream, members, folder, identity, checkpoint.step)


def training_seed(config: SAERecipe, params: Params) -> int:
    return params.random_seed if config.seed is None else config.seed


def _below(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}


def _identity(lm: LanguageModel, tokens: Tensor | StoredContexts, device: torch.device, precision: str) -> dict[str, str]:
    """What a run depends on besides its settings, under the words a user would use."""
    return {
        "language model": lm.fingerprint,
        "text": contexts_sha256(tokens),
        "training code": sources_fingerprint("sae_research.training.run"),
        "version of torch": torch.__version__,
        "kind of device": f"{lm.device.type}, {device.type}, {lm.dtype}, {precision}",
    }
