"""Which library's files a folder or a file holds, and what reads them: one record a layout. The table in
`docs/formats.md` is made of these records, and a test holds it against them.

    python -m sae_research.saes.layouts       prints that table
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sae_research.runtime.errors import UserError
from sae_research.runtime.files import slugify
from sae_research.runtime.formatting import markdown_table
from sae_research.saes.base import SparseAutoencoder
from sae_research.saes.files import CONFIG_FILE, WEIGHTS_FILE, load_sae
from sae_research.saes.formats import (
    checkpoints,
    circuit_tracer,
    dictionary_learning_crosscoders,
    gemma_scope,
    gemma_scope_cross_layer,
    gemma_scope_crosscoders,
    llamascopium,
    llamascopium_cross_layer,
    openai,
    sparsify,
    temporal_saes,
)
from sae_research.saes.formats import dictionary_learning as dl
from sae_research.saes.formats import sae_interpretability as si
from sae_research.saes.reading import names_on_path, unfinished_in


class Layout(NamedTuple):
    """One library's files."""

    name: str
    files: str
    """What is there, in words."""
    what: str
    """What they hold, in words."""
    marks: Callable[[Path], list[str]]
    """The names by which a folder, or a file, is known to be one; none where it is not."""
    read: Callable[[Path], dict[str, SparseAutoencoder]]
    """The SAEs by name."""
    written: str
    """How it is written; empty where it is not."""
    tested: str
    """What its numbers are compared with."""


def _one(load: Callable[[Path], SparseAutoencoder]) -> Callable[[Path], dict[str, SparseAutoencoder]]:
    return lambda path: {path.stem if path.is_file() else path.name: load(path)}


def _placed(load: Callable[[Path, list[str]], SparseAutoencoder]) -> Callable[[Path], dict[str, SparseAutoencoder]]:
    """Of layouts whose model and hook stand in the names of folders."""
    return _one(lambda path: load(path, names_on_path(path)))


def _there(*names: str, unless: tuple[str, ...] = ()) -> Callable[[Path], list[str]]:
    """Known by any of these files in a folder; `unless` there is one of the others."""

    def marks(path: Path) -> list[str]:
        if any((path / name).is_file() for name in unless):
            return []
        return [name for name in names if (path / name).is_file()]

    return marks


def _sae_lens(path: Path) -> list[str]:
    """`cfg.json`, which sparsify has too: there, the name of the weights tells them apart."""
    if not (path / CONFIG_FILE).is_file():
        return []
    if (path / WEIGHTS_FILE).is_file():
        return [CONFIG_FILE, WEIGHTS_FILE]
    return [] if (path / sparsify.WEIGHTS_FILE).is_file() else [CONFIG_FILE]


def _llamascopium(path: Path) -> list[str]:
    if (path / llamascopium.FIRST_CONFIG).is_file():
        return [llamascopium.FIRST_CONFIG]
    beside = any((path / name).is_file() for name in llamascopium.WEIGHTS_FILES)
    own = (path / llamascopium.CONFIG_FILE).is_file() and not (path / CONFIG_FILE).is_file()
    return [llamascopium.CONFIG_FILE] if beside and own else []


def _dictionary_learning(path: Path) -> list[str]:
    return [] if _dictionary_learning_crosscoders(path) else _there(dl.WEIGHTS_FILE)(path)


def _dictionary_learning_crosscoders(path: Path) -> list[str]:
    if not dictionary_learning_crosscoders.is_crosscoder_config(path / dl.CONFIG_FILE):
        return []
    return _there(dl.WEIGHTS_FILE, dictionary_learning_crosscoders.HUB_WEIGHTS_FILE)(path)


def _files(known: Callable[[Path], bool]) -> Callable[[Path], list[str]]:
    """Of layouts of one file each: the file itself, or the files of a folder."""

    def marks(path: Path) -> list[str]:
        if path.is_dir():
            return sorted(inside.name for inside in path.iterdir() if inside.is_file() and known(inside))
        return [path.name] if path.is_file() and known(path) else []

    return marks


