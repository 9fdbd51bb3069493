"""What a sparsity coefficient of each recipe gives on a short stream: the record and the table of docs/training.md.

    python -m benchmarks.coefficients        # some minutes on two cores; writes docs/coefficients.json and the table

SAEs of 2,304 latents at the hook, model and text of `params.yaml`, all other settings at their defaults, in one run.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from benchmarks.pages import write_between
from sae_research.runtime.errors import run_main
from sae_research.runtime.files import project_root, read_json, round_significant, slugify, write_json
from sae_research.runtime.formatting import amount, markdown_table, number

RECORD, PAGE = Path("docs/coefficients.json"), Path("docs/training.md")
BEGIN, END = "<!-- coefficients -->", "<!-- end of coefficients -->"
FOLDER = Path("output/coefficients")
TOKENS, D_SAE = 65_536, 2_304
GRID: dict[str, tuple[str, tuple[float, ...]]] = {
    "top_k": ("k", (32,)),
    "standard": ("l1_coefficient", (0.06, 0.08, 0.12)),
    "gated": ("l1_coefficient", (0.05, 0.1, 0.2)),
    "gated_rajamanoharan": ("l1_coefficient", (0.05, 0.1, 0.2)),
    "jump_relu": ("target_l0", (32,)),
    "hard_concrete": ("l0_coefficient", (0.0001, 0.0006, 0.003)),
    "gated_hard_concrete": ("l0_coefficient", (0.0005, 0.002, 0.01)),
}
"""By recipe the setting that decides its sparsity, and values of it."""
MEASURED = ("l0", "variance_explained", "fraction_alive")


def main() -> None:
    from sae_research.config.params import load_params
    from sae_research.training.stage import train

    root, params = project_root(), load_params()
    saes = {
        slugify(f"{recipe} {value}"): {"recipe": recipe, "d_sae": D_SAE, key: value}
        for recipe, (key, values) in GRID.items()
        for value in values
    }
    chosen = type(params.train).model_validate(params.train.model_dump() | {"saes": saes, "tokens": TOKENS})
    report = train(params.model_copy(update={"train": chosen}), root / FOLDER)
    shutil.rmtree(root / FOLDER)
    write_json(root / RECORD, recorded(report, saes))
    write_between(root / PAGE, BEGIN, END, table(root / RECORD))


def recorded(report: dict[str, Any], saes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is kept of a run."""
    rows = [
        {"recipe": sae["recipe"], "key": (key := GRID[sae["recipe"]][0]), "value": sae[key]}
        | {what: report["saes"][name]["held_out"][what] for what in MEASURED}
        for name, sae in saes.items()
    ]
    return round_significant({key: report[key] for key in ("tokens", "model_name", "hook_name", "text")} | {"rows": rows})


def table(record: Path) -> str:
    """What was measured, in a line, and a row for each SAE."""
    found = read_json(record)
    head = (
        f"{amount(found['tokens'])} tokens of `{found['text']}` at `{found['hook_name']}` of `{found['model_name']}`, "
        f"{D_SAE:,} latents; held-out text:"
    )
    rows = [
        [f"`{row['recipe']}`", f"`{row['key']}: {row['value']:g}`", *(number(row[what]) for what in MEASURED)]
        for row in found["rows"]
    ]
    return f"{head}\n\n{markdown_table(['recipe', 'setting', 'L0', 'variance explained', 'alive'], rows, left=2)}"


if __name__ == "__main__":
    run_main(main)
