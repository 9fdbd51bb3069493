"""What a training run says of itself while it runs: `.cache/train/<run key>/progress.json`, for whoever watches it.

No torch here: a monitor must start in a fraction of a second.
"""

from __future__ import annotations

import math
import os
import time
from pathlib import Path
from typing import Any

from sae_research.params import Params
from sae_research.store import cache_dir, fingerprint, round_significant, write_json

PROGRESS_FILE = "progress.json"
SECONDS_BETWEEN_WRITES = 1.0
OPERATIONAL = frozenset({"enabled", "checkpoint_seconds", "checkpoint_steps", "evaluate_tokens"})
"""Keys of `train` that change nothing about the SAEs that come out."""


def run_key(params: Params) -> str:
    """Name of a run: every setting that its SAEs depend on. [32 hex digits]

    Code, weights of the language model and text are not in it; a checkpoint notes those and is refused where they differ.
    """
    return fingerprint({
        "model": params.model.model_dump(include={"name", "llm_batch_size", "device"}),
        "text": params.text.model_dump(),
        "token_mask": params.token_mask.model_dump(),
        "train": params.train.model_dump(exclude=set(OPERATIONAL)),
        "random_seed": params.random_seed,
    })[:32]


def run_folder(params: Params) -> Path:
    """Where a run keeps its checkpoint and its progress: `.cache/train/<run key>/` of the project (`$DVC_ROOT`)."""
    return cache_dir("train") / run_key(params)


def progress_path(params: Params) -> Path:
    """The file in which a run of `params` reports its progress; it need not exist yet.

    It is replaced whole, at most once a second, and stays when the run is over. Its keys:

    - `state`: `running`, `finished`, `interrupted` (SIGTERM or Ctrl-C; a checkpoint was kept) or `failed`;
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
        self.values: dict[str, Any] = {
            "state": "running", "message": "", "step": 0, "total_steps": None, "fraction": 0.0, "tokens": 0,
            "total_tokens": None, "checkpoint_step": None, "seconds_left": None, "pid": os.getpid(), "device": device,
            "saes": {}}

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
        write_json(self.path, _finite(round_significant({**self.values, "updated": int(time.time())}, 6)))


def _finite(value: Any) -> Any:
    """Without NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
