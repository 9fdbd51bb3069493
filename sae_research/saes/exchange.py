"""SAEs out of the project and into it: other libraries' formats (`export`, `import`), and folders to a hub repository in one
commit (`upload`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae_research.runtime.endpoints import keeps_secrets, one_line, secret
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import read_json
from sae_research.runtime.formatting import markdown_table, number
from sae_research.saes.base import SparseAutoencoder
from sae_research.saes.files import sae_lens_lacks, save_sae
from sae_research.saes.formats import sae_interpretability as si
from sae_research.saes.formats import sparsify
from sae_research.saes.formats.dictionary_learning import EVAL_FILE, export_dictionary_learning
from sae_research.saes.layouts import layouts_of, open_place

FORMATS = ("dictionary_learning", "sae_lens", "sparsify", "sae_interpretability")


def sae_folders(folder: Path) -> list[Path]:
    """The folder itself where it holds an SAE, else those below it that do, in alphabetical order."""
    if not folder.is_dir():
        if folder.is_file():
            return [folder]
        raise UserError(f"{folder}: no such folder")
    if layouts_of(folder):
        return _single(folder)
    found = sorted(one for path in folder.rglob("*") if path.is_dir() and layouts_of(path) for one in _single(path))
    if not found:
        open_place(folder)  # says what was expected
    return found


def _single(folder: Path) -> list[Path]:
    """The folder; in its place its files, where each of several holds a dictionary (`layer_0.safetensors`, ...)."""
    files = [folder / name for layout in layouts_of(folder) for name in layout.marks(folder)]
    return files if len(files) > 1 and all(layouts_of(file) for file in files) else [folder]


def import_saes(source: Path, output: Path) -> list[Path]:
    """Write every SAE of `source` in our layout, which is SAELens': one into `output` itself, several below it."""
    found = _read_all(source)
    for place, (_, sae) in found.items():
        save_sae(sae, output / place)
        _say(output / place, sae, sae_lens_lacks(sae))
    return [output / place for place in found]


