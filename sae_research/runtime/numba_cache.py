"""numba, told before its import to keep compiled code with the other caches, not beside the source. Import it from
here."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from sae_research.runtime.cache import cache_dir, writable_cache_dir
from sae_research.runtime.errors import UserError


def _folder() -> Path:
    try:
        return writable_cache_dir("numba")
    except UserError:  # numba reads no folder that it cannot write: it gets a copy, for this process alone
        copy = Path(tempfile.mkdtemp(prefix="numba-"))
        atexit.register(shutil.rmtree, copy, ignore_errors=True)
        if cache_dir("numba").is_dir():
            shutil.copytree(cache_dir("numba"), copy, dirs_exist_ok=True)
            for folder in (copy, *(path for path in copy.rglob("*") if path.is_dir())):
                folder.chmod(0o700)
        return copy


if "NUMBA_CACHE_DIR" not in os.environ:
    os.environ["NUMBA_CACHE_DIR"] = str(_folder())

import numba  # noqa: E402  (reads the setting above when it is imported)

__all__ = ["numba"]
