"""Which code computes a value: the project's files that a module's imports reach, and the libraries those files import.

Keys of everything cached and the dependencies of every stage of `dvc.yaml` come from here. Nothing is imported: files are
read as syntax trees, so that lazy imports count, imports for a type checker do not, and no library has to start.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import re
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from sae_research.runtime.files import fingerprint

PROJECT = Path(__file__).resolve().parents[2]
_PACKAGE = __name__.partition(".")[0]
_INSTALLED = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_NAME = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+(:[A-Za-z_][\w.]*)?$")
_PREFIX = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*\.$")

ByName = Mapping[str, Iterable[str]]
"""Module -> the modules that it imports by a name which is only known when it runs, where the caller knows them."""


class Sources(NamedTuple):
    """What a value is computed by."""

    files: tuple[Path, ...]
    """Python files of the project, and the data files (templates, tables) beside them."""
    libraries: tuple[str, ...]
    """Top-level names of the other modules that those files import, without the standard library's."""

    def fingerprint(self) -> str:
        """SHA-256 over the files' bytes and the libraries' versions. [64 hex digits]"""
        return fingerprint(
            [
                {_label(path): _sha256(path, *_stamp(path)) for path in self.files},
                {name: library_version(name) for name in self.libraries},
            ]
        )


def sources(*modules: str, by_name: ByName | None = None) -> Sources:
    """Everything that importing and running `modules` may reach.

    A module counts with its parent packages. Imports inside functions count, and so does a module that a string names as a
    whole (`"package.module"`, `"package.module:Class"`), as they are handed to `importlib`; of an f-string such as
    `f"package.{name}"` every module of the package does. `by_name` replaces both for the modules it holds.

    Raises `ModuleNotFoundError` for a module of the project that does not exist.
    """
    chosen = {name: tuple(found) for name, found in (by_name or {}).items()}
    question = (modules, tuple(sorted(chosen.items())), Path.cwd())
    if question in _known:
        known, stamps = _known[question]
        if stamps == _stamps(known.files):
            return known
    found = _collect(modules, chosen)
    _known[question] = found, _stamps(found.files)
    return found


_known: dict[Any, tuple[Sources, dict[Path, tuple[int, int]]]] = {}
"""Closures found before, each with what its files looked like: a notebook may edit and reload a module."""


def _collect(modules: tuple[str, ...], chosen: dict[str, tuple[str, ...]]) -> Sources:
    seen: dict[str, Path] = {}
    libraries: set[str] = set()
    absent: set[str] = set()
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        for parent in _parents(name):
            if parent in seen:
                continue
            path = None if parent in absent else _find(parent)
            if path is None:
                if parent == name and name in modules:
                    raise ModuleNotFoundError(f"no source of the module {name} in the project", name=name)
                libraries.add(parent.partition(".")[0])
                absent.add(parent)
                break
            seen[parent] = path
            found = _read(path, parent, path.stat().st_mtime_ns)
            waiting += [*found.imports, *(chosen[parent] if parent in chosen else _named(found))]
    packages = {path.parent for path in seen.values() if (path.parent / "__init__.py").is_file()}
    data = {extra for package in packages for extra in _data_in(package)}
    return Sources(
        tuple(sorted({path for path in (*seen.values(), *data) if path.is_file()})),
        tuple(sorted(libraries - set(sys.stdlib_module_names) - {"__future__"})),
    )


def sources_fingerprint(*modules: str, by_name: ByName | None = None) -> str:
    """`Sources.fingerprint` of the modules' closure: results computed by other code are other results."""
    return sources(*modules, by_name=by_name).fingerprint()


@cache
def library_version(name: str) -> str | None:
    """Version of the distribution that a top-level module comes from; None where it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found = sorted(set(_distributions().get(name, ())))
        return ", ".join(f"{one} {importlib.metadata.version(one)}" for one in found) or None


@cache
def _distributions() -> Mapping[str, list[str]]:
    return importlib.metadata.packages_distributions()


# --- finding modules ---------------------------------------------------------------------------


def _parents(name: str) -> Iterator[str]:
    """`a`, `a.b`, `a.b.c` of `a.b.c`: importing the last runs them all."""
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        yield ".".join(parts[:end])


def _find(name: str) -> Path | None:
    """The file of a module of the project or of the user's own; None for a library and for what is no module."""
    top = name.partition(".")[0]
    if top in sys.stdlib_module_names or top == "__main__":
        return None
    loaded = getattr(sys.modules.get(name), "__file__", None)
    if loaded is not None:
        path = Path(loaded).resolve()
        return path if path.suffix == ".py" and (top == _PACKAGE or not _installed(path)) else None
    # as Python looks for them, the working directory first; PROJECT is no project where the package was installed alone
    for root in (PROJECT,) if top == _PACKAGE else (Path.cwd(), *(() if _installed(PROJECT) else (PROJECT,))):
        path = root.joinpath(*name.split("."))
        for candidate in (path / "__init__.py", path.with_name(path.name + ".py")):
            if candidate.is_file():
                return candidate
        if path.is_dir() and any(path.glob("*.py")):  # a package without __init__.py: scripts/, custom_saes/
            return path
    return None


