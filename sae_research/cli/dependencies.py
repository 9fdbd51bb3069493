"""What every stage of `dvc.yaml` depends on, computed: code from the imports its script reaches, local inputs from the
parameters it reads. `python -m sae_research.cli.dependencies` writes the lists; a test holds the file to them.

Files and folders that other stages write are the one part that is kept by hand: only the stage knows what it reads.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from io import StringIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from sae_research.config.local_inputs import FOLDER, sections
from sae_research.evals.run import EVALUATIONS, RESULTS
from sae_research.runtime.errors import UserError, run_main
from sae_research.runtime.sources import PROJECT, sources

PIPELINE = Path("dvc.yaml")
PACKAGE, SCRIPTS, OWN_CLASSES = "sae_research", "scripts", "custom_saes"
_REGISTRY = f"{PACKAGE}.saes.registry"


def dependencies(stage: Mapping[str, Any]) -> list[str]:
    """The `deps` of a stage of `dvc.yaml`, sorted within each kind: code, local inputs, what other stages write."""
    code = _code(stage)
    own = [OWN_CLASSES] if f"{PACKAGE}/saes/registry.py" in code else []
    read = {key.partition(".")[0] for key in stage.get("params", ()) if isinstance(key, str)}
    inputs = [f"{FOLDER}/{name}.json" for name in sections() if name in read]
    return [*_folders(code), *own, *inputs, *(dep for dep in stage.get("deps", ()) if not _computed(dep))]


def written(text: str) -> str:
    """`dvc.yaml` with the dependencies that its stages have. Raises `UserError` for a stage that runs no script."""
    yaml = YAML()
    yaml.width, yaml.preserve_quotes = 4096, True
    yaml.indent(mapping=2, sequence=4, offset=2)
    pipeline = yaml.load(text)
    for name, stage in pipeline["stages"].items():
        if name == "inputs":
            stage["outs"] = [{f"{FOLDER}/{section}.json": {"cache": False}} for section in sections()]
        stage["deps"] = dependencies(stage)
    stream = StringIO()
    yaml.dump(pipeline, stream)
    return stream.getvalue()


def _code(stage: Mapping[str, Any]) -> set[str]:
    """Files of the project that a stage's script reaches, relative to the project."""
    words = str(stage["cmd"]).split()
    if words[:2] != ["python", "-m"]:
        raise UserError(f"{PIPELINE}: a stage must run `python -m {SCRIPTS}.NAME`, not {stage['cmd']!r}")
    outs = [next(iter(out)) if isinstance(out, Mapping) else out for out in stage.get("outs", ())]
    modules = [
        f"{PACKAGE}.evals.{EVALUATIONS[name].partition(':')[0]}" for name in EVALUATIONS if f"{RESULTS}/{name}" in outs
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
