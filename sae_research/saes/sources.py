"""SAEs by where they are: folders, the train and setup stages, a hub, SAELens' releases, classes of the user's own, memory.

First come checks that an SAE belongs to a model, cheap enough to be made as soon as one is read.
"""

from __future__ import annotations

import ast
import errno
import glob
import importlib.util
import inspect
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from torch import nn

from sae_research.config.params import BaselineSAE
from sae_research.config.transfer import TransferSAE
from sae_research.lm import LanguageModel
from sae_research.lm.hooks import check_pair
from sae_research.lm.load import folder_fingerprint
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import checked_name, fingerprint, read_json, slugify, user_path
from sae_research.runtime.packaged import packaged_place
from sae_research.saes import SAEConfig, SparseAutoencoder, form_class, load_sae
from sae_research.saes.files import CONFIG_FILE
from sae_research.saes.foreign import adapt
from sae_research.saes.layouts import layouts_of, open_place
from sae_research.saes.releases import fetched, from_release, plan_of_file, shown_licence
from sae_research.text.hub import offline_if_silent, one_line


def same_model(one: str, other: str) -> bool:
    """Whether two names mean one model: hub organisation, path and case aside, and TransformerLens' other names for it."""
    one, other = _bare(one), _bare(other)
    return one == other or _official(one) == _official(other)


def _bare(name: str) -> str:
    last = name.rstrip("/").rpartition("/")[2].lower()
    return last.removeprefix("meta-") if last.startswith("meta-llama-") else last  # the hub has Llama 3.1 under both


def _official(name: str) -> str:
    model, _, revision = name.partition("@")
    return f"{_official_names().get(model, model)}@{revision}"


@cache
def _official_names() -> dict[str, str]:
    """Name on the hub by every other name that TransformerLens has for a model, both without organisation and case. Read
    from its source: importing it takes 8 s."""
    spec = importlib.util.find_spec("transformer_lens")  # located, not imported
    names: dict[str, str] = {}
    for place in (spec.submodule_search_locations or ()) if spec else ():
        for path in (Path(place) / "supported_models.py", Path(place) / "loading_from_pretrained.py"):
            table = _assigned(path, "MODEL_ALIASES") if path.is_file() else {}
            names |= {_bare(alias): _bare(official) for official, aliases in table.items() for alias in aliases}
            names |= {_bare(official): _bare(official) for official in table}
    return names


