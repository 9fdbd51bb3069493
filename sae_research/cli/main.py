"""One command with verbs: `sae-research VERB`, which is `python -m sae_research VERB`."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

from sae_research.cli import experiments
from sae_research.cli.analyze import add_verb as add_analyze
from sae_research.cli.saes import add_verbs
from sae_research.reporting import shapes
from sae_research.runtime.errors import UserError
from sae_research.runtime.workspace import prepare

PRESETS = Path("presets")


def main(arguments: list[str] | None = None) -> int:
    """Parse and run; returns the exit code."""
    parser = argparse.ArgumentParser(prog="sae-research", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    repro = verbs.add_parser(
        "repro",
        help="run the pipeline, then say what failed and what changed",
        description="Example: python -m sae_research repro --preset pythia-70m",
    )
    repro.add_argument("--preset", default="", help="a file of presets/, one -S override a line")
    verbs.add_parser("check", help="say what failed in the last run", description="Example: python -m sae_research check")
    add_verbs(verbs)
    experiments.add_verbs(verbs)
    add_analyze(verbs)
    options = parser.parse_args(arguments)
    if "run" in options:
        return options.run(options)
    if options.verb == "check":
        return shapes.report(compare=True)
    return run_pipeline(options.preset)


def run_pipeline(preset: str) -> int:
    """`dvc repro --ignore-errors` (or `dvc exp run` with a preset's overrides), then the check.

    An evaluation that fails does not stop the others; its status says so and the exit code is 1. Files of DVC that a
    killed run left damaged are mended first. Raises `UserError` where another DVC process is at work in the workspace.
    """
    for line in prepare(Path.cwd()):
        print(line, flush=True)
    if preset:
        command = ["dvc", "exp", "run", "--ignore-errors"]
        for override in read_preset(preset):
            command += ["-S", override]
    else:
        command = ["dvc", "repro", "--ignore-errors"]
    code = subprocess.run(command, check=False).returncode
    unchanged = (
        subprocess.run(["git", "diff", "--quiet", "HEAD", "--", "params.yaml"], check=False, capture_output=True).returncode
        == 0
    )
    return shapes.report(compare=unchanged and not preset) or code


def read_preset(name: str) -> list[str]:
    """The overrides of a preset, without comments and blank lines. Raises `UserError` naming those there are."""
    path = PRESETS / f"{name}.txt"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.txt")))
        raise UserError(f"no preset {name!r}; known: {known}")
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    return [line for line in lines if line]
