"""Every dictionary of a release of SAELens' directory, scored by the pipeline's evaluations, into one leaderboard.

Dictionaries that read one hook of one model and write one hook come one after another in most releases; each such batch has
a folder of its own, laid out as a project is (`params.yaml`, `downloaded_saes`, `eval_results`), and is evaluated as the
stages do it, over the workers of `cluster` where there are any. A batch that is finished is not looked at again.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sae_research.config.evaluations import OF_SAES
from sae_research.config.params import Params, check_params, read_params
from sae_research.evals.run import run_evaluation
from sae_research.experiments.config_files import PARAMS, over, parse_overrides, with_values, write_yaml
from sae_research.experiments.release_board import BOARD, CSV, published_rows, write_board
from sae_research.runtime.errors import UserError, did_you_mean
from sae_research.runtime.files import ROOT_VARIABLE, fingerprint, project_root, read_json, slugify, write_json
from sae_research.runtime.former_names import elsewhere
from sae_research.runtime.sources import sources_fingerprint
from sae_research.saes.files import WEIGHTS_FILE, save_sae
from sae_research.saes.releases import ReleasedSAE, saes_of
from sae_research.saes.sources import PREPARED, open_sae, same_model
from sae_research.setup.stage import make_manifest

INDEX, DONE = "index.json", "done.json"
BATCH = 64
"""Dictionaries of one batch at most: they lie on disk together."""


class Place(NamedTuple):
    """Where a dictionary of the release is scored."""

    folder: str
    """Of its batch, below the release's."""
    name: str
    """In tables."""


@dataclass
class Batch:
    """Dictionaries that the evaluations score together."""

    folder: Path
    model: str
    hooks: tuple[str, str]
    """Read and written."""
    rows: dict[str, dict[str, Any]]
    """What the manifest says of each, by name."""


def evaluate_release(options: argparse.Namespace) -> int:
    """The command of this name. Returns 1 where a dictionary could not be opened or an evaluation failed."""
    evaluations = list(dict.fromkeys(part.strip() for part in options.evaluations.split(",") if part.strip()))
    if not evaluations:
        raise UserError(f"--evaluations names none; known: {', '.join(OF_SAES)}")
    for name in evaluations:
        if name not in OF_SAES:
            raise UserError(
                f"--evaluations: unknown evaluation {name}{elsewhere(name, 'value') or did_you_mean(name, OF_SAES)}"
            )
    chosen = saes_of(options.release, options.match, "--match")
    if options.list:
        for entry in chosen:
            print("  ".join([entry.sae_id, *(f"{key} {value:g}" for key, value in entry.card.items())]))
        return 0
    root = (options.output_dir or Path("releases") / slugify(options.release)).absolute()
    root.mkdir(parents=True, exist_ok=True)
    work = Work(root, options.overrides, evaluations, options.discard)
    published = published_rows(options.published, evaluations) if options.published else []  # before hours are spent
    folders = work.run(chosen)
    names = {work.index[entry.sae_id].name: entry.sae_id for entry in chosen if entry.sae_id in work.index}
    text = write_board(root, options.release, folders, names, work.refused, evaluations, published)
    print(f"\n{text}\n{root / BOARD}, {CSV}; {len(work.refused)} of {len(chosen)} dictionaries could not be opened")
    for line in work.failures:
        print(f"failed: {line}")
    return int(bool(work.refused or work.failures))


