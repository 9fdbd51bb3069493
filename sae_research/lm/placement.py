"""Where the weights of a language model lie: on one device, or in parts on GPUs, in main memory and on disk (Accelerate's
device map), as stored or quantised by a library.

Parts in main memory or on disk are copied to the device that computes each time their layer runs. No number depends on the
placement as long as all parts are computed on one kind of device.
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sae_research.runtime.cache import writable_cache_dir
from sae_research.runtime.errors import UserError

QUANTISED = {"bnb_8bit": {"load_in_8bit": True}, "bnb_4bit": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}
"""Name -> options of transformers' `BitsAndBytesConfig`."""


class Loading:
    """How `from_pretrained` is to load a model: `options`, its arguments beside the model and its precision.

    What it has to write for a part on disk is removed with this object. Raises `UserError` for a limit that names no device
    or no size, and for a quantisation whose package or device is missing.
    """

    def __init__(
        self,
        where: torch.device,
        dtype: torch.dtype,
        placement: str = "one",
        max_memory: Mapping[str, str] | None = None,
        quantization: str | None = None,
    ) -> None:
        self.options: dict[str, Any] = {}
        if quantization is not None:
            self.options["quantization_config"] = _quantisation(quantization, where, dtype)
        if placement == "auto":
            limits = _limits(where, max_memory)
            folder = tempfile.mkdtemp(dir=writable_cache_dir("offload"))
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
            self.options |= {"device_map": "auto", "max_memory": limits, "offload_folder": folder}
        elif max_memory is not None:
            raise UserError("model.max_memory: only a model in parts has limits; set model.placement: auto, or null here")
        elif quantization is not None:
            self.options["device_map"] = {"": where}


def _limits(where: torch.device, given: Mapping[str, str] | None) -> dict[str | int, str | int]:
    """Most bytes of each device that may be used, what is free where `given` does not say: GPU numbers, `mps` and `cpu`.
    The disk takes the rest."""
    from accelerate.utils import convert_file_size_to_int, get_max_memory

    free: dict[Any, Any] = get_max_memory()
    if where.type == "cpu":
        free = {"cpu": free.get("cpu", free.get("mps"))}
    elif where.index is not None:
        free = {key: free[key] for key in (where.index, "cpu") if key in free}
    for key, size in (given or {}).items():
        device = int(key) if key.isdigit() else key
        if device not in free:
            raise UserError(
                f"model.max_memory: no device {key} is to be used with model.device; there are {', '.join(map(str, free))}"
            )
        try:
            convert_file_size_to_int(size)
        except ValueError:
            raise UserError(f"model.max_memory.{key}: {size!r} is no size; write e.g. 60GiB or 500MB") from None
        free[device] = size
    return free


def _quantisation(name: str, where: torch.device, dtype: torch.dtype) -> Any:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"model.quantization: {name} needs the package bitsandbytes; pip install bitsandbytes, or set null")
    if where.type != "cuda":
        raise UserError(f"model.quantization: {name} needs a CUDA device, this is {where.type}; set null")
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = QUANTISED[name]
    return BitsAndBytesConfig(**options, **({"bnb_4bit_compute_dtype": dtype} if name == "bnb_4bit" else {}))


# --- models in parts ---


def in_parts(model: nn.Module) -> bool:
    """Whether Accelerate moves activations or weights between devices as the model runs."""
    return hasattr(model, "_hf_hook")


def main_device(model: Any) -> torch.device:
    """Where a model takes tokens and gives logits."""
    embeddings = model.get_input_embeddings()
    if embeddings.weight.device.type != "meta":
        return embeddings.weight.device
    return torch.device(model._hf_hook.execution_device)


def weight(module: nn.Module, device: torch.device) -> Tensor:
    """A module's weight, fetched where it does not lie on a device that computes."""
    if not hasattr(module, "_hf_hook"):
        return module.weight
    from accelerate.utils import align_module_device

    with align_module_device(module, device):
        return module.weight.detach()  # ty: ignore[not-callable]


def whole_state(model: Any) -> dict[str, Tensor]:
    """`state_dict` with every tensor in main memory."""
    if not in_parts(model):
        return model.state_dict()
    from accelerate.utils.modeling import get_state_dict_offloaded_model

    return get_state_dict_offloaded_model(model)


def change_class(module: nn.Module, new: type[nn.Module]) -> None:
    """Give a module another class with its own `forward`, also where Accelerate has put its own around it."""
    module.__class__ = new
    if "_old_forward" in vars(module):
        vars(module)["_old_forward"] = partial(new.forward, module)
