"""What separate SAEs say of finetunes of different length: the record and the table of docs/transfer.md.

    dvc exp run -S eval_types.transfer=true -S 'transfer.separate={}' -S transfer.own_finetune.steps=20
    python -m benchmarks.model_difference eval_results/transfer "20 steps"

adds a finished run of the stage to docs/transfer.json under a name, and writes the table anew.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks.pages import write_between
from sae_research.reporting.transfer_crosscoder import MODELS, at, bounded
from sae_research.reporting.transfer_separate import ALONE
from sae_research.runtime.errors import UserError, run_main
from sae_research.runtime.files import project_root, read_json, round_significant, write_json
from sae_research.runtime.formatting import markdown_table, number

RECORD, PAGE = Path("docs/transfer.json"), Path("docs/transfer.md")
BEGIN, END = "<!-- separate SAEs -->", "<!-- end of separate SAEs -->"
GROUP_KEYS = ("latents", "match", "kl", "kl_other", "kl_matched", "over_matched", "kl_patched_base", "patch_gain")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="of a finished run of the transfer stage")
    parser.add_argument("name", help="of the run, in the table")
    arguments = parser.parse_args()
    root = project_root()
    record = read_json(root / RECORD) if (root / RECORD).is_file() else {}
    record[arguments.name] = recorded(read_json(arguments.folder / "finetuned_eval_results.json"))
    write_json(root / RECORD, record)
    write_between(root / PAGE, BEGIN, END, table(root / RECORD))


def recorded(result: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a run. Raises `UserError` where its SAEs were not compared."""
    separate = result.get("separate") or {}
    if separate.get("status") != "ok":
        raise UserError("this run compared no separate SAEs; set transfer.separate: {}")
    groups = {
        name: {key: group[key] for key in GROUP_KEYS if key in group} | {"latents": len(group["latents"])}
        for model in MODELS
        for name, group in separate["ablations"][model]["groups"].items()
    }
    classes = {
        who: {model: separate[who][model]["classes"] | {"fire": separate[who][model]["fire"]} for model in MODELS}
        for who in ("saes", "control")
        if who in separate
    }
    return round_significant(
        {
            "weights_relative_change": at(result, "moved", "weights", "relative_change"),
            "kl_on_finetuned_text": at(result, "moved", "outputs_on_finetuned_text", "kl"),
            "tokens": separate["tokens"],
            "match_median": {model: separate["saes"][model].get("match_median") for model in MODELS},
            **classes,
            "kl_base": at(separate, "ablations", "finetuned", "kl_base"),
            "checked_tokens": separate["ablations"]["finetuned"]["tokens"],
            "groups": groups,
        }
    )


def table(record: Path) -> str:
    """The page's table: classes of latents, and ablations of the least matched, one row a run."""
    body = []
    for name, run in json.loads(record.read_text()).items():
        kept = [f"{run['saes'][m]['kept']:,} of {run['saes'][m]['fire']:,}" for m in MODELS]
        alone = [f"{run['saes'][m][ALONE[m]]:,} ({at(run, 'control', m, ALONE[m])})" for m in MODELS]
        least, same = run["groups"]["finetuned_end"], run["groups"]["kept"]
        body.append(
            [
                name,
                number(run["kl_on_finetuned_text"]),
                *kept,
                *alone,
                number(least["match"]),
                number(least["kl"]),
                number(least.get("kl_other")),
                bounded(least.get("over_matched")),
                bounded(least.get("patch_gain")),
                bounded(same.get("patch_gain")),
            ]
        )
    header = ["Finetune", "KL of the models", "kept, base SAE", "kept, finetuned SAE", "lost (control)", "made (control)"]
    header += ["least matched: match", "KL", "in the base model", "KL over kept latents [95 %]"]
    header += ["KL taken off by patching [95 %]", "by the largest kept ones [95 %]"]
    return markdown_table(header, body)


if __name__ == "__main__":
    run_main(main)
