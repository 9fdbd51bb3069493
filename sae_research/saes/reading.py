"""What every reader of SAE files checks: values of a configuration, weights files, shapes, names of hooks.

A file is used in full or refused in one line: what is read without a doubt is the SAE that was saved.
"""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
import yaml
from torch import Tensor

from sae_research.runtime.errors import UserError
from sae_research.runtime.files import regular_file

DAMAGED = (
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    EOFError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    safetensors.SafetensorError,
)
"""What parsers of weights files raise on bytes that are none of theirs."""
LARGEST = 10**9
"""No number of dimensions, latents, tokens or steps of an SAE is beyond this."""


# --- configurations --------------------------------------------------------------------------


def whole(value: Any, key: str, where: object, least: int = 1) -> int:
    """A whole number from `least` to `LARGEST`. Raises `UserError` for anything else, `true` and "8" too."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= LARGEST or value != int(value):
        raise UserError(f"{where}: {key} must be a whole number from {least} to {LARGEST:,}, not {shown(value)}")
    return int(value)


def number(value: Any, key: str, where: object) -> float:
    """A finite number. Raises `UserError` for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
        raise UserError(f"{where}: {key} must be a number, not {shown(value)}")
    return float(value)


def flag(value: Any, key: str, where: object) -> bool:
    """true or false. Raises `UserError` for anything else."""
    if not isinstance(value, bool):
        raise UserError(f"{where}: {key} must be true or false, not {shown(value)}")
    return value


def text(value: Any, key: str, where: object) -> str:
    """A text, empty for null. Raises `UserError` for anything else."""
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}: {key} must be a text, not {shown(value)}")
    return value or ""


def precision(value: Any, key: str, where: object) -> str:
    """A floating-point type by torch's name, with or without `torch.`. Raises `UserError` for anything else."""
    name = text(value, key, where).removeprefix("torch.")
    dtype = getattr(torch, name, None) if name else None
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"{where}: {key} {shown(value)} is no precision of weights, such as float32")
    return name


def section(value: Any, key: str, where: object) -> dict[str, Any]:
    """A section of settings, empty for null. Raises `UserError` for anything else."""
    if value is not None and not isinstance(value, dict):
        raise UserError(f"{where}: {key} must be a section of settings, not {shown(value)}")
    return value or {}


def shown(value: Any) -> str:
    """The value as a message names it, in at most 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:59] + "…"


def read_yaml(path: Path) -> dict[str, Any]:
    """The settings of a YAML file of another library. Raises `UserError` for one that is missing, damaged or holds none."""
    try:
        values = yaml.safe_load(regular_file(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())[:160]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: not a section of settings")
    return values


# --- weights ---------------------------------------------------------------------------------


_POINTER = b"version https://git-lfs.github.com/spec/"
_UNFINISHED = (".incomplete", ".part", ".partial", ".crdownload", ".aria2")


def unfinished_in(folder: Path) -> list[str]:
    """Names of files in a folder, or in what the hub's client keeps there, that a download has left unfinished."""
    places = (folder, folder / ".cache" / "huggingface" / "download")
    inside = (path for place in places if place.is_dir() for path in place.iterdir())
    return sorted(path.name for path in inside if path.suffix in _UNFINISHED)


def weights_file(path: Path) -> Path:
    """The path of weights that are there in full. Raises `UserError` for a file that is missing or no plain one, for what
    Git has in the place of a large file that was not fetched, and where only an unfinished download of it is there."""
    unfinished = unfinished_in(path.parent) if not path.exists() else []
    if unfinished:
        raise UserError(f"{path}: not there, but an unfinished download is ({unfinished[0]}); fetch it again")
    with regular_file(path).open("rb") as stream:
        if stream.read(len(_POINTER)) == _POINTER:
            raise UserError(f"{path}: a pointer of Git LFS, not the weights; run `git lfs pull` there, or fetch the file")
    return path


def names_on_path(path: Path) -> list[str]:
    """Names of the folders that lead to a file or folder, and its own; `org/name` for a repository in the hub's cache."""
    return [
        part.removeprefix("models--").replace("--", "/") if part.startswith("models--") else part
        for part in path.absolute().parts[1:]
    ]


def load_npz(path: Path) -> dict[str, Tensor]:
    """Arrays of a NumPy archive. Raises `UserError` for one that is missing, damaged, or holds Python objects."""
    weights_file(path)
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: torch.from_numpy(np.ascontiguousarray(archive[name])) for name in archive.files}
    except (*DAMAGED, OSError) as error:
        raise UserError(f"{path}: damaged weights ({_reason(error)}); fetch them again") from None


def load_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises `UserError` for one that is missing, damaged or no plain file."""
    weights_file(path)
    try:
        return safetensors.torch.load_file(path)
    except (*DAMAGED, OSError) as error:  # an offset outside the file arrives as an OSError
        raise UserError(f"{path}: damaged weights ({_reason(error)}); make or fetch them again") from None


def load_state(path: Path) -> dict[str, Tensor]:
    """Tensors of a `.pt` file, read without executing anything in it and held against the checksums it carries.

    Raises `UserError` for one that is missing, damaged, no plain file, or holds more than tensors.
    """
    state = load_checkpoint(path)
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: not a state dict of tensors")
    return state


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What a `.pt` file holds by name: tensors, numbers, texts, and dicts of them; read as `load_state` reads it."""
    weights_file(path)
    try:
        whole_file = zipfile.is_zipfile(path)
        damaged = _damaged_record(path) if whole_file else None
        # files of torch before 1.6 are no zip archives and cannot be mapped
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True, mmap=whole_file)
    except pickle.UnpicklingError:
        raise UserError(f"{path}: damaged, or holds more than tensors; only plain state dicts are read") from None
    except (*DAMAGED, OSError) as error:  # an offset outside the file arrives as an OSError
        raise UserError(f"{path}: damaged weights ({_reason(error)}); fetch them again") from None
    if damaged:
        raise UserError(f"{path}: damaged weights ({damaged} does not fit its checksum); fetch them again")
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise UserError(f"{path}: not a state dict of tensors")
    return state


