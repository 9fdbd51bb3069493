"""Checkpoints of a run: `.cache/train/<run key>/checkpoint_<step>/`, tensors as safetensors, all else as JSON.

A checkpoint appears whole or not at all, and the one before it goes only then. Those of runs that nobody goes on with
are kept up to a size.

Beside them `progress.json` says how far a run is. Nothing here imports torch at the top: a monitor that reads it must start
in a fraction of a second.
"""

from __future__ import annotations

import errno
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError

from sae_research.config.params import Params
from sae_research.runtime.cache import cache_dir, held, prune
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import (
    file_sha256,
    fingerprint,
    read_json,
    remove_leftovers,
    replaced_folder,
    round_significant,
    write_json,
)

if TYPE_CHECKING:
    from torch import Tensor

STATE_FILE, TENSORS_FILE = "state.json", "tensors.safetensors"
_NAME = re.compile(r"^checkpoint_(\d+)$")


class Checkpoint(NamedTuple):
    step: int
    identity: dict[str, Any]
    """What the run depends on that its settings do not say: weights, text, code, versions."""
    state: dict[str, Any]
    tensors: dict[str, Tensor]


@contextmanager
def in_use(folder: Path, max_gb: float) -> Generator[None]:
    """Hold a run's folder during the block, for nobody to remove, and first make room beside it: of runs that ended
    early, those that were at work longest ago go until no more than `max_gb` gigabytes are left. Says so in a line."""
    with held(folder):
        finished = [run for run in folder.parent.iterdir() if not any(path.is_dir() for path in run.glob("*"))]
        removed = prune(folder.parent, max_gb, keep=[folder, *finished])
        if removed:
            print(
                f"removed the checkpoints of {len(removed)} unfinished run{'s' * (len(removed) > 1)}: .cache/train held "
                f"more than {max_gb:g} GB (activation_caching.max_gb)",
                flush=True,
            )
        yield


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write it, then delete older ones. Raises `OSError` on a full disk; the last good checkpoint then stays."""
    target = folder / f"checkpoint_{checkpoint.step}"
    with replaced_folder(target) as temporary:  # it may replace one that was passed over: damaged, or of other code
        _write_tensors(temporary / TENSORS_FILE, checkpoint.tensors)
        write_json(
            temporary / STATE_FILE,
            {"identity": checkpoint.identity, "state": checkpoint.state, "sha256": file_sha256(temporary / TENSORS_FILE)},
        )
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
    from safetensors.torch import load_file

    remove_leftovers(folder)
    for step, path in saved_checkpoints(folder):
        try:
            written = read_json(path / STATE_FILE)
            if file_sha256(path / TENSORS_FILE) != written["sha256"]:
                raise UserError(f"{TENSORS_FILE} is not what was written")
            tensors = load_file(path / TENSORS_FILE)
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
    from safetensors.torch import save_file

    try:
        save_file({key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, path)
    except SafetensorError as error:
        full = [number for number in (errno.ENOSPC, errno.EDQUOT) if f"os error {number}" in str(error)]
        if full:
            raise OSError(full[0], os.strerror(full[0]), str(path)) from None
        raise
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


PROGRESS_FILE = "progress.json"
SECONDS_BETWEEN_WRITES = 1.0
OPERATIONAL = frozenset({"enabled", "checkpoint_seconds", "checkpoint_steps", "evaluate_tokens"})
"""Keys of `train` that change nothing about the SAEs that come out."""
_ELSEWHERE = OPERATIONAL | {"held_out_tokens", "hook_name", "learning_rate", "device", "saes"}
"""Keys of `train` that are not in a run's name: they change no weight, or stand in it as what they come to."""


