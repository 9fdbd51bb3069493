"""What other tools' names are called here: every new name exists, every old one of theirs has a row, and who types an old
name is told the new one."""

from __future__ import annotations

import argparse
import ast
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
from ruamel.yaml import YAML

from sae_research.cli import reference
from sae_research.cli.main import main, parser
from sae_research.cli.parameters import section_of
from sae_research.cli.pipeline import read_preset
from sae_research.config.params import Params, check_params
from sae_research.config.recipes import AnyRecipe
from sae_research.experiments import demo, sae_interpretability
from sae_research.experiments.config_files import with_values
from sae_research.reporting import transfer
from sae_research.reporting.metric_table import METRICS
from sae_research.runtime.errors import UserError
from sae_research.runtime.former_names import NOTHING, QUOTED, Table, Tool, elsewhere, tools

ROOT = Path(__file__).parents[2]
ROWS = [(tool, table, row) for tool in tools() for table in tool.tables for row in table.rows]
RECIPES = {name: one for one in get_args(AnyRecipe) for name in get_args(one.model_fields["recipe"].annotation)}
OURS = re.compile(
    r"(sae-research|python -m (sae_research|scripts)|make|dvc) .+|sae_research\.[\w.]+|presets/\S+|configs/\S+"
)


# --- whether a new name exists -------------------------------------------------------------------


@cache
def _pipeline() -> dict[str, Any]:
    return YAML(typ="safe").load(ROOT / "dvc.yaml")["stages"]


def _parses(parser: argparse.ArgumentParser, words: list[str]) -> None:
    """Raises `AssertionError` for an unknown verb or flag, and for one that is missing; nothing is run."""
    try:
        _, unknown = parser.parse_known_args(words)
    except SystemExit:
        raise AssertionError(words) from None
    assert not unknown, (words, unknown)


def _exists(name: str) -> bool:
    """Whether a name in backticks is one of this project, of whatever kind."""
    return (
        _is_command(name)
        or _is_parameter(name)
        or _is_metric(name)
        or _is_python(name)
        or _is_file(name)
        or _is_secret(name)
    )


def _is_command(name: str) -> bool:
    words = shlex.split(name)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        return words[1] in targets and all(read_preset(word.partition("=")[2]) for word in words[2:])
    if words[0] == "dvc":
        if words[1] == "repro":
            assert set(words[2:]) <= set(_pipeline()), name
        elif words[1:4] == ["exp", "run", "-S"]:
            assert all(_is_parameter(": ".join(word.split("=", 1))) for word in words[4:]), name
        else:
            assert words[1:] == ["exp", "show"], name
        return True
    if words[:2] == ["python", "-m"]:
        if words[2] == "scripts.demo":
            _parses(demo._parser(), words[3:])
        elif words[2] == "scripts.run":
            _parses(parser()[0], ["run", *words[3:]])
        else:
            return len(words) == 3 and _module(words[2])
        return True
    if words[0] == "sae-research":
        if len(words) == 2:  # a verb that prose speaks of
            return words[1] in parser()[1]
        _parses(parser()[0], words[1:])
        return True
    return False


def _is_parameter(name: str) -> bool:
    """`train.tokens`, `train.saes.NAME.k`, or either with `: value`."""
    key, _, value = name.partition(": ")
    if re.match(r"train\.saes\.\w+\.", key):
        last = key.split(".")[3]
        return any(last in recipe.model_fields for recipe in RECIPES.values()) and (
            last != "recipe" or not value or value in RECIPES
        )
    section: Any = Params
    for part in key.split("."):
        if section is None or part not in section.model_fields:
            return False
        section = section_of(section, part)
    if value:
        check_params(with_values(Params().model_dump(), {key: YAML(typ="safe").load(value), **NEEDED.get(name, {})}), name)
    return True


NEEDED = {
    "transfer.sae.source: sae_lens": {"transfer.sae.release": "r", "transfer.sae.sae_id": "i"},
    "transfer.outliers.rule: absolute": {"transfer.outliers.absolute_threshold": 200.0},
    "baseline_sae.source: sae_lens": {"baseline_sae.release": "r", "baseline_sae.sae_id": "i"},
    "baseline_sae.source: hub": {"baseline_sae.repo_id": "r", "baseline_sae.filename": "f"},
}
"""What a value cannot stand without."""


def _is_metric(name: str) -> bool:
    evaluation, _, key = name.partition(".")
    if evaluation == "transfer":
        similar = {f"{one}{suffix}" for one in transfer.SIMILARITY for suffix in transfer.FILTERS.values()}
        each = {f"{model}_{one}" for model in ("base", "finetuned") for one in (*transfer.QUALITY, *transfer.LOSSES)}
        return key in similar | each | {f"{one}_median" for one in transfer.LATENTS}
    return any((metric.eval, metric.key) == (evaluation, key) for metric in METRICS)


