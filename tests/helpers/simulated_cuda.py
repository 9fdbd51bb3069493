"""A CUDA device made of the CPU: tensors that say they are on cuda:0 while their numbers lie in the computer's memory.

`simulated_cuda()` is the device for the length of a block. Within it tensors on "cuda" report `device`, `is_cuda` and
`get_device()` as on a GPU; `.numpy()` raises; an operation that mixes them with CPU tensors raises as CUDA's would, but for
what CUDA allows (scalars of no dimension, copies, CPU indices into a CUDA tensor). Streams and events are kept apart by
vector clocks: reading on one stream what another has not finished raises, where a GPU would read garbage now and then.
Pinned memory, generators, memory figures and the device's properties answer as a GPU of 16 GB. Speed, kernels' rounding and
Triton are not simulated.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tests.helpers.simulated_streams import CUDA, DEFAULT, Event, Stream, current_stream, stream_context

MEMORY = 16 * 2**30
CPU, META = torch.device("cpu"), torch.device("meta")
aten = torch.ops.aten
_INDEXING = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
_WAITING = {aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default}
"""Operations for whose result the computer waits."""
_INNER = {"tolist": lambda t: t.inner.tolist(), "data_ptr": lambda t: t.inner.data_ptr(), "get_device": lambda t: 0}
"""Methods that the numbers themselves answer."""
_Real = torch.Generator


@dataclass
class Counts:
    """What a block has given the device to do."""

    operations: int = 0
    waits: int = 0
    """How often the computer waited for a number."""
    bytes_to_host: int = 0


_counts = Counts()


class SimulatedError(RuntimeError):
    """What CUDA would raise, or compute wrongly."""


# --- tensors ---------------------------------------------------------------------------------


class Simulated(torch.Tensor):
    """A tensor on cuda:0. Torch sees one without storage (`meta`); `inner` holds the numbers on the CPU."""

    inner: torch.Tensor
    made: tuple[Stream, int]
    """The operation that wrote it last."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Simulated:
        with torch._C._DisableTorchDispatch():
            empty = torch.empty_strided(inner.size(), inner.stride(), dtype=inner.dtype, device=META)
        made = torch.Tensor._make_subclass(cls, empty)
        made.inner = inner
        stream = current_stream()
        made.made = stream, stream.clock[stream]
        return made

    def record_stream(self, stream: Any) -> None:
        """Memory is given back when nobody holds it, here."""

    def __repr__(self, **_: Any) -> str:
        return f"Simulated({self.inner!r})"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.data.__set__:
            target, value = args
            with torch._C.DisableTorchFunctionSubclass():
                func(*args)
            if isinstance(value, Simulated):
                target.inner, target.made = value.inner, value.made
            return None
        for attribute, answer in (("device", CUDA), ("is_cuda", True), ("is_meta", False), ("is_cpu", False)):
            if func == getattr(torch.Tensor, attribute).__get__:
                return answer
        name = getattr(func, "__name__", "")
        if name in _INNER:
            return _INNER[name](args[0])
        if name == "numpy" or name == "__array__":
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        if name == "pin_memory":
            raise SimulatedError("cannot pin a CUDA tensor: only dense CPU tensors can be pinned")
        if name == "is_pinned":
            return False
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _wrapped(value: Any) -> Any:
    return Simulated(value) if type(value) is torch.Tensor else value


def _inner(value: Any) -> Any:
    return value.inner if isinstance(value, Simulated) else value


def _on_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type in ("cuda", "meta")


def _check_order(func: Any, tensors: list[Simulated]) -> None:
    """Raises where the current stream reads or writes what another may still be writing."""
    now = current_stream()
    for tensor in tensors:
        stream, time = tensor.made
        if stream is not now and now.clock.get(stream, 0) < time:
            raise SimulatedError(f"{func} uses a tensor {tuple(tensor.shape)} that another stream may still be writing")


