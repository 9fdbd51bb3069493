"""SAELens' directory of releases: what it lists, how each is laid out, and what reads it here. Everything but the download
itself works without a hub; `sae_lens` is not imported, only its list is read.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import yaml

from sae_research.runtime.errors import UserError, did_you_mean
from sae_research.runtime.files import read_settings
from sae_research.saes.base import SparseAutoencoder
from sae_research.saes.files import CONFIG_FILE, WEIGHTS_FILE, load_sae
from sae_research.saes.formats import (
    checkpoints,
    circuit_tracer,
    gemma_scope,
    gemma_scope_cross_layer,
    llamascopium,
    sparsify,
    temporal_saes,
)
from sae_research.saes.formats import dictionary_learning as dl
from sae_research.saes.formats.sae_lens import convert
from sae_research.saes.formats.sae_lens_settings import OF_ALL, without_unknown
from sae_research.saes.reading import load_safetensors

# --- what it lists ---------------------------------------------------------------------------


class ReleasedSAE(NamedTuple):
    """One entry of SAELens' directory. `card` holds the metrics it publishes: l0, variance_explained."""

    release: str
    sae_id: str
    repo_id: str
    card: dict[str, float]
    path: str = ""
    """Inside the repository: a folder or a file."""
    layout: str = ""
    """Which of SAELens' loaders converts it; its own layout where empty."""
    model_name: str = ""
    overrides: dict[str, Any] = {}
    """What the directory says in the place of the files' own settings."""
    factor: float | None = None
    """What activations were multiplied by in training, where the files do not say it."""


