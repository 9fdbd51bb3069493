"""Whether a command of the documentation can be what it says, without running it: its own parser reads it, `params.yaml`
takes its settings, and the files, stages, targets and presets that it names are there."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

from ruamel.yaml import YAML

from sae_research.cli.main import read_preset
from sae_research.config.params import check_params
from tests.helpers.doc_pages import Command
from tests.helpers.dvc_project import ROOT

USERS_OWN = {
    "…": "whatever comes there",
    "VERB": "one of a command's verbs",
    "PART": "a part of the benchmarks",
    "<theme>": "likewise",
    "FILE": "a configuration file",
    "NAME": "an experiment, a job or a project",
    "FORMAT": "a library's layout",
    "FOLDER": "a folder",
    "CLONE": "a clone with a finished run",
    "OUT": "a new folder",
    "SOURCE": "another library's SAEs",
    "<url>": "where the repository lies",
    "MODEL/SOURCE": "a model of Neuronpedia and one of its sets of latents",
    "output/RUN": "a run of SAE-Interpretability",
    "path/to/sae_folder": "an SAE",
    "../before/trained_saes": "SAEs of another run",
    "k.yaml": "written as the page shows it",
    "my_sweep.yaml": "a sweep of their own",
    "mine.yaml": "a configuration of their own",
    "sweep.wandb.yaml": "made by the command before",
    "gpu_bundle": "a new folder",
    "wheels/*.whl": "in the folder that gpu_bundle wrote",
    "section.key=value": "any parameter",
}
"""What stands for something of the reader's, and what."""
OUTPUTS = {"output", "out", "output_dir", "save_dir", "save_worlds", "wandb_sweep", "json", "target"}
"""Options, by the parser's name for them, that say where a command writes."""
ELSEWHERE = {
    "hf_repo_id",
    "model_name",
    "text",
    "release",
    "match",
    "prompt",
    "search",
    "describe",
    "overrides",
    "set_param",
}
"""Options whose values are no files of this project even where they hold a slash."""


_NAMED_ALONE = "are required|expected (one|2) argument"
"""What a parser says of a command that a text names without what it needs."""


class Invalid(AssertionError):
    """A command of the documentation that cannot be right."""


class _Parsed(Exception):
    """Ends a program once its own parser has read the options."""


@contextmanager
def parse_only() -> Iterator[list[argparse.Namespace]]:
    """In here a program ends where its own `argparse` parser has read the command line, into the list."""
    parse, read = argparse.ArgumentParser.parse_args, list[argparse.Namespace]()

    def parse_args(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        read.append(parse(parser, args, namespace))
        raise _Parsed

    def error(_: argparse.ArgumentParser, message: str) -> None:
        raise Invalid(message)

    with (
        mock.patch.object(argparse.ArgumentParser, "parse_args", parse_args),
        mock.patch.object(argparse.ArgumentParser, "error", error),
    ):
        yield read


def check(command: Command) -> None:
    """Raises `Invalid` naming what is wrong."""
    words = [word for word in command.words if word != "…"]
    if words[-1] in ("-S", "--format") and "…" in command.words:
        words.pop()
    head, *rest = words
    if head == "python" or head == "python3":
        if rest[:1] == ["-c"]:
            compile(rest[1], str(command), "exec")
        elif rest[:2] != ["-m", "pip"]:
            _check(rest[:1] == ["-m"], "not `python -m MODULE`")
            _check_module(rest[1], rest[2:], command)
    elif head == "sae-research":
        _check_module("sae_research", rest, command)
    elif head == "dvc":
        _check_dvc(rest, command)
    elif head == "make":
        _check_make(rest)
    elif head == "ray":
        source = (Path(_found("ray").submodule_search_locations[0]) / "scripts/scripts.py").read_text()
        for option in (word.partition("=")[0] for word in rest if word.startswith("--")):
            _check(f'"{option}"' in source, f"ray {rest[0]} has no {option}")
    elif head == "sbatch":
        _check((ROOT / rest[-1]).is_file(), f"{rest[-1]} is not there")


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise Invalid(message)


# --- programs of this project ------------------------------------------------------------------------


def _check_module(name: str, arguments: Sequence[str], command: Command) -> None:
    if "VERB" in arguments:
        arguments = [*arguments[: arguments.index("VERB")], "--help"]
    if name == "sae_research":
        options = _parsed(importlib.import_module("sae_research.cli.main").main, None, arguments, command)
    elif _reads_options(name):
        options = _parsed(importlib.import_module(_main_module(name)).main, name, arguments, command)
    else:
        _check(not [word for word in arguments if word.startswith("-")], f"{name} reads no options")
        return
    if options is not None:
        _check_options(options)


def _parsed(main: Any, name: str | None, arguments: Sequence[str], command: Command) -> argparse.Namespace | None:
    """What the program's own parser makes of the arguments; None for a request for help, and for a program that prose names
    without what it needs."""
    with parse_only() as read, mock.patch.object(sys, "argv", [str(name), *arguments]):
        try:
            main(list(arguments)) if name is None else main()
        except _Parsed:
            return read[0]
        except SystemExit as end:
            _check(end.code in (0, None), f"ends with {end.code}")
            return None
        except Invalid as error:
            if command.place == "prose" and re.search(_NAMED_ALONE, str(error)):
                return None
            raise
    raise Invalid("it ran without reading its options")


def _main_module(name: str) -> str:
    return f"{name}.__main__" if _found(name).submodule_search_locations else name


def _found(name: str) -> Any:
    spec = importlib.util.find_spec(name) if name.partition(".")[0] != name or name in ("ray", "benchmarks") else None
    _check(spec is not None, f"there is no module {name}")
    return spec


@cache
def _reads_options(name: str) -> bool:
    """Whether a module, or the one from which it takes `main`, parses options: one that does not would run."""
    source = Path(importlib.util.find_spec(_main_module(name)).origin).read_text()  # type: ignore[union-attr, arg-type]
    _check('__name__ == "__main__"' in source, f"{name} is no program")
    others = re.findall(r"from (\S+) import main\b", source)
    return "parse_args" in source or any(
        "parse_args" in Path(importlib.util.find_spec(other).origin).read_text()  # type: ignore[union-attr, arg-type]
        for other in others
    )


def _check_options(options: argparse.Namespace) -> None:
    values = vars(options)
    if values.get("preset"):
        read_preset(values["preset"])
    _check_settings([*(values.get("set_param") or []), *(values.get("overrides") or [])], sweep="config_path" in values)
    for name, value in values.items():
        if name in OUTPUTS | ELSEWHERE or callable(value):
            continue
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, Path) or (isinstance(one, str) and ("/" in one or Path(one).suffix in (".yaml", ".json"))):
                check_file(str(one), name)