def export_saes(source: Path, output: Path, layout: str, dict_class: str | None = None) -> list[Path]:
    """Write every SAE of `source` for another library; held-out metrics go along for dictionary_learning.

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
                if sae.cfg.is_crosscoder:
                    raise UserError(f"dictionary_learning's layout has one hook; a crosscoder has several ({sae.cfg.hooks})")
                note = export_dictionary_learning(sae, output / place, dict_class, origin / EVAL_FILE)
                if not sae.cfg.hook_name.endswith("hook_resid_post"):
                    note += "; SAE Bench's loaders would put it at hook_resid_post of its layer"
            elif layout == "sparsify":
                note = sparsify.write_sparsify(sae, output / place).name
            elif layout == "sae_interpretability":
                note = si.write_run(sae, output / place)
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
        saes = open_place(folder)
        for name, sae in saes.items():
            place = folder.relative_to(source)
            place = place.with_suffix("") if folder.is_file() and place.name else place
            found[place / name if len(saes) > 1 else place] = folder, sae
    return found


def _say(folder: Path, sae: SparseAutoencoder, note: str) -> None:
    about = f"{sae.cfg.form}, {sae.cfg.d_in} x {sae.cfg.d_sae}, {sae.cfg.hook_name or 'no hook named'}"
    print(f"{folder}: {about}" + (f"; {note}" if note else ""))


TOKEN_NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ACCESS_TOKEN")
CARD = "README.md"
_COLUMNS = ("l0", "variance_explained", "loss_recovered", "fraction_alive")


def upload(folders: Sequence[Path], repo_id: str, private: bool = False) -> str:
    """Send every file of the folders, each under its folder's own name, and return the commit's address.

    The repository is made where there is none. A card that lists the SAEs goes along unless the repository has one.
    Either everything arrives, or nothing. Raises `UserError` for a missing folder, token or permission, and when the hub
    cannot be reached.
    """
    files = _files(folders)
    token = secret(*TOKEN_NAMES)
    if token is None:
        raise UserError(f"upload needs a token with write access: set {TOKEN_NAMES[0]} in the environment or in .env")
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
    from huggingface_hub.utils import get_session

    api, session = HfApi(token=token), get_session()
    if not keeps_secrets(api.endpoint):
        raise UserError(
            "HF_ENDPOINT is plain http to another machine, and the token would travel there in the clear: use https"
        )
    session.event_hooks["response"].append(_refuse_redirect)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        if CARD not in files and not api.file_exists(repo_id, CARD):
            operations.append(CommitOperationAdd(CARD, card(files, repo_id).encode()))
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=f"{len(files)} files of {', '.join(folder.resolve().name for folder in folders)}",
        )
    except HfHubHTTPError as error:
        raise UserError(f"{repo_id}: {_reason(error, token)}") from None
    except HFValidationError as error:
        raise UserError(f"--hf_repo_id {repo_id}: {str(error).partition(chr(10))[0]}") from None
    except (HTTPError, OSError, RuntimeError, ValueError, KeyError) as error:
        # lost connections, uploads that a thread gave up, answers that are no hub's
        cause = error.__cause__ or error
        raise UserError(
            f"{repo_id}: the upload failed ({type(cause).__name__}: {one_line(str(cause), token)}); nothing was "
            "committed, run it again"
        ) from None
    finally:
        session.event_hooks["response"].remove(_refuse_redirect)
    return commit.commit_url


def _files(folders: Sequence[Path]) -> dict[str, Path]:
    """Path in the repository -> file; hidden files stay behind."""
    found: dict[str, Path] = {}
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder")
        inside = sorted(
            path
            for path in folder.rglob("*")
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        )
        if not inside:
            raise UserError(f"{folder}: holds no files")
        for path in inside:
            name = f"{folder.resolve().name}/{path.relative_to(folder).as_posix()}"
            if name in found:
                raise UserError(f"two folders are called {folder.resolve().name}; rename one")
            found[name] = path
    return found


def card(files: dict[str, Path], repo_id: str) -> str:
    """A model card: which SAEs, their held-out metrics, how to load them."""
    saes = sorted(name.removesuffix("/cfg.json") for name in files if name.endswith("/cfg.json"))
    rows = []
    for sae in saes:
        results = files.get(f"{sae}/eval_results.json")
        figures: Any = read_json(results) if results else {}
        if not isinstance(figures, dict):
            raise UserError(f"{results}: not the metrics of an SAE; remove it or write it again")
        cells = [number(value if isinstance(value := figures.get(key), int | float) else None) for key in _COLUMNS]
        rows.append([f"`{sae}`", *cells])
    head = [
        "---",
        "library_name: sae_lens",
        "tags:",
        "- sparse-autoencoder",
        "---",
        "",
        "# Sparse autoencoders",
        "",
        "Trained with sae_research; held-out metrics, sinks left out.",
        "",
    ]
    table = [markdown_table(["SAE", "L0", "variance explained", "loss recovered", "fraction alive"], rows)]
    load = (
        ["", "```python", "from sae_lens import SAE", "", f'sae = SAE.from_pretrained("{repo_id}", "{saes[0]}")', "```"]
        if saes
        else []
    )
    return "\n".join([*head, *(table if saes else []), *load]) + "\n"


def _refuse_redirect(response: Any) -> None:
    """Called with every answer before a redirect would be followed."""
    if response.has_redirect_location:
        raise UserError(
            f"the hub answers with a redirect ({response.status_code}), which a token does not follow; give the "
            "repository's present name, or HF_ENDPOINT the final address"
        )


def _reason(error: Any, token: str) -> str:
    """One line for a refusal of the hub."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return "the hub does not accept the token (401); make a new one with write access"
    if status == 403:
        return "the token may not write to this repository (403)"
    return one_line(str(error), token)
