"""Every speed that this project claims, against what exists, both sides in one run on the same inputs.

    make bench                                             # all parts, twenty minutes on 2 cores
    python -m benchmarks core_probing scr_tpp --saes 8     # some, on more SAEs
    python -m benchmarks transfer --record                 # keeps them in docs/bench.json, and writes docs/speed.md's tables

`growth` has no other side: it prints what one more SAE costs in each evaluation beside its arithmetic floor. Where the
pipeline has prepared no SAEs yet, it trains and prepares them first. Both sides compute everything afresh; neither
loading models nor imports are counted. What else is counted stands in the docstring of each part's `compare`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.pages import write_between
from sae_research.runtime.errors import UserError, run_main
from sae_research.runtime.files import read_json, round_significant, write_json
from sae_research.runtime.formatting import markdown_table

if TYPE_CHECKING:
    from sae_research.saes import SparseAutoencoder

PARTS: dict[str, dict[str, Any]] = {
    "core_probing": {"batches": 2, "tasks": 1},
    "transcoders": {},
    "crosscoders": {},
    "scr_tpp": {},
    "absorption": {"words_per_letter": 6},
    "sae_probes": {},
    "unlearning": {"questions": 2},
    "ravel": {},
    "autointerp": {},
    "training": {},
    "transcoder_training": {},
    "transfer": {"n_tokens": 1024},
    "analysis": {"tokens": 8192, "latents": 2},
    "dashboards": {},
    "pursuit": {},
    "growth": {},
}
"""Modules of this package, each with `compare(saes, lm, model, params, **sizes) -> {row: (our seconds, theirs)}`, and sizes
that keep the whole short."""
RECORD, PAGE = Path("docs/bench.json"), Path("docs/speed.md")
TABLES = {
    "evaluations": ("core_probing", "scr_tpp", "absorption", "sae_probes", "unlearning", "ravel", "autointerp"),
    "training": ("training",),
    "analysis": ("analysis", "dashboards", "transfer"),
}
"""Tables of the page, each of some parts; those that keep a record of their own are not among them."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"which of {', '.join(PARTS)}; default all")
    parser.add_argument("--saes", type=int, default=3, help="how many SAEs, from all over the manifest (default 3)")
    parser.add_argument(
        "--record", action="store_true", help="keep the rows in docs/bench.json, and write the tables of docs/speed.md anew"
    )
    options = parser.parse_args()
    unknown = [part for part in options.parts if part not in PARTS]
    if unknown:
        raise UserError(f"unknown part {', '.join(unknown)}; known: {', '.join(PARTS)}")
    prepare_saes(Path.cwd())
    import torch  # imports take seconds that --help need not wait

    from benchmarks import stock
    from sae_research.config.params import load_params
    from sae_research.evals.harness import PreparedSAEs
    from sae_research.lm import load_language_model
    from sae_research.lm.load import packaged_folder
    from sae_research.saes.sources import PREPARED

    os.environ["SAE_RESEARCH_NO_CACHE"] = "1"
    params = load_params()
    params = params.model_copy(
        update={"activation_caching": params.activation_caching.model_copy(update={"enabled": False})}
    )
    lm = load_language_model(params.model.name, "cpu")
    saes = _some(dict(PreparedSAEs(PREPARED, lm)), options.saes)
    model = stock.hooked_model(packaged_folder(params.model.name))
    print(f"{len(saes)} SAEs, {torch.get_num_threads()} threads: {', '.join(saes)}\n", flush=True)
    rows: dict[str, tuple[float, float]] = {}
    for part in options.parts or PARTS:
        found = importlib.import_module(f"benchmarks.{part}").compare(saes, lm, model, params, **PARTS[part])
        if found:
            print(table(found), flush=True)
        if found and options.record:  # kept as soon as it is measured
            keep(part, found, {"saes": len(saes), "threads": torch.get_num_threads()})
        rows |= found
    if rows:
        print(f"\n{table(rows)}")


def keep(part: str, rows: dict[str, tuple[float, float]], here: dict[str, int]) -> None:
    """Put a part's rows into the record in place of its earlier ones, and the tables of the record into the page."""
    record = read_json(RECORD) if RECORD.is_file() else {}
    found = {name: {"ours": ours, "theirs": theirs} for name, (ours, theirs) in rows.items()}
    write_json(RECORD, record | {part: {**here, "rows": round_significant(found, 3)}})
    for name in TABLES:
        write_between(PAGE, f"<!-- {name} -->", f"<!-- end of {name} -->", recorded_table(name))


def recorded_table(name: str, record: Path = RECORD) -> str:
    """One of the page's tables: either side's seconds, and how many times ours theirs are."""
    kept = read_json(record)
    counted = ["saes", "threads"] if name == "evaluations" else ["threads"]  # other parts do not use the SAEs at hand
    rows = [
        [what, *(str(part[key]) for key in counted), *_seconds(row)]
        for part in (kept[key] for key in TABLES[name] if key in kept)
        for what, row in part["rows"].items()
    ]
    return markdown_table(["", *("SAEs" if key == "saes" else key for key in counted), "ours", "theirs", "ratio"], rows)


def _seconds(row: dict[str, float]) -> tuple[str, str, str]:
    return f"{row['ours']:.3g} s", f"{row['theirs']:.3g} s", f"{row['theirs'] / row['ours']:.1f}×"


def prepare_saes(root: Path) -> None:
    """Train and prepare the SAEs of `params.yaml` where that was not done yet. Raises `UserError` where it fails."""
    from sae_research.runtime.workspace import prepare

    if (root / "downloaded_saes/manifest.json").is_file():
        return
    for line in prepare(root):
        print(line)
    print("no SAEs are prepared yet: dvc repro setup, some minutes", flush=True)
    if subprocess.run(["dvc", "repro", "setup"], cwd=root, check=False).returncode:
        raise UserError("the SAEs to compare could not be prepared: dvc repro setup says why, above")


def _some(saes: dict[str, SparseAutoencoder], count: int) -> dict[str, SparseAutoencoder]:
    """Every n-th SAE, the first among them: one of each kind rather than one family."""
    names = list(saes)
    return {names[i * len(names) // count]: saes[names[i * len(names) // count]] for i in range(min(count, len(names)))}


def table(rows: dict[str, tuple[float, float]]) -> str:
    """One line a row: our seconds, theirs, and how many times ours theirs are."""
    lines = [f"{'':72}{'ours':>9}{'theirs':>9}{'ratio':>8}"]
    lines += [f"{name:72}{ours:8.3g}s{theirs:8.3g}s{theirs / ours:7.1f}x" for name, (ours, theirs) in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    run_main(main)
