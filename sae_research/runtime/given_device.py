"""The device that a process was given. A file of its own, since every stage depends on it and on nothing else of workers."""

from __future__ import annotations

import os

DEVICE_VARIABLE = "SAE_RESEARCH_DEVICE"
"""What `model.device: auto` means to a process that was given a device of its own (see `lm.load.pick_device`)."""


def has_device_of_its_own() -> bool:
    """Whether this process was given its device as a worker or as an experiment of a sweep: it asks for no workers then."""
    return bool(os.environ.get(DEVICE_VARIABLE))
