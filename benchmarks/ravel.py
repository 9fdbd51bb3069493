"""RAVEL: ours against SAE Bench 0.6.0 on the same SAEs, known prompts and numbers of pairs."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from benchmarks import stock_ravel
from sae_research.config.params import Params
from sae_research.evals.harness import by_hook
from sae_research.evals.ravel.evaluation import findings_of, mean_scores, sae_bench_scores
from sae_research.evals.ravel.pairs import build_tasks
from sae_research.evals.ravel.patches import PromptActivations, Swap
from sae_research.evals.ravel.prompts import known_prompts
from sae_research.lm import LanguageModel
from sae_research.lm.load import packaged_folder
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SparseAutoencoder

ALONE, BOTH = "RAVEL, SAE Bench's definition", "RAVEL, both definitions"
AT_MOST = 1
"""SAEs."""


def compare(
    saes: dict[str, SparseAutoencoder], lm: LanguageModel, model: object, params: Params
) -> dict[str, tuple[float, float]]:
    """Row -> (our seconds, SAE Bench's), with both sides' scores printed, of the first SAE: either side's time grows
    with their number alike. model: unused, SAE Bench's RAVEL runs on the Hugging Face model.

    Counted are the prompts' activations, encoding, learning the masks and asking the patched model; not counted are
    loading and finding out what the model knows, which either side does once per model. SAE Bench is helped twice: the
    weights are frozen, so it computes no gradients of them, and its layer look-up is mended
    (`benchmarks/stock_ravel.py`). It drops each attribute's incomplete last batches; ours uses them. Only per-token SAEs
    of one entity class at `hook_resid_post` take part: stock knows no other hook. `activation_caching.enabled` must be
    false, or the activations may come from the cache.
    """
    fit = [name for name, sae in saes.items() if sae.per_token and sae.cfg.hook_name.endswith("hook_resid_post")]
    saes = {name: saes[name] for name in fit[:AT_MOST]}
    with tempfile.TemporaryDirectory() as folder:
        stage = StageFolder(Path(folder))
        known = known_prompts(lm, params, stage)
        ours: dict[str, float] = {}
        for row, definitions in ((ALONE, ("sae_bench",)), (BOTH, ("sae_bench", "lab_v1"))):
            start = time.perf_counter()
            for members in by_hook(saes):
                group = PromptActivations(lm, members.hook, known, params)
                tasks = build_tasks(known, group.usable, params, stage)
                for name in members.infos:
                    sae = saes[name]
                    swap = Swap(sae, group.entity_latents({name: sae})[name], group)
                    found = findings_of(swap, tasks, params, definitions)
                    scores = mean_scores(
                        {
                            task.name: sae_bench_scores(known, task.sae_bench.test, found[task.name]["sae_bench"]["answers"])
                            for task in tasks
                        },
                        tasks,
                    )
                    print(f"RAVEL, {name}: ours cause {scores.cause:.3f}, isolation {scores.isolation:.3f}")
            ours[row] = time.perf_counter() - start
    start = time.perf_counter()
    for name, sae in saes.items():
        stock = [
            stock_ravel.one_attribute(
                sae,
                lm,
                known,
                task.attribute,
                params,
                f"{params.random_seed} {task.entity_class} {task.attribute}",
                str(packaged_folder(params.model.name)),
            )["scores"]
            for task in tasks
        ]
        cause, isolation = (sum(one[key] for one in stock) / len(stock) for key in ("cause_score", "isolation_score"))
        print(f"RAVEL, {name}: stock cause {cause:.3f}, isolation {isolation:.3f}")
    their_time = time.perf_counter() - start
    return {row: (seconds, their_time) for row, seconds in ours.items()}
