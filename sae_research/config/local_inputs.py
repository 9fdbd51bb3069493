"""What parameters point at on this machine: local texts, tables, models, SAEs, classes of one's own, packaged dictionaries.

DVC sees that a parameter names another folder, not that the folder's content changed. A first stage that always runs writes
the content's fingerprint to `inputs/<section>.json`, on which the stages that read the section depend. Parameters that may
point at something carry `section.MayBeLocal` or `section.PythonClass`; nothing else says which they are.
"""

from __future__ import annotations

import glob
import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, get_args, get_origin

from sae_research.config.params import Params
from sae_research.config.section import MayBeLocal, Packaged, PythonClass, Section
from sae_research.runtime.cache import cache_dir, caches_readable
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import file_sha256, find_local, fingerprint, project_root, write_json
from sae_research.runtime.packaged import CARD, find_packaged
from sae_research.runtime.sources import sources

FOLDER = Path("inputs")
_MEMORY = "inputs.json"
_SETTLED_SECONDS = 2.0
"""A file that changed more recently is read again next time: its time stamp may not show a second change."""


_MARKS = (MayBeLocal, Packaged, PythonClass)


class Pointer(NamedTuple):
    """One value of a parameter that may point at something."""

    key: str
    """Dotted, below its section; items of a list by number."""
    value: str
    mark: type


def sections() -> list[str]:
    """Sections of `params.yaml` with a parameter that may point at something, in the file's order."""
    return [
        name
        for name, field in Params.model_fields.items()
        if isinstance(field.annotation, type)
        and issubclass(field.annotation, Section)
        and any(True for _ in _marks(field.annotation))
    ]


def write_inputs(params: Params, folder: Path = FOLDER) -> None:
    """Write `inputs/<section>.json` of every section; files whose bytes stay the same are left alone.

    Raises `UserError` for what is there and cannot be read.
    """
    memory = _Memory()
    for name in sections():
        found = {
            pointer.key: content
            for pointer in pointers(getattr(params, name))
            if (content := _content(pointer, memory)) is not None
        }
        path, text = folder / f"{name}.json", json.dumps(found, indent=2, sort_keys=True) + "\n"
        if not path.is_file() or path.read_text() != text:
            write_json(path, found)
    for path in folder.glob("*.json"):
        if path.stem not in sections():
            path.unlink()
    memory.save()


def pointers(section: Section, prefix: str = "") -> Iterator[Pointer]:
    """Every value of a section that may point at something, sections inside it included."""
    for name, field in type(section).model_fields.items():
        value, key = getattr(section, name), f"{prefix}{name}"
        if isinstance(value, Section):
            yield from pointers(value, f"{key}.")
        else:
            annotation: Any = field.annotation
            if field.metadata:
                annotation = Annotated.__class_getitem__((annotation, *field.metadata))  # ty: ignore[missing-attribute]
            mark = next(iter(_marks(annotation)), None)
            if mark is not None:
                yield from _texts(value, key, mark)


def _texts(value: Any, key: str, mark: type) -> Iterator[Pointer]:
    if isinstance(value, str):
        yield Pointer(key, value, mark)
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _texts(item, f"{key}.{number}", mark)
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, f"{key}.{name}", mark)


def _marks(annotation: Any) -> Iterator[type]:
    """Marks anywhere in a type, those of sections inside it included."""
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        yield from (type(mark) for mark in metadata if isinstance(mark, _MARKS))
        yield from _marks(inner)
    elif isinstance(annotation, type) and issubclass(annotation, Section):
        for field in annotation.model_fields.values():
            yield from (type(mark) for mark in field.metadata if isinstance(mark, _MARKS))
            yield from _marks(field.annotation)
    else:
        for argument in get_args(annotation):
            yield from _marks(argument)


# --- what they point at -----------------------------------------------------------------------


