"""Results sites of synthetic runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from sae_research.reporting.comparisons import comparisons
from sae_research.reporting.report import write_report
from sae_research.reporting.rows import Row, Run
from sae_research.reporting.site.pages import write_site
from sae_research.reporting.tables import write_results_csv
from tests.helpers.results import STYLE, Lab, build

METHODS = {  # method: (dictionary, encoder, L0, variance explained, MCC, F1, top-1 probing), each at two sparsities
    "standard": ("trained", "own encoder", 4.0, 0.5, 0.62, 0.6, 0.7),
    "batch_top_k": ("trained", "own encoder", 6.0, 0.7, 0.64, 0.55, 0.72),
    "omp over truth": ("truth", "omp", 7.0, 0.8, 0.99, 0.7, 0.83),
    "ihtp over untrained": ("untrained", "ihtp", 90.0, 0.85, 0.3, 0.06, 0.62),
}


def ground_truth(lab: Lab) -> None:
    """A finished ground-truth evaluation of two seeds."""
    rows = [
        {
            "method": method,
            "dictionary": dictionary,
            "encoder": encoder,
            "sparsity": f"s{step}",
            "flags": [],
            "metrics": {
                "l0": l0 * (1 + step),
                "variance_explained": explained + 0.05 * step,
                "mcc": mcc + 0.01 * seed,
                "latent_f1": f1 - 0.02 * step + 0.01 * seed,
                "top_1_probing": probing,
            },
        }
        for seed in (0, 1)
        for method, (dictionary, encoder, l0, explained, mcc, f1, probing) in METHODS.items()
        for step in (0, 1)
    ]
    correlations = {
        key: {"mcc": {"spearman": 0.5, "interval": [0.1, 0.9]}, "latent_f1": {"spearman": -0.2, "interval": [-0.7, 0.4]}}
        for key in ("variance_explained", "top_1_probing")
    }
    known = {"correlations": correlations, "methods": list(METHODS), "l0": 8.0, "seeds": 2, "note": "", "left_out": []}
    unknown = {"correlations": {}, "methods": [], "note": "too few methods", "l0": 0.0, "seeds": 2, "left_out": []}
    setting = {"num_features": 64, "hidden_dim": 16, "name": "tiny", "samples": 1000, "test_samples": 200, "n_seeds": 2}
    follow = {"all": known, "trained_dictionaries": unknown, "trained": unknown}
    lab.status("ground_truth", "ok")
    lab.write(
        "eval_results/ground_truth/results.json",
        {"setting": setting, "generator": [{"l0": 3.0}], "notes": [], "rows": rows, "follow": follow},
    )


def written_site(lab: Lab, run: Run | None = None) -> Path:
    """The site of a lab's run, as the report stage writes it: `report/` in the lab's folder."""
    run = build(lab) if run is None else run
    found = comparisons(run)
    write_report(run, found, lab.root)
    write_results_csv(run, lab.root)
    write_site(run, found, STYLE, lab.root)
    return lab.root / "report"


def held(page: Path, name: str) -> Any:
    """The data that a page holds under a name."""
    return json.loads(
        re.findall(rf'<script type="application/json" id="data-{name}">(.*?)</script>', page.read_text(), re.S)[0]
    )


def specs(page: Path) -> dict[str, dict[str, Any]]:
    """The charts of a page by key, each with the rows that it asks for."""
    found = re.findall(r'data-spec="(\w+)">(.*?)</script>', page.read_text(), re.S)
    sets = held(page, "datasets")
    charts = {key: json.loads(spec) for key, spec in found}
    for spec in charts.values():
        name = spec["data"].get("name")
        spec |= {"datasets": {name: sets[name]}} if name else {}
        spec["params"] = [*spec.get("params", []), {"name": "ground", "value": "#ffffff"}]
        spec["width"] = 400
    return charts


def many(run: Run, n: int) -> Run:
    """A run of `n` SAEs without what comparisons rest on, which would take minutes."""
    dropped = ("cluster_sums", "clusters", "outcomes")
    rows = []
    for index in range(n):
        row = run.rows[index % len(run.rows)]
        evals = {name: {key: value for key, value in one.items() if key not in dropped} for name, one in row.evals.items()}
        metrics = {key: value * (1 + 0.001 * index) for key, value in evals["core"]["metrics"].items()}
        rows.append(Row(f"{row.name}_{index}", row.cfg, {**evals, "core": {**evals["core"], "metrics": metrics}}))
    return Run(rows, run.evals, run.training, run.curves)
