"""The texts and files that the evaluations to come name: are they there, and can a first row be read?

An evaluation that fails for a misspelt name after an hour of others could have been told before them. Cheap: nothing is
fetched, and of a file only its beginning is read. No torch here.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sae_research.errors import UserError
from sae_research.params import Params
from sae_research.text.crossed_tasks import CROSSED_TASKS, HUB_TASKS, LOCAL_COLUMNS, unknown_crossed_task
from sae_research.text.local import SUFFIXES, TABLE_SUFFIXES, find_local, local_files, looks_local, read_rows
from sae_research.text.packaged import packaged_folder, packaged_version
from sae_research.text.packaged_tasks import PACKAGED_TASKS
from sae_research.text.questions import COLUMNS
from sae_research.text.tasks import SAE_BENCH_TASKS, unknown_task

LABELLED = ("text", "label")


def check_inputs(params: Params) -> None:
    """Raises `UserError` for what an enabled evaluation would not find or could not read, naming the key that says so."""
    on = params.eval_types
    if on.sparse_probing:
        _check_tasks("sparse_probing", params.sparse_probing.dataset_names)
    if on.tpp and params.tpp.dataset_names is not None:
        _check_tasks("tpp", params.tpp.dataset_names)
    if on.scr:
        for name in params.scr.dataset_names:
            if not _is_readable("scr.dataset_names", name, LOCAL_COLUMNS, {*CROSSED_TASKS, *HUB_TASKS}):
                raise UserError(f"scr.dataset_names: {unknown_crossed_task(name)}")
    if on.sparse_probing_sae_probes:
        _check_packaged(params.sparse_probing_sae_probes.dataset_names)
    if on.unlearning:
        unlearning = params.unlearning
        for key in ("forget_corpus", "retain_corpus"):
            _check_path(f"unlearning.{key}", getattr(unlearning, key), [unlearning.corpus_column], SUFFIXES)
        for key in ("forget_questions", "retain_questions"):
            for name in getattr(unlearning, key):
                _check_path(f"unlearning.{key}", name, COLUMNS, TABLE_SUFFIXES)
    if on.ravel:
        _check_path("ravel.prompts", params.ravel.prompts)
    if on.transfer and params.transfer.dataset is not None:
        _check_path("transfer.dataset", params.transfer.dataset, [params.transfer.column_name], SUFFIXES)


def _check_tasks(section: str, names: Sequence[str]) -> None:
    for name in names:
        if not _is_readable(f"{section}.dataset_names", name, LABELLED, {*PACKAGED_TASKS, *SAE_BENCH_TASKS}):
            raise UserError(f"{section}.dataset_names: {unknown_task(name)}")


def _is_readable(key: str, name: str, columns: Sequence[str], known: Collection[str]) -> bool:
    """Whether a task is known by its name or lies in a file; raises `UserError` where that cannot be read."""
    if name in known:
        return True
    return _check_path(key, name, columns, TABLE_SUFFIXES) if find_local(name) is not None else False


def _check_path(key: str, name: str, columns: Sequence[str] = (), suffixes: Sequence[str] = ()) -> bool:
    """Whether `name` is a local file or folder, and every file in it has the columns. Raises `UserError` for a path that
    leads nowhere and for files that cannot be read; what may be a name on the hub passes."""
    local = find_local(name)
    if local is None:
        if looks_local(name.partition(":")[0]):
            raise UserError(f"{key}: {name}: no such file or folder")
        return False
    try:
        for file in local_files(local, suffixes) if columns else ():
            next(read_rows(file, columns), None)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    return True


def _check_packaged(names: Sequence[str]) -> None:
    if isinstance(names, str):  # all of them
        return
    for name in names:
        if not (packaged_folder() / f"{name}.csv.zst").is_file():
            raise UserError(f"sparse_probing_sae_probes.dataset_names: sae-probes {packaged_version()} has no task {name!r}")