def _is_python(name: str) -> bool:
    if not re.fullmatch(r"sae_research(\.\w+)+", name):
        return False
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        module = ".".join(parts[:end])
        if importlib.util.find_spec(parts[0]) and _module(module):
            found: Any = importlib.import_module(module)
            for part in parts[end:]:
                found = getattr(found, part)  # AttributeError: the name is not there
            return True
    return False


def _module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def _is_file(name: str) -> bool:
    """In the project, or below what a stage writes, or where a run from one file writes."""
    outs = [
        out if isinstance(out, str) else next(iter(out)) for stage in _pipeline().values() for out in stage.get("outs", ())
    ]
    return (ROOT / name).exists() or any(name == out or name.startswith(f"{out}/") for out in [*outs, "output"])


def _is_secret(name: str) -> bool:
    """An environment variable that the code reads."""
    name = name.partition("=")[0]
    return bool(re.fullmatch(r"[A-Z_]+", name)) and any(
        f'"{name}"' in path.read_text() for path in ROOT.glob("sae_research/**/*.py")
    )


@pytest.mark.parametrize(
    ("tool", "table"), [(tool, table) for tool in tools() for table in tool.tables], ids=lambda one: one[0]
)
def test_every_new_name_exists(tool: Tool, table: Table) -> None:
    for row in table.rows:
        if row.new == NOTHING:
            continue
        if not row.new.startswith("the same of "):
            assert QUOTED.sub("", row.new).strip(" ,") == "", row
            assert [name for name in QUOTED.findall(row.new) if not _exists(name)] == [], row
            continue
        for old in row.old_names:
            for here in row.here(old).split(", "):
                command, _, flag = here.rpartition(" ")
                if command:
                    assert flag in {name for action in _of(command)._actions for name in action.option_strings}, here
                else:
                    assert _is_parameter(here), here


def _of(command: str) -> argparse.ArgumentParser:
    """The parser of a command's own flags."""
    words = shlex.split(command)
    if words[0] == "python":
        return demo._parser()
    verbs = next(action for action in parser()[0]._actions if isinstance(action, argparse._SubParsersAction))
    return verbs.choices[words[1]]


def test_what_notes_and_prose_name_of_this_project_exists() -> None:
    wrong = []
    for tool in tools():
        page = (reference.FOLDER.parent / "moving" / f"{tool.page}.md").read_text()
        notes = "\n".join(row.note for table in tool.tables for row in table.rows)
        said = [
            *QUOTED.findall(reference._PLACE.sub("", page)),
            *QUOTED.findall(notes),
            *re.findall(r"^    (.+)$", page, re.M),
        ]
        wrong += [(tool.page, name) for name in said if (OURS.fullmatch(name) or _dotted(name)) and not _exists(name)]
    assert wrong == []


def _dotted(name: str) -> bool:
    """Whether it has the shape of a parameter: `section.key`, perhaps with a value."""
    return name.partition(".")[0] in Params.model_fields and "." in name and not name.endswith((".json", ".yaml"))


# --- whether the tables are whole ----------------------------------------------------------------


@pytest.mark.parametrize("tool", tools(), ids=lambda tool: tool.page)
def test_a_page_has_the_tables_of_its_record(tool: Tool) -> None:
    page = reference.FOLDER.parent / "moving" / f"{tool.page}.md"
    assert page.read_text() == reference.moving(tool), "python -m sae_research.cli.reference"


def _old(page: str) -> set[str]:
    """Old names on a page, flags without their dashes, dotted ones by their last part too."""
    names = {old for tool, _, row in ROWS if tool.page == page for old in row.old_names}
    return names | {name.lstrip("-") for name in names} | {name.rpartition(".")[2] for name in names}