def _check_settings(overrides: Sequence[str], sweep: bool = False) -> None:
    """DVC's own reading of `-S` on the values of params.yaml, and the project's check of what comes out."""
    overrides = [one for one in overrides if one not in USERS_OWN]
    if not overrides or sweep:
        return
    from dvc.exceptions import DvcException
    from dvc.utils.hydra import apply_overrides

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.json"  # DVC keeps a YAML file's comments, which takes it a second
        path.write_text(json.dumps(_params()))
        try:
            apply_overrides(path, list(overrides))
        except DvcException as error:
            raise Invalid(f"{error}: {error.__cause__}") from error
        check_params(json.loads(path.read_text()), " ".join(overrides))


@cache
def _params() -> dict[str, Any]:
    return YAML(typ="safe").load((ROOT / "params.yaml").read_text())


def check_file(name: str, option: str = "") -> None:
    """A file or folder of the project, of its pipeline, or said to be the user's own."""
    name = name.removesuffix("/")
    mine = name in USERS_OWN or name.partition("=")[0] in USERS_OWN
    made = any(name == out or name.startswith(f"{out}/") or name.startswith(f"{out}=") for out in _made())
    prepared = option == "sae" and re.fullmatch(r"\w+", name)
    _check(bool(mine or made or prepared or (ROOT / name).exists()), f"{name} is not there")


@cache
def _stages() -> dict[str, Any]:
    return YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]


@cache
def _made() -> frozenset[str]:
    """What stages write."""
    outs = (out for stage in _stages().values() for key in ("outs", "metrics", "plots") for out in stage.get(key, []))
    return frozenset(next(iter(out)) if isinstance(out, dict) else out for out in outs)


# --- DVC and make ------------------------------------------------------------------------------------


def _check_dvc(arguments: list[str], command: Command) -> None:
    options = _dvc_options(arguments, command)
    if options is None:
        return
    _check_settings(getattr(options, "set_param", None) or [])
    targets = getattr(options, "targets", None) or []
    for target in [targets] if isinstance(targets, str) else targets:
        if target not in _stages():
            check_file(target)
    for path in getattr(options, "path", None) or []:
        check_file(path)


def _dvc_options(arguments: list[str], command: Command) -> argparse.Namespace | None:
    """What DVC's parser makes of them; None where prose speaks of a command that needs more, or of a group of commands."""
    from dvc.cli.parser import DvcParser, get_main_parser

    def error(_: argparse.ArgumentParser, message: str, *__: Any) -> None:
        raise Invalid(message)

    with mock.patch.object(DvcParser, "error", error):
        try:
            return _dvc_parser(get_main_parser).parse_args(arguments)
        except Invalid as wrong:
            if command.place != "prose" or not re.search(_NAMED_ALONE, str(wrong)):
                raise
            return None


@cache
def _dvc_parser(make: Any) -> argparse.ArgumentParser:
    return make()


def _check_make(arguments: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for word in arguments:
        name, is_variable, value = word.partition("=")
        if is_variable:
            _check(f"$({name})" in makefile, f"the Makefile reads no {name}")
            if name == "PRESET":
                read_preset(value)
        else:
            _check(re.search(rf"^{re.escape(word)}:", makefile, re.MULTILINE) is not None, f"no target {word}")
