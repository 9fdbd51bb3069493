"""The process of a rank other than 0: `group.OtherRanks` starts it, with its task as one line of JSON on standard input.

It writes nothing but its log. It answers no signals, since rank 0 tells it when to stop; it ends when rank 0 does, because
its standard input ends then.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from typing import Any

import torch

from sae_research.config.params import Params
from sae_research.lm import load_configured
from sae_research.runtime.errors import UserError, environment_line
from sae_research.runtime.processes import task_of_parent
from sae_research.training.checkpoints import ProgressFile, progress_path
from sae_research.training.group import HOST, LOST, TIMEOUT, Group, RankLost, ready, tell_failure
from sae_research.training.loop import Moments, Stop, StopSignals, Trainer
from sae_research.training.ranks import device_of_rank, shared_contexts
from sae_research.training.session import open_session


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    return run_rank(json.loads(task_of_parent(lambda: os._exit(LOST))))


def run_rank(task: dict[str, Any]) -> int:
    """Exit status: 0 when the run is over or was stopped, 1 when this rank failed and has told so, `LOST` when another
    did."""
    torch.set_num_threads(task["threads"])
    store = torch.distributed.TCPStore(HOST, task["port"], is_master=False, timeout=TIMEOUT)
    try:
        _train(task, store)
    except RankLost as error:
        print(error, file=sys.stderr)
        return LOST
    except UserError as error:
        tell_failure(store, task["rank"], "user", str(error))
        return 1
    except torch.OutOfMemoryError as error:
        tell_failure(store, task["rank"], "memory", str(error))
        return 1
    except Exception as error:  # noqa: BLE001 (told to rank 0, which ends the run with it)
        traceback.print_exc()
        line = environment_line(error)
        text = line or traceback.format_exception_only(error)[-1].strip()
        tell_failure(store, task["rank"], "user" if line else "other", text)
        return 1
    return 0


def _train(task: dict[str, Any], store: torch.distributed.Store) -> None:
    params, rank = Params.model_validate(task["params"]), task["rank"]
    device = device_of_rank(task["kind"], rank)
    if task["kind"] == "cuda":
        torch.cuda.set_device(rank)
    lm = load_configured(params.model.model_copy(update={"device": device}), dtype=task["dtype"])
    store.set(ready(rank), "")
    group = Group(store, rank, task["size"], torch.device(device))
    session = open_session(lm, shared_contexts(group, None), params, group)
    moments = Moments(params.train.saved_checkpoints, None if session.resumed_at is None else session.stream.fraction)

    def at_step(fraction: float) -> None:
        if moments.come(fraction):  # in rank 0 too, which saves the SAEs
            session.peers.gather()

    trainer = Trainer(
        session.stream,
        session.saes,
        params.train,
        _Unwritten(progress_path(params), device),
        StopSignals(),
        lambda: None,
        at_step,
        session.peers,
    )
    try:
        trainer.run()
    except Stop:
        print("stopped by rank 0")
    group.leave()


class _Unwritten(ProgressFile):
    """Rank 0 says how far the run is."""

    def _write(self) -> None:
        pass
