"""Where SAEs come from: the train stage, a hub, SAELens' releases, folders, and classes of the user's own."""

from __future__ import annotations

import errno
import glob
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from sae_research.errors import UserError
from sae_research.params import BaselineSAE
from sae_research.saes import SparseAutoencoder, exchange, form_class, load_sae
from sae_research.saes import dictionary_learning as dl
from sae_research.saes.files import CONFIG_FILE, WEIGHTS_FILE
from sae_research.saes.sae_lens import from_release
from sae_research.store import checked_name, fingerprint, read_json, slugify, user_path
from sae_research.text.hub import offline_if_silent, one_line

TRAINED = Path("trained_saes")
"""What the train stage writes."""
TRAINING_REPORT = "training_report.json"
T = TypeVar("T")
OFFLINE_HINT = "without a hub, set baseline_sae.source: trained"


def read_baseline(settings: BaselineSAE) -> SparseAutoencoder:
    """The baseline, wherever `baseline_sae.source` says it is."""
    if settings.source == "trained":
        return read_trained(settings.name)
    if settings.source == "hub":
        assert settings.repo_id and settings.filename  # params.py requires them for this source
        return read_hub(settings.repo_id, settings.filename)
    if settings.source == "sae_lens":
        assert settings.release and settings.sae_id
        return read_release(settings.release, settings.sae_id)
    assert settings.path
    return read_folder(user_path(settings.path))


def read_trained(name: str) -> SparseAutoencoder:
    """An SAE of the train stage. Raises `UserError` naming those there are."""
    folder = TRAINED / checked_name(name, "trained SAE", "choose one of train.saes")
    if not (folder / CONFIG_FILE).is_file():
        known = trained_names()
        raise UserError(f"{folder}: no such trained SAE "
                        f"({'there are ' + ', '.join(known) if known else 'none yet'}); "
                        f"run the train stage first (dvc repro train), with {name} under train.saes")
    sae = load_sae(folder)
    if "held_out" not in sae.cfg.provenance and (TRAINED / TRAINING_REPORT).is_file():
        report = read_json(TRAINED / TRAINING_REPORT)
        try:
            figures = report.get("saes", {}).get(name, {}).get("held_out")
        except AttributeError:
            raise UserError(f"{TRAINED / TRAINING_REPORT}: not a training report; run the train stage again") from None
        if figures:
            sae.cfg = sae.cfg.replace(provenance={**sae.cfg.provenance, "held_out": figures})
    return _from(sae, source="trained", name=name)


def trained_names() -> list[str]:
    """Names of the SAEs the train stage wrote."""
    return sorted(path.parent.name for path in TRAINED.glob(f"*/{CONFIG_FILE}"))


def read_folder(folder: Path) -> SparseAutoencoder:
    """A local folder: ours, SAELens', dictionary_learning's, or a run of SAE-Interpretability with one hook."""
    saes = exchange.read_folder(folder)
    if len(saes) > 1:
        raise UserError(f"{folder}: holds {len(saes)} SAEs ({', '.join(saes)}); split it with "
                        f"`python -m sae_research import {folder} OUT` and name those folders")
    return _from(next(iter(saes.values())), source="folder", name=folder.name)


def matching_folders(pattern: str) -> list[Path]:
    """Folders a glob stands for, in alphabetical order. Raises `UserError` when there are none."""
    found = sorted(Path(path) for path in glob.glob(str(user_path(pattern)), recursive=True) if Path(path).is_dir())
    if not found:
        raise UserError(f"comparison_saes.folders: {pattern!r} matches no folder")
    return found


def folder_names(patterns: Sequence[str]) -> dict[Path, str]:
    """The folders that globs stand for, each once, and what their SAEs are called: the folder's own name, with as many of
    the folders above it as tell it apart from the others (`runs/a/trainer_0` -> `a_trainer_0`)."""
    folders = {path.resolve(): path for pattern in patterns for path in matching_folders(pattern)}
    parts = dict.fromkeys(folders, 1)
    while True:
        names = {place: slugify("_".join(place.parts[-count:])) for place, count in parts.items()}
        twins = [place for place, name in names.items()
                 if list(names.values()).count(name) > 1 and parts[place] < len(place.parts) - 1]
        if not twins:
            return {path: names[place] for place, path in folders.items()}
        parts |= {place: parts[place] + 1 for place in twins}


