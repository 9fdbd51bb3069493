"""Evaluations on a Ray cluster against one process: time, and whether the bytes are the same.

    python -m benchmarks.cluster        # writes docs/cluster.json and the tables of docs/cluster.md

Time: one process on two cores, one worker on two cores, and two loopback nodes of one core each. Every run starts from empty
result and activation caches, in a process of its own whose start counts; the cluster is up before. The SAEs are those that
the pipeline prepared.

Memory: the largest resident size of one worker that scores core of `FEW` and of `MANY` SAEs with random weights, all in
one unit.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.pages import write_between
from sae_research.config.yaml_files import read_mapping
from sae_research.runtime.errors import run_main
from sae_research.runtime.files import project_root, write_json
from sae_research.runtime.formatting import markdown_table
from sae_research.runtime.stages import read_manifest
from sae_research.saes.sources import PREPARED

RECORD, PAGE = Path("docs/cluster.json"), Path("docs/cluster.md")
BEGIN, END = "<!-- measured -->", "<!-- end -->"
EVALUATIONS = {"core": "run_core_eval", "sparse_probing": "run_sparse_probing", "scr": "run_optional_evals scr"}
N_SAES = 16
FEW, MANY, WIDE = 8, 64, 16_384
"""SAEs and latents of the comparison of memory."""
BEGIN_MEMORY = "<!-- memory -->"
WAYS = {"one process, 2 threads": None, "one worker, 2 threads": (2,), "two nodes of one core": (1, 1)}


def main() -> None:
    root = project_root()
    rows = {}
    for evaluation in EVALUATIONS:
        rows[evaluation] = {way: _run(root, evaluation, nodes) for way, nodes in WAYS.items()}
        print(evaluation, {way: row["seconds"] for way, row in rows[evaluation].items()}, flush=True)
    peaks = {str(number): _peak(number) for number in (FEW, MANY)}
    print("peak bytes", peaks, flush=True)
    write_json(root / RECORD, {"saes": N_SAES, "cores": os.cpu_count(), "evaluations": rows, "peak_bytes": peaks})
    for begin, part in ((BEGIN, table(root / RECORD)), (BEGIN_MEMORY, memory_line(root / RECORD))):
        write_between(root / PAGE, begin, END, part)


def memory_line(record: Path) -> str:
    """What the page says of memory."""
    if not record.exists():
        return "Not measured yet."
    peaks = json.loads(record.read_text()).get("peak_bytes")
    if peaks is None:
        return "Not measured yet."
    few, many = (peaks[str(number)] for number in (FEW, MANY))
    return (
        f"A worker that scores core of {MANY} SAEs of {WIDE:,} latents in one unit takes {many / 1e9:.2f} GB at its peak, "
        f"of {FEW} {few / 1e9:.2f} GB: {many / few:.2f} times."
    )


def _peak(number: int) -> int:
    """Largest resident bytes of a process that scores one unit of so many SAEs."""
    code = "import sys; from benchmarks.cluster import score_unit; score_unit(int(sys.argv[1]))"
    environment = os.environ | {"PYTHONPATH": str(project_root()), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code, str(number)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return int(done.stdout.split()[-1])


def score_unit(number: int) -> None:
    """Prepare SAEs one by one, score them in one unit, print the peak of this process in bytes."""
    import resource

    from benchmarks.scale_measure import MODEL, TimedWorkers, parameters, prepared_project, run_whole
    from sae_research.lm import load_language_model

    sizes = {"batch_size_prompts": 2, "n_eval_reconstruction_batches": 1, "n_eval_sparsity_variance_batches": 4}
    params = parameters("core", sizes)
    with prepared_project(WIDE, number):
        workers = TimedWorkers(params, "core", 1)
        run_whole("core", params, load_language_model(MODEL, "cpu"), workers)
        if {unit["saes"] for unit in workers.units} != {number}:
            raise RuntimeError(f"units of other sizes: {workers.units}")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def table(record: Path) -> str:
    """The page's table. Ratios are to one process; `same` says whether all result files have equal bytes."""
    if not record.exists():
        return "Not measured yet."
    found = json.loads(record.read_text())
    rows = []
    for evaluation, ways in found["evaluations"].items():
        alone = ways["one process, 2 threads"]
        rows += [
            [
                evaluation,
                way,
                f"{row['seconds']:.0f} s",
                f"{row['seconds'] / alone['seconds']:.2f}",
                "" if row is alone else "yes" if row["sha256"] == alone["sha256"] else "no",
            ]
            for way, row in ways.items()
        ]
    return markdown_table(["evaluation", "on", "time", "ratio", "same bytes"], rows)


def _run(root: Path, evaluation: str, nodes: tuple[int, ...] | None) -> dict[str, Any]:
    """Seconds of the stage's process, and a hash of what it wrote."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        _project(root, folder, evaluation)
        if nodes is None:
            seconds = _timed(folder, evaluation, 2, None)
        else:
            from tests.helpers.ray_cluster import loopback_cluster

            with loopback_cluster(*nodes) as cluster:
                seconds = _timed(folder, evaluation, 2, cluster.address, cpus=max(nodes))
        digest = hashlib.sha256()
        for file in sorted((folder / "eval_results" / evaluation).iterdir()):
            digest.update(file.name.encode() + file.read_bytes())
        return {"seconds": round(seconds, 1), "sha256": digest.hexdigest()}


def _project(root: Path, folder: Path, evaluation: str) -> None:
    """A project with the prepared SAEs and the unpacked model, and nothing computed."""
    manifest = read_manifest(root / PREPARED / "manifest.json")
    chosen = manifest["order"][:N_SAES]
    (folder / PREPARED).mkdir()
    for name in chosen:
        (folder / PREPARED / name).symlink_to(root / PREPARED / name)
    rows = {name: row for name, row in manifest["saes"].items() if name in chosen}
    write_json(folder / PREPARED / "manifest.json", {"order": chosen, "saes": rows})
    (folder / ".cache").mkdir()
    shutil.copytree(root / ".cache" / "models", folder / ".cache" / "models")
    values = read_mapping(root / "params.yaml")
    values["eval_types"][evaluation] = True
    write_json(folder / "params.yaml", values)  # JSON is YAML


def _timed(folder: Path, evaluation: str, threads: int, address: str | None, cpus: int = 1) -> float:
    values = json.loads((folder / "params.yaml").read_text())
    values["cluster"] |= {"address": address, "cpus_per_worker": cpus}
    write_json(folder / "params.yaml", values)
    module, *arguments = EVALUATIONS[evaluation].split()
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", f"scripts.{module}", *arguments],
        cwd=folder,
        env=os.environ
        | {
            "DVC_ROOT": str(folder),
            "PYTHONPATH": str(project_root()),
            "OMP_NUM_THREADS": str(threads),
            "NUMBA_NUM_THREADS": str(threads),
        },
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{evaluation}: {done.stderr[-2000:]}")
    return time.monotonic() - began


if __name__ == "__main__":
    run_main(main)
