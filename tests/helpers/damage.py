"""Ways in which a file may come to differ from what was written, and folders that may not be written."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


def flip(path: Path) -> None:
    """One bit in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a byte short": lambda path: os.truncate(path, path.stat().st_size - 1),
    "a byte long": lambda path: os.truncate(path, path.stat().st_size + 1),
    "emptied": lambda path: os.truncate(path, 0),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "deleted": Path.unlink,
    "a bit flipped": flip,
}

_HEADER = (ctypes.c_uint32 * 2)(0x20080522, 0)
_OVERRIDES = 0b110  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: what makes root pass over permissions


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """`folder` and all in it may be read but not written, by root either. Skips the test where that cannot be had."""
    paths = [folder, *folder.rglob("*")]
    modes = {path: path.stat().st_mode for path in paths}
    libc, held = ctypes.CDLL(None), (ctypes.c_uint32 * 6)()
    if not hasattr(libc, "capset"):
        pytest.skip("no capabilities to give up on this system")
    libc.capget(_HEADER, held)
    before = held[0]
    for path in paths:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        held[0] = before & ~_OVERRIDES
        libc.capset(_HEADER, held)
        try:
            (folder / "probe").touch()
        except PermissionError:
            pass
        else:
            (folder / "probe").unlink()
            pytest.skip("permissions do not bind this process")
        yield
    finally:
        held[0] = before
        libc.capset(_HEADER, held)
        for path, mode in modes.items():
            if path.exists():
                path.chmod(mode)
