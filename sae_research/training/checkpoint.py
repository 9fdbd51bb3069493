"""Checkpoints of a run: `.cache/train/<run key>/checkpoint_<step>/`, tensors as safetensors, all else as JSON.

A checkpoint appears whole or not at all, and the one before it goes only then. Those of runs that nobody goes on with
are kept up to a size.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from sae_research.errors import UserError
from sae_research.folders import remove_leftovers, replaced_folder
from sae_research.store import file_sha256, read_json, write_json
from sae_research.store_cache import held, prune

STATE_FILE, TENSORS_FILE = "state.json", "tensors.safetensors"
_NAME = re.compile(r"^checkpoint_(\d+)$")


class Checkpoint(NamedTuple):
    step: int
    identity: dict[str, Any]
    """What the run depends on that its settings do not say: weights, text, code, versions."""
    state: dict[str, Any]
    tensors: dict[str, Tensor]


@contextmanager
def in_use(folder: Path, max_gb: float) -> Iterator[None]:
    """Hold a run's folder during the block, for nobody to remove, and first make room beside it: of runs that ended
    early, those that were at work longest ago go until no more than `max_gb` gigabytes are left. Says so in a line."""
    with held(folder):
        finished = [run for run in folder.parent.iterdir() if not any(path.is_dir() for path in run.glob("*"))]
        removed = prune(folder.parent, max_gb, keep=[folder, *finished])
        if removed:
            print(f"removed the checkpoints of {len(removed)} unfinished run{'s' * (len(removed) > 1)}: .cache/train held "
                  f"more than {max_gb:g} GB (activation_caching.max_gb)", flush=True)
        yield


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write it, then delete older ones. Raises `OSError` on a full disk; the last good checkpoint then stays."""
    target = folder / f"checkpoint_{checkpoint.step}"
    with replaced_folder(target) as temporary:  # it may replace one that was passed over: damaged, or of other code
        _write_tensors(temporary / TENSORS_FILE, checkpoint.tensors)
        write_json(temporary / STATE_FILE, {
            "identity": checkpoint.identity, "state": checkpoint.state,
            "sha256": file_sha256(temporary / TENSORS_FILE)})
    for _, other in saved_checkpoints(folder):
        if other != target:
            shutil.rmtree(other, ignore_errors=True)  # one that cannot go now goes with the next


def saved_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, folder) of a run's checkpoints, the newest first."""
    found = [(int(match[1]), path) for path in folder.glob("checkpoint_*") if (match := _NAME.match(path.name))]
    return sorted(found, reverse=True)


def load_checkpoint(folder: Path, identity: dict[str, Any]) -> Checkpoint | None:
    """The newest checkpoint of a run that is whole and of the same `identity`; says in a line why one is passed over.

    What a killed run left half written is deleted.
    """
    remove_leftovers(folder)
    for step, path in saved_checkpoints(folder):
        try:
            written = read_json(path / STATE_FILE)
            if file_sha256(path / TENSORS_FILE) != written["sha256"]:
                raise UserError(f"{TENSORS_FILE} is not what was written")
            tensors = safetensors.torch.load_file(path / TENSORS_FILE)
        except (UserError, SafetensorError, KeyError, TypeError) as error:
            print(f"the checkpoint of step {step} is damaged and not used ({error}): {path}", flush=True)
            continue
        changed = [key for key, value in identity.items() if written["identity"].get(key) != value]
        if changed:
            print(f"the checkpoint of step {step} is not used: it was made with another {', '.join(changed)}", flush=True)
            continue
        return Checkpoint(step, identity, written["state"], tensors)
    return None


def remove_checkpoints(folder: Path) -> None:
    """The run is over and its SAEs are in place."""
    for _, path in saved_checkpoints(folder):
        shutil.rmtree(path)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Raises `OSError` where safetensors wraps one."""
    try:
        safetensors.torch.save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
    except SafetensorError as error:
        full = [number for number in (errno.ENOSPC, errno.EDQUOT) if f"os error {number}" in str(error)]
        if full:
            raise OSError(full[0], os.strerror(full[0]), str(path)) from None
        raise
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