def _together(marks: Callable[[Path], list[str]]) -> Callable[[Path], list[str]]:
    """Of layouts whose files, where a folder holds several, are one dictionary."""
    return lambda path: marks(path)[:1]


def _only_file(marks: Callable[[Path], list[str]], read: Callable[[Path], dict[str, SparseAutoencoder]]):  # noqa: ANN202
    def only(path: Path) -> dict[str, SparseAutoencoder]:
        if not path.is_dir():
            return read(path)
        names = marks(path)
        if len(names) > 1:
            raise UserError(f"{path}: holds {len(names)} of them ({', '.join(names[:4])}, ...); name one: {path / names[0]}")
        return read(path / names[0])

    return only


_PUBLISHED = _files(checkpoints.is_checkpoint)
_OPENAI = _files(lambda path: path.suffix == ".pt" and path.stem.isdigit() and path.parent.name == "autoencoders")
_LAYERS = _files(circuit_tracer.is_transcoder_file)
_CROSS_LAYER = _together(_files(circuit_tracer.is_cross_layer_file))
_GEMMA_CROSS_LAYER = _together(_files(gemma_scope_cross_layer.is_cross_layer_file))
LAYOUTS = (
    Layout(
        "SAELens",
        "`cfg.json`, `sae_weights.safetensors`",
        "all architectures of version 6.54 and its configurations since version 2, with `scaling_factor`",
        _sae_lens,
        _one(load_sae),
        "`export --format sae_lens`, `save_sae`",
        "SAELens' classes",
    ),
    Layout(
        "dictionary_learning",
        "`ae.pt`, `config.json`",
        "its seven classes of SAEs",
        _dictionary_learning,
        _one(dl.load_dictionary_learning),
        "`export --format dictionary_learning`",
        "plain references; SAE Bench's and SAELens' loaders",
    ),
    Layout(
        "SAE-Interpretability",
        "`final_config.yaml`, `samples_N.pt`",
        "its four kinds, one SAE a hook",
        _there(si.CONFIG_FILE),
        lambda path: {slugify(hook): sae for hook, sae in si.load_run(path).items()},
        "`export --format sae_interpretability`",
        "plain references",
    ),
    Layout(
        "sparsify",
        "`cfg.json`, `sae.safetensors`",
        "SAEs and transcoders, with a skip; TopK, GroupMax, signed TopK",
        _there(sparsify.WEIGHTS_FILE),
        _one(sparsify.load_sparsify),
        "`export --format sparsify`",
        "sparsify's class where it is installed, else plain references",
    ),
    Layout(
        "Gemma Scope 1 and 2",
        "`params.npz` or `params.safetensors`, `config.json`",
        "SAEs of streams, heads, MLPs and embeddings; transcoders, with a skip",
        _there(*gemma_scope.WEIGHTS_FILES),
        _placed(gemma_scope.load_gemma_scope),
        "",
        "SAELens' loaders and classes; plain references",
    ),
    Layout(
        "Llamascopium, Llama Scope",
        "`config.json`, `sae_weights.safetensors`; `hyperparams.json`, `checkpoints/final.safetensors`",
        "SAEs, transcoders, cross-layer transcoders: ReLU, JumpReLU, TopK; crosscoders: ReLU, JumpReLU; with norms of data",
        _llamascopium,
        _one(llamascopium_cross_layer.load_any),
        "",
        "Llamascopium's class where it is installed; SAELens' loaders and classes; plain references",
    ),
    Layout(
        "OpenAI",
        "`LOCATION/autoencoders/LAYER.pt`",
        "ReLU, and TopK on normed tokens",
        _OPENAI,
        _only_file(_OPENAI, _placed(openai.load_openai)),
        "",
        "plain references",
    ),
    Layout(
        "Goodfire, qresearch, Qwen Scope, Kissane",
        "one `.pt` or `.pth`, as published",
        "ReLU; TopK",
        _PUBLISHED,
        _only_file(_PUBLISHED, _placed(checkpoints.load_published)),
        "",
        "SAELens' loaders and classes",
    ),
    Layout(
        "circuit-tracer",
        "`config.yaml`, `layer_L.safetensors`",
        "transcoders: ReLU, JumpReLU, with a skip",
        _LAYERS,
        _only_file(_LAYERS, _placed(circuit_tracer.load_circuit_tracer)),
        "",
        "SAELens' loaders and classes; plain references",
    ),
    Layout(
        "dictionary_learning, crosscoders",
        "`ae.pt` or `model.safetensors`, `config.json`",
        "`CrossCoder`, `BatchTopKCrossCoder`: of two models, or of the hooks that `hook_names` lists in `config.json`",
        _dictionary_learning_crosscoders,
        _one(dictionary_learning_crosscoders.load_crosscoder),
        "",
        "plain references",
    ),
    Layout(
        "Gemma Scope 2, crosscoders",
        "`params_layer_N.safetensors`, `config.json`, below a folder `crosscoder`",
        "weakly causal crosscoders of several layers of the stream",
        gemma_scope_crosscoders.files_in,
        _placed(gemma_scope_crosscoders.load_crosscoder),
        "",
        "plain references",
    ),
    Layout(
        "circuit-tracer, cross-layer",
        "`config.yaml`, `W_enc_L.safetensors`, `W_dec_L.safetensors` of every layer L, or one layer of it",
        "cross-layer transcoders: ReLU, JumpReLU; layer 0 as a transcoder, another layer alone for its latents",
        _CROSS_LAYER,
        _placed(circuit_tracer.load_circuit_tracer),
        "",
        "plain references; of one layer SAELens' loader",
    ),
    Layout(
        "Gemma Scope 2, cross-layer",
        "`params_layer_L.safetensors` of every layer L, or one layer of it",
        "cross-layer transcoders: JumpReLU, with a skip; layer 0 as a transcoder, another layer alone for its latents",
        _GEMMA_CROSS_LAYER,
        _placed(gemma_scope_cross_layer.load_cross_layer),
        "",
        "plain references",
    ),
    Layout(
        "Temporal SAEs",
        "`conf.yaml`, `latest_ckpt.safetensors`",
        "SAEs that take away what earlier tokens predict",
        _there(temporal_saes.CONFIG_FILE),
        _placed(temporal_saes.load_temporal),
        "",
        "SAELens' loaders and classes",
    ),
)


