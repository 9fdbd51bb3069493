"""What tells one object in memory from another: tensors' bytes, every attribute, the code of its classes and functions.

A result that is kept by such an identity is found again only by an object that computes the same. What cannot be looked
into (a lock, a compiled module, a module of the user's own that a function reads from) has no identity, and nothing that
depends on it is kept.
"""

from __future__ import annotations

import dis
import hashlib
import pickle
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), torch.dtype, torch.device, torch.Size)
_OF_CLASSES = {
    "__module__",
    "__doc__",
    "__dict__",
    "__weakref__",
    "__annotations__",
    "_abc_impl",
    "__abstractmethods__",
    "__firstlineno__",
    "__static_attributes__",
}
"""Entries of a class that change nothing it computes."""
_SLOTS = (MemberDescriptorType, GetSetDescriptorType)
"""What stands for a slot in a class: its value is an attribute of the object."""


_OUTSIDE = {"os", "posix", "io", "pathlib", "tempfile", "time", "datetime", "random", "secrets", "uuid"}
"""Modules whose functions answer by what stands outside the program, or differently each time."""


class Unidentified(Exception):
    """This object holds what nobody can look into."""


def identity(value: Any) -> str:
    """SHA-256 of all that decides what `value` does. Equal objects of two processes have equal identities. [64 hex digits]

    Raises `Unidentified` where a part of it cannot be looked into.
    """
    walk = _Walk()
    try:
        walk.add(value)
    except RecursionError:
        raise Unidentified("it is nested too deeply") from None
    return walk.digest.hexdigest()


def own_data(value: Any) -> dict[str, Any]:
    """The plain values, tensors and functions that stand in a user's classes of `value`, by class and name: methods and
    properties aside, whose source is known."""
    return {
        f"{cls.__qualname__}.{name}": entry
        for cls in type(value).__mro__
        if _library(cls.__module__) is None
        for name, entry in vars(cls).items()
        if name not in _OF_CLASSES and not isinstance(entry, (FunctionType, property, staticmethod, classmethod, *_SLOTS))
    }


