"""Latent statistics in one streaming pass: what every latent fires on, how often and how strongly.

`collect_stats` writes stores (docs/analysis.md says what they hold), `load_stats` opens one.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import os
import shutil
from collections.abc import Generator, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sae_research.analysis import store as layout
from sae_research.analysis.accumulate import Accumulator, Firings, firings, joined
from sae_research.analysis.store import LatentStats, load_stats
from sae_research.config.params import Params
from sae_research.lm import LanguageModel, median_activation_norm, token_mask
from sae_research.runtime.cache import (
    cache_dir,
    cache_writes,
    caches_readable,
    prune,
    read_checked_json,
    seal,
    usable,
    write_checked_json,
)
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import file_sha256, fingerprint, write_bytes, write_json
from sae_research.saes import SparseAutoencoder, encode_each
from sae_research.saes.registry import code_fingerprint
from sae_research.text.corpus import text_fingerprint
from sae_research.text.tokens import Contexts, context_chunks, token_strings

__all__ = ["LatentStats", "collect_stats", "load_stats"]

SHARD_TOKENS = 65_536
"""At most what 16-bit token numbers tell apart."""
SHARD_ENTRIES = 16_000_000
"""A dense SAE's shards end earlier, so that memory stays bounded."""
CHUNK_TOKENS = 16_384
"""Tokens taken from the text at a time."""
MEDIAN_CONTEXTS = 16
"""Contexts that give the median norm which the mask compares with."""
ENCODE_ELEMENTS = 32_000_000
"""Dense activations held at a time."""
SAMPLE_LEVELS, SAMPLES_PER_LEVEL = 5, 5
"""Equal parts of a latent's firings by activation, and contexts drawn from each."""
OVERSAMPLE = 3
"""Firings drawn at random for each that is kept: levels are cut only once quantiles are known."""
PROGRESS, _LOCK = "progress.json", ".lock"
TEXT_ARRAYS = {"token_ids": np.int32, "document": np.int32, "counted": np.bool_}


def collect_stats(
    saes: Mapping[str, SparseAutoencoder], lm: LanguageModel, params: Params, progress: bool = False
) -> dict[str, LatentStats]:
    """Statistics of every latent of SAEs that read one hook, from one pass of the model over `params.analysis.tokens`
    tokens; by SAE name. What is in the cache is not computed again, an interrupted pass goes on where it stopped.

    Raises `UserError` for SAEs of several hooks, a crosscoder, an encoder that returns NaN, and text that ends too soon.
    """
    for sae in saes.values():
        if sae.cfg.is_crosscoder or sae.cfg.is_cross_layer:
            sae.cfg.check_one_hook("the analysis of latents")
    hooks = {sae.cfg.hook_name for sae in saes.values()}
    if len(hooks) != 1:
        raise UserError(f"one pass serves one hook, these SAEs read {', '.join(sorted(hooks))}; give them one after another")
    folders = {name: store_folder(sae, lm, params) for name, sae in saes.items()}
    missing = {name: saes[name] for name, folder in folders.items() if not is_collected(folder)}
    if missing:
        with ExitStack() as stack:
            stores = {}
            for name, sae in missing.items():
                if folders[name] not in [store.folder for store in stores.values()]:
                    stack.enter_context(_alone(folders[name]))
                    stores[name] = _Store(folders[name], name, sae, params)
            _fill(stores, {name: missing[name] for name in stores}, lm, params, progress)
        prune(cache_dir("latents"), params.analysis.max_gb, keep=folders.values())
    return {name: load_stats(folder) for name, folder in folders.items()}


def store_folder(sae: SparseAutoencoder, lm: LanguageModel, params: Params) -> Path:
    """Where the statistics of an SAE lie or will lie: addressed by weights, code, model, text and settings."""
    chosen = params.analysis
    key = fingerprint(
        {
            "sae": sae.weights_fingerprint(),
            "hook": sae.cfg.hook_name,
            "model": lm.fingerprint,
            "dtype": str(lm.dtype),
            "device": lm.device.type,
            "text": text_fingerprint(params.text, chosen.split),
            "context_size": params.text.context_size,
            "mask": params.token_mask.model_dump(),
            "seed": params.random_seed,
            "settings": chosen.model_dump(exclude={"max_gb"}),
            "code": code_fingerprint(__name__, classes=[type(sae)]),
        }
    )
    return cache_dir("latents") / key[:32]


def is_collected(folder: Path) -> bool:
    """Whether a store is finished, what was written, and may be read."""
    return (folder / layout.ABOUT).is_file() and usable(folder)


@contextmanager
def _alone(folder: Path) -> Generator[None]:
    """Only one process writes a store; another that tries says so instead of spoiling it."""
    with cache_writes(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _LOCK).touch()
    with (folder / _LOCK).open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{folder}: another process is computing these statistics; wait until it is done") from None
        yield