def _content(pointer: Pointer, memory: _Memory) -> dict[str, Any] | None:
    """Number of files, bytes and fingerprint of what a parameter points at; None where nothing is there."""
    if pointer.mark is PythonClass:
        return _code(pointer.value, memory)
    matches = _packaged(pointer.value) if pointer.mark is Packaged else _matches(pointer.value)
    if not matches:
        return None
    found: dict[str, str] = {}
    size = 0
    for name, path in matches:
        for file in _files(path):
            where = file.relative_to(path).as_posix() if file != path else ""
            found[f"{name}/{where}" if where else name] = memory.sha256(file)
            size += file.stat().st_size
    return {"files": len(found), "bytes": size, "sha256": fingerprint(found)}


def _packaged(name: str) -> list[tuple[str, Path]]:
    """The weights and configuration of a dictionary that comes with the package, where there is one of the name; its card
    changes no metric."""
    folder = find_packaged(name)
    return [(path.name, path) for path in sorted(folder.iterdir()) if path.name != CARD] if folder else []


def _matches(value: str) -> list[tuple[str, Path]]:
    """(name without the way to it, path) of the file or folder that `value` names, or of all that it names as a glob."""
    if found := find_local(value):
        return [(found.absolute().name, found.absolute())]
    for root in (Path.cwd(), project_root()) if glob.has_magic(value) else ():
        matches = sorted(Path(match) for match in glob.glob(str(root / Path(value).expanduser()), recursive=True))
        if matches:
            fixed = Path(os.path.commonpath([match.parent for match in matches]))
            return [(match.relative_to(fixed).as_posix(), match) for match in matches]
    return []


def _code(place: str, memory: _Memory) -> dict[str, Any] | None:
    """The files of the user's own that a class's module imports; the package's own count in each stage's dependencies."""
    package = Path(__file__).resolve().parents[1]
    try:
        files = [file for file in sources(place.partition(":")[0]).files if not file.resolve().is_relative_to(package)]
    except (ModuleNotFoundError, SyntaxError):
        return None  # setup says what is wrong with it
    found = {f"{number}/{file.name}": memory.sha256(file) for number, file in enumerate(files) if file.is_file()}
    return {"files": len(found), "bytes": sum(file.stat().st_size for file in files), "sha256": fingerprint(found)}


def _files(path: Path) -> Iterator[Path]:
    """Regular files at or below a path, through links, sorted; hidden ones and compiled Python are left out."""
    if path.is_file():
        yield path
        return
    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(path, followlinks=True):
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in seen:  # a link back to a folder above
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        for name in sorted(files):
            file = Path(folder, name)
            if not name.startswith(".") and file.exists() and stat.S_ISREG(file.stat().st_mode):
                yield file


class _Memory:
    """SHA-256 of files by size, inode and times, kept in `.cache/inputs.json`: a large folder is read once, not in every
    run. The change time tells a content that changed behind a restored modification time."""

    def __init__(self) -> None:
        self.path = project_root() / ".cache" / _MEMORY
        self.old: dict[str, Any] = {}
        if caches_readable() and self.path.is_file():
            try:
                values = json.loads(self.path.read_text())
                self.old = values if isinstance(values, dict) else {}
            except ValueError:  # damaged: everything is read again
                self.old = {}
        self.new: dict[str, Any] = {}

    def sha256(self, file: Path) -> str:
        state = file.stat()
        stamp = [state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]
        kept = self.old.get(str(file))
        if isinstance(kept, dict) and kept.get("stamp") == stamp and isinstance(kept.get("sha256"), str):
            digest = kept["sha256"]
        else:
            try:
                digest = file_sha256(file)
            except PermissionError:
                raise UserError(f"{file}: may not be read; params.yaml points at it") from None
        if time.time() - max(state.st_mtime, state.st_ctime) > _SETTLED_SECONDS:
            self.new[str(file)] = {"stamp": stamp, "sha256": digest}
        return digest

    def save(self) -> None:
        if self.new != self.old:
            cache_dir("")
            write_json(self.path, self.new)
