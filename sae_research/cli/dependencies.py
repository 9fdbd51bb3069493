"""What every stage of `dvc.yaml` depends on, computed: code from the imports its script reaches, local inputs from the
parameters it reads. `python -m sae_research.cli.dependencies` writes the lists; a test holds the file to them.

Files and folders that other stages write are kept by hand, as only the stage knows what it reads, but for the two stages
that gather all evaluations.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from sae_research.config.evaluations import OF_SAES
from sae_research.config.local_inputs import FOLDER, sections
from sae_research.evals.run import RESULTS
from sae_research.runtime.errors import UserError, run_main
from sae_research.runtime.sources import PROJECT, sources

PIPELINE = Path("dvc.yaml")
PACKAGE, SCRIPTS, OWN_CLASSES = "sae_research", "scripts", "custom_saes"
_REGISTRY = f"{PACKAGE}.saes.registry"


def dependencies(stage: Mapping[str, Any], gathered: Sequence[str] = ()) -> list[str]:
    """The `deps` of a stage of `dvc.yaml`, sorted within each kind: code, local inputs, what other stages write, and of that
    what is `gathered` from all evaluations."""
    code = _code(stage)
    own = [OWN_CLASSES] if f"{PACKAGE}/saes/registry.py" in code else []
    read = {key.partition(".")[0] for key in stage.get("params", ()) if isinstance(key, str)}
    inputs = [f"{FOLDER}/{name}.json" for name in sections() if name in read]
    written_elsewhere = [dep for dep in stage.get("deps", ()) if not _computed(dep) and dep not in gathered]
    return [*_folders(code), *own, *inputs, *written_elsewhere, *gathered]


def written(text: str) -> str:
    """`dvc.yaml` with the dependencies that its stages have. Raises `UserError` for a stage that runs no script."""
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 4096, True
    yaml.indent(mapping=2, sequence=4, offset=2)
    pipeline = yaml.load(text)
    gathered = _gathered(pipeline["stages"])
    for name, stage in pipeline["stages"].items():
        if name == "inputs":
            stage["outs"] = [{f"{FOLDER}/{section}.json": {"cache": False}} for section in sections()]
        stage["deps"] = dependencies(stage, gathered.get(name, ()))
    stream = StringIO()
    yaml.dump(pipeline, stream)
    return stream.getvalue()


def _gathered(stages: Mapping[str, Any]) -> dict[str, list[str]]:
    """What the stages that read every evaluation depend on; completes the command that lists it."""
    evaluations = [name for name in OF_SAES if f"{name}_metrics" in stages]
    metrics = [f"metrics/{name}.json" for name in evaluations]
    if "aggregate_metrics" in stages:
        command = f"python -m {SCRIPTS}.extract_metrics aggregate {' '.join(metrics)} metrics/all_metrics.json"
        if str(stages["aggregate_metrics"]["cmd"]) != command:
            stages["aggregate_metrics"]["cmd"] = command
    return {"aggregate_metrics": metrics, "process_results": [f"{RESULTS}/{name}" for name in evaluations]}


def _code(stage: Mapping[str, Any]) -> set[str]:
    """Files of the project that a stage's script reaches, relative to the project."""
    words = str(stage["cmd"]).split()
    if words[:2] != ["python", "-m"]:
        raise UserError(f"{PIPELINE}: a stage must run `python -m {SCRIPTS}.NAME`, not {stage['cmd']!r}")
    outs = [next(iter(out)) if isinstance(out, Mapping) else out for out in stage.get("outs", ())]
    modules = [
        f"{PACKAGE}.evals.{str(one.evaluate).partition(':')[0]}"
        for one in OF_SAES.values()
        if f"{RESULTS}/{one.name}" in outs
    ]
    found = sources(words[2], by_name={f"{PACKAGE}.evals.run": modules})
    return {path.resolve().relative_to(PROJECT).as_posix() for path in found.files}


def _computed(dep: str) -> bool:
    return dep.partition("/")[0] in (PACKAGE, SCRIPTS, OWN_CLASSES, str(FOLDER))


def _folders(files: Iterable[str]) -> list[str]:
    """Files as the folders that they fill at least half; the others by name.

    A folder is one subject: a stage that reaches most of it is better run once for nothing than described file by file.
    """
    files = set(files)
    found: list[str] = []

    def visit(folder: Path) -> None:
        for entry in sorted(folder.iterdir()):
            name = entry.relative_to(PROJECT).as_posix()
            if name in files:
                found.append(name)
            elif entry.is_dir() and any(file.startswith(f"{name}/") for file in files):
                contents = _contents(entry)
                if sum(inner in files for inner in contents) * 2 >= len(contents):
                    found.append(name)
                else:
                    visit(entry)

    for top in (SCRIPTS, PACKAGE):
        visit(PROJECT / top)
    return found


def _contents(folder: Path) -> list[str]:
    return [
        file.relative_to(PROJECT).as_posix()
        for file in folder.rglob("*")
        if file.is_file() and file.parent.name != "__pycache__" and not file.name.startswith(".")
    ]


def main() -> None:
    path = PROJECT / PIPELINE
    before = path.read_text()
    after = written(before)
    if "--check" in sys.argv[1:]:
        if before != after:
            raise UserError(f"{PIPELINE} is not up to date: run `python -m sae_research.cli.dependencies`")
        return
    path.write_text(after)
    print(f"{PIPELINE}: {'as it was' if before == after else 'dependencies written'}")


if __name__ == "__main__":
    run_main(main)
