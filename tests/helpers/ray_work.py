"""Work for workers that does as its payload says: answers, waits, fails, or ends its process."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

from sae_research.runtime.errors import UserError


class Obedient:
    """Payload: JSON with `name`, and of `wait` (seconds), `until` (a file's path), `fail`, `user_error`, `die_once` (a file
    that says that it has died before), `die`. Every start of a unit is a line of the file that the argument names."""

    def __init__(self, argument: bytes) -> None:
        self._journal = Path(argument.decode())

    def __call__(self, payload: bytes, shared: bytes) -> bytes:
        asked = json.loads(payload)
        with self._journal.open("a") as journal:
            journal.write(f"{asked['name']}\n")
        time.sleep(asked.get("wait", 0))
        while "until" in asked and not Path(asked["until"]).exists():
            time.sleep(0.05)
        if "user_error" in asked:
            raise UserError(asked["user_error"])
        if "fail" in asked:
            print("on the way to a failure")
            raise ValueError(asked["fail"])
        if asked.get("die") or "die_once" in asked and not Path(asked["die_once"]).exists():
            if "die_once" in asked:
                Path(asked["die_once"]).touch()
            os._exit(1)
        return asked["name"].encode() + shared