def _check_devices(func: Any, args: Any, flat: list[Any], tensors: list[Simulated]) -> None:
    plain = [t for t in flat if type(t) in (torch.Tensor, torch.nn.Parameter) and t.dim() > 0 and t.device.type == "cpu"]
    first = args[0] if args else None
    if func in _INDEXING:
        if not isinstance(first, Simulated):
            raise SimulatedError(
                f"{func}: indices should be either on cpu or on the same device as the indexed tensor (cpu)"
            )
        if values := [tuple(v.shape) for v in args[2:] if type(v) is torch.Tensor and v.dim() > 0]:
            raise SimulatedError(f"{func}: expected values on cuda:0, got cpu {values}")
        return
    if plain:
        raise SimulatedError(
            f"Expected all tensors to be on the same device: {func} got cuda:0 {[tuple(t.shape) for t in tensors]} "
            f"and cpu {[tuple(t.shape) for t in plain]}"
        )
    if isinstance(first, torch.Tensor) and not isinstance(first, Simulated) and func.name().split(".")[0].endswith("_"):
        raise SimulatedError(f"{func}: in-place on a cpu tensor with cuda arguments")


def _copied(func: Any, args: Any, kwargs: Any) -> Any:
    """`copy_` and `to`, which alone go from device to device."""
    inner_args, inner_kwargs = tree_map(_inner, args), tree_map(_inner, kwargs)
    if func is aten.copy_.default:
        func(*inner_args, **inner_kwargs)
        if isinstance(args[0], Simulated):
            args[0].made = current_stream(), current_stream().tick()
        elif isinstance(args[1], Simulated):
            _counts.bytes_to_host += args[0].nbytes
            current_stream().synchronize()
        return args[0]
    device = kwargs.get("device")
    to_cuda = _on_cuda(device) if device is not None else isinstance(args[0], Simulated)
    if _on_cuda(device):
        inner_kwargs["device"] = CPU
    out = func(*inner_args, **inner_kwargs)
    if not to_cuda:
        if isinstance(args[0], Simulated):
            _counts.bytes_to_host += out.nbytes
            if not kwargs.get("non_blocking"):
                current_stream().synchronize()
                _counts.waits += 1
        return out
    current_stream().tick()
    return Simulated(out)


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """One operation: checked, run on the numbers, its results on cuda:0 where its arguments are or it was asked to."""
    flat, _ = tree_flatten((args, kwargs))
    tensors = [t for t in flat if isinstance(t, Simulated)]
    _check_order(func, tensors)
    if func in (aten.copy_.default, aten._to_copy.default):
        return _copied(func, args, kwargs)
    if tensors:
        _check_devices(func, args, flat, tensors)
    device = kwargs.get("device")
    to_cuda = _on_cuda(device) if device is not None else bool(tensors)
    inner_args, inner_kwargs = tree_map(_inner, args), tree_map(_inner, kwargs)
    if _on_cuda(device):
        inner_kwargs["device"] = CPU
    if torch.Tag.inplace_view in func.tags:
        func(*inner_args, **inner_kwargs)
        with torch._C._DisableTorchDispatch():
            func(*args, **kwargs)
        return args[0]
    if tensors and func in _WAITING:
        current_stream().synchronize()
        _counts.waits += 1
    if to_cuda:
        current_stream().tick()
        _counts.operations += 1
    out = func(*inner_args, **inner_kwargs)
    written = _written(func, args, kwargs) if tensors else None
    if written is not None:
        return written
    return tree_map(_wrapped, out) if to_cuda else out


def _written(func: Any, args: Any, kwargs: Any) -> Any:
    """The very tensor that an operation in place, or with `out=`, has to hand back."""
    schema = func._schema
    if len(schema.returns) != 1:
        return None
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = args[place] if place < len(args) else kwargs.get(argument.name)
        if isinstance(given, Simulated):
            if given.shape != given.inner.shape:
                raise SimulatedError(f"{func} resized in place")
            given.made = current_stream(), current_stream().clock[current_stream()]
            return given
    return None


# --- modes -----------------------------------------------------------------------------------


class _Dispatch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _elsewhere(device: Any) -> Any:
    """CUDA as `meta`, which this build of torch can make tensors on."""
    cuda = (isinstance(device, torch.device) and device.type == "cuda") or (
        isinstance(device, str) and device.startswith("cuda")
    )
    return META if cuda else device


def _index(index: Any) -> Any:
    """Lists in an index as tensors: torch would make them where the tensor seems to be, without numbers."""
    if isinstance(index, tuple):
        return tuple(_index(part) for part in index)
    return torch.tensor(index) if isinstance(index, list) else index