def _assigned(path: Path, name: str) -> dict[str, list[str]]:
    """The literal that a module assigns to `name`; empty where it assigns none."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if node.value is not None and any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return ast.literal_eval(node.value)
    return {}


def is_model(name: str, lm: LanguageModel) -> bool:
    """Whether `name` means this model. Two local folders are one model when their weights are the same."""
    folder, own = (os.path.expanduser(one) for one in (name, lm.name))
    if os.path.isfile(os.path.join(folder, "config.json")) and os.path.isdir(own):
        return os.path.samefile(folder, own) or folder_fingerprint(Path(folder)) == lm.fingerprint
    return any(same_model(name, known) for known in lm.names)


def fill_in(sae: SparseAutoencoder, model_name: str, hook_name: str) -> list[str]:
    """Complete a configuration that names no model or hook; returns what was assumed, in words."""
    assumed = []
    if not sae.cfg.model_name:
        assumed.append(f"names no model; assumed {model_name}")
        sae.cfg = sae.cfg.replace(model_name=model_name)
    if not sae.cfg.hook_name:
        assumed.append(f"names no hook; assumed {hook_name}")
        sae.cfg = sae.cfg.replace(hook_name=hook_name)
    return assumed


def check_fits(name: str, sae: SparseAutoencoder, lm: LanguageModel, same_as: Sequence[str] | None = None) -> None:
    """Raises `UserError` when the SAE was made for another model, another width, or a hook the model
    lacks. same_as: further names of this model (`model.same_as`)."""
    cfg = sae.cfg
    known = cfg.provenance.get("model_fingerprint") == lm.fingerprint or is_model(cfg.model_name, lm)
    if not known and not any(same_model(cfg.model_name, other) for other in same_as or ()):
        if not (lm.saved_from and same_model(cfg.model_name, lm.saved_from)):
            raise UserError(
                f"SAE {name} was trained on {cfg.model_name}, model.name is {lm.name}; set model.name: "
                f"{cfg.model_name} or choose another SAE; if {lm.name} is that model under another name, set "
                f"model.same_as: [{cfg.model_name}]"
            )
        print(
            f"SAE {name} was trained on {cfg.model_name}; the config in {lm.name} says that it was saved from "
            f"{lm.saved_from}: taken for that model, which a finetune of it is not",
            flush=True,
        )
    check_widths(name, cfg, lm)
    module = cfg.provenance.get("module")
    if module and not lm.is_output_of(module, cfg.hook_out):
        raise UserError(
            f"SAE {name} stands for what {module} puts out; {lm.name} norms or scales it before {cfg.hook_out}, "
            "or has no such part: no hook here has it"
        )
    if cfg.center_input and not any(isinstance(module, nn.LayerNorm) for module in lm.model.modules()):
        raise UserError(
            f"SAE {name} was trained with center_writing_weights, which a model without "
            f"LayerNorm such as "
            f"{lm.name} does not allow"
        )


def check_widths(name: str, cfg: SAEConfig, lm: LanguageModel) -> None:
    """Raises `UserError` when the SAE reads or writes another width than the model has there, a hook the model lacks, or two
    hooks that do not belong together."""
    sides = [("reads", cfg.d_in // len(cfg.hook_names), hook) for hook in cfg.hook_names]
    if cfg.is_transcoder:
        try:
            for read, written in zip(cfg.hook_names, cfg.hooks_out, strict=False):  # a part writes later layers too
                check_pair(read, written)
        except UserError as error:
            raise UserError(f"SAE {name}: {error}") from None
        sides += [("writes", cfg.d_out // len(cfg.hooks_out), hook) for hook in cfg.hooks_out]
    for does, width, hook in sides:
        if width != lm.d_in(hook):
            raise UserError(f"SAE {name} {does} {width} dimensions, {lm.name} has {lm.d_in(hook)} at {hook}")


def check_tokenizer(lm: LanguageModel) -> None:
    """Raises `UserError` when the tokenizer makes ids the model has no embedding for."""
    if len(lm.tokenizer) > lm.vocab_size:
        raise UserError(
            f"model.name: the tokenizer of {lm.name} has {len(lm.tokenizer)} tokens, the model "
            f"{lm.vocab_size}; they do not belong together"
        )


PREPARED, TRAINED = Path("downloaded_saes"), Path("trained_saes")
"""What the setup stage and the train stage write."""
TRAINING_REPORT = "training_report.json"
T = TypeVar("T")
OFFLINE_HINT = "without a hub, set baseline_sae.source: trained"


def open_sae(
    wanted: Any, lm: LanguageModel | None = None, hook: str | None = None, baseline: SparseAutoencoder | None = None
) -> SparseAutoencoder:
    """The one door to an SAE, wherever it is. Raises `UserError` for one that is not there, damaged, or not used in full.

    wanted: a folder as a `Path`; a folder or the name of one in downloaded_saes/ or trained_saes/ as a user writes it; or

        trained:NAME            of the train stage
        packaged:NAME           that comes with this package
        prepared:NAME           of the setup stage
        sae_lens:RELEASE:ID     of SAELens' directory
        hub:REPO_ID:FILENAME    of a hub repository, with the configuration beside it
        python:MODULE:CLASS     a class of the user's own, built from `baseline`

    or an object in memory with `encode` and `decode`. What such an object does is found by trying, on activations of `lm`
    at `hook`, where it does not say itself which hook it reads.
    """
    if isinstance(wanted, Path):
        return _in_folder(wanted)
    if not isinstance(wanted, str):
        return adapt(wanted, lm, hook)
    kind, _, rest = wanted.partition(":")
    first, _, second = rest.partition(":")
    if kind == "trained":
        return _trained(rest)
    if kind == "packaged":
        return load_sae(packaged_place(rest))
    if kind == "prepared":
        return _prepared(rest)
    if kind == "sae_lens":
        return _release(first, second)
    if kind == "hub":
        return _on_hub(first, second)
    if kind == "python" and baseline is not None:
        return _of_class(rest, baseline)
    return _in_folder(_named_folder(wanted))


def reference_of(block: BaselineSAE | TransferSAE) -> str | Path:
    """What `open_sae` takes for a block of params.yaml with a `source`."""
    if block.source == "folder":
        assert block.path  # the section requires what its source needs
        return user_path(block.path)
    return ":".join([block.source, *(getattr(block, key) for key in block.NEEDS[block.source] or ("name",))])


def sae_name(wanted: str) -> str:
    """The name in tables of an SAE that a user names: of its folder, or of its release and id."""
    kind, _, rest = wanted.partition(":")
    return slugify(rest) if kind in ("sae_lens", "hub", "packaged") else slugify(_named_folder(wanted).resolve().name)


def local_names() -> list[str]:
    """Names of the SAEs that the pipeline wrote."""
    return sorted({name for root in (PREPARED, TRAINED) for name in _names_in(root)})


def trained_names() -> list[str]:
    """Names of the SAEs that the train stage wrote."""
    return _names_in(TRAINED)


def _names_in(root: Path) -> list[str]:
    return sorted(path.parent.name for path in root.glob(f"*/{CONFIG_FILE}"))


def _trained(name: str) -> SparseAutoencoder:
    folder = TRAINED / checked_name(name, "trained SAE", "choose one of train.saes")
    if not (folder / CONFIG_FILE).is_file():
        known = trained_names()
        raise UserError(
            f"{folder}: no such trained SAE "
            f"({'there are ' + ', '.join(known) if known else 'none yet'}); "
            f"run the train stage first (dvc repro train), with {name} under train.saes"
        )
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


def _prepared(name: str) -> SparseAutoencoder:
    if name not in _names_in(PREPARED):
        known = ", ".join(_names_in(PREPARED))
        raise UserError(
            f"{PREPARED} holds no SAE {name!r}"
            + (f"; there are {known}" if known else "; run the setup stage first (dvc repro setup)")
        )
    return load_sae(PREPARED / name)


# --- folders ---------------------------------------------------------------------------------


def _in_folder(folder: Path) -> SparseAutoencoder:
    saes = open_place(folder)
    if len(saes) > 1:
        raise UserError(
            f"{folder}: holds {len(saes)} SAEs ({', '.join(saes)}); split it with "
            f"`python -m sae_research import {folder} OUT` and name those folders"
        )
    return _from(next(iter(saes.values())), source="folder", name=folder.name)


def _named_folder(name: str) -> Path:
    for folder in (user_path(name), PREPARED / name, TRAINED / name):
        if folder.is_dir() or (folder.is_file() and folder.suffix in (".pt", ".pth", ".safetensors")):
            return folder
    raise UserError(
        f"--sae {name}: no such folder, nor a name in {PREPARED}/ or {TRAINED}/ (there: "
        f"{', '.join(local_names()) or 'none yet'}); releases are written sae_lens:RELEASE:ID"
    )


def matching_folders(pattern: str) -> list[Path]:
    """Folders a glob stands for, in alphabetical order; where it matches none, files that hold a dictionary each. Raises
    `UserError` when there are none of these either."""
    paths = sorted(Path(path) for path in glob.glob(str(user_path(pattern)), recursive=True))
    found = [path for path in paths if path.is_dir()] or [path for path in paths if layouts_of(path)]
    if not found:
        raise UserError(f"comparison_saes.folders: {pattern!r} matches no folder")
    return found


def folder_names(patterns: Sequence[str]) -> dict[Path, str]:
    """The folders that globs stand for, each once, and what their SAEs are called: the folder's own name, with as many of
    the folders above it as tell it apart from the others (`runs/a/trainer_0` -> `a_trainer_0`)."""
    paths = [path for pattern in patterns for path in matching_folders(pattern)]
    folders = {(path.with_suffix("") if path.is_file() else path).resolve(): path for path in paths}
    parts = dict.fromkeys(folders, 1)
    while True:
        names = {place: slugify("_".join(place.parts[-count:])) for place, count in parts.items()}
        twins = [
            place
            for place, name in names.items()
            if list(names.values()).count(name) > 1 and parts[place] < len(place.parts) - 1
        ]
        if not twins:
            return {path: names[place] for place, path in folders.items()}
        parts |= {place: parts[place] + 1 for place in twins}


def python_name(place: str) -> str:
    """The name in tables of a class of the user's own: its `form`, or its own name."""
    cls = form_class(place)
    return slugify(cls.form or cls.__name__)


