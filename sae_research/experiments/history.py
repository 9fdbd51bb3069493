"""What earlier experiments hold: DVC keeps each as a commit under git's `refs/exps`, from which all is read."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sae_research.config.params import check_params
from sae_research.config.yaml_files import parse as parse_yaml
from sae_research.experiments.config_files import PARAMS
from sae_research.experiments.grid import sae_keys
from sae_research.experiments.job_process import Base
from sae_research.reporting.rows import REPORT_FILE, TRAINED
from sae_research.runtime.errors import UserError, did_you_mean
from sae_research.runtime.files import read_json

CODE = ("sae_research", "scripts", "custom_saes", "dvc.yaml")
"""What an experiment's metrics depend on beside its parameters."""
REPLACED = "refs/exps/apply/stash"
"""Where DVC keeps the uncommitted changes that an applied experiment replaces."""
METRICS = "metrics/core.json"


def base_of(root: Path) -> Base:
    """What new experiments start from: the last commit, and the workspace's uncommitted changes. Raises `UserError` where
    there is no DVC project in a git repository with a commit."""
    if not (root / ".dvc").is_dir():
        raise UserError(f"{root}: no DVC project; run from the project's folder (git init, dvc init)")
    if git(root, "rev-parse", "--verify", "-q", "HEAD").returncode:
        raise UserError(f"{root}: experiments need a git repository with a commit; git add, git commit")
    head = git(root, "rev-parse", "HEAD").stdout.strip()
    if git(root, "diff", "--quiet", "HEAD").returncode == 0:
        return Base(head, "")
    changes = git(root, "-c", "user.name=sweep", "-c", "user.email=sweep", "stash", "create")
    if changes.returncode or not changes.stdout.strip():
        raise UserError(f"git stash create, of uncommitted changes: {changes.stderr.strip() or 'it made nothing'}")
    return Base(head, changes.stdout.strip())


def keep(root: Path, bundle: bytes) -> None:
    """Take in the experiment that a git bundle holds, in the place of one of its name on the same commit."""
    with tempfile.NamedTemporaryFile(suffix=".bundle") as file:
        file.write(bundle)
        file.flush()
        taken = git(root, "fetch", "--quiet", file.name, "+refs/exps/*:refs/exps/*")
    if taken.returncode:
        raise UserError(f"git fetch of an experiment: {taken.stderr.strip()}")


class Experiment(NamedTuple):
    """A finished experiment."""

    name: str
    revision: str


def experiments(root: Path, commit: str) -> list[Experiment]:
    """Finished experiments on a commit, from git alone."""
    prefix = f"refs/exps/{commit[:2]}/{commit[2:]}/"
    lines = git(root, "for-each-ref", prefix, "--format=%(refname) %(objectname)").stdout.splitlines()
    return [Experiment(line.split()[0].removeprefix(prefix), line.split()[1]) for line in lines]


def revision(root: Path, name: str, what: str = "commit or experiment") -> str:
    """The commit of an experiment, or of what git knows under a name. Raises `UserError` for neither, with the nearest
    experiment."""
    lines = git(root, "for-each-ref", "refs/exps/*/*/*", "--format=%(refname) %(objectname)").stdout.splitlines()
    known = {reference.rpartition("/")[2]: commit for reference, commit in (line.split() for line in lines)}
    if name in known:
        return known[name]
    found = git(root, "rev-parse", "--verify", "-q", f"{name}^{{commit}}")
    if found.returncode:
        raise UserError(f"no {what} {name!r}{did_you_mean(name, known) if known else '; there is none yet'}")
    return found.stdout.strip()


def file_at(root: Path, revision: str, path: str) -> str | None:
    """A file as an experiment left it; None where it has none."""
    shown = git(root, "show", f"{revision}:./{path}")
    return None if shown.returncode else shown.stdout


def same_code(root: Path, revision: str, base: Base, paths: Iterable[str]) -> bool:
    """Whether an experiment ran with the code of `base`."""
    return git(root, "diff", "--quiet", revision, base.changes or base.commit, "--", *paths).returncode == 0


def untracked_code(root: Path) -> list[str]:
    """Files of code that git does not know, which an experiment therefore lacks."""
    return git(root, "ls-files", "--others", "--exclude-standard", "--", *CODE).stdout.splitlines()


def git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)


class Finished(NamedTuple):
    """An SAE that an earlier experiment trained and evaluated with the present code."""

    experiment: str
    figures: dict[str, Any]


def finished_saes(root: Path, base: Base) -> dict[str, Finished]:
    """By `grid.sae_keys`: what the experiments on the commit of `base` hold. Experiments whose parameters no longer make
    sense to this code, or that other code made, hold nothing."""
    found: dict[str, Finished] = {}
    for experiment in experiments(root, base.commit):
        if not same_code(root, experiment.revision, base, CODE):
            continue
        figures, keys = _figures(root, experiment), _keys(root, experiment)
        found |= {key: Finished(experiment.name, figures[name]) for name, key in keys.items() if name in figures}
    return found


def _figures(root: Path, experiment: Experiment) -> dict[str, Any]:
    text = file_at(root, experiment.revision, METRICS)
    return json.loads(text) if text else {}


def _keys(root: Path, experiment: Experiment) -> dict[str, str]:
    text = file_at(root, experiment.revision, str(PARAMS))
    try:
        return sae_keys(check_params(parse_yaml(text, experiment.name), experiment.name)) if text else {}
    except UserError:  # made when params.yaml had other keys
        return {}


def apply_experiment(root: Path, name: str) -> list[str]:
    """Bring an experiment into the workspace; returns outputs that are in no cache here, whose folders are gone then.

    `dvc exp apply` ends with an error there, as an experiment names the outputs of all stages, those too that neither
    it nor this clone has run. Raises `UserError` for an unknown name, with the names there are, for SAEs in `trained_saes`
    that no run made, as DVC would remove them, and what else DVC refuses.
    """
    base_of(root)
    if own := _by_hand(root / TRAINED):
        raise UserError(
            f"{own[0]}: no run trained it here, and applying an experiment would remove it; move it out of {TRAINED}/ "
            "(comparison_saes.folders takes it from anywhere) and apply again"
        )
    revision(root, name, "experiment")

    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with contextlib.redirect_stdout(io.StringIO()), Repo(str(root)) as repo:
            before = git(root, "rev-parse", "--verify", "-q", REPLACED).stdout
            repo.experiments.apply(name, allow_missing=True)
            if git(root, "rev-parse", "--verify", "-q", REPLACED).stdout != before:
                print(f"uncommitted changes are kept: git stash apply {REPLACED}", file=sys.stderr)
            return sorted(
                os.path.relpath(out.fs_path, repo.root_dir) for out in repo.index.outs if out.use_cache and not out.exists
            )
    except DvcException as error:
        raise UserError(f"DVC: {_reasons(error)}") from error


def _by_hand(trained: Path) -> list[Path]:
    """Folders of `trained_saes` that the run which wrote the rest does not name."""
    report = trained / REPORT_FILE
    made = read_json(report).get("saes", {}) if report.is_file() else {}
    folders = sorted(path for path in trained.iterdir() if path.is_dir()) if trained.is_dir() else []
    return [path for path in folders if path.name not in made and not path.name.startswith(".")]


def _reasons(error: BaseException | None) -> str:
    lines = []
    while error is not None:
        lines.append(" ".join(str(error).split()))
        error = error.__cause__
    return ": ".join(dict.fromkeys(line for line in lines if line))
