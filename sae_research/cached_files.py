"""Folders of files under `.cache`: each is written whole, with a list of its files, and believed only while that list holds.

What is read back instead of being computed again (activations, mean latents, tokens of long texts, models made here, latent
statistics) decides figures as much as code does. A file that was cut, emptied, zeroed, exchanged or has a flipped bit costs
time, never correctness. No torch here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sae_research.folders import remove_leftovers, replaced_folder
from sae_research.store import file_sha256, write_json
from sae_research.store_cache import UNWRITABLE, cache_writes, caches_readable

CHECKSUMS = "checksums.json"
"""In every entry: name of each other file -> {"bytes": length, "sha256": of its bytes}."""

_found_intact: dict[Path, tuple[str, list[tuple[str, int, int, int]]]] = {}
"""Entries that this process has read whole: their list, and what the file system said of each file then."""


def usable(entry: Path, lengths: Mapping[str, int] | None = None) -> bool:
    """Whether a cached folder may be read instead of being computed again: caches may be read, and it is `intact`."""
    return caches_readable() and intact(entry, lengths)


def intact(entry: Path, lengths: Mapping[str, int] | None = None) -> bool:
    """Whether a cached folder is there and holds, byte for byte, what was written; one printed line says where it does not.

    lengths: bytes that some of its files must have for whoever asks. Every file's SHA-256 is computed once per process
    (0.7 s a gigabyte); later calls compare names, lengths and times of change. An entry that is believed counts as used for
    `prune`, where the cache can be written.
    """
    if not entry.is_dir():
        return False
    wrong = damage(entry) or _other_length(entry, lengths or {})
    if wrong is not None:
        print(f"{os.path.relpath(entry)}: {wrong}; not used, made again", flush=True)
        return False
    try:
        os.utime(entry / CHECKSUMS)
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
    return True


def damage(entry: Path) -> str | None:
    """In what way a folder is not what was written, in a few words; None where it is just that."""
    try:
        text = (entry / CHECKSUMS).read_text()
        listed = json.loads(text)
        seen = _listing(entry)
        if _found_intact.get(entry) == (text, seen):
            return None
        if not isinstance(listed, dict):
            return f"{CHECKSUMS} is damaged"
        wrong = _first_difference(entry, listed, {name: size for name, size, *_ in seen})
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except ValueError:  # neither UTF-8 nor JSON
        return f"{CHECKSUMS} is damaged"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    if wrong is None:
        _found_intact[entry] = text, seen
    return wrong


def _first_difference(entry: Path, listed: dict[str, object], sizes: dict[str, int]) -> str | None:
    for name in sorted(listed.keys() | sizes.keys()):
        if name not in sizes:
            return f"{name} is missing"
        if name not in listed:
            return f"{name} was not there when it was written"
        want = listed[name]
        if not isinstance(want, dict) or set(want) != {"bytes", "sha256"}:
            return f"{CHECKSUMS} is damaged"
        if sizes[name] != want["bytes"]:
            return f"{name} has {sizes[name]:,} bytes and not the {want['bytes']} it was written with"
        if file_sha256(entry / name) != want["sha256"]:
            return f"{name} has another checksum than when it was written"
    return None


def _other_length(entry: Path, lengths: Mapping[str, int]) -> str | None:
    for name, length in lengths.items():
        size = (entry / name).stat().st_size if (entry / name).is_file() else 0
        if size != length:
            return f"{name} has {size:,} bytes and not {length:,}"
    return None


def _listing(entry: Path) -> list[tuple[str, int, int, int]]:
    """(name, length, time of change, inode) of every file but the list itself and hidden ones, by name."""
    found = []
    for path in sorted(entry.rglob("*")):
        if path.is_file() and path.name != CHECKSUMS and not path.name.startswith("."):
            stat = path.stat()
            found.append((path.relative_to(entry).as_posix(), stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return found


def seal(folder: Path) -> None:
    """Write the list of a finished folder's files."""
    seen = _listing(folder)
    write_json(folder / CHECKSUMS, {name: {"bytes": size, "sha256": file_sha256(folder / name)} for name, size, *_ in seen})
    _found_intact[folder] = (folder / CHECKSUMS).read_text(), seen


@contextmanager
def new_entry(entry: Path) -> Iterator[Path]:
    """A temporary folder to write into. When the block ends well it takes the place of `entry`, with the list of its files;
    when not, it is removed. No other process prunes it meanwhile, and whoever has the old one's files open reads on.

    Raises `UserError` where the cache cannot be written.
    """
    with ExitStack() as stack:
        with cache_writes(entry.parent):
            entry.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(entry.parent)
            if entry.is_file():  # of another version, or put there by somebody else
                entry.unlink()
            temporary = stack.enter_context(replaced_folder(entry))
        yield temporary
        seal(temporary)
    _found_intact[entry] = _found_intact.pop(temporary)
