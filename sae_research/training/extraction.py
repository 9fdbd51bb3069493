"""Activations of the training text, ahead of training: `sae-research extract`.

The text is cut into the chunks that the activation stream reads (`stream.chunk_contexts`), and every chunk becomes one shard
for each hook: a folder named after its content, with a list of checksums, written in one step and never changed. A run that
is interrupted loses the chunks at work; the next one goes on. With `cluster.address` many workers write. What reads
activations finds shards by their names (`activation_caching.shards`), on whatever machine they lie.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from sae_research.config.params import Params, check_params
from sae_research.lm import LanguageModel
from sae_research.lm.activations import collect_hooks, entry_names
from sae_research.runtime.cache import CHECKSUMS, intact, new_entry
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import read_json, write_json
from sae_research.runtime.workers import Job, Unit, start_workers
from sae_research.text.tokens import StoredContexts
from sae_research.training.session import load_model, training_text
from sae_research.training.stream import chunk_contexts

MANIFEST = "manifest.json"
FORMAT = "sae_research activations 1"
_FIRST, _LENGTH = "big", 8
"""Answers of a worker without the driver's disk: length of a JSON header, header, files."""


class Extraction(NamedTuple):
    """What is to be written."""

    lm: LanguageModel
    contexts: Tensor | StoredContexts
    hooks: list[str]
    size: int
    """Contexts of a chunk."""

    @property
    def n_chunks(self) -> int:
        return -(-len(self.contexts) // self.size)

    @property
    def n_bytes(self) -> int:
        """Of all shards."""
        per_token = sum(self.lm.d_in(hook) for hook in self.hooks) * torch.empty(0, dtype=self.lm.dtype).element_size()
        return self.contexts.numel() * per_token

    def rows(self, chunk: int) -> list[Tensor]:
        return list(self.contexts[chunk * self.size : (chunk + 1) * self.size])

    def names(self, chunk: int) -> dict[str, str]:
        """Of a chunk's shards, by hook."""
        return entry_names(self.lm, self.hooks, self.rows(chunk))


def prepare(params: Params, hooks: Sequence[str]) -> Extraction:
    """Load the model and tokenise the training text. Raises `UserError` for a hook the model lacks."""
    lm = load_model(params)
    for hook in hooks:
        lm.d_in(hook)
    _, contexts = training_text(params, lm)
    return Extraction(lm, contexts.tokens, list(hooks), chunk_contexts(params, params.text.context_size))


def extract(params: Params, hooks: Sequence[str], output: Path, max_gb: float) -> Path:
    """Write all shards into `output`, those that lie there already excepted, and their manifest; returns its path.

    Raises `UserError` before any work where they would take more than `max_gb` or than the disk has free, and afterwards
    where a chunk could not be computed; what is finished stays.
    """
    work = prepare(params, hooks)
    _check_size(work, output, max_gb)
    output.mkdir(parents=True, exist_ok=True)
    names = [work.names(chunk) for chunk in range(work.n_chunks)]
    missing = [chunk for chunk, of in enumerate(names) if not all(intact(output / name) for name in of.values())]
    print(f"{work.n_chunks - len(missing)} of {work.n_chunks} chunks are there", flush=True)
    failures = _compute(params, work, output, missing, names) if missing else {}
    _write_manifest(work, output, [of for chunk, of in enumerate(names) if chunk not in failures])
    if failures:
        chunk, why = next(iter(failures.items()))
        raise UserError(f"{len(failures)} of {work.n_chunks} chunks are missing; chunk {chunk}: {why}")
    return output / MANIFEST


def _check_size(work: Extraction, output: Path, max_gb: float) -> None:
    gigabytes = work.n_bytes / 1e9
    print(
        f"{work.contexts.numel():,} tokens at {', '.join(work.hooks)} in {str(work.lm.dtype).removeprefix('torch.')}: "
        f"{gigabytes:.2f} GB in {work.n_chunks * len(work.hooks)} shards",
        flush=True,
    )
    if gigabytes > max_gb:
        raise UserError(f"the shards take {gigabytes:.2f} GB, more than --max-gb {max_gb:g}; raise it, or lower --tokens")
    place = next(folder for folder in (output, *output.absolute().parents) if folder.exists())
    there = sum(file.stat().st_size for file in output.rglob("*") if file.is_file()) if output.is_dir() else 0
    free = shutil.disk_usage(place).free
    if work.n_bytes - there > free:
        raise UserError(f"{output}: the shards take {gigabytes:.2f} GB, the disk has {free / 1e9:.2f} free")


def _compute(
    params: Params, work: Extraction, output: Path, missing: Sequence[int], names: Sequence[dict[str, str]]
) -> dict[int, str]:
    """Have the chunks written; returns why some were not."""
    seen_by_all = output / f".{uuid.uuid4().hex}"
    argument = {"params": params.model_dump(mode="json"), "hooks": work.hooks, "output": str(output.absolute())}
    job = Job(f"{__name__}:extraction_worker", json.dumps(argument).encode(), "sae_research.lm.load:device_memory")
    workers = start_workers(params.cluster, job, ExtractionWorker(work, params, output))
    failures: dict[int, str] = {}
    seen_by_all.touch()
    try:
        units = [
            Unit(f"chunk {chunk}", json.dumps({"chunk": chunk, "names": names[chunk], "token": seen_by_all.name}).encode())
            for chunk in missing
        ]
        with tqdm(total=len(units), desc="extract", unit="chunk", dynamic_ncols=True) as bar:
            for outcome in workers.run(units):
                if outcome.value is None:
                    failures[json.loads(outcome.unit.payload)["chunk"]] = outcome.failure
                else:
                    _write_shards(outcome.value, output)
                bar.update()
    finally:
        seen_by_all.unlink(missing_ok=True)
        workers.close()
    return failures


def _write_manifest(work: Extraction, output: Path, chunks: Sequence[dict[str, str]]) -> None:
    listed = [
        {"name": name, "hook": hook, "chunk": chunk, "files": read_json(output / name / CHECKSUMS)}
        for chunk, of in enumerate(chunks)
        for hook, name in of.items()
    ]
    about = {
        "format": FORMAT,
        "model": work.lm.name,
        "dtype": str(work.lm.dtype).removeprefix("torch."),
        "d_in": {hook: work.lm.d_in(hook) for hook in work.hooks},
        "context_size": work.contexts.shape[1],
        "contexts_per_chunk": work.size,
    }
    write_json(output / MANIFEST, {**about, "shards": listed})


# --- a worker --------------------------------------------------------------------------------


def extraction_worker(argument: bytes) -> ExtractionWorker:
    """In a process other than the driver's."""
    given = json.loads(argument)
    params = check_params(given["params"], "the driver's parameters")
    return ExtractionWorker(prepare(params, given["hooks"]), params, Path(given["output"]))


class ExtractionWorker:
    """Writes the shards of one chunk after another."""

    def __init__(self, work: Extraction, params: Params, output: Path) -> None:
        self._work, self._params, self._output = work, params, output

    def __call__(self, payload: bytes, shared: bytes) -> bytes:
        """Nothing where the shards are on the driver's disk now, else the shards themselves."""
        asked = json.loads(payload)
        rows = self._work.rows(asked["chunk"])
        if self._work.names(asked["chunk"]) != asked["names"]:
            raise UserError(
                "model, text or code here are not the driver's; give every node the same files (docs/cluster.md)"
            )
        if (self._output / asked["token"]).exists():  # the driver's disk
            self._write(rows, self._output)
            return b""
        with tempfile.TemporaryDirectory() as folder:
            self._write(rows, Path(folder))
            return _packed(Path(folder), asked["names"].values())

    def _write(self, rows: list[Tensor], folder: Path) -> None:
        caching = self._params.activation_caching.model_copy(update={"enabled": True, "shards": []})
        batch_size = self._params.model.llm_batch_size
        collect_hooks(self._work.lm, self._work.hooks, rows, batch_size, caching, shards=folder)


def _packed(folder: Path, names: Iterable[str]) -> bytes:
    files = {f"{name}/{file.name}": file.read_bytes() for name in names for file in sorted((folder / name).iterdir())}
    header = json.dumps({name: len(data) for name, data in files.items()}).encode()
    return b"".join([len(header).to_bytes(_LENGTH, _FIRST), header, *files.values()])


def _write_shards(packed: bytes, output: Path) -> None:
    """Write what a worker on another disk sent."""
    if not packed:
        return
    length = int.from_bytes(packed[:_LENGTH], _FIRST)
    header, position, shards = json.loads(packed[_LENGTH : _LENGTH + length]), _LENGTH + length, {}
    for path, size in header.items():
        name, _, file = path.partition("/")
        shards.setdefault(name, {})[file] = packed[position : position + size]
        position += size
    for name, files in shards.items():
        with new_entry(output / name) as folder:
            for file, data in files.items():
                if file != CHECKSUMS:
                    (folder / file).write_bytes(data)
        if json.loads(files[CHECKSUMS]) != read_json(output / name / CHECKSUMS):
            raise UserError(f"{output / name}: not what the worker wrote; run it again")