@cache
def release_directory() -> dict[str, dict[str, Any]]:
    """SAELens' list of releases as its package holds it: model, repo_id and saes (id, path; where known neuronpedia, l0,
    variance_explained) by release."""
    spec = importlib.util.find_spec("sae_lens")  # located, not imported
    if spec is None or not spec.submodule_search_locations:
        raise UserError("sae_lens is not installed; run `make setup`")
    with (Path(spec.submodule_search_locations[0]) / "pretrained_saes.yaml").open("rb") as stream:
        return yaml.load(stream, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


@cache
def released_saes() -> tuple[ReleasedSAE, ...]:
    """Every SAE that SAELens knows by release and id."""
    return tuple(_entries())


def _entries() -> Iterator[ReleasedSAE]:
    for release, value in release_directory().items():
        for entry in value["saes"]:
            yield ReleasedSAE(
                release,
                str(entry["id"]),
                value["repo_id"],
                {key: float(entry[key]) for key in ("l0", "variance_explained") if isinstance(entry.get(key), int | float)},
                str(entry["path"]),
                value.get("conversion_func") or "",
                value["model"],
                value.get("config_overrides") or {},
                entry.get("norm_scaling_factor"),
            )


def matching_saes(release_pattern: str, id_pattern: str) -> list[ReleasedSAE]:
    """Releases and ids that both patterns match in full, as SAE Bench's `get_saes_from_regex` selects them.

    Raises `UserError` for a pattern that is no regular expression, and when nothing matches.
    """
    try:
        release, sae_id = re.compile(release_pattern), re.compile(id_pattern)
    except re.error as error:
        raise UserError(f"comparison_saes: {error.pattern!r} is not a regular expression ({error})") from None
    found = [sae for sae in released_saes() if release.fullmatch(sae.release) and sae_id.fullmatch(sae.sae_id)]
    if not found:
        releases = sum(1 for name in {sae.release for sae in released_saes()} if release.fullmatch(name))
        raise UserError(
            f"comparison_saes: no SAE of SAELens' directory matches {release_pattern!r} and "
            f"{id_pattern!r} "
            f"in full ({releases} releases match the first)"
        )
    return found


def saes_of(release: str, match: str | None, what: str) -> list[ReleasedSAE]:
    """The dictionaries of a release whose id the regular expression is found in, in the directory's order. what: names the
    expression in messages. Raises `UserError` for an unknown release, a pattern that is none, and one that matches
    nothing."""
    known = release_directory()
    if release not in known:
        raise UserError(f"SAELens' directory has no release {release!r}{did_you_mean(release, known)}")
    try:
        pattern = re.compile(match or "")
    except re.error as error:
        raise UserError(f"{what}: {match!r} is not a regular expression ({error})") from None
    found = [entry for entry in released_saes() if entry.release == release and pattern.search(entry.sae_id)]
    if not found:
        ids = [entry.sae_id for entry in released_saes() if entry.release == release]
        raise UserError(f"{what} {match}: none of the {len(ids)} ids of {release} holds it; the first is {ids[0]}")
    return found


def find_released(release: str, sae_id: str) -> ReleasedSAE:
    """The entry of the directory; for a release that it lacks, a repository of the hub in SAELens' own layout, with the id
    as the folder. Raises `UserError` for an id that the release does not have, and a name that is neither."""
    if release not in release_directory():
        if "/" not in release:
            raise UserError(
                f"SAELens {release}: no such release; `analyze saes --search TEXT` lists them; a repository of the hub is "
                "written ORGANISATION/NAME"
            )
        return ReleasedSAE(release, sae_id, release, {}, sae_id)
    entries = [entry for entry in released_saes() if entry.release == release]
    for entry in entries:
        if entry.sae_id == sae_id:
            return entry
    raise UserError(
        f"SAELens {release} / {sae_id}: the release has no such id; it has "
        f"{', '.join(entry.sae_id for entry in entries[:5])}{', ...' if len(entries) > 5 else ''}"
    )


# --- how it is laid out ----------------------------------------------------------------------


class Plan(NamedTuple):
    """How one entry is read: either the files to fetch and what reads them, or why it cannot be."""

    layout: str
    files: tuple[str, ...] = ()
    """Paths inside the repository, settings before weights."""
    read: Callable[[Path], SparseAutoencoder] | None = None
    """Takes the folder that the repository's files are in."""
    optional: tuple[str, ...] = ()
    """Further files, used where the repository has them."""
    reason: str = ""


def plan_of(entry: ReleasedSAE) -> Plan:
    """How an entry is read. Needs no hub."""
    layout = entry.layout or "sae_lens"
    if layout not in _PLANS:
        return Plan(
            layout,
            reason=f"SAELens converts it by {layout}, which is not known here; load it with sae_lens and save it "
            "(`sae.save_model(FOLDER)`), and name that folder",
        )
    try:
        return _PLANS[layout](entry)
    except UserError as error:
        return Plan(layout, reason=str(error))


def _inside(entry: ReleasedSAE, *names: str) -> tuple[str, ...]:
    return tuple(str(PurePosixPath(entry.path) / name) for name in names)


def _names(entry: ReleasedSAE) -> list[str]:
    return [entry.repo_id, *entry.path.split("/")]


def _of_sae_lens(entry: ReleasedSAE) -> Plan:
    return Plan("sae_lens", _inside(entry, CONFIG_FILE, WEIGHTS_FILE), lambda root: _lens_folder(root / entry.path, entry))


def _lens_folder(folder: Path, entry: ReleasedSAE) -> SparseAutoencoder:
    values = read_settings(folder / CONFIG_FILE)
    if isinstance(values.get("metadata"), dict) and "sae_research" in values["metadata"]:
        return load_sae(folder)
    where = f"SAELens {entry.release} / {entry.sae_id}"
    weights = load_safetensors(folder / WEIGHTS_FILE)
    values = without_unknown(values)
    if "metadata" in values:  # from version 6 on, what is about the model stands in a section of its own
        values["metadata"] = {**values["metadata"], **entry.overrides}
    top = {key: value for key, value in entry.overrides.items() if "metadata" not in values or key in OF_ALL}
    return convert({**values, **top}, weights, where, entry.factor)


def _of_dictionary_learning(entry: ReleasedSAE) -> Plan:
    return Plan(
        "dictionary_learning",
        _inside(entry, dl.CONFIG_FILE, dl.WEIGHTS_FILE),
        lambda root: dl.load_dictionary_learning(root / entry.path),
    )


def _of_gemma_scope(entry: ReleasedSAE) -> Plan:
    gemma_scope.place_of(_names(entry), entry.path)
    second = entry.layout == "gemma_3"
    return Plan(
        gemma_scope.LIBRARY,
        _inside(entry, gemma_scope.WEIGHTS_FILES[second]),
        lambda root: gemma_scope.load_gemma_scope(root / entry.path, _names(entry)),
        _inside(entry, gemma_scope.CONFIG_FILE) if second else (),
    )


def _of_checkpoint(entry: ReleasedSAE) -> Plan:
    place = checkpoints.place_of(_names(entry), entry.path)
    beside = entry.path.removesuffix(".pt") + checkpoints.CONFIG_ENDING
    return Plan(
        place.publisher.library,
        (beside, entry.path) if place.publisher.library == "kissane" else (entry.path,),
        lambda root: checkpoints.load_published(root / entry.path, _names(entry)),
    )


def _of_llama_scope(entry: ReleasedSAE) -> Plan:
    first = entry.layout == "llama_scope"
    names = (llamascopium.FIRST_CONFIG, "checkpoints/final.safetensors")
    return Plan(
        llamascopium.LIBRARY,
        _inside(entry, *(names if first else (llamascopium.CONFIG_FILE, llamascopium.WEIGHTS_FILES[0]))),
        lambda root: llamascopium.load_llamascopium(root / entry.path, entry.model_name, entry.factor, published=True),
    )


def _of_sparsify(entry: ReleasedSAE) -> Plan:
    return Plan(
        sparsify.LIBRARY,
        _inside(entry, sparsify.CONFIG_FILE, sparsify.WEIGHTS_FILE),
        lambda root: sparsify.load_sparsify(root / entry.path),
        (str(PurePosixPath(entry.path).parent / "config.json"),),
    )


def _of_circuit_tracer(entry: ReleasedSAE) -> Plan:
    cross = entry.layout == "mntss_clt_layer_transcoder"
    files = circuit_tracer.files_of(int(entry.path)) if cross else circuit_tracer.files_with(entry.path)
    return Plan(
        circuit_tracer.LIBRARY,
        files,
        lambda root: circuit_tracer.load_circuit_tracer(root / files[0], _names(entry)),
        (circuit_tracer.CONFIG_FILE,),
    )


def _of_temporal(entry: ReleasedSAE) -> Plan:
    about = {"model_name": entry.model_name, "dataset_path": entry.overrides.get("dataset_path")}
    return Plan(
        temporal_saes.LIBRARY,
        _inside(entry, temporal_saes.CONFIG_FILE, temporal_saes.WEIGHTS_FILE),
        lambda root: temporal_saes.load_temporal(root / entry.path, _names(entry), about),
    )


_PLANS: dict[str, Callable[[ReleasedSAE], Plan]] = {
    "sae_lens": _of_sae_lens,
    "dictionary_learning_1": _of_dictionary_learning,
    "gemma_2": _of_gemma_scope,
    "gemma_2_transcoder": _of_gemma_scope,
    "gemma_3": _of_gemma_scope,
    "goodfire": _of_checkpoint,
    "deepseek_r1": _of_checkpoint,
    "qwen_scope": _of_checkpoint,
    "connor_rob_hook_z": _of_checkpoint,
    "llama_scope": _of_llama_scope,
    "llama_scope_r1_distill": _of_llama_scope,
    "sparsify": _of_sparsify,
    "mwhanna_transcoder": _of_circuit_tracer,
    "mntss_clt_layer_transcoder": _of_circuit_tracer,
    "temporal": _of_temporal,
}
"""SAELens' name of a loader -> how its releases are read here."""


_LAYOUT_OF_FILE = {
    dl.WEIGHTS_FILE: "dictionary_learning_1",
    WEIGHTS_FILE: "sae_lens",
    sparsify.WEIGHTS_FILE: "sparsify",
    **dict(zip(gemma_scope.WEIGHTS_FILES, ("gemma_2", "gemma_3"), strict=True)),
    temporal_saes.WEIGHTS_FILE: "temporal",
}
"""Name of a weights file -> the loader for the folder that it is in."""


def plan_of_file(repo_id: str, filename: str) -> Plan:
    """How a weights file of any repository is read. Raises `UserError` for a name that no layout has."""
    path = PurePosixPath(filename)
    if path.name in _LAYOUT_OF_FILE:
        entry = ReleasedSAE(repo_id, filename, repo_id, {}, str(path.parent), _LAYOUT_OF_FILE[path.name])
    elif checkpoints.is_checkpoint(Path(filename)):
        entry = ReleasedSAE(repo_id, filename, repo_id, {}, filename, "goodfire")
    elif gemma_scope_cross_layer.is_cross_layer_file(Path(filename)):
        names = [repo_id, *path.parts]
        return Plan(
            gemma_scope.LIBRARY,
            (filename,),
            lambda root: gemma_scope_cross_layer.load_cross_layer(root / filename, names),
            (str(path.parent / gemma_scope.CONFIG_FILE),),
        )
    elif circuit_tracer.is_transcoder_file(Path(filename)) or circuit_tracer.is_cross_layer_file(Path(filename)):
        entry = ReleasedSAE(repo_id, filename, repo_id, {}, filename, "mwhanna_transcoder")
    else:
        raise UserError(
            f"baseline_sae.filename: {filename!r} must end with {', '.join(_LAYOUT_OF_FILE)}, or be a checkpoint under its "
            "published name (docs/formats.md)"
        )
    plan = plan_of(entry)
    if plan.read is None:
        raise UserError(f"{repo_id}/{filename}: {plan.reason}")
    return plan


# --- fetching --------------------------------------------------------------------------------


def from_release(release: str, sae_id: str) -> SparseAutoencoder:
    """Fetch an SAE by release and id (or hub repository and folder), say under which licence, and read it. Needs the hub or
    its cache. Raises `UserError` for what is not read, before anything is fetched."""
    entry = find_released(release, sae_id)
    plan = plan_of(entry)
    where = f"SAELens {release} / {sae_id}"
    if plan.read is None:
        raise UserError(f"{where}: {plan.reason}")
    sae = plan.read(fetched(entry.repo_id, plan))
    licence = shown_licence(entry.repo_id)
    sae.cfg = sae.cfg.replace(
        provenance={
            **sae.cfg.provenance,
            "release": release,
            "sae_id": sae_id,
            **({"licence": licence} if licence else {}),
            **({"held_out": entry.card} if entry.card else {}),
        }
    )
    return sae


def fetched(repo_id: str, plan: Plan) -> Path:
    """The folder of the hub's cache that the plan's files are in."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    places = [Path(hf_hub_download(repo_id, name)) for name in plan.files]
    for name in plan.optional:
        try:
            hf_hub_download(repo_id, name)
        except EntryNotFoundError:  # not there, or not in the cache: it is used where it is
            continue
    return places[0].parents[len(PurePosixPath(plan.files[0]).parts) - 1]


def licence_of(repo_id: str) -> str:
    """The licence that a repository's card names; empty where it names none, or there is no card."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        card = Path(hf_hub_download(repo_id, "README.md")).read_text(encoding="utf-8", errors="replace")
    except EntryNotFoundError:
        return ""
    head = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", card, re.DOTALL)
    try:
        values = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return ""
    if not isinstance(values, dict):
        return ""
    named = [values.get(key) for key in ("license", "license_name", "license_link")]
    flat = [one for value in named if value for one in (value if isinstance(value, list) else [value])]
    return " ".join(" ".join(str(one).split()) for one in flat)[:200]


def shown_licence(repo_id: str) -> str:
    """`licence_of`, having said it on the error stream, which no command writes results to."""
    licence = licence_of(repo_id)
    said = f"licence {licence}" if licence else "no licence named; ask its authors before you pass anything on"
    print(f"{repo_id}: {said}", file=sys.stderr, flush=True)
    return licence
