"""SCR and TPP against stock SAE Bench 0.6.0, in one run on the same model, texts, tasks and SAEs.

    make repro && python -m benchmarks.scr_tpp

Counted on either side: the model's pass over the texts, training the probes, encoding and scoring every SAE at every
threshold; ours in both definitions and with intervals. Not counted: loading models, reading the tasks, imports. Ours
computes everything afresh (no cache, so TPP gains nothing from sparse probing here). Stock has its best setting:
activations and probes of the first SAE are kept for the others. Both encode with our encoders. Texts are few and
thresholds three, because stock encodes every test text anew for each of them; with the seven of params.yaml the ratio is
about twice as large.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import stock, stock_scr_tpp  # first: they switch jaxtyping off

import torch  # isort: skip

from sae_research.errors import run_main  # isort: skip
from sae_research.evals.inputs import SAE_FOLDER, load_saes
from sae_research.evals.scr_tpp import evaluate_scr, evaluate_tpp
from sae_research.evals.scr_tpp.evaluate import tpp_settings
from sae_research.evals.scr_tpp.stage import Settings
from sae_research.lm import LanguageModel, load_language_model
from sae_research.lm.load import packaged_folder
from sae_research.params import SCR, TPP, Params, load_params
from sae_research.saes import SparseAutoencoder, encode_each
from sae_research.store import StageFolder
from sae_research.text.crossed_tasks import load_crossed_tasks
from sae_research.text.tasks import load_task

SCR_TASK, TPP_TASK = "film_or_restaurant_by_sentiment", "code_language"
SETTINGS = {"train_set_size": 32, "test_set_size": 16, "context_length": 24, "n_values": [5, 20, 100]}


def compare(saes: dict[str, SparseAutoencoder], lm: LanguageModel, model: Any,
            params: Params) -> dict[str, tuple[float, float]]:
    """Row -> (our seconds, stock's). model: the same one as `stock.hooked_model`."""
    params = params.model_copy(update={
        "activation_caching": params.activation_caching.model_copy(update={"enabled": False}),
        "scr": SCR(dataset_names=[SCR_TASK], **SETTINGS), "tpp": TPP(dataset_names=[TPP_TASK], **SETTINGS)})
    rows: dict[str, tuple[float, float]] = {}
    _warm_up(saes)
    crossed = load_crossed_tasks(SCR_TASK, 32, 16, params.random_seed, lambda *reason: print(*reason))
    tasks = [load_task(TPP_TASK, 32, 16, params.random_seed)]
    scr_settings = Settings(*(getattr(params.scr, field) for field in Settings._fields))
    for row, evaluate, run, inputs, settings in (
            ("SCR", evaluate_scr, stock_scr_tpp.scr, crossed, scr_settings),
            ("TPP", evaluate_tpp, stock_scr_tpp.tpp, tasks, tpp_settings(params))):
        with tempfile.TemporaryDirectory() as folder:
            start = time.perf_counter()
            for _ in evaluate(saes, lm, params, StageFolder(Path(folder))):
                pass
            ours, start = time.perf_counter() - start, time.perf_counter()
            for sae in saes.values():
                run(sae, model, inputs, settings, params.random_seed, params.model.llm_batch_size, Path(folder) / "stock")
            rows[row] = ours, time.perf_counter() - start
    rows["SCR and TPP"] = tuple(sum(seconds) for seconds in zip(*rows.values(), strict=True))
    return rows


def _warm_up(saes: dict[str, SparseAutoencoder]) -> None:
    """Encode a few tokens, so that neither side pays for the compilation of kernels."""
    for sae in saes.values():
        x = torch.randn(2, 8, sae.cfg.d_in, generator=torch.Generator().manual_seed(0)).to(sae.W_dec.device)
        for mask in (None, torch.ones(2, 8, dtype=torch.bool, device=x.device)):
            for _ in encode_each({"sae": sae}, x, mask):
                pass


def main() -> None:
    os.environ["SAE_RESEARCH_NO_CACHE"] = "1"
    params = load_params()
    lm = load_language_model(params.model.name, "cpu")
    saes = dict(list(load_saes(SAE_FOLDER, lm).items())[:8])
    print(", ".join(saes))
    model = stock.hooked_model(packaged_folder(params.model.name))
    for row, (ours, theirs) in compare(saes, lm, model, params).items():
        print(f"{row:58}{ours:8.1f}s{theirs:8.1f}s{theirs / ours:7.1f}x")


if __name__ == "__main__":
    run_main(main)