def layouts_of(path: Path) -> list[Layout]:
    """The layouts that a folder or a file may be in."""
    return [layout for layout in LAYOUTS if layout.marks(path)]


def open_place(path: Path) -> dict[str, SparseAutoencoder]:
    """The SAEs of one folder or file by name, of whichever library. Raises `UserError` where there is none, and where it
    looks like two libraries'."""
    found = layouts_of(path)
    if not found and (unfinished := unfinished_in(path)):
        raise UserError(f"{path}: only an unfinished download is there ({unfinished[0]}); fetch it again")
    if not found:
        raise UserError(
            f"{path}: no SAE there; expected {CONFIG_FILE} with {WEIGHTS_FILE}, or what docs/formats.md lists of "
            f"{', '.join(layout.name for layout in LAYOUTS[1:])}"
        )
    if len(found) > 1:
        seen = "; ".join(f"{layout.name}: {', '.join(layout.marks(path)[:3])}" for layout in found)
        raise UserError(f"{path}: looks like {len(found)} formats ({seen}); move the files of all but one elsewhere")
    return found[0].read(path)


def table() -> str:
    """What is read, written, and tested against what, in Markdown."""
    heads = ["library", "files", "what is read", "written", "tested against"]
    rows = [[layout.name, layout.files, layout.what, layout.written or "–", layout.tested] for layout in LAYOUTS]
    return markdown_table(heads, rows, left=len(heads))


if __name__ == "__main__":
    print(table())
