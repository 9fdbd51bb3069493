"""k-sparse probing on sae-probes: ours against SAE Bench 0.6.0 on the same SAEs, rows and context length.

Where the time goes depends on the texts. On names stock spends it on probes; on sentences both sides spend it on the
model's pass, in which stock also reads padding (batches in the file's order), copies of a text, and texts that several
tasks share. Over all 113 tasks it reads 3.4 times the tokens that ours does, at 300 rows a task and its own context.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import pandas as pd

from benchmarks import stock_sae_probes
from sae_research.config.evaluation_params import SparseProbingSaeProbes
from sae_research.config.params import Params
from sae_research.evals import sae_probes
from sae_research.evals.sae_probes.tasks import TaskRows, chosen_names, read_rows, task_names
from sae_research.lm import LanguageModel
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SparseAutoencoder

STOCK_CONTEXT = 1024
BLOCKS = {
    "names": tuple(task_names()[68:74]),
    "sentences": ("87_glue_cola", "92_glue_sst2"),
}
"""Tasks timed together: names of places (119_us_state_TX to 124_world_country_United_States), and two on sentences."""


def stock_rows(config: SparseProbingSaeProbes, seed: int) -> dict[str, pd.DataFrame]:
    """The rows that SAE Bench's split draws from, by task: all that SAE Bench is given."""
    found = {}
    for name in chosen_names(config):
        frame = read_rows(name)
        labels = frame["target"].astype("category").cat.codes.to_numpy()
        found[name] = frame.iloc[TaskRows(frame["prompt"].tolist(), labels, seed).of_sae_bench(config.max_texts)]
    return found


def compare(
    saes: dict[str, SparseAutoencoder],
    lm: LanguageModel,
    model: object,
    params: Params,
    blocks: tuple[str, ...] = tuple(BLOCKS),
) -> dict[str, tuple[float, float]]:
    """Row -> (our seconds, SAE Bench's), with agreement printed for every SAE. model: the same one as `stock.hooked_model`.

    Counted are tokenising, the model's pass, encoding, all probes and writing results, on either side from nothing; not
    counted are imports and loading the model. Rows are those of `max_texts`, the context length is SAE Bench's own. Ours
    scores its own definition beside SAE Bench's, with the texts that needs beyond SAE Bench's. SAE Bench keeps the model's
    activations for later SAEs and the baseline (its best setting). Only per-token SAEs take part: stock cannot encode
    sequences. `SAE_RESEARCH_NO_CACHE=1` must be set, and activation caching off.
    """
    saes = {name: sae for name, sae in saes.items() if sae.per_token}
    return {
        f"sae-probes, {block}, both definitions; stock keeps activations": _block(saes, lm, model, params, block)
        for block in blocks
    }


def _block(
    saes: dict[str, SparseAutoencoder], lm: LanguageModel, model: object, params: Params, block: str
) -> tuple[float, float]:
    config = params.sparse_probing_sae_probes.model_copy(
        update={"dataset_names": list(BLOCKS[block]), "context_length": STOCK_CONTEXT}
    )
    params = params.model_copy(update={"sparse_probing_sae_probes": config})
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        stage = StageFolder(Path(folder) / "ours")
        ours = {}
        for name, result in sae_probes.evaluate(saes, lm, params, stage):
            stage.write_result(name, result)
            ours[name] = result
        seconds, start = time.perf_counter() - start, time.perf_counter()
        theirs = stock_sae_probes.sae_probes(
            saes, model, stock_rows(config, params.random_seed), config, params.random_seed, Path(folder)
        )
        stock_seconds = time.perf_counter() - start
    for name in saes:
        both = [results[name]["eval_result_metrics"]["sae"] for results in (ours, theirs)]
        gap = max(abs(both[0][key] - value) for key, value in both[1].items() if value is not None)
        print(
            f"sae-probes, {block}, {name}: top-1 {both[0]['sae_top_1_test_accuracy']:.3f}, largest difference of a mean "
            f"{gap:.1e}"
        )
    return seconds, stock_seconds
