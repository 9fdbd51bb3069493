"""From the flags of a sweep to its end: read, expand, leave out what is finished, say so, run, report."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

from sae_research.errors import UserError
from sae_research.experiments import sweep
from sae_research.experiments.config_files import PARAMS
from sae_research.experiments.devices import parse
from sae_research.experiments.grid import expand
from sae_research.experiments.jobs import Job, make_jobs
from sae_research.experiments.single import scales_over
from sae_research.experiments.translate import Changes
from sae_research.experiments.wandb_sweep import write_wandb_sweep
from sae_research.params import read_params
from sae_research.store import project_root
from sae_research.yaml_files import read_mapping


def carry_out(options: argparse.Namespace, changes: Changes) -> int:
    """The sweep that the flags describe. Returns 1 where a job failed."""
    for flag in ("limit", "saes_per_run"):
        if (number := getattr(options, flag)) is not None and number < 1:
            raise UserError(f"--{flag} must be above 0")
    root = project_root()
    params_yaml = read_params(root / PARAMS)
    name = re.sub(r"[^a-zA-Z0-9_-]+", "-", options.name or options.sweep_config.stem).strip("-") or "sweep"
    base = read_mapping(options.base_config) if options.base_config else {}
    where = (str(options.base_config or PARAMS), str(options.sweep_config))
    slots = parse(options.devices)[:1 if options.sequential else None]
    grid = expand(base, read_mapping(options.sweep_config), params_yaml, changes,
                  scales_over(params_yaml, slots[0].device), options.limit, where)
    for line in grid.notes:
        print(f"note: {line}")
    if options.wandb_sweep:
        flags = [part for flag, value in (("--model", changes.model), ("--text", changes.text), ("--tokens", changes.tokens))
                 if value is not None for part in (flag, str(value))]
        write_wandb_sweep(options.wandb_sweep, grid.points, grid.total, options.base_config, flags, options.wandb_project)
        print(f"wrote {options.wandb_sweep}: wandb sweep {options.wandb_sweep}, then wandb agent on each machine")
        return 0
    stages = list(dict.fromkeys(["core", *(part.strip() for part in options.stages.split(",") if part.strip())]))
    jobs = make_jobs(grid.points, stages, name, where[1], options.saes_per_run)
    finished = sweep.finished_saes(root)
    left = sweep.remaining(jobs, finished, stages, name)
    _say(grid.total, len(grid.points), jobs, left, [slot.device for slot in slots])
    if options.dry_run:
        return 0
    if options.output_dir:
        _make(options.output_dir)
    outcome = sweep.Runner(name, left, slots, options.sequential).run() if left else None
    finished = sweep.finished_saes(root)
    print(f"\n{sweep.results_table(jobs, finished)}")
    if options.output_dir:
        sweep.write_copies(options.output_dir, left or jobs, finished, outcome)
    if outcome and outcome.failed:
        print(f"\n{len(outcome.failed)} of {len(left)} jobs failed:")
        for job, why in outcome.failed.items():
            print(f"  {job}: {why}\n    dvc queue logs {job}; the same call tries again")
        return 1
    print("\nalso: dvc exp show --only-changed; python -m sae_research apply NAME brings an "
          "experiment's SAEs into trained_saes/")
    return 0


def _make(folder: Path) -> None:
    """The folder for copies, before hours are spent. Raises `UserError` where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"--output_dir {folder}: no permission to write there")


def _say(total: int, chosen: int, jobs: list[Job], left: list[Job], devices: list[str]) -> None:
    n_saes, n_left = (sum(len(job.saes) for job in group) for group in (jobs, left))
    print(f"{chosen} of {total} points, {n_saes} SAEs in {len(jobs)} runs; "
          f"{n_saes - n_left} SAEs are finished, {n_left} to train in {len(left)} runs on {', '.join(devices)}")
    for job in left:
        print(f"  {job.name}: {len(job.saes)} SAE{'s' * (len(job.saes) > 1)}, {job.params.train.tokens:,} tokens, "
              f"{job.params.model.name}, {', '.join(job.params.train.hooks)}")
        for point in job.points:
            print(f"    {point.label}")
