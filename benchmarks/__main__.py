"""Every speed that this project claims, against what exists, both sides in one run on the same inputs.

    make repro && make bench                       # all parts
    python -m benchmarks core scr_tpp --saes 4     # some

Both sides compute everything afresh; neither loading models nor imports are counted. What else is counted stands in the
docstring of each part's `compare`.
"""

from __future__ import annotations

import argparse
import importlib
import os

import torch

from benchmarks import stock
from sae_research.errors import UserError, run_main
from sae_research.evals.inputs import SAE_FOLDER, load_saes
from sae_research.lm import load_language_model
from sae_research.lm.load import packaged_folder
from sae_research.params import load_params

PARTS = ("core_probing", "scr_tpp", "absorption", "sae_probes", "unlearning", "ravel", "autointerp", "training", "transfer",
         "analysis", "dashboards")
"""Modules of this package, each with `compare(saes, lm, model, params) -> {row: (our seconds, theirs)}`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"which of {', '.join(PARTS)}; default all")
    parser.add_argument("--saes", type=int, default=8, help="how many SAEs, in the manifest's order (default 8)")
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        raise UserError(f"unknown part {', '.join(unknown)}; known: {', '.join(PARTS)}")
    os.environ["SAE_RESEARCH_NO_CACHE"] = "1"
    params = load_params()
    params = params.model_copy(update={
        "activation_caching": params.activation_caching.model_copy(update={"enabled": False})})
    lm = load_language_model(params.model.name, "cpu")
    saes = dict(list(load_saes(SAE_FOLDER, lm).items())[:options.saes])
    model = stock.hooked_model(packaged_folder(params.model.name))
    print(f"{len(saes)} SAEs, {torch.get_num_threads()} threads: {', '.join(saes)}\n", flush=True)
    rows: dict[str, tuple[float, float]] = {}
    for part in options.parts or PARTS:
        found = importlib.import_module(f"benchmarks.{part}").compare(saes, lm, model, params)
        print(table(found), flush=True)
        rows |= found
    print(f"\n{table(rows)}")


def table(rows: dict[str, tuple[float, float]]) -> str:
    """One line a row: our seconds, theirs, and how many times ours theirs are."""
    lines = [f"{'':72}{'ours':>9}{'theirs':>9}{'ratio':>8}"]
    lines += [f"{name:72}{ours:8.1f}s{theirs:8.1f}s{theirs / ours:7.1f}x" for name, (ours, theirs) in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