def _of_class(place: str, baseline: SparseAutoencoder) -> SparseAutoencoder:
    """A class of the user's own. `cfg.form` keeps its place, so that `load_sae` finds it; the source is pinned by its
    hash."""
    cls = form_class(place)
    sae = cls.from_baseline(baseline)
    if not isinstance(sae, SparseAutoencoder):
        raise UserError(f"{place}: from_baseline returned {type(sae).__name__}, not an SAE")
    source = inspect.getsource(inspect.getmodule(cls) or cls)
    architecture = sae.cfg.architecture if sae.cfg.architecture != place else cls.form or cls.__name__
    sae.cfg = sae.cfg.replace(
        form=place,
        architecture=architecture,
        options=sae.options(),
        provenance={"source": "python", "place": place, "source_sha256": fingerprint(source)},
    )
    return sae


# --- the hub ---------------------------------------------------------------------------------


def _on_hub(repo_id: str, filename: str) -> SparseAutoencoder:
    """An SAE file of a hub repository with the configuration beside it; kept in the hub's own cache."""
    for part in filename.split("/"):
        checked_name(part, "baseline_sae.filename", "name a file inside the repository")
    plan = plan_of_file(repo_id, filename)
    assert plan.read is not None  # `plan_of_file` refuses what is not read
    for name in plan.files:
        download(repo_id, name)  # each that is missing is named
    root = reach(lambda: fetched(repo_id, plan), f"{repo_id}/{filename}", repo_id)
    sae = plan.read(root)
    revision = root.name if root.parent.name == "snapshots" else None
    licence = reach(lambda: shown_licence(repo_id), repo_id, repo_id)
    return _from(sae, source="hub", repo_id=repo_id, filename=filename, revision=revision, licence=licence or None)


def download(repo_id: str, filename: str) -> Path:
    """One file of a hub repository, from the hub's cache where it is there already."""
    from huggingface_hub import hf_hub_download

    return reach(
        lambda: Path(hf_hub_download(repo_id, filename)),
        f"{repo_id}/{filename}",
        repo_id,
        f"{quote(repo_id)}/resolve/main/{quote(filename)}",
    )


def _release(release: str, sae_id: str) -> SparseAutoencoder:
    if not sae_id:
        raise UserError(f"sae_lens:{release}: write sae_lens:RELEASE:ID; `analyze saes --search TEXT` lists them")
    sae = reach(lambda: from_release(release, sae_id), f"SAELens {release} / {sae_id}", release)
    return _from(sae, source="sae_lens")


def reach(fetch: Callable[[], T], what: str, where: str, path: str = "") -> T:
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
        raise UserError(
            f"{what}: access is restricted; accept its terms on the hub and log in (hf auth login), or {OFFLINE_HINT}"
        ) from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"{what}: the hub has no repository {where!r} (or it is private); {OFFLINE_HINT}") from None
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
