"""How a run starts, afresh or from a checkpoint, alone or as one rank of a group; and how it writes a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_research.config.params import Params, Train
from sae_research.config.recipes import SAERecipe
from sae_research.lm import LanguageModel, load_configured, pick_device
from sae_research.runtime.sources import sources_fingerprint
from sae_research.text.corpus import TRAINING, text_fingerprint
from sae_research.text.tokens import LongContexts, StoredContexts, contexts_sha256, long_contexts
from sae_research.training.checkpoints import Checkpoint, load_checkpoint, run_folder, save_checkpoint
from sae_research.training.group import Group
from sae_research.training.peers import Alone, Peers
from sae_research.training.products import has_bfloat16, pass_dtype
from sae_research.training.ranks import SharedStream, Together, owners
from sae_research.training.stream import ActivationStream
from sae_research.training.training_sae import TrainingSAE, new_training_sae, start


def load_model(params: Params) -> LanguageModel:
    """The language model as training runs it, in `train.llm_dtype` where the device has that."""
    return load_configured(params.model, dtype=pass_dtype(params.train.llm_dtype, pick_device(params.model.device)))


def training_text(params: Params, lm: LanguageModel) -> tuple[str, LongContexts]:
    """(fingerprint, contexts) of the text that SAEs are trained on. Raises as `long_contexts` does."""
    text = text_fingerprint(params.text, TRAINING)
    return text, long_contexts(
        lm.tokenizer, lm.separator_id, params.text, TRAINING, params.train.tokens, text, params.activation_caching.max_gb
    )


@dataclass
class Session:
    """One run of `params`, in one process."""

    stream: ActivationStream
    saes: list[TrainingSAE]
    """All; in ranks other than 0, those of this rank."""
    peers: Peers
    folder: Path
    identity: dict[str, Any]
    resumed_at: int | None
    """Step of the checkpoint this process started from."""

    def save(self) -> None:
        """Write a checkpoint. Raises `OSError` on a full disk; the last good one then stays."""
        values, tensors = self.stream.state()
        state: dict[str, Any] = {"stream": values, "saes": {}}
        everything = {f"stream/{key}": tensor for key, tensor in tensors.items()}
        for sae in self.saes:
            state["saes"][sae.name], own = sae.state()
            everything |= {f"{sae.name}/{key}": tensor for key, tensor in own.items()}
        step = max(sae.step for sae in self.saes)
        save_checkpoint(self.folder, Checkpoint(step, self.identity, state, everything))


def open_session(lm: LanguageModel, contexts: LongContexts, params: Params, group: Group | None = None) -> Session:
    """Start a run, or go on from its last good checkpoint, bit for bit where the device computes so. With a `group` every
    rank calls this.

    A checkpoint that was made with other weights, text or code is not used, and a line says so. It may be of another
    number of ranks.
    """
    device = lm.device if params.train.device is None or group is not None else pick_device(params.train.device)
    train = _train_settings(params, device)
    folder = run_folder(params)
    if group is None or group.number == 0:
        identity = _identity(lm, contexts.tokens, device, train.precision)
        checkpoint = load_checkpoint(folder, identity)
    else:
        identity, checkpoint = {}, None
    if group is None:
        stream = ActivationStream(lm, contexts.tokens, params, device, contexts.counted)
        saes = [_new_sae(name, train, stream, device) for name in params.train.saes]
        peers: Peers = Alone()
    else:
        stream = SharedStream(lm, contexts, params, device, group)
        owner = owners(params, group.size)
        saes = [
            _new_sae(name, train, stream, device if owner[name] == group.number else torch.device("cpu"))
            for name in params.train.saes
            if group.number in (0, owner[name])
        ]
        peers = Together(group, params, saes)
    step = _resume(checkpoint, stream, saes) if group is None else _resume_together(checkpoint, stream, saes, group, params)
    if step is None:
        rows = stream.calibrate()
        for sae in saes:
            if peers.owns(sae):
                start(sae, rows[sae.hook], training_seed(params.train.saes[sae.name], params))
    elif peers.leads:
        print(f"going on from the checkpoint of step {step}", flush=True)
    return Session(stream, saes, peers, folder, identity, step)


def training_seed(config: SAERecipe, params: Params) -> int:
    return params.random_seed if config.seed is None else config.seed


def _train_settings(params: Params, device: torch.device) -> Train:
    if params.train.precision == "bfloat16" and not has_bfloat16(device):
        print(f"train.precision: bfloat16 is no faster on this {device.type} device; products stay float32", flush=True)
        return params.train.model_copy(update={"precision": "float32"})
    return params.train


def _new_sae(name: str, train: Train, stream: ActivationStream, device: torch.device) -> TrainingSAE:
    return new_training_sae(name, train, stream.buffers[train.place_of(name)].d_in, device)


def _resume(checkpoint: Checkpoint | None, stream: ActivationStream, saes: list[TrainingSAE]) -> int | None:
    """Put stream and SAEs where a checkpoint says; its step."""
    if checkpoint is None:
        return None
    stream.restore(checkpoint.state["stream"], _below("stream", checkpoint.tensors))
    for sae in saes:
        sae.restore(checkpoint.state["saes"][sae.name], _below(sae.name, checkpoint.tensors))
    return checkpoint.step


def _resume_together(
    checkpoint: Checkpoint | None, stream: ActivationStream, saes: list[TrainingSAE], group: Group, params: Params
) -> int | None:
    """The same in every rank, of rank 0's checkpoint."""
    if group.number == 0:
        if checkpoint is None:
            group.share(None)
            return None
        stream_tensors = _below("stream", checkpoint.tensors)
        group.share([checkpoint.step, checkpoint.state["stream"]], stream_tensors)
        for name, rank in owners(params, group.size).items():
            if rank != 0:
                group.send(checkpoint.state["saes"][name], _below(name, checkpoint.tensors), rank)
        return _resume(checkpoint, stream, saes)
    found, stream_tensors = group.share()
    if found is None:
        return None
    step, values = found
    stream.restore(values, stream_tensors)
    own = {sae.name: sae for sae in saes}
    for name, rank in owners(params, group.size).items():
        if rank == group.number:
            own[name].restore(*group.receive(0))
    return step


def _below(name: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): tensor for key, tensor in tensors.items() if key.startswith(f"{name}/")}


def _identity(lm: LanguageModel, tokens: Tensor | StoredContexts, device: torch.device, precision: str) -> dict[str, str]:
    """What a run depends on besides its settings, under the words a user would use."""
    return {
        "language model": lm.fingerprint,
        "text": contexts_sha256(tokens),
        "training code": sources_fingerprint("sae_research.training.stage"),
        "version of torch": torch.__version__,
        "kind of device": f"{lm.device.type}, {device.type}, {lm.dtype}, {precision}",
    }