def read_python(place: str, baseline: SparseAutoencoder) -> SparseAutoencoder:
    """A class of the user's own, built from the baseline. `cfg.form` keeps its place, so that `load_sae`
    finds it; the source is pinned by its hash."""
    cls = form_class(place)
    sae = cls.from_baseline(baseline)
    if not isinstance(sae, SparseAutoencoder):
        raise UserError(f"{place}: from_baseline returned {type(sae).__name__}, not an SAE")
    source = inspect.getsource(inspect.getmodule(cls) or cls)
    architecture = sae.cfg.architecture if sae.cfg.architecture != place else cls.form or cls.__name__
    sae.cfg = sae.cfg.replace(form=place, architecture=architecture, options=sae.options(), provenance={
        "source": "python", "place": place, "source_sha256": fingerprint(source)})
    return sae


def python_name(place: str) -> str:
    """The name in tables of a class of the user's own: its `form`, or its own name."""
    cls = form_class(place)
    return slugify(cls.form or cls.__name__)


# --- the hub ---------------------------------------------------------------------------------

def read_hub(repo_id: str, filename: str) -> SparseAutoencoder:
    """An SAE file of a hub repository with the configuration beside it; kept in the hub's own cache."""
    beside = {dl.WEIGHTS_FILE: dl.CONFIG_FILE, WEIGHTS_FILE: CONFIG_FILE}
    folder, _, name = filename.rpartition("/")
    if name not in beside:
        raise UserError(f"baseline_sae.filename: {filename!r} must end with {' or '.join(beside)}")
    for part in filename.split("/"):
        checked_name(part, "baseline_sae.filename", "name a file inside the repository")
    config = download(repo_id, f"{folder}/{beside[name]}".lstrip("/"))
    weights = download(repo_id, filename)
    sae = dl.read_checkpoint(weights, config) if name == dl.WEIGHTS_FILE else load_sae(weights.parent)
    parts = weights.parts
    revision = parts[parts.index("snapshots") + 1] if "snapshots" in parts else None
    return _from(sae, source="hub", repo_id=repo_id, filename=filename, revision=revision)


def download(repo_id: str, filename: str) -> Path:
    """One file of a hub repository, from the hub's cache where it is there already."""
    from huggingface_hub import hf_hub_download

    return _reach(lambda: Path(hf_hub_download(repo_id, filename)), f"{repo_id}/{filename}", repo_id,
                  f"{quote(repo_id)}/resolve/main/{quote(filename)}")


def read_release(release: str, sae_id: str) -> SparseAutoencoder:
    """An SAE by SAELens release and id."""
    sae = _reach(lambda: from_release(release, sae_id), f"SAELens {release} / {sae_id}", release)
    return _from(sae, source="sae_lens")


def _reach(fetch: Callable[[], T], what: str, where: str, path: str = "") -> T:
    """Run a download; each way a hub can fail becomes its own line. path: an address at the hub that must answer, or only
    what is cached counts."""
    import requests
    from huggingface_hub import errors

    unreachable = f"{what}: the hub cannot be reached and the file is not in its cache; {OFFLINE_HINT}"
    try:
        with offline_if_silent(path):
            return fetch()
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, requests.RequestException):
        raise UserError(unreachable) from None
    except errors.GatedRepoError:
        raise UserError(f"{what}: access is restricted; accept its terms on the hub and log in "
                        f"(hf auth login), or {OFFLINE_HINT}") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{what}: the hub has no repository {where!r} (or it is private); "
                        f"{OFFLINE_HINT}") from None
    except errors.EntryNotFoundError:
        raise UserError(f"{what}: no such file in the repository {where}") from None
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        raise UserError(f"{what}: {str(error).strip().partition(chr(10))[0]}; {OFFLINE_HINT}") from None
    except errors.HTTPError:  # the connection broke
        raise UserError(unreachable) from None
    except OSError as error:  # fewer bytes than announced; a cache that may not be written
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"{what}: {one_line(error)}; run it again, or {OFFLINE_HINT}") from None


def _from(sae: SparseAutoencoder, **origin: str | None) -> SparseAutoencoder:
    """The SAE with its origin added to what its own card says."""
    known = {key: value for key, value in origin.items() if value is not None}
    sae.cfg = sae.cfg.replace(provenance={**sae.cfg.provenance, **known})
    return sae