def renamed(
    tensors: dict[str, Tensor], names: Mapping[str, str], where: object, optional: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The tensors by our names. names: theirs -> ours; a name of ours that ends with `.T` stands for the transpose. Raises
    `UserError` for one that is missing, and for one that `names` does not have: nothing in a file is ignored."""
    missing = sorted(set(names) - set(tensors) - set(optional))
    unknown = sorted(set(tensors) - set(names))
    if missing or unknown:
        parts = [f"lack {', '.join(missing)}"] * bool(missing) + [f"also hold {', '.join(unknown)[:120]}"] * bool(unknown)
        mend = "fetch them again" if missing else "another format, or more than is read: ask for it with such a file"
        raise UserError(f"{where}: the weights {' and '.join(parts)}; {mend}")
    found = {}
    for theirs, ours in names.items():
        if theirs not in tensors:
            continue
        if ours.endswith(".T") and tensors[theirs].dim() != 2:
            raise UserError(f"{where}: {theirs} is no matrix (shape {tuple(tensors[theirs].shape)})")
        found[ours.removesuffix(".T")] = tensors[theirs].T if ours.endswith(".T") else tensors[theirs]
    return found


def _damaged_record(path: Path) -> str | None:
    """A part of the archive that is not what its checksum says; torch itself looks at none. Files written without
    (`torch.serialization.set_crc32_options(False)`) have zeros there."""
    with zipfile.ZipFile(path) as archive:
        if not any(record.CRC for record in archive.infolist()):
            return None
        return archive.testzip()


def floats(tensors: dict[str, Tensor], where: object) -> dict[str, Tensor]:
    """The tensors in float32, contiguous, on the CPU. Raises `UserError` for one that holds no real numbers, or none."""
    made = {}
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or not tensor.is_floating_point() or not tensor.numel():
            kind = (
                "empty"
                if not tensor.numel()
                else str(tensor.dtype if tensor.layout == torch.strided else tensor.layout).removeprefix("torch.")
            )
            raise UserError(f"{where}: {name} is {kind}; weights must be dense floating-point numbers")
        try:
            made[name] = tensor.detach().cpu().float().contiguous()
        except (RuntimeError, MemoryError) as error:
            raise UserError(f"{where}: {name} of shape {tuple(tensor.shape)} cannot be read ({_reason(error)})") from None
    return made


def expected_shape(name: str, d_in: int, d_sae: int, d_out: int | None = None) -> tuple[int, ...]:
    """Shape of a tensor by its name: matrices, `b_dec`, `b_in`, and for every other name one number a latent. d_out: of what
    is written, `d_in` where None."""
    d_out = d_in if d_out is None else d_out
    shapes = {"W_enc": (d_in, d_sae), "W_gate": (d_in, d_sae), "W_dec": (d_sae, d_out), "b_dec": (d_out,)}
    return {**shapes, "b_in": (d_in,), "W_skip": (d_out, d_in)}.get(name, (d_sae,))


def check_shapes(tensors: dict[str, Tensor], d_in: int, d_sae: int, where: object, d_out: int | None = None) -> None:
    """Raises `UserError` for a tensor of another shape than the configuration says, and names a transposed matrix."""
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[0] != "W_enc", item[0] != "W_dec")):
        shape, expected = tuple(tensor.shape), expected_shape(name, d_in, d_sae, d_out)
        if shape != expected:
            transposed = " (it is transposed)" if len(shape) == 2 and shape[::-1] == expected else ""
            raise UserError(
                f"{where}: {name} has shape {shape}, expected {expected} for d_in {d_in} and d_sae {d_sae}{transposed}"
            )


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


# --- hooks -----------------------------------------------------------------------------------

_OWN = re.compile(r"blocks\.[0-9]{1,6}\.[A-Za-z_][A-Za-z0-9_.]*")
_MODULE = re.compile(r"(?:model\.layers|model\.decoder\.layers|transformer\.h|gpt_neox\.layers)\.([0-9]{1,6})")


def hook_of(name: str, where: object) -> str:
    """The hook that a name from a file stands for: TransformerLens' own names as they are, a Hugging Face layer by what
    it puts out (`model.layers.14` -> `blocks.14.hook_resid_post`).

    Empty stays empty. Raises `UserError` for any other name: a guess would feed the SAE something else. What a module inside
    a layer puts out (`model.layers.14.mlp`) is not always what is added to the stream: some families norm or scale it.
    """
    module = _MODULE.fullmatch(name)
    if module:
        return f"blocks.{int(module[1])}.hook_resid_post"
    if name and not _OWN.fullmatch(name):
        raise UserError(
            f"{where}: the hook {shown(name)} is not known; write TransformerLens' name of it, such as "
            "blocks.8.hook_resid_post or blocks.8.hook_mlp_out, or a layer such as model.layers.8"
        )
    return name