class _Walk:
    """One pass over everything an object refers to; what is met twice is written once."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self.met: dict[int, int] = {}
        self.alive: list[Any] = []
        """What was met, so that no number of `id` is given away again."""

    def add(self, value: Any) -> None:
        if isinstance(value, _PLAIN) and type(value).__module__ in ("builtins", "torch"):
            self._write(type(value).__qualname__, repr(value))
        elif id(value) in self.met:
            self._write("again", self.met[id(value)])
        else:
            self.met[id(value)] = len(self.met)
            self.alive.append(value)
            if type(value) in (list, tuple):
                self._all(type(value).__name__, *value)
            elif type(value) is dict:
                self._all("dict", *(part for item in value.items() for part in item))
            else:
                next((write for kind, write in self._writers() if isinstance(value, kind)), self._reduced)(value)

    def _writers(self) -> Iterator[tuple[Any, Callable[[Any], None]]]:
        yield Tensor, self._tensor
        yield np.ndarray, self._array
        yield torch.nn.Module, lambda module: self._all("module", type(module), vars(module))
        yield type, self._class
        yield ModuleType, self._module
        yield FunctionType, self._function
        yield MethodType, lambda method: self._all("method", method.__func__, method.__self__)
        yield BuiltinFunctionType, self._builtin
        yield (
            CodeType,
            lambda code: self._all(
                "code",
                code.co_code,
                code.co_consts,
                code.co_names,
                code.co_varnames,
                code.co_freevars,
                code.co_argcount,
                code.co_kwonlyargcount,
                code.co_flags,
            ),
        )
        yield CellType, self._cell
        yield property, lambda one: self._all("property", one.fget, one.fset, one.fdel)
        yield (staticmethod, classmethod), lambda one: self._all(type(one).__name__, one.__func__)
        yield _SLOTS, lambda one: self._write("slot", one.__name__)
        yield (set, frozenset), lambda one: self._all(type(one).__name__, *sorted(map(identity, one)))

    def _write(self, kind: str, text: Any) -> None:
        data = text if isinstance(text, bytes) else str(text).encode(errors="surrogatepass")
        self.digest.update(f"{kind} {len(data)} ".encode())
        self.digest.update(data)

    def _all(self, kind: str, *parts: Any) -> None:
        self._write(kind, len(parts))
        for part in parts:
            self.add(part)

    def _tensor(self, value: Tensor) -> None:
        if value.layout != torch.strided or value.is_meta or value.is_quantized:
            raise Unidentified(f"a tensor of layout {value.layout}")
        flat = value.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        self._write(
            f"{type(value).__qualname__} {tuple(value.shape)} {value.dtype}", flat.view(torch.uint8).numpy().tobytes()
        )

    def _array(self, value: np.ndarray) -> None:
        if value.dtype.hasobject:
            self._all(f"array {value.shape}", *value.ravel().tolist())
        else:
            self._write(f"array {value.shape} {value.dtype.descr}", np.ascontiguousarray(value).tobytes())

    def _class(self, cls: type) -> None:
        library = _library(cls.__module__)
        self._write("class", f"{library} {cls.__module__} {cls.__qualname__}" if library else cls.__qualname__)
        if library is None:
            self._all("bases", *cls.__bases__)
            for name, entry in vars(cls).items():
                if name not in _OF_CLASSES:
                    self._all(name, entry)

    def _module(self, module: ModuleType) -> None:
        library = _library(module.__name__)
        if library is None:
            raise Unidentified(f"the module {module.__name__}, which may change")
        self._write("library", f"{library} {module.__name__}")

    def _function(self, function: FunctionType) -> None:
        library = _library(function.__module__ or "")
        self._write("function", f"{library} {function.__module__} {function.__qualname__}" if library else "")
        if library is None:
            self.add(function.__code__)
            for name in _globals_of(function.__code__):
                if name in function.__globals__:
                    self._all(name, _inside(name, function.__globals__[name]))
                elif name in ("open", "input"):
                    raise Unidentified(f"{function.__qualname__}, which reads by {name}()")
        self._all("bound", function.__defaults__, function.__kwdefaults__, function.__closure__, vars(function))

    def _builtin(self, function: Any) -> None:
        self._write("builtin", f"{getattr(function, '__module__', '')} {function.__qualname__}")
        if function.__self__ is not None and not isinstance(function.__self__, ModuleType):
            self.add(function.__self__)

    def _cell(self, cell: CellType) -> None:
        try:
            self.add(cell.cell_contents)
        except ValueError:  # not filled yet
            self._write("cell", "empty")

    def _reduced(self, value: Any) -> None:
        """Anything else, by what pickling would keep of it."""
        try:
            reduced = value.__reduce_ex__(4)
        except (TypeError, ValueError, AttributeError, RuntimeError, pickle.PickleError) as error:
            raise Unidentified(f"a {type(value).__qualname__}: {error}") from None
        self.add(type(value))
        if isinstance(reduced, str):
            self._write("global", reduced)
            return
        make, arguments, *rest = reduced
        self._all(
            "reduced",
            make,
            arguments,
            *(part if part is None or number == 0 else list(part) for number, part in enumerate(rest[:3])),
        )


def _inside(name: str, value: Any) -> Any:
    """`value`, which a user's function uses. Raises `Unidentified` for what reads files, the environment or the clock."""
    module = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    if isinstance(module, str) and module.partition(".")[0] in _OUTSIDE:
        raise Unidentified(f"{name}, which depends on more than the program")
    return value


def _globals_of(code: CodeType) -> list[str]:
    """Names that a function's code, and the functions inside it, look up in their module."""
    steps = list(dis.get_instructions(code))
    for step in steps:
        if step.opname == "IMPORT_NAME" and (_library(step.argval) is None or step.argval.partition(".")[0] in _OUTSIDE):
            raise Unidentified(f"an import of {step.argval} inside a function")
    names = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            names.update(_globals_of(constant))
    return sorted(names)


@cache
def _library(module: str) -> str | None:
    """Name and version of what an installed module belongs to; None for a user's own code."""
    top = module.partition(".")[0]
    found = sys.modules.get(top)
    if top in ("builtins", "sae_research") or top in sys.builtin_module_names:
        return top
    file = getattr(found, "__file__", None) or next(iter(getattr(found, "__path__", [])), None)
    if found is None or top == "__main__" or (file is None and top not in sys.stdlib_module_names):
        return None
    roots = [Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    if file is not None and not any(Path(file).resolve().is_relative_to(root) for root in roots):
        return None
    return f"{top} {getattr(found, '__version__', '')}"
