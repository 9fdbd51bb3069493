"""Files under `.cache` changed at random between two runs: the second ends in the figures of the first."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from sae_research.config.params import Params
from sae_research.evals.core import evaluation
from sae_research.evals.sparse_probing import evaluation as sparse_probing
from sae_research.lm import LanguageModel, load_language_model
from sae_research.runtime import cache as cached_files
from sae_research.runtime.stages import StageFolder
from tests.helpers.evals_saes import everything
from tests.helpers.mutations import changed_bytes


@pytest.fixture(scope="module")
def lm(tiny_inputs: Path) -> LanguageModel:
    return load_language_model(str(tiny_inputs / "tiny"), "cpu")


@pytest.fixture
def params(tiny_inputs: Path, in_project: Path) -> Params:
    rows = [f"{label} text of words number {i},{label}" for label in ("cat", "dog") for i in range(120)]
    (in_project / "mine.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    return Params.model_validate(
        {
            "model": {"name": str(tiny_inputs / "tiny"), "device": "cpu", "llm_batch_size": 4},
            "text": {"dataset": str(tiny_inputs / "texts"), "context_size": 24},
            "core_eval": {
                "batch_size_prompts": 2,
                "n_eval_reconstruction_batches": 1,
                "n_eval_sparsity_variance_batches": 1,
            },
            "sparse_probing": {
                "dataset_names": [str(in_project / "mine.csv")],
                "context_length": 12,
                "k_values": [1],
                "probe_train_set_size": 16,
                "probe_test_set_size": 8,
            },
        }
    )


def figures(lm: LanguageModel, params: Params, *names: str) -> list[dict[str, Any]]:
    """Of both evaluations, as by a process that knows nothing of what was read before."""
    cached_files._found_intact.clear()
    saes = {name: sae for name, sae in everything().items() if name in names}
    stage = StageFolder(Path("unused"))
    return [dict(evaluation.evaluate(saes, lm, params)), dict(sparse_probing.evaluate(saes, lm, params, stage))]


def harm(path: Path, others: list[Path], rng: random.Random) -> str:
    """others: copies of all files as they were."""
    kind = rng.choice(["bytes", "bytes", "bytes", "missing", "folder", "exchanged", "rows"])
    alike = [other for other in others if other.name == path.name or other.parent.name == path.parent.name]
    if kind == "bytes":
        data, kind = changed_bytes(path.read_bytes(), rng)
        path.write_bytes(data)
    elif kind == "exchanged":
        path.write_bytes(rng.choice(alike).read_bytes() if alike else b"")
    elif kind == "rows":  # of the same length and sum
        data = path.read_bytes()
        path.write_bytes(data[::-1])
    else:
        path.unlink()
        if kind == "folder" and path.suffix != ".json":
            path.mkdir()
    return kind


@pytest.mark.parametrize(
    ("count", "names"), [(2, ["standard"]), pytest.param(60, ["standard", "mpsae_s3", "ihtp_k4"], marks=pytest.mark.slow)]
)
def test_damaged_caches_change_no_figure(
    lm: LanguageModel, params: Params, count: int, names: list[str], in_project: Path
) -> None:
    rng, seen = random.Random(count), Counter[str]()
    clean, cache, kept = figures(lm, params, *names), in_project / ".cache", in_project / "kept"
    shutil.copytree(cache, kept)
    for _ in range(count):
        shutil.rmtree(cache)
        shutil.copytree(kept, cache)
        files = sorted(path for path in cache.rglob("*") if path.is_file() and "numba" not in path.parts)
        chosen = rng.sample(files, min(6, len(files)))
        others = [kept / file.relative_to(cache) for file in files]
        harms = {path: harm(path, others, rng) for path in chosen}
        seen.update(harms.values())
        assert figures(lm, params, *names) == clean, {str(path.relative_to(cache)): kind for path, kind in harms.items()}
    print(dict(seen))