def run_key(params: Params) -> str:
    """Name of a run: every setting that changes a bit of its weights, as what it comes to for each SAE. [32 hex digits]

    What only decides how SAEs are measured, saved or watched is not in it, nor on which of several like devices they are
    trained. Of how trained SAEs are written, `inference` is in it only with `saved_checkpoints`, which are of one kind.
    Code, weights of the language model and text are not in it; a checkpoint notes those and is refused where they differ.
    """
    train, model = params.train, params.model
    written = set() if train.saved_checkpoints else {"inference"}
    return fingerprint(
        {
            "model": model.model_dump(include={"name", "llm_batch_size"}),
            "devices": [_kind(device) for device in (model.device, train.device or model.device)],
            "text": params.text.model_dump(),
            "token_mask": params.token_mask.model_dump(),
            "train": train.model_dump(exclude=set(_ELSEWHERE)),
            "saes": {
                name: {
                    **config.model_dump(exclude=written),
                    "hook_name": train.hook_of(name),
                    "seed": params.random_seed if config.seed is None else config.seed,
                }
                for name, config in train.saes.items()
            },
            "random_seed": params.random_seed,
        }
    )[:32]


def _kind(device: str) -> str:
    """`cuda:1` -> `cuda`"""
    return device.partition(":")[0]


def run_folder(params: Params) -> Path:
    """Where a run keeps its checkpoint and its progress: `.cache/train/<run key>/` of the project (`$DVC_ROOT`)."""
    return cache_dir("train") / run_key(params)


def progress_path(params: Params) -> Path:
    """The file in which a run of `params` reports its progress; it need not exist yet.

    It is replaced whole, at most once a second, and stays when the run is over. Its keys:

    - `state`: `running`, `finished`, `interrupted` (SIGTERM or Ctrl-C; `message` says what was kept) or `failed`;
      `message`: why, in one line. A run that was killed outright still says `running`: look at `pid` and `updated`.
    - `step`, `total_steps` (an estimate until the text has been read), `fraction` of the run done;
    - `tokens` trained on and `total_tokens` likewise; `checkpoint_step`, the step a new start would resume from;
    - `seconds_left`, null until it can be told; `updated`, Unix time of the last write; `pid`; `device`;
    - `saes`: by name `step`, `loss`, `l0`, `variance_explained`, as in the last row of its curve; null is not finite.
    """
    return run_folder(params) / PROGRESS_FILE


class ProgressFile:
    """Writes one run's progress."""

    def __init__(self, path: Path, device: str) -> None:
        self.path, self.started, self.written = path, time.monotonic(), -math.inf
        self.first_fraction: float | None = None
        self.unwritable = False
        self.trained = False
        """Whether all steps are done, and only measuring and writing are left."""
        self.values: dict[str, Any] = {
            "state": "running",
            "message": "",
            "step": 0,
            "total_steps": None,
            "fraction": 0.0,
            "tokens": 0,
            "total_tokens": None,
            "checkpoint_step": None,
            "seconds_left": None,
            "pid": os.getpid(),
            "device": device,
            "saes": {},
        }

    def update(self, fraction: float, **values: Any) -> None:
        """Note where the run stands; writes if the last write is a second old."""
        now = time.monotonic()
        if self.first_fraction is None:  # a resumed run starts in the middle
            self.first_fraction, self.started = fraction, now
        done = fraction - self.first_fraction
        left = (now - self.started) * (1 - fraction) / done if done > 0 else None
        self.values |= {"fraction": fraction, "seconds_left": left, **values}
        if now - self.written >= SECONDS_BETWEEN_WRITES:
            self._write()

    def end(self, state: str, message: str = "") -> None:
        """Say how the run ended; written at once."""
        self.values |= {"state": state, "message": message, "seconds_left": None}
        self._write()

    def _write(self) -> None:
        self.written = time.monotonic()
        try:
            write_json(self.path, _finite(round_significant({**self.values, "updated": int(time.time())}, 6)))
        except OSError as error:  # a full disk costs the view of a run, not the run
            if not self.unwritable:
                print(f"\nprogress cannot be followed: {self.path}: {error.strerror or error}", file=sys.stderr, flush=True)
            self.unwritable = True


def _finite(value: Any) -> Any:
    """Without NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
