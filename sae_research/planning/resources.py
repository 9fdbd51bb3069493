"""Disk and device memory that a run takes, and which parameter makes it fit."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from sae_research.config.params import Params
from sae_research.config.training import FLOAT_BYTES, STATE_COPIES
from sae_research.lm.shape import ModelShape
from sae_research.planning.saes import PlannedSAE
from sae_research.planning.work import Phase, sample_size
from sae_research.runtime.files import project_root
from sae_research.runtime.formatting import gigabytes
from sae_research.saes.base import OPEN_BYTES, ROOM

LOGIT_COPIES = 4
"""Of a batch's logits in float32 that are held at once: clean and patched, as log-probabilities, and what is computed."""
LATENT_COPIES = 6
"""Of a step's [batch, d_sae] in float32."""
PRECISION_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
HEADROOM = 0.9
"""Share of a device's memory that is counted on."""


def activation_cache_bytes(
    params: Params, stages: Iterable[Iterable[Phase]], widths: Mapping[str, int], dtype_bytes: int, d_sae: int
) -> float:
    """Of the activations that setup and these evaluations keep. widths: d_in by hook of the SAEs compared."""
    tokens = params.preflight.tokens + sum(phase.parts * phase.work.prefix for stage in stages for phase in stage)
    sample = sample_size(d_sae) if params.controls.names else 0
    return (sum(widths.values()) * tokens + sample * max(widths.values())) * dtype_bytes


class Need(NamedTuple):
    """Part of what a stage holds on its device."""

    what: str
    nbytes: float
    key: str = ""
    """The parameter that it grows with, empty where none does."""
    value: float = 0.0


def training_memory(shape: ModelShape, params: Params, saes: Iterable[PlannedSAE], devices: int = 1) -> list[Need]:
    """Of the device that holds most. devices: SAEs are dealt out to so many."""
    train, saes = params.train, list(saes)
    context = params.text.context_size
    states = sorted((sae.nbytes * (STATE_COPIES + 1) for sae in saes), reverse=True)
    mine = sum(states[:: max(devices, 1)])
    width = sum(shape.width(hook) for hook in train.hooks)
    batch = train.batch_size / train.accumulation_steps
    widest = max((sae.d_sae for sae in saes), default=0)
    pass_tokens = params.model.llm_batch_size * context
    return [
        _weights(shape, train.llm_dtype, "train.llm_dtype"),
        Need("SAEs, gradients and moments", mine, "train.saes", len(saes)),
        Need(
            "shuffled activations",
            width * max(train.buffer_tokens, 2 * train.batch_size) * FLOAT_BYTES,
            "train.buffer_tokens",
            train.buffer_tokens,
        ),
        Need("a step", LATENT_COPIES * batch * widest * FLOAT_BYTES, "train.batch_size", train.batch_size),
        _model_pass(shape, pass_tokens, PRECISION_BYTES[train.llm_dtype], params),
    ]


def evaluation_memory(evaluation: str, shape: ModelShape, params: Params, saes: Iterable[PlannedSAE]) -> list[Need]:
    """Of one worker."""
    saes, context = list(saes), params.text.context_size
    itemsize = PRECISION_BYTES[params.model.torch_dtype]
    sequences, key = params.model.llm_batch_size, "model.llm_batch_size"
    if evaluation == "core":
        sequences, key = params.core_eval.batch_size_prompts, "core_eval.batch_size_prompts"
    largest = max(saes, key=lambda sae: sae.nbytes, default=None)
    opened = 0.0 if largest is None else max(min(OPEN_BYTES, sum(sae.nbytes for sae in saes)), ROOM * largest.nbytes)
    needs = [
        _weights(shape, params.model.torch_dtype, "model.torch_dtype"),
        Need("SAEs that are open together", opened),
        _model_pass(shape, params.model.llm_batch_size * context, itemsize, params),
    ]
    if largest is not None:
        latents = 2 * sequences * context * largest.d_sae * FLOAT_BYTES
        needs.append(Need("latents of a batch", latents, key, sequences))
    if evaluation in ("core", "unlearning", "ravel"):
        logits = LOGIT_COPIES * sequences * context * shape.vocab_size * FLOAT_BYTES
        needs.append(Need("logits of a batch", logits, key, sequences))
    return needs


def _weights(shape: ModelShape, dtype: str, key: str) -> Need:
    return Need("language model", shape.parameters * PRECISION_BYTES[dtype], key, PRECISION_BYTES[dtype])


def _model_pass(shape: ModelShape, tokens: int, itemsize: int, params: Params) -> Need:
    """A layer's activations; the widest is the MLP's."""
    wide = max(shape.layer_matrices / shape.d_model, 4 * shape.d_model)
    return Need("a pass of the model", tokens * wide * itemsize, "model.llm_batch_size", params.model.llm_batch_size)


def what_fits(needs: list[Need], memory: float, devices: int = 1) -> str:
    """Empty where `needs` fit into `memory` bytes; else which parameter would make them fit."""
    room = HEADROOM * memory
    excess = sum(need.nbytes for need in needs) - room
    if excess <= 0:
        return ""
    for need in sorted(needs, key=lambda need: -need.nbytes):
        if need.nbytes > excess and (mend := _mend(need, excess, devices)):
            return mend
    largest = max(needs, key=lambda need: need.nbytes)
    return f"no one parameter is enough; {largest.what} alone takes {largest.nbytes / 1e9:.3g} GB"


def _mend(need: Need, excess: float, devices: int) -> str:
    share = 1 - excess / need.nbytes
    if need.key.endswith("dtype"):
        return f"{need.key}: bfloat16 would fit" if need.value * share >= PRECISION_BYTES["bfloat16"] else ""
    if need.key == "train.saes":
        return f"--gpus {max(devices + 1, round(devices / share + 0.5))}, or fewer SAEs in train.saes, would fit"
    if need.key == "train.batch_size":
        return f"train.accumulation_steps: {round(1 / share + 0.5)} would fit"
    largest = int(need.value * share)
    return f"{need.key}: {largest} (it is {need.value:g}) would fit" if need.key and largest else ""


def cache_lines(needed: float, params: Params) -> list[str]:
    """The activation cache's size in words, needed in bytes, and a warning where the disk or the limit does not hold it."""
    free, limit = shutil.disk_usage(project_root()).free, params.activation_caching.max_gb * 1e9
    lines = [f"activation cache: about {gigabytes(needed)} (limit {gigabytes(limit)}, {gigabytes(free)} free)"]
    if needed > free:
        lines.append("warning: the disk has less room than that; make room or set activation_caching.enabled: false")
    elif needed > limit:
        lines.append("warning: activation_caching.max_gb is smaller than that; activations will be computed more than once")
    return lines