def _fill(
    stores: dict[str, _Store], saes: dict[str, SparseAutoencoder], lm: LanguageModel, params: Params, progress: bool
) -> None:
    """The pass: text in chunks, the model in batches, each SAE's activations into its store."""
    hook, size, batch_size = next(iter(saes.values())).cfg.hook_name, params.text.context_size, params.model.llm_batch_size
    wanted = -(-params.analysis.tokens // size)
    resumed = sorted({store.contexts for store in stores.values()})
    median = next((store.median for store in stores.values() if store.contexts), None)
    seen = 0
    with tqdm(
        total=wanted * size,
        initial=resumed[0] * size,
        desc="latent statistics",
        unit="tok",
        unit_scale=True,
        disable=not progress,
        mininterval=2,
        dynamic_ncols=True,
    ) as bar:
        for chunk in context_chunks(
            lm.tokenizer,
            lm.separator_id,
            params.text,
            params.analysis.split,
            params.analysis.tokens,
            max(1, CHUNK_TOKENS // size),
        ):
            if median is None:
                median = _median_norm(lm, hook, chunk, batch_size)
            start = min(max(resumed[0] - seen, 0), len(chunk.tokens))
            while start < len(chunk.tokens):
                # batches end where a store that got further begins
                end = min([start + batch_size, len(chunk.tokens), *(r - seen for r in resumed if r - seen > start)])
                tokens, documents = chunk.tokens[start:end], chunk.doc_ids[start:end]
                acts = lm.activations(tokens.to(lm.device), hook)
                counted = None if chunk.counted is None else chunk.counted[start:end]
                mask = token_mask(lm, tokens.to(lm.device), acts, params.token_mask, median, counted)
                due = {name: sae for name, sae in saes.items() if stores[name].contexts == seen + start}
                for name, found in _encoded(due, acts.float(), mask):
                    stores[name].add(found, tokens, documents, mask, median)
                bar.update(tokens.numel())
                start = end
            seen += len(chunk.tokens)
    for name, store in stores.items():
        store.finish(saes[name], lm, params, chunk)


def _median_norm(lm: LanguageModel, hook: str, text: Contexts, batch_size: int) -> float:
    """Median activation norm of the first contexts' tokens that are neither special nor first."""
    tokens, counted = text.tokens[:MEDIAN_CONTEXTS], None if text.counted is None else text.counted[:MEDIAN_CONTEXTS]
    acts = torch.cat([lm.activations(part.to(lm.device), hook).float() for part in tokens.split(batch_size)])
    return median_activation_norm(lm, tokens.to(lm.device), acts, counted)


def _encoded(saes: dict[str, SparseAutoencoder], acts: Tensor, mask: Tensor) -> Iterator[tuple[str, Firings]]:
    """(name, firings) of each SAE on a batch, a few contexts at a time where an SAE is wide."""
    if not saes:
        return
    widest = max(sae.cfg.d_sae for sae in saes.values())
    rows = max(1, ENCODE_ELEMENTS // (widest * acts.shape[1]))
    found: dict[str, list[Firings]] = {name: [] for name in saes}
    for x, kept in zip(acts.split(rows), mask.split(rows), strict=True):
        for name, z in encode_each(saes, x, kept):
            found[name].append(firings(z))
    for name, parts in found.items():
        yield name, parts[0] if len(parts) == 1 else joined(parts, [i * rows * acts.shape[1] for i in range(len(parts))])


class _Store:
    """A store being written. What is on disk after each shard is enough to go on from there."""

    def __init__(self, folder: Path, name: str, sae: SparseAutoencoder, params: Params) -> None:
        self.folder, self.name, self.size = folder, name, params.text.context_size
        chosen = params.analysis
        kept = SAMPLE_LEVELS * SAMPLES_PER_LEVEL
        self.gathered = Accumulator(
            sae.cfg.d_sae, self.size, sae.signed, chosen.top_contexts, OVERSAMPLE * kept, params.random_seed
        )
        self.shards: list[dict[str, Any]] = []
        self.median: float | None = None
        self.contexts = self.counted = 0
        self._firings: list[Firings] = []
        self._texts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._sha256: dict[str, str] = {}
        known = _left_by_another_run(folder)
        if known is None:
            _empty(folder)
        else:
            self._sha256 = known["sha256"]
            self.shards, self.median = known["shards"], known["median_norm"]
            self.contexts, self.counted = known["contexts"], known["counted_tokens"]
            with np.load(folder / known["state"]) as state:
                self.gathered.restore(dict(state))

    def add(self, found: Firings, tokens: Tensor, documents: Tensor, mask: Tensor, median: float) -> None:
        """The next contexts. tokens, documents, mask: [contexts, S]"""
        self.median = median
        self.gathered.add(found, documents.numpy().reshape(-1), self.contexts)
        self._firings.append(found)
        self._texts.append((tokens.numpy().astype(np.int32), documents.numpy().astype(np.int32), mask.cpu().numpy()))
        self.contexts += len(tokens)
        self.counted += int(mask.sum())
        held = sum(part[0].size for part in self._texts)
        if held + tokens.numel() > SHARD_TOKENS or sum(len(part.value) for part in self._firings) >= SHARD_ENTRIES:
            self._end_shard()

    def _end_shard(self) -> None:
        """Write what is held, then the state that includes it, then the file that points to both."""
        sizes = [part[0].size for part in self._texts]
        found = joined(self._firings, [0, *np.cumsum(sizes[:-1]).tolist()])
        number, last = len(self.shards), self.contexts
        arrays = dict(zip(TEXT_ARRAYS, (np.concatenate(column) for column in zip(*self._texts, strict=True)), strict=True))
        fits = np.uint16 if sum(sizes) <= SHARD_TOKENS else np.uint32
        arrays |= {"start": found.start, "token": found.token.astype(fits), "value": found.value}
        for name, array in arrays.items():
            place = f"{layout.SHARDS}/{number:05d}/{name}.npy"
            self._sha256[place] = _save(self.folder / place, array)
        self.shards.append({"contexts": [last - len(arrays["token_ids"]), last], "entries": len(found.value)})
        state = self.folder / f"state_{number:05d}.npz"
        written = {**self._sha256, state.name: _save_all(state, self.gathered.state())}
        write_checked_json(
            self.folder / PROGRESS,
            {
                "contexts": self.contexts,
                "counted_tokens": self.counted,
                "state": state.name,
                "median_norm": self.median,
                "shards": self.shards,
                "sha256": written,
            },
        )
        for old in self.folder.glob("state_*.npz"):
            if old != state:
                old.unlink()
        self._firings, self._texts = [], []

    def finish(self, sae: SparseAutoencoder, lm: LanguageModel, params: Params, text: Contexts) -> None:
        """Publish: arrays, text, vocabulary, and last of all the description."""
        if self._texts:
            self._end_shard()
        chosen, n = params.analysis, self.contexts
        for name, array in self.gathered.finished(SAMPLE_LEVELS, SAMPLES_PER_LEVEL).items():
            _save(self.folder / f"{name}.npy", array)
        for name, kind in TEXT_ARRAYS.items():
            whole = np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", kind, (n, self.size))
            for number, shard in enumerate(self.shards):
                part = self.folder / layout.SHARDS / f"{number:05d}" / f"{name}.npy"
                whole[slice(*shard["contexts"])] = np.load(part)
            whole.flush()
        write_json(self.folder / layout.DOCUMENTS, [list(pair) for pair in zip(text.documents, text.sources, strict=True)])
        write_json(self.folder / layout.VOCABULARY, token_strings(lm.tokenizer, lm.vocab_size))
        cfg = sae.cfg
        write_json(
            self.folder / layout.ABOUT,
            {
                "format": layout.FORMAT,
                "sae": {
                    "name": self.name,
                    "fingerprint": sae.weights_fingerprint(),
                    "form": cfg.form,
                    "d_in": cfg.d_in,
                    "d_sae": cfg.d_sae,
                    "signed": sae.signed,
                    "per_token": sae.per_token,
                    "causal": sae.causal,
                    "provenance": cfg.provenance,
                },
                "model": {"name": lm.name, "fingerprint": lm.fingerprint, "dtype": str(lm.dtype).removeprefix("torch.")},
                "hook": cfg.hook_name,
                "text": {
                    **params.text.model_dump(),
                    "split": chosen.split,
                    "fingerprint": text_fingerprint(params.text, chosen.split),
                },
                "mask": {**params.token_mask.model_dump(), "median_norm": self.median},
                "settings": chosen.model_dump(exclude={"max_gb"}),
                "seed": params.random_seed,
                "contexts": n,
                "context_size": self.size,
                "tokens": n * self.size,
                "counted_tokens": self.counted,
                "entries": sum(shard["entries"] for shard in self.shards),
                "shards": self.shards,
            },
        )
        for leftover in (
            *self.folder.glob("state_*.npz"),
            self.folder / PROGRESS,
            *(path for name in TEXT_ARRAYS for path in self.folder.glob(f"{layout.SHARDS}/*/{name}.npy")),
        ):
            leftover.unlink(missing_ok=True)
        seal(self.folder)


def _left_by_another_run(folder: Path) -> dict[str, Any] | None:
    """What an interrupted pass wrote of itself; None where there is none, or its files are not what it wrote."""
    known = read_checked_json(folder / PROGRESS) if caches_readable() else None
    if known is None:
        return None
    for name, digest in known["sha256"].items():
        if not (folder / name).is_file() or file_sha256(folder / name) != digest:
            print(f"{os.path.relpath(folder / name)}: not what was written; the pass begins again", flush=True)
            return None
    return known


def _empty(folder: Path) -> None:
    """Remove what is not to be gone on with, but not the lock that this process holds."""
    for path in folder.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _save(path: Path, array: np.ndarray) -> str:
    """Write an array; returns the file's SHA-256."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return _write(path, buffer.getvalue())


def _save_all(path: Path, arrays: dict[str, np.ndarray]) -> str:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return _write(path, buffer.getvalue())


def _write(path: Path, data: bytes) -> str:
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()