def _installed(path: Path) -> bool:
    """Whether a file belongs to a library, not to a project."""
    return any(path.is_relative_to(folder) for folder in _INSTALLED)


@cache
def _is_module(name: str) -> bool:
    return _find(name) is not None


# --- reading them --------------------------------------------------------------------------------


class _Found(NamedTuple):
    """What one file imports, by absolute name."""

    imports: tuple[str, ...]
    strings: tuple[str, ...]
    """Strings that have the shape of a module's name."""
    prefixes: tuple[str, ...]
    """First parts of f-strings that end in a dot, as in `f"package.{name}"`."""


@cache
def _read(path: Path, name: str, _modified: int) -> _Found:
    if path.is_dir():
        return _Found((), (), ())
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    imports: list[str] = []
    strings: list[str] = []
    prefixes: list[str] = []
    waiting: list[ast.AST] = [ast.parse(path.read_bytes(), str(path))]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Import):
            imports += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imports += _from(node, package)
        elif isinstance(node, ast.JoinedStr):
            prefixes += _prefix(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _NAME.match(node.value):
            strings.append(node.value.partition(":")[0])
        elif isinstance(node, ast.If) and _for_type_checkers(node.test):
            waiting += node.orelse
            continue
        waiting += ast.iter_child_nodes(node)
    return _Found(tuple(imports), tuple(strings), tuple(prefixes))


def _from(node: ast.ImportFrom, package: str) -> Iterator[str]:
    """`from base import name`: the base, and `name` where that is a module."""
    above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
    base = ".".join([*above, *([node.module] if node.module else [])])
    if base:
        yield base
        for alias in node.names:
            if alias.name != "*" and _is_module(f"{base}.{alias.name}"):
                yield f"{base}.{alias.name}"


def _prefix(node: ast.JoinedStr) -> Iterator[str]:
    first = node.values[0] if node.values else None
    if isinstance(first, ast.Constant) and isinstance(first.value, str) and _PREFIX.match(first.value):
        yield first.value[:-1]


def _for_type_checkers(test: ast.expr) -> bool:
    return (
        isinstance(test, ast.Name)
        and test.id == "TYPE_CHECKING"
        or isinstance(test, ast.Attribute)
        and test.attr == "TYPE_CHECKING"
    )


def _named(found: _Found) -> Iterator[str]:
    """Modules of the project that a file names in strings."""
    for name in found.strings:
        if _is_module(name):
            yield name
    for prefix in found.prefixes:
        path = _find(prefix)
        folder = path.parent if path is not None and path.name == "__init__.py" else path
        if folder is not None and folder.is_dir():
            for file in sorted(folder.rglob("*.py")):
                inner = file.relative_to(folder).with_suffix("").parts
                yield ".".join([prefix, *(inner[:-1] if inner[-1] == "__init__" else inner)])


# --- files ---------------------------------------------------------------------------------------


def _data_in(folder: Path) -> tuple[Path, ...]:
    """What is no Python in a package, and in the folders there that hold none: templates, tables, scripts of pages. Hidden
    files and an editor's copies are left out."""
    found: list[Path] = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith((".", "__pycache__")) or entry.name.endswith("~"):
            continue
        if entry.is_dir():
            found += _data_in(entry) if not any(entry.rglob("*.py")) else ()
        elif entry.suffix not in (".py", ".pyc", ".typed"):
            found.append(entry)
    return tuple(found)


def _label(path: Path) -> str:
    """The file's name in fingerprints: the same wherever the project lies."""
    whole = path.resolve()
    return whole.relative_to(PROJECT).as_posix() if whole.is_relative_to(PROJECT) else whole.name


def _stamps(files: Iterable[Path]) -> dict[Path, tuple[int, int]]:
    """Of files and of the folders that they lie in, whose stamp changes when a file comes or goes."""
    return {path: _stamp(path) for path in {*files, *(file.parent for file in files)} if path.exists()}


def _stamp(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_mtime_ns, state.st_size


@cache
def _sha256(path: Path, _modified: int, _size: int) -> str:
    return hashlib.sha256(b"" if path.is_dir() else path.read_bytes()).hexdigest()