class _Devices(TorchFunctionMode):
    """Names of devices, and what torch does before it comes to an operation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if "device" in kwargs:
            kwargs["device"] = _elsewhere(kwargs["device"])
        if kwargs.get("pin_memory"):
            kwargs.pop("pin_memory")
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and kwargs.get("device") is META:
            kwargs["device"] = CPU
            data = _inner(args[0]) if args else _inner(kwargs.pop("data"))
            return Simulated(torch.tensor(data, **{key: v for key, v in kwargs.items() if key != "requires_grad"}))
        if name == "new_tensor" and isinstance(args[0], Simulated):
            kwargs.pop("device", None)
            return Simulated(args[0].inner.new_tensor(*args[1:], **kwargs))
        if name == "pin_memory" and type(args[0]) is torch.Tensor:
            return args[0]
        if name in ("__matmul__", "matmul"):  # torch would look into the storage of a vector
            if args[0].dim() == 1 and args[1].dim() == 2:
                return (args[0][None] @ args[1])[0]
            if args[0].dim() >= 2 and args[1].dim() == 1:
                return (args[0] @ args[1][:, None])[..., 0]
        if name in ("__getitem__", "__setitem__"):
            args = (args[0], _index(args[1]), *args[2:])
        if name == "to":
            args = tuple(_elsewhere(a) for a in args)
        elif name == "cuda":
            func, args = torch.Tensor.to, (args[0], META)
        return func(*args, **kwargs)


class _GeneratorType(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _Real)


class _Generator(metaclass=_GeneratorType):
    """A generator of any device is one of the CPU."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return _Real()


def _device_functions() -> dict[str, Any]:
    """What `torch.cuda` answers."""
    properties = SimpleNamespace(
        total_memory=MEMORY, major=9, minor=0, multi_processor_count=132, name="simulated", L2_cache_size=60 * 2**20
    )

    def always(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value  # a function of its own for each name: torch's compiler refuses one of two names

    return {
        "_lazy_init": always(None),
        "is_available": always(True),
        "is_initialized": always(True),
        "device_count": always(1),
        "current_device": always(0),
        "get_device_properties": always(properties),
        "get_device_name": always("simulated"),
        "get_device_capability": always((9, 0)),
        "mem_get_info": always((MEMORY, MEMORY)),
        "is_bf16_supported": always(True),
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": always(None),
        "synchronize": always(None),
        "empty_cache": always(None),
        "reset_peak_memory_stats": always(None),
        "manual_seed": always(None),
        "manual_seed_all": always(None),
        "max_memory_allocated": always(0),
        "memory_allocated": always(0),
        "device": lambda *_: nullcontext(),
        "Stream": Stream,
        "Event": Event,
        "stream": stream_context,
        "current_stream": current_stream,
        "default_stream": always(DEFAULT),
    }


@contextmanager
def _modes() -> Generator[None]:
    with _Devices(), _Dispatch():
        yield


def _still_tied(to: Callable[..., Any]) -> Callable[..., Any]:
    """`Module.to` that leaves one tensor in two places one tensor, as it is between real devices."""

    def wrapped(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        moved = to(module, *args, **kwargs)
        if callable(getattr(module, "tie_weights", None)):
            module.tie_weights()
        return moved

    return wrapped


def _in_own_modes(run: Callable[[threading.Thread], None]) -> Callable[[threading.Thread], None]:
    """Modes belong to a thread: every new one enters its own."""

    def wrapped(thread: threading.Thread) -> None:
        with _modes():
            run(thread)

    return wrapped


@contextmanager
def simulated_cuda() -> Generator[Counts]:
    """cuda:0 is there, in this thread and those it starts; yields what it is given to do. Afterwards all is as it was."""
    _counts.__init__()
    torch._C._ensureCUDADeviceGuardSet()
    threaded = torch.autograd.is_multithreading_enabled()
    with ExitStack() as stack:
        for name, value in _device_functions().items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(mock.patch.object(threading.Thread, "run", _in_own_modes(threading.Thread.run)))
        stack.enter_context(mock.patch.object(torch.nn.Module, "to", _still_tied(torch.nn.Module.to)))
        torch.autograd.set_multithreading_enabled(False)
        stack.callback(torch.autograd.set_multithreading_enabled, threaded)
        stack.enter_context(_modes())
        yield _counts
