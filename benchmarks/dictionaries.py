"""What transcoders and crosscoders cost beside SAEs, and their training beside other libraries'.

    python -m benchmarks.dictionaries                        # writes docs/dictionaries.json and its table in docs/speed.md
    python -m benchmarks.dictionaries transcoder_training    # some parts; the record keeps the rows of the others

The parts `transcoders`, `crosscoders` and `transcoder_training` of `make bench`, without any SAEs at hand.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
from pathlib import Path

from benchmarks.pages import write_between
from sae_research.runtime.errors import UserError, run_main
from sae_research.runtime.files import project_root, write_json
from sae_research.runtime.formatting import markdown_table

RECORD, PAGE = Path("docs/dictionaries.json"), Path("docs/speed.md")
PARTS = ("transcoder_training", "crosscoders", "transcoders")
BEGIN, END = "<!-- dictionaries -->", "<!-- end of dictionaries -->"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"which of {', '.join(PARTS)}; default all")
    parts = parser.parse_args().parts or PARTS
    if unknown := sorted(set(parts) - set(PARTS)):
        raise UserError(f"unknown part {', '.join(unknown)}; known: {', '.join(PARTS)}")
    import torch  # imports take seconds that --help need not wait

    from sae_research.config.params import load_params
    from sae_research.lm import load_language_model

    os.environ["SAE_RESEARCH_NO_CACHE"] = "1"
    params = load_params()
    caching = params.activation_caching.model_copy(update={"enabled": False})
    params = params.model_copy(update={"activation_caching": caching})
    lm = load_language_model(params.model.name, "cpu")
    root = project_root()
    here = {"threads": torch.get_num_threads(), "precision": params.train.precision}
    for part in parts:  # each is kept as soon as it is measured
        rows = importlib.import_module(f"benchmarks.{part}").compare({}, lm, None, params)
        found = {name: {"ours": float(f"{a:.3g}"), "beside": float(f"{b:.3g}"), **here} for name, (a, b) in rows.items()}
        before = json.loads((root / RECORD).read_text()) if (root / RECORD).is_file() else {}
        write_json(root / RECORD, before | found)
        write_between(root / PAGE, BEGIN, END, table(root / RECORD))


def table(record: Path) -> str:
    """The page's table: either side's seconds, and how many times ours theirs are."""
    rows = [
        [name, str(row["threads"]), f"{row['ours']:.3g} s", f"{row['beside']:.3g} s", f"{row['beside'] / row['ours']:.2f}×"]
        for name, row in json.loads(record.read_text()).items()
    ]
    return markdown_table(["", "threads", "ours", "beside", "ratio"], rows)


if __name__ == "__main__":
    run_main(main)
