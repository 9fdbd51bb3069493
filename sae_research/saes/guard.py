"""One SAE that cannot be scored takes no other with it: it is skipped with its reason, the others' figures stay the same.

Every evaluation scores its SAEs through a `Guard`. What counts as an SAE's own failure: what encoders and the checks on them
refuse (`UserError`: NaN, infinity, another shape, nothing that fires), numbers that a solver or JSON refuses (`ValueError`,
`ArithmeticError`, `LinAlgError`), and memory that one SAE alone is too large for. Any other exception is a defect of the
program and ends the stage with its traceback.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from sae_research.errors import NotApplicable, UserError
from sae_research.saes.base import SparseAutoencoder, families

FAULTS = (UserError, ValueError, ArithmeticError, torch.linalg.LinAlgError, torch.OutOfMemoryError)

Value = TypeVar("Value")
Family = dict[str, SparseAutoencoder]


class Guard:
    """Which SAEs of one evaluation failed. skip: what is told a name and a reason, a stage's `skip` say. Without it failures
    are raised: a caller who lists none wants to see them."""

    def __init__(self, skip: Callable[[str, str], None] | None) -> None:
        self.skip = skip
        self.failed: set[str] = set()

    @contextmanager
    def on(self, name: str) -> Iterator[None]:
        """What happens inside concerns this SAE alone. Ends quietly where it fails."""
        try:
            yield
        except NotApplicable:
            raise
        except FAULTS as error:
            self._skip(name, error)

    def each(self, saes: Family, score: Callable[[Family], Iterator[tuple[str, Value]]]) -> Iterator[tuple[str, Value]]:
        """(name, value) of every SAE that can be scored, families together. `score` gets SAEs of one family and yields what
        it finds of each; where it fails on several, what it has not found yet is scored one by one."""
        for names in families(self.left(saes)):
            left = {name: saes[name] for name in names}
            try:
                for name, value in score(dict(left)):
                    del left[name]
                    yield name, value
            except NotApplicable:
                raise
            except FAULTS as error:
                left = self.left(left)
                if len(left) == 1:
                    self._skip(*left, error)
                    continue
                for name, sae in left.items():
                    with self.on(name):
                        yield from score({name: sae})

    def left(self, of: dict[str, Value]) -> dict[str, Value]:
        """Those of SAEs that have not failed."""
        return {name: value for name, value in of.items() if name not in self.failed}

    def _skip(self, name: str, error: BaseException) -> None:
        if self.skip is None:
            raise error
        self.failed.add(name)
        self.skip(name, why(error))


def why(error: BaseException) -> str:
    """A failure in one line; of what was not meant for users also its kind and the function it arose in."""
    if isinstance(error, UserError):
        return _one_line(error, 500)
    if isinstance(error, ValueError) and "JSON compliant" in str(error):
        return "one of its figures is NaN or infinite"
    where = traceback.extract_tb(error.__traceback__)[-1].name
    return f"{type(error).__name__} in {where}: {_one_line(error, 200)}"


def check_finite(figures: Any, where: str = "") -> None:
    """Raises `UserError` that names the first figure, inside dicts and lists, that is NaN or infinite."""
    if isinstance(figures, float) and not math.isfinite(figures):
        raise UserError(f"{where or 'a figure'} is NaN or infinite")
    for key, value in figures.items() if isinstance(figures, dict) else ():
        check_finite(value, f"{where}, {key}" if where else str(key))
    for value in figures if isinstance(figures, list) else ():
        check_finite(value, where)


def _one_line(error: BaseException, limit: int) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit - 1] + "…"
