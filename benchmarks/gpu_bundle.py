"""What a bare GPU machine needs beside torch and transformers: `python -m benchmarks.gpu_bundle FOLDER --python 3.12`.

Writes the project's files and the wheels of the missing packages into a folder to bring along, at most 60 MB. There:

    python3 -m pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site python3 -m benchmarks.gpu
"""

from __future__ import annotations

import argparse
import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, packages_distributions, requires, version
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
LIMIT_MB = 60
CARRIED = ("sae_research", "benchmarks", "tests", "custom_saes", "docs/gpu.md", "pyproject.toml", "params.yaml", "dvc.yaml")
"""Of the project's tracked files, what runs there."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def needs() -> list[str]:
    """Distributions that the benchmark's modules import as they are loaded, and what those require, less what torch and
    transformers bring; with their versions here. Evaluations that import more are left out there, with a line."""
    import benchmarks.gpu  # noqa: F401
    import benchmarks.gpu_evaluations
    import benchmarks.gpu_page
    import benchmarks.gpu_training
    import benchmarks.pursuit  # noqa: F401
    from sae_research.evals.run import evaluation_function

    evaluation_function("core")
    owners = packages_distributions()
    imported = {owner for name in _libraries() for owner in owners.get(name, [])}
    # of what torch and transformers require only the first level is sure to be the same in other versions of them
    given = {"torch", "transformers", *_required("torch"), *_required("transformers")}
    return sorted(f"{name}=={version(name)}" for name in _closure({_plain(name) for name in imported} - given) - given)


def _libraries() -> Iterator[str]:
    """Top-level names of what the project's loaded modules import from elsewhere."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ("sae_research", "benchmarks") or not getattr(module, "__file__", None):
            continue
        for node in ast.parse(Path(str(module.__file__)).read_text()).body:
            if isinstance(node, ast.Import):
                yield from (alias.name.partition(".")[0] for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.partition(".")[0]


def _plain(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _closure(names: set[str]) -> set[str]:
    """These distributions and all that they require without extras."""
    left, found = {_plain(name) for name in names} - {"sae-research"}, set[str]()
    while left:
        name = left.pop()
        try:
            wanted = _required(name)
        except PackageNotFoundError:
            continue  # of another platform
        found.add(name)
        left |= wanted - found
    return found


def _required(name: str) -> set[str]:
    """What a distribution requires itself, without extras."""
    wanted = [Requirement(line) for line in requires(name) or []]
    return {_plain(one.name) for one in wanted if one.marker is None or one.marker.evaluate({"extra": ""})}


def bundle(folder: Path, python: str, packages: list[str]) -> None:
    """Write the folder. Raises `CalledProcessError` where a wheel is not to be had."""
    tracked = subprocess.check_output(["git", "ls-files", *CARRIED], cwd=ROOT, text=True).splitlines()
    for name in tracked:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "wheels").mkdir(exist_ok=True)
    given = ["--python-version", python, "--implementation", "cp", *(part for p in PLATFORMS for part in ("--platform", p))]
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", *given]
    subprocess.run([*command, "-d", str(folder / "wheels"), *packages], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="where it goes; without it the packages are listed")
    parser.add_argument("--python", default="3.12", help="version there (default 3.12)")
    parser.add_argument(
        "--there", nargs="*", default=[], help="packages that are there already, for example scipy pandas numba"
    )
    options = parser.parse_args()
    there = _closure(set(options.there))
    packages = [line for line in needs() if line.partition("==")[0] not in there]
    if options.folder is None:
        print("\n".join(packages))
        return 0
    bundle(options.folder, options.python, packages)
    size = sum(path.stat().st_size for path in options.folder.rglob("*") if path.is_file()) / 1e6
    print(f"{options.folder}: {size:.1f} MB")
    if size > LIMIT_MB:
        print(f"error: more than {LIMIT_MB} MB; name what is there already with --there", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