class Work:
    """The batches of one release, and how far they are."""

    def __init__(self, root: Path, overrides: Sequence[str], evaluations: Sequence[str], discard: bool) -> None:
        """discard: whether the weights of a batch are removed once it is scored."""
        self.root, self.evaluations, self.discard = root, evaluations, discard
        self.project = project_root()
        given, changes = self.project / PARAMS, parse_overrides(overrides)
        base = check_params(read_params(given), str(given)) if given.is_file() else Params()
        types = {f"eval_types.{name}": name in evaluations for name in OF_SAES}
        self.values = over(base.model_dump(mode="json"), {**changes, **types})
        check_params(self.values, "params.yaml with -S")
        self.model = str(changes["model.name"]) if "model.name" in changes else None
        code = [
            sources_fingerprint(f"sae_research.evals.{str(OF_SAES[name].evaluate).partition(':')[0]}")
            for name in evaluations
        ]
        inputs = {key: value for key, value in self.values.items() if key != "cluster"}
        self.key = fingerprint({"params": inputs, "evaluations": list(evaluations), "code": code})
        self.index: dict[str, Place] = (
            {sae_id: Place(**place) for sae_id, place in read_json(root / INDEX).items()} if (root / INDEX).is_file() else {}
        )
        self.refused: dict[str, str] = {}
        self.failures: list[str] = []
        self._made: set[Path] = set()
        """Folders of this call's batches."""

    def run(self, chosen: Sequence[ReleasedSAE]) -> list[Path]:
        """Open and score what is not finished; returns the folders of all batches that hold chosen dictionaries."""
        folders: dict[Path, None] = {}
        batch: Batch | None = None
        for number, entry in enumerate(chosen, 1):
            place = self.index.get(entry.sae_id)
            if place is None or not self._finished(place):
                print(f"{number} of {len(chosen)}: {entry.sae_id}", flush=True)
                try:
                    batch = self._admitted(entry, batch)
                except UserError as error:
                    self.refused[entry.sae_id] = str(error)
                    print(f"not opened: {error}", flush=True)
                    continue
                place = self.index[entry.sae_id]
            folders[self.root / place.folder] = None
        self._score(batch)
        return list(folders)

    def _finished(self, place: Place) -> bool:
        path = self.root / place.folder / DONE
        done = read_json(path) if path.is_file() else {}
        return done.get("key") == self.key and place.name in done["names"]

    def _admitted(self, entry: ReleasedSAE, batch: Batch | None) -> Batch:
        """The batch that now holds a dictionary; the one before is scored where this belongs to another. Raises `UserError`
        where it cannot be opened, or is another model's than the one asked for."""
        sae = open_sae(f"sae_lens:{entry.release}:{entry.sae_id}")
        cfg = sae.cfg
        model = self.model or cfg.model_name
        if not (cfg.model_name and cfg.hook_name):
            raise UserError(f"{entry.sae_id} does not say which model and which hook it reads")
        if not any(same_model(cfg.model_name, name) for name in (model, *(self.values["model"]["same_as"] or ()))):
            raise UserError(
                f"{entry.sae_id} was trained on {cfg.model_name}, -S model.name is {model}; if that is the same model, add "
                f"-S model.same_as=[{cfg.model_name}]"
            )
        hooks = cfg.hook_name, cfg.hook_out
        if batch is None or (batch.model, batch.hooks) != (model, hooks) or len(batch.rows) >= BATCH:
            self._score(batch)
            batch = Batch(self._new_folder(model, hooks), model, hooks, {})
        name = self._name(entry.sae_id)
        save_sae(sae, batch.folder / PREPARED / name)
        batch.rows |= make_manifest({name: sae})["saes"]
        self.index[entry.sae_id] = Place(str(batch.folder.relative_to(self.root)), name)
        write_json(self.root / INDEX, {sae_id: place._asdict() for sae_id, place in self.index.items()})
        return batch

    def _name(self, sae_id: str) -> str:
        """A dictionary's name in tables; two ids that differ in punctuation alone get different ones."""
        name, others = slugify(sae_id), {place.name for other, place in self.index.items() if other != sae_id}
        return name if name not in others else f"{name}_{fingerprint(sae_id)[:6]}"

    def _new_folder(self, model: str, hooks: tuple[str, str]) -> Path:
        """A folder for dictionaries of these hooks in which no batch is finished, empty."""
        stem = slugify("_".join(dict.fromkeys(hooks)))
        for number in itertools.count(1):
            folder = self.root / slugify(model) / (stem if number == 1 else f"{stem}_{number}")
            done = read_json(folder / DONE) if (folder / DONE).is_file() else {}
            if done.get("key") != self.key and folder not in self._made:
                if folder.is_dir():  # of other parameters, or not finished: what it computed is in the result cache
                    shutil.rmtree(folder)
                self._made.add(folder)
                return folder
        raise AssertionError("unreachable")

    def _score(self, batch: Batch | None) -> None:
        """Run the evaluations on a batch. What an evaluation refuses is noted, and the others go on."""
        if batch is None:
            return
        values = with_values(self.values, {"model.name": batch.model})
        params = check_params(values, str(PARAMS))
        write_yaml(batch.folder / PARAMS, values)
        write_json(batch.folder / PREPARED / "manifest.json", {"order": list(batch.rows), "saes": batch.rows})
        failed = False
        print(f"{batch.folder.relative_to(self.root)}: {len(batch.rows)} dictionaries", flush=True)
        with _working_in(batch.folder, self.project):
            for name in self.evaluations:
                try:
                    run_evaluation(name, params)
                except UserError as error:
                    failed = True
                    self.failures.append(f"{name} of {batch.folder.relative_to(self.root)}: {error}")
        if not failed:
            write_json(batch.folder / DONE, {"key": self.key, "names": list(batch.rows)})
            if self.discard:
                for name in batch.rows:
                    (batch.folder / PREPARED / name / WEIGHTS_FILE).unlink(missing_ok=True)


@contextmanager
def _working_in(folder: Path, project: Path) -> Generator[None]:
    """The folder is the stages' working directory; caches stay the project's."""
    before, root = Path.cwd(), os.environ.get(ROOT_VARIABLE)
    os.environ[ROOT_VARIABLE] = str(project)
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)
        if root is None:
            del os.environ[ROOT_VARIABLE]
        else:
            os.environ[ROOT_VARIABLE] = root
