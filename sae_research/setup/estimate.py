"""How long the evaluations will take here and how much disk they want: for the screen, never for files."""

from __future__ import annotations

import shutil
import time

import torch

from sae_research.evaluated import Evaluated
from sae_research.lm import LanguageModel
from sae_research.params import Params
from sae_research.saes import SparseAutoencoder
from sae_research.setup.controls import sample_size
from sae_research.store import project_root

TIMED_CONTEXTS = 2
PROBING_CLASSES = 4
"""Texts of a probing data set come from several classes; about this many on average."""


def model_seconds(lm: LanguageModel, hook: str, context_size: int) -> tuple[float, float]:
    """Seconds per token of a pass up to `hook` and of a full pass, each after a short warm-up."""
    tokens = (
        torch.arange(TIMED_CONTEXTS * context_size, device=lm.device).reshape(TIMED_CONTEXTS, -1)
        % lm.vocab_size
    )
    lm.activations(tokens[:1, :8], hook)
    times = []
    for run in (lambda: lm.activations(tokens, hook), lambda: lm.logits(tokens)):
        start = time.perf_counter()
        float(run().flatten()[0])  # reading a value waits for the device
        times.append((time.perf_counter() - start) / tokens.numel())
    return times[0], max(times)


def evaluation_tokens(params: Params) -> dict[str, tuple[int, int]]:
    """(tokens to encode, tokens to run with each SAE patched in) of every enabled evaluation that can be
    foretold."""
    core, probing = params.core_eval, params.sparse_probing
    found = {}
    if params.eval_types.core:
        batch = core.batch_size_prompts * params.text.context_size
        found["core"] = (
            core.n_eval_sparsity_variance_batches * batch,
            core.n_eval_reconstruction_batches * batch,
        )
    if params.eval_types.sparse_probing:
        texts = (probing.probe_train_set_size + probing.probe_test_set_size) // 2 * PROBING_CLASSES
        found["sparse_probing"] = (len(probing.dataset_names) * texts * probing.context_length, 0)
    return found


def time_lines(
    params: Params, lm: LanguageModel, hook: str, saes: dict[str, SparseAutoencoder], seconds_per_token: dict[str, float]
) -> list[str]:
    """One line per evaluation: the time it will take, at the speeds just measured, less what is in the cache."""
    prefix, full = model_seconds(lm, hook, params.text.context_size)
    tokens = evaluation_tokens(params)
    lines = []
    for name, (encoded, patched) in tokens.items():
        notes = Evaluated(name, lm, params)
        parts = params.sparse_probing.dataset_names if name == "sparse_probing" else [name]
        left = [[sae for sae in saes if not notes.has(saes[sae], part)] for part in parts]
        seconds = 0.0
        for todo in left:
            if todo:
                encoding = prefix + sum(seconds_per_token[sae] for sae in todo)
                # the clean pass, then from the hook on once per SAE and twice for the ablations
                seconds += encoded / len(parts) * encoding + patched * (full + (full - prefix) * (len(todo) + 2))
        lines.append(f"{name}: {_amount(seconds, left, len(saes), encoded)}")
    rest = [name for name, on in params.eval_types.model_dump().items() if on and name not in tokens]
    return lines + ([f"{', '.join(rest)}: not estimated"] if rest else [])


def _amount(seconds: float, left: list[list[str]], n_saes: int, tokens: int) -> str:
    """left: by part, the SAEs that are still to be scored on it."""
    n_left = len({sae for todo in left for sae in todo})
    if not n_left:
        return f"all {n_saes} SAEs are in the cache"
    lacking = sum(map(len, left))
    cached = "" if lacking == n_saes * len(left) else f"; {1 - lacking / (n_saes * len(left)):.0%} is in the cache"
    return f"up to {_duration(seconds)} for {n_left} SAEs on {tokens:,} tokens{cached}"


def disk_lines(
    params: Params, lm: LanguageModel, saes: dict[str, SparseAutoencoder], d_sae: int
) -> list[str]:
    """The activation cache's size, and a warning where the disk or the limit does not hold it."""
    if not params.activation_caching.enabled:
        return ["activation cache: off"]
    tokens = sum(encoded for encoded, _ in evaluation_tokens(params).values()) + params.preflight.tokens
    sample = sample_size(d_sae) if params.controls.names else 0
    widths = {sae.cfg.hook_name: sae.cfg.d_in for sae in saes.values()}
    width = torch.empty(0, dtype=lm.dtype).element_size()
    needed = sum(widths.values()) * tokens * width + sample * max(widths.values()) * width
    free, limit = shutil.disk_usage(project_root()).free, params.activation_caching.max_gb * 1e9
    lines = [f"activation cache: about {needed / 1e9:.2f} GB (limit {limit / 1e9:g} GB, {free / 1e9:.0f} GB "
             f"free)"]
    if needed > free:
        lines.append("warning: the disk has less room than that; make room or set "
                     "activation_caching.enabled: false")
    elif needed > limit:
        lines.append("warning: activation_caching.max_gb is smaller than that; activations will be computed "
                     "more than once")
    return lines


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
