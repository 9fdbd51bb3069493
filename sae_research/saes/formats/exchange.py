"""SAEs in and out of other libraries' files: `python -m sae_research import` and `export`."""

from __future__ import annotations

from pathlib import Path

from sae_research.runtime.errors import UserError
from sae_research.saes.base import SparseAutoencoder
from sae_research.saes.files import CONFIG_FILE, sae_lens_lacks, save_sae
from sae_research.saes.formats import dictionary_learning as dl
from sae_research.saes.formats import sae_interpretability as si
from sae_research.saes.formats.dictionary_learning import EVAL_FILE, export_dictionary_learning
from sae_research.saes.sources import open_folder

FORMATS = ("dictionary_learning", "sae_lens")


def sae_folders(folder: Path) -> list[Path]:
    """The folder itself where it holds an SAE, else those below it that do, in alphabetical order."""
    marks = (CONFIG_FILE, dl.WEIGHTS_FILE, si.CONFIG_FILE)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    if any((folder / mark).is_file() for mark in marks):
        return [folder]
    found = sorted({path.parent for mark in marks for path in folder.rglob(mark)})
    if not found:
        open_folder(folder)  # says what was expected
    return found


def import_saes(source: Path, output: Path) -> list[Path]:
    """Write every SAE of `source` in our layout, which is SAELens': one into `output` itself, several below it."""
    found = _read_all(source)
    for place, (_, sae) in found.items():
        save_sae(sae, output / place)
        _say(output / place, sae, sae_lens_lacks(sae))
    return [output / place for place in found]


def export_saes(source: Path, output: Path, layout: str, dict_class: str | None = None) -> list[Path]:
    """Write every SAE of `source` for another library; held-out figures go along for dictionary_learning.

    Raises `UserError` naming those whose form the library does not have, once all others are written.
    """
    if layout not in FORMATS:
        raise UserError(f"unknown format {layout!r}; known: {', '.join(FORMATS)}")
    if dict_class and layout != "dictionary_learning":
        raise UserError("--dict_class belongs to --format dictionary_learning")
    written, refused = [], []
    for place, (origin, sae) in _read_all(source).items():
        try:
            if layout == "dictionary_learning":
                note = export_dictionary_learning(sae, output / place, dict_class, origin / EVAL_FILE)
                if not sae.cfg.hook_name.endswith("hook_resid_post"):
                    note += "; SAE Bench's loaders would put it at hook_resid_post of its layer"
            elif note := sae_lens_lacks(sae):
                raise UserError(note)
            else:
                save_sae(sae, output / place)
        except UserError as error:
            refused.append(f"{origin}: {error}")
            continue
        _say(output / place, sae, note)
        written.append(output / place)
    if refused:
        raise UserError("; ".join(refused) + (f"; the other {len(written)} are written" if written else ""))
    return written


def _read_all(source: Path) -> dict[Path, tuple[Path, SparseAutoencoder]]:
    """(folder, SAE) by place below `source`; SAEs of one folder stand below it by name."""
    found = {}
    for folder in sae_folders(source):
        saes = open_folder(folder)
        for name, sae in saes.items():
            place = folder.relative_to(source)
            found[place / name if len(saes) > 1 else place] = folder, sae
    return found


def _say(folder: Path, sae: SparseAutoencoder, note: str) -> None:
    about = f"{sae.cfg.form}, {sae.cfg.d_in} x {sae.cfg.d_sae}, {sae.cfg.hook_name or 'no hook named'}"
    print(f"{folder}: {about}" + (f"; {note}" if note else ""))