def _fields(package: str, file: str) -> Iterator[tuple[str, list[str]]]:
    """Classes of an installed library with their annotated fields, read without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    tree = ast.parse((Path(spec.submodule_search_locations[0]) / file).read_text())
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            fields = [
                part.target.id for part in node.body if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
            ]
            yield node.name, fields


def test_every_setting_of_saelens_has_a_row() -> None:
    wanted = {
        name
        for cls, fields in _fields("sae_lens", "config.py")
        for name in fields
        if cls in ("LanguageModelSAERunnerConfig", "LoggingConfig")
    }
    wanted -= {"sae"}  # the configuration of the SAE, whose fields are the next files'
    for file in ("standard", "gated", "topk", "batchtopk", "jumprelu", "matryoshka_batchtopk"):
        wanted |= {
            name
            for cls, fields in _fields("sae_lens", f"saes/{file}_sae.py")
            if cls.endswith("TrainingSAEConfig")
            for name in fields
        }
    assert len(wanted) > 60
    assert wanted <= _old("sae_lens")


def test_every_setting_and_metric_of_sae_bench_has_a_row() -> None:
    spec = importlib.util.find_spec("sae_bench")
    assert spec is not None and spec.submodule_search_locations
    evals = Path(spec.submodule_search_locations[0]) / "evals"
    wanted = {
        name
        for path in evals.glob("*/eval_config.py")
        if path.parent.name != "mdl"
        for _, fields in _fields("sae_bench", str(path))
        for name in fields
    }
    flags = {
        flag
        for path in evals.glob("*/main.py")
        if path.parent.name != "mdl"
        for flag in re.findall(r'^ +"--(\w+)",', path.read_text(), re.M)
    }
    assert len(wanted) > 90 and len(flags) > 30
    wanted -= {"random_seed", "dtype"}
    assert wanted | (flags - {"sae_id_pattern", "setting", "dtype"}) <= _old("sae_bench")
    sources = {metric.source.rpartition(".")[2] for metric in METRICS if metric.source}
    assert sources <= {
        old for tool, table, row in ROWS if tool.page == "sae_bench" and table.kind == "metric" for old in row.old_names
    }


def test_every_key_of_sae_interpretability_has_a_row() -> None:
    keys = {
        f"{section}.{name}".lstrip(".")
        for section, model in sae_interpretability._SECTIONS.items()
        for name in model.model_fields
    } - {"data", "saes"}
    assert keys <= _old("sae_interpretability")


# --- who types an old name -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "table"), [(tool, table) for tool in tools() for table in tool.tables], ids=lambda one: one[0]
)
def test_every_old_name_is_answered(tool: Tool, table: Table) -> None:
    for row in table.rows:
        assert row.old_names, row
        for old in row.old_names:
            said = elsewhere(old, table.kind)
            known = row.note.replace("`", "") if row.new == NOTHING else row.here(old)
            assert all(part in said for part in (f"; {old} of ", tool.name, known, f"docs/moving/{tool.page}.md")), old


def _refused(values: dict[str, Any]) -> str:
    with pytest.raises(UserError) as refused:
        check_params(values, "params.yaml")
    return str(refused.value)


def test_old_parameters_are_answered_with_the_new() -> None:
    assert "training_tokens of SAELens is train.tokens here (docs/moving/sae_lens.md)" in _refused(
        {"train": {"training_tokens": 1}}
    )
    assert "save_activations of SAE Bench is activation_caching.enabled here" in _refused({"save_activations": True})
    assert "train.saes.NAME.aux_k_coefficient" in _refused(
        {"train": {"saes": {"a": {"recipe": "top_k", "d_sae": 8, "k": 2, "auxk_alpha": 0.1}}}}
    )
    assert "eval_types.meta_sae" in _refused({"eval_types": {"meta_structure": True}})
    assert "unknown recipe batchtopk; batchtopk of SAELens is train.saes.NAME.recipe: batch_top_k" in _refused(
        {"train": {"saes": {"a": {"recipe": "batchtopk", "d_sae": 8, "k": 2}}}}
    )
    assert _refused({"train": {"token": 1}}).endswith("did you mean tokens?")
    assert _refused({"train": {"saes": {"a": {"recipe": "topk_", "d_sae": 8}}}}).endswith(
        "unknown recipe topk_, did you mean top_k?"
    )


@pytest.mark.parametrize(
    ("verb", "said"),
    [
        ("run.py", "sae-research run --config_path configs/tinystories/relu.yaml"),
        ("scripts/setup_wandb_sweep.py", "--wandb_sweep FILE"),
        ("run_dynamic_sweep", "sae-research sweep --sweep_config FILE"),
        ("sae_bench.evals.ravel.main", "dvc repro ravel_eval"),
        ("4_sae_eval.ipynb", "dvc repro transfer_eval"),
        ("train", "dvc repro train"),
        ("scr", "dvc repro scr_eval"),
        ("swep", "did you mean sweep?"),
    ],
)
def test_an_old_command_is_answered_with_the_new(verb: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        main([verb, "--some", "flag"])
    assert "\n" not in str(refused.value)


def test_old_files_are_answered_with_the_new(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file; .* is configs/tinystories/relu\.yaml here"):
        main(["run", "--config_path", str(tmp_path / "tinystories-relu.yaml")])
    with pytest.raises(UserError, match=r"no preset 'tinystories-gated'; .* configs/tinystories/gated\.yaml"):
        read_preset("tinystories-gated")
    with pytest.raises(UserError, match=r"no preset 'nothing'; known: gemma-2-2b"):
        read_preset("nothing")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.training_tokens=1", "no parameter train.training_tokens; training_tokens of SAELens is train.tokens here"),
        ("train.tokns=1", "no parameter train.tokns, did you mean train.tokens?"),
    ],
)
def test_an_override_of_an_unknown_key_says_what_it_may_mean(override: str, said: str) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        main(["plan", "-S", override])


def test_one_old_name_of_two_tools_has_both_answers() -> None:
    assert "lr of SAE-Interpretability and SAELens is train.learning_rate" in elsewhere("lr", "parameter")
    assert "lr of dictionary_learning is train.learning_rate, python -m scripts.demo" in elsewhere("lr", "parameter")
    assert elsewhere("no_such_name_anywhere") == ""
