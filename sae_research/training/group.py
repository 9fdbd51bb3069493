"""A group of processes on one machine: rank 0, which is the stage's own, starts the others and talks with them.

torch.distributed carries what travels: NCCL from GPU to GPU, gloo over the loopback address all else. Values travel as JSON,
tensors as their bytes, nothing as a pickle. A rank that dies ends the group: whoever waits for it gets `RankLost`, or in
rank 0 the error that the other met. When rank 0 dies the others see the end of their standard input, and go.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from sae_research.runtime.cache import writable_cache_dir
from sae_research.runtime.errors import UserError
from sae_research.runtime.processes import end_child, start_child

HOST = "127.0.0.1"
TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for another that lives, but does not answer."""
LOST = 3
"""Exit status of a rank that ends because another did."""
VERDICT_SECONDS = 10.0
"""How long rank 0 looks for the rank that broke a connection."""
GRACE_SECONDS = 2.0
"""How long ranks may take to end by themselves."""
LOGS_KEPT = 64

Values = Any
"""What JSON holds."""


class RankLost(Exception):
    """A rank has ended, and with it the group: says which and how."""


class Group:
    """One rank's way to the others. Every method may raise `RankLost`, in rank 0 also what another rank met."""

    def __init__(
        self,
        store: torch.distributed.Store,
        number: int,
        size: int,
        device: torch.device,
        verdict: Callable[[Exception], Exception] = lambda error: RankLost(str(error)),
    ) -> None:
        """verdict: why a connection broke off, as an error to raise."""
        self.number, self.size, self.device, self._verdict = number, size, device, verdict
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        with self._talk(), _on_loopback():
            torch.distributed.init_process_group(backend, store=store, rank=number, world_size=size, timeout=TIMEOUT)

    @contextmanager
    def _talk(self) -> Generator[None]:
        try:
            yield
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except RuntimeError as error:
            raise self._verdict(error) from None

    def share_number(self, number: int) -> int:
        """Rank 0's number, in all."""
        with self._talk():
            shared = torch.tensor([number])
            torch.distributed.broadcast(shared, 0)
            return int(shared)

    def share(self, values: Values = None, tensors: Mapping[str, Tensor] | None = None) -> tuple[Values, dict[str, Tensor]]:
        """Rank 0's values and tensors, in all; on the CPU where they were received."""
        with self._talk():
            if self.number == 0:
                return _write(lambda part: torch.distributed.broadcast(part, 0), values, tensors or {})
            return _read(lambda part: torch.distributed.broadcast(part, 0))

    def send(self, values: Values, tensors: Mapping[str, Tensor], to: int) -> None:
        with self._talk():
            _write(lambda part: torch.distributed.send(part, to), values, tensors)

    def receive(self, source: int) -> tuple[Values, dict[str, Tensor]]:
        """What `source` sends; tensors on the CPU."""
        with self._talk():
            return _read(lambda part: torch.distributed.recv(part, source))

    def share_rows(self, rows: Tensor | None, d_in: int, dtype: torch.dtype, source: int) -> Tensor:
        """The rows [n, d_in] of the rank `source`, in all, on this rank's device; from GPU to GPU where there are some."""
        with self._talk():
            n = torch.tensor([0 if rows is None else len(rows)])
            torch.distributed.broadcast(n, source)
            if rows is None:
                rows = torch.empty(int(n), d_in, dtype=dtype, device=self.device)
            rows = rows.to(self.device).contiguous()
            if len(rows):
                torch.distributed.broadcast(rows.view(torch.uint8), source)  # as bytes: no backend knows all types
            return rows

    def leave(self) -> None:
        torch.distributed.destroy_process_group()


@contextmanager
def _on_loopback() -> Generator[None]:
    """gloo listens at the loopback address alone."""
    name = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if name is None or "GLOO_SOCKET_IFNAME" in os.environ:
        yield
        return
    os.environ["GLOO_SOCKET_IFNAME"] = name
    try:
        yield
    finally:
        del os.environ["GLOO_SOCKET_IFNAME"]


def _write(move: Callable[[Tensor], Any], values: Values, tensors: Mapping[str, Tensor]) -> tuple[Values, dict[str, Tensor]]:
    parts = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    about = [[key, str(part.dtype).removeprefix("torch."), list(part.shape)] for key, part in parts.items()]
    header = torch.frombuffer(bytearray(json.dumps([values, about]).encode()), dtype=torch.uint8)
    move(torch.tensor([len(header)]))
    move(header)
    for part in parts.values():
        if part.numel():
            move(part.reshape(-1).view(torch.uint8))
    return values, dict(tensors)


