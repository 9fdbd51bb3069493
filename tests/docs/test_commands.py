"""Every command of the documentation can be what it says (its parser, its parameters, its files), and every Python block
compiles and finds what it imports. `test_commands_run.py` runs them."""

from __future__ import annotations

import ast
import importlib

import pytest

from sae_research.runtime.errors import UserError
from tests.helpers.doc_checks import USERS_OWN, Invalid, check
from tests.helpers.doc_pages import APPLIED, Block, Command, blocks, commands, pages, python
from tests.helpers.dvc_project import ROOT

COMMANDS = [command for page in pages() for command in commands(page)]


@pytest.mark.parametrize("page", [page for page in pages() if commands(page)])
def test_commands_are_what_their_parsers_know(
    page: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    wrong = []
    for command in commands(page):
        try:
            check(command)
        except (Invalid, UserError) as error:
            wrong.append(f"{command}\n    {error}")
    capsys.readouterr()  # what --help prints
    assert not wrong, "\n".join(wrong)


def test_what_is_the_users_own_is_named_by_a_command() -> None:
    words = {part for command in COMMANDS for word in command.words for part in (word, word.partition("=")[0])}
    assert set(USERS_OWN) <= words, sorted(set(USERS_OWN) - words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sae-research", "analyse", "stats"], "no verb analyse, did you mean analyze"),
        (["sae-research", "plan", "gemma-3"], "no preset 'gemma-3'"),
        (["python", "-m", "scripts.demo", "--save_dir", "x", "--architectures", "topk"], "invalid choice: 'topk'"),
        (["python", "-m", "scripts.run_everything"], "no module scripts.run_everything"),
        (["python", "-m", "scripts.run_core_eval", "--fast"], "reads no options"),
        (["python", "-m", "scripts.run_experiments", "--sweep_config", "absent.yaml"], "absent.yaml is not there"),
        (["dvc", "exp", "runs"], "invalid choice: 'runs'"),
        (["dvc", "exp", "run", "--twice"], "--twice"),
        (["dvc", "exp", "run", "-S", "train.saes.topk.kk=3"], "kk"),
        (["dvc", "exp", "run", "-S", "core_eval.batch_size_prompts=few"], "batch_size_prompts"),
        (["dvc", "repro", "core_evals"], "core_evals is not there"),
        (["dvc", "metrics", "show", "metrics/cores.json"], "metrics/cores.json is not there"),
        (["make", "everything"], "no target everything"),
        (["make", "repro", "PRESET=none"], "no preset 'none'"),
        (["ray", "start", "--heads"], "ray start has no --heads"),
    ],
)
def test_what_is_wrong_is_found(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((Invalid, UserError), match=message):
        check(Command("page", 1, tuple(words), (), frozenset(), "block"))
    capsys.readouterr()


def test_blocks_are_found_whole() -> None:
    """Against a count made another way: every fence opens a block."""
    for page in pages():
        fences = sum(line.lstrip().startswith("```") for line in (ROOT / page).read_text().split("\n"))
        assert sum(block.language != "indented" for block in blocks(page)) == fences / 2, page


def test_the_other_tests_read_their_pages() -> None:
    for page, test in APPLIED.items():
        assert f'"{page}"' in (ROOT / test).read_text()


@pytest.mark.parametrize(
    "block",
    [pytest.param(block, id=f"{page}:{block.line}") for page in pages() if page not in APPLIED for block in python(page)],
)
def test_python_compiles_and_finds_what_it_imports(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.import_module(str(node.module))
            missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
            assert not missing, f"{node.module} has no {', '.join(missing)}"
