"""Activations in shards: what training reads from them, from whom they come, and what a damaged one costs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_research.config.params import Params
from sae_research.lm.model import LanguageModel
from sae_research.runtime.cache import damage
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import read_json
from sae_research.runtime.workers import InProcess, Outcome, Unit
from sae_research.training import extraction
from sae_research.training.extraction import MANIFEST, Extraction, ExtractionWorker, extract, prepare
from sae_research.training.stream import ActivationStream
from tests.helpers.training import HOOK

HOOKS = [HOOK, "blocks.0.hook_resid_post"]


@pytest.fixture
def params(make_params: Callable[..., Params], tmp_path: Path) -> Params:
    made = make_params()
    return made.model_copy(
        update={"activation_caching": made.activation_caching.model_copy(update={"shards": [str(tmp_path / "out")]})}
    )


class Passes:
    """How often the language model ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.n = 0
        for name in ("activations", "activations_at"):
            real = getattr(LanguageModel, name)

            def counted(*given: Any, real: Any = real, **more: Any) -> Any:
                self.n += 1
                return real(*given, **more)

            monkeypatch.setattr(LanguageModel, name, counted)


def chunks(params: Params, work: Extraction) -> Iterator[dict[str, torch.Tensor]]:
    stream = ActivationStream(work.lm, work.contexts, params)
    for chunk in range(stream.n_chunks):
        yield {hook: acts.clone() for hook, acts in stream.read(chunk).items()}


def test_training_reads_shards_and_the_model_runs_no_more(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uncached = params.model_copy(update={"activation_caching": params.activation_caching.model_copy(update={"shards": []})})
    expected = list(chunks(uncached, prepare(uncached, HOOKS)))
    manifest = read_json(extract(params, HOOKS, tmp_path / "out", 1.0))
    assert "0.00 GB in 32 shards" in capsys.readouterr().out
    assert (manifest["dtype"], manifest["context_size"], manifest["contexts_per_chunk"]) == ("float32", 32, 16)
    assert len(manifest["shards"]) == 2 * len(expected) == 32 and {row["hook"] for row in manifest["shards"]} == set(HOOKS)
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "elsewhere"))  # a project without caches
    (tmp_path / "elsewhere").mkdir()
    work = prepare(params, HOOKS)  # loading the model runs it once, as a check
    passes = Passes(monkeypatch)
    for got, want in zip(chunks(params, work), expected, strict=True):
        assert torch.equal(got[HOOK], want[HOOK])
    assert passes.n == 0
    next(chunks(uncached, work))
    assert passes.n > 0, "without shards it would have run"


def test_what_is_there_is_kept_and_a_shard_cut_short_is_made_again(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    before = extract(params, [HOOK], out, 1.0).read_bytes()
    shard = out / read_json(out / MANIFEST)["shards"][3]["name"]
    with (shard / "activations.bin").open("r+b") as file:
        file.truncate(100)
    assert damage(shard) is not None
    passes = Passes(monkeypatch)
    assert extract(params, [HOOK], out, 1.0).read_bytes() == before
    assert "15 of 16 chunks are there" in capsys.readouterr().out and damage(shard) is None
    assert passes.n == 2, "one as a check when the model is loaded"


def test_an_interrupted_run_keeps_what_it_wrote(params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = ExtractionWorker.__call__, []

    def interrupted(self: ExtractionWorker, payload: bytes, shared: bytes) -> bytes:
        calls.append(payload)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(self, payload, shared)

    monkeypatch.setattr(ExtractionWorker, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract(params, [HOOK], tmp_path / "out", 1.0)
    extract(params, [HOOK], tmp_path / "out", 1.0)
    assert len(calls) == 6 + 11
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_a_worker_on_another_disk_sends_its_shards(params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extract(params, HOOKS, tmp_path / "out", 1.0)

    class Far(InProcess):
        def run(self, units: Sequence[Unit], shared: bytes = b"") -> Iterator[Outcome]:
            far = [
                unit._replace(payload=json.dumps(json.loads(unit.payload) | {"token": "none"}).encode()) for unit in units
            ]
            yield from super().run(far, shared)

    monkeypatch.setattr(extraction, "start_workers", lambda cluster, job, compute: Far(job))
    extract(params, HOOKS, tmp_path / "far", 1.0)
    files = {
        path.relative_to(tmp_path / "out"): path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    far = {path.relative_to(tmp_path / "far"): path.read_bytes() for path in (tmp_path / "far").rglob("*") if path.is_file()}
    assert far == files


def test_refusals(params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="more than --max-gb 0.0001"):
        extract(params, HOOKS, tmp_path / "out", 0.0001)
    with pytest.raises(UserError, match="hook"):
        extract(params, ["blocks.9.hook_resid_post"], tmp_path / "out", 1.0)
    assert not (tmp_path / "out").exists()

    def broken(self: ExtractionWorker, payload: bytes, shared: bytes) -> bytes:
        raise ValueError("no luck")

    monkeypatch.setattr(ExtractionWorker, "__call__", broken)
    with pytest.raises(UserError, match="16 of 16 chunks are missing; chunk 0: ValueError: no luck"):
        extract(params, [HOOK], tmp_path / "out", 1.0)