def _read(move: Callable[[Tensor], Any]) -> tuple[Values, dict[str, Tensor]]:
    length = torch.zeros(1, dtype=torch.long)
    move(length)
    header = torch.empty(int(length), dtype=torch.uint8)
    move(header)
    values, about = json.loads(header.numpy().tobytes())
    parts = {key: torch.empty(shape, dtype=getattr(torch, dtype)) for key, dtype, shape in about}
    for part in parts.values():
        if part.numel():
            move(part.reshape(-1).view(torch.uint8))
    return values, parts


# --- processes -------------------------------------------------------------------------------


class OtherRanks:
    """The processes of ranks 1 and up. Close it whatever happens: none of them outlives it."""

    def __init__(self, module: str, size: int, device: torch.device, threads: int, task: Mapping[str, Values]) -> None:
        """module: its `main` is a rank; task: what that needs to know besides its number; threads: of each."""
        self.size, self.device = size, device
        listener = socket.create_server((HOST, 0))
        port = listener.getsockname()[1]
        self.store = torch.distributed.TCPStore(
            HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach(), timeout=TIMEOUT
        )
        folder, run = writable_cache_dir("logs"), f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        for old in sorted(folder.glob("*-rank*.log"))[:-LOGS_KEPT]:
            old.unlink(missing_ok=True)
        self.logs = {rank: folder / f"{run}-rank{rank}.log" for rank in range(1, size)}
        self.processes: dict[int, subprocess.Popen[bytes]] = {}
        self._group: Group | None = None
        self._closed = threading.Event()
        counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), str(threads))
        try:
            for rank, log in self.logs.items():
                given = {**task, "rank": rank, "size": size, "port": port, "threads": threads}
                self.processes[rank] = start_child(module, json.dumps(given).encode(), log, counts)
        except BaseException:
            self.close()
            raise

    def join(self) -> Group:
        """The group, once every rank is there. Raises what stopped one of them."""
        while not self.store.check([ready(rank) for rank in self.processes]):
            if error := self._error():
                raise error
            time.sleep(0.05)
        self._group = Group(self.store, 0, self.size, self.device, self._verdict)
        if self.device.type == "cuda":
            threading.Thread(target=self._abort_with_the_first, daemon=True).start()
        return self._group

    def close(self) -> None:
        """End the ranks that are left: those that are done have ended by themselves."""
        self._closed.set()
        for process in self.processes.values():
            end_child(process)
        until = time.monotonic() + GRACE_SECONDS
        for process in self.processes.values():
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if self._group is not None:
            self._group.leave()
            self._group = None

    def _error(self) -> Exception | None:
        """What ended a rank; None while all are at work, or are done."""
        codes = {rank: process.poll() for rank, process in self.processes.items()}
        if self.store.check([FAILURE]):
            told = json.loads(self.store.get(FAILURE))
            if told["kind"] == "memory":
                return torch.OutOfMemoryError(f"rank {told['rank']} of {self.size}: {told['text']}")
            if told["kind"] == "user":
                return UserError(told["text"])
            return RankLost(
                f"rank {told['rank']} of {self.size} failed ({told['text']}; its output: {self.logs[told['rank']]})"
            )
        for rank, code in codes.items():
            if code not in (None, 0, LOST):
                how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with status {code}"
                return RankLost(f"rank {rank} of {self.size} {how} (its output: {self.logs[rank]})")
        return None

    def _verdict(self, error: Exception) -> Exception:
        until = time.monotonic() + VERDICT_SECONDS
        while time.monotonic() < until:
            if found := self._error():
                return found
            time.sleep(0.05)
        return RankLost(f"the ranks lost each other ({' '.join(str(error).split())[:200]})")

    def _abort_with_the_first(self) -> None:
        """gloo notices at once that a rank is gone; NCCL would wait for it."""
        while not self._closed.wait(0.5):
            if any(process.poll() not in (None, 0) for process in self.processes.values()):
                world = torch.distributed.group.WORLD
                if world is not None:
                    world.abort()
                return


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


FAILURE = "failure"
"""Under which a rank tells what it met."""


def ready(rank: int) -> str:
    """Under which a rank tells that it is about to join."""
    return f"ready {rank}"


def tell_failure(store: torch.distributed.Store, rank: int, kind: str, text: str) -> None:
    """kind: `user` for what one line explains, `memory` of a device, `other`."""
    with suppress(RuntimeError):  # rank 0 is gone, and asks no more
        store.set(FAILURE, json.dumps({"rank": rank, "kind": kind, "text": text}))
