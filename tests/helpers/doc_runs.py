"""The documentation's commands on a small copy of the project: what is written smaller there, what stands for the reader's
own files, what is not run and why."""

from __future__ import annotations

import multiprocessing
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.helpers.doc_pages import Command, blocks, commands, python
from tests.helpers.dvc_project import ENV, run

FROM_AN_INDEX = "builds an environment from a package index"
TESTS = "runs the tests, of which this is one"
STUDY = "the study of the packaged model at full size, more than an hour"
NOT_RUN = {
    "git clone '<url>' sae_research": "has no address here; the small copy stands for the clone",
    "cd sae_research": "likewise",
    "source .venv/bin/activate": "changes a shell; the commands here find the environment's programs first",
    "make setup": FROM_AN_INDEX,
    "make check": TESTS,
    "make test": TESTS,
    "make test-slow": TESTS,
    "make repro PRESET=study": STUDY,
    "make repro PRESET=study_seeds": STUDY,
    "make repro PRESET=study_rates": STUDY,
    "python -m benchmarks.pursuit_study": "a study of the packaged model at full size, some minutes on an idle machine",
    "python -m benchmarks.pursuit --json docs/pursuit/speed.json": "measures speed, on an idle machine",
    "python -m scripts.monitor_experiments --attach NAME": "follows a job at work; tests/experiments does so with real ones",
    "python -m scripts.monitor_experiments --kill NAME": "ends a job at work; tests/experiments does so with real ones",
}
"""Commands without a marker that are not run, and why."""
SMALLER = (
    ("blocks.8.", "blocks.1."),
    ("blocks.12.", "blocks.2."),
    ("--layers 8", "--layers 1 --widths 64 --tokens 2000"),
    ("train.saes.topk.k=64", "train.saes.topk.k=8"),
    ("[1,2,5,10,20]", "[1,2]"),
    ("train.saes.topk.k: [16, 32, 64]", "train.saes.topk.k: [2, 4]"),
    ("--answer ' Paris'", "--answer ' the'"),
    ("--against ' London'", "--against ' of'"),
    ("--search-promoted ' Monday' ' Friday'", "--search-promoted ' the' ' of'"),
    ("--answer ' four'", "--answer ' the'"),
    ("--seeds 16 --length 20", "--seeds 2 --length 4"),
    (
        "--targets ' Monday' ' Tuesday' ' Wednesday' ' Thursday' ' Friday' ' Saturday' ' Sunday'",
        "--targets ' the' ' of'",
    ),
    ('[" Monday", " Friday"]', '[" the", " of"]'),
    ('token(" Paris")', 'token(" the")'),
    ('token(" London")', 'token(" of")'),
    ("--latents 1379 1337 647 1624 780", "--latents 7 13 17 24 60"),
    ("samples=262144", "samples=1024"),
    ("n_seeds=5", "n_seeds=1"),
    ("--tokens 1e6", "--tokens 2e3"),
    ("--tokens 2e5", "--tokens 5e2"),
    ("d_sae: 2304, k: 32, tokens: 131072", "d_sae: 64, k: 4, tokens: 1000, held_out_tokens: 240, checked_tokens: 240"),
    ("--devices cuda:0,cuda:1", "--devices cpu"),
    ("tokens: 500_000", "tokens: 3000"),
    ("d_sae: 4608, k: 24", "d_sae: 64, k: 4"),
)
"""Sizes of the packaged model, and those of the tiny one."""
OWN = (
    ("--config_path FILE", "--config_path one.yaml"),
    ("--sweep_config FILE", "--sweep_config k.yaml"),
    ("--base_config mine.yaml", "--base_config base.yaml"),
    ("apply NAME", "apply {experiment}"),
    ("--wandb_project NAME", "--wandb_project mine"),
    ('evaluations=["core"', 'params=load_params(), evaluations=["core"'),
    ('"smollm2-135m-instruct", device', '"{model}", device'),
    ("import FOLDER OUTPUT", "import trained_saes imported"),
    ("--compare main sweep-1a2b3c4d", "--compare HEAD~1 HEAD"),
    ("import SOURCE", "import exported"),
    ("import output/RUN", "import trained_saes"),
    ("../before/trained_saes=before", "trained_saes=before"),
    ("path/to/sae_folder", "{ground_truth_sae}"),
    (".cache/latents/4f0c…", "{latents}"),
)
"""What stands for something of the reader's own, and what is put there; names in braces are looked up in the project."""
PARAMS: dict[str, Any] = {
    "analysis": {"tokens": 2000},
    "absorption": {"icl_examples": 2, "icl_prompts": 2, "max_words": 100},
    "unlearning": {"dataset_size": 16, "seq_len": 32},
    "transfer": {
        "hooks": ["blocks.0.hook_resid_post"],
        "tokens": 1000,
        "patched_tokens": 240,
        "own_finetune": {"source": None, "steps": 3},
        "controls": {"tokens": 480, "patched_tokens": 96},
        "repair": {"tokens": 480, "held_out_tokens": 240},
    },
}
"""Of what the pages switch on, beside the tiny project's own."""
FILES = {
    "base.yaml": "train:\n  saes:\n    topk: {recipe: top_k, d_sae: 64, k: 4}\n",
    "k.yaml": "train.saes.topk.k: [2, 4]\n",
}
"""Files of the reader's own that a page names without showing them."""
UNTIL_INTERRUPTED = "--watch"
"""An option of commands that go on until Ctrl-C, which comes after some seconds."""
_MODULE = "from sae_research import load_params, load_sae\nmy_module = load_sae('trained_saes/standard')\n"
PREPARED = {
    "README.md": _MODULE,
    "docs/start/own_sae.md": _MODULE,
    "docs/pursuit.md": "import torch\ntorch.manual_seed(0)\nW_dec, b_dec = torch.randn(64, 32), torch.zeros(32)\n"
    "x, mask = torch.randn(2, 9, 32), torch.ones(2, 9, dtype=torch.bool)\n",
}
"""Names that a page's Python takes for granted."""


def executed(page: str) -> list[Command]:
    """Commands of a page that are run, in its order: those of its blocks and tables, without those that need something."""
    return [
        command
        for command in sorted(commands(page), key=lambda command: command.line)
        if command.place != "prose" and not command.needs and command.text not in NOT_RUN
    ]


def smaller(text: str, project: Path) -> str:
    """A command or a file of a page, for the small copy."""
    for old, new in (*SMALLER, *OWN):
        if old in text:
            text = text.replace(old, new.format_map(_Looked(project)))
    return text


class _Looked(dict[str, str]):
    """What stands for a name in braces, in a project."""

    def __init__(self, project: Path) -> None:
        super().__init__()
        self.project = project

    def __missing__(self, name: str) -> str:
        return getattr(self, name)()

    def model(self) -> str:
        return YAML(typ="safe").load((self.project / "params.yaml").read_text())["model"]["name"]

    def experiment(self) -> str:
        return run(self.project, "dvc", "exp", "list", "--name-only").stdout.split()[-1]

    def latents(self) -> str:
        return str(next((self.project / ".cache/latents").glob("*/about.json")).parent)

    def ground_truth_sae(self) -> str:
        code = (
            "import torch; from pathlib import Path; from sae_research.saes import SAEConfig, form_class, save_sae; "
            "W = torch.randn(48, 24); save_sae(form_class('standard')(SAEConfig('standard', 24, 48), W_dec=W, "
            "W_enc=W.T.contiguous(), b_enc=torch.zeros(48), b_dec=torch.zeros(24)), Path('wide'))"
        )
        run(self.project, sys.executable, "-c", code)
        return "wide"


def write_shown_files(page: str, project: Path) -> None:
    """`FILES`, and those that a page shows: a YAML block that begins with `# name.yaml`, and, without a name, `one.yaml`."""
    for name, text in FILES.items():
        (project / name).write_text(text)
    for block in blocks(page):
        if block.language == "yaml":
            named = re.match(r"# (\w+\.yaml)", block.text)
            (project / (named[1] if named else "one.yaml")).write_text(smaller(block.text, project) + "\n")


def run_command(command: Command, project: Path) -> None:
    """Raises where it ends with another code than 0."""
    words = shlex.split(smaller(command.text, project))
    variables = dict(word.split("=", 1) for word in words[: len(command.variables)])
    words = words[len(command.variables) :]
    if words[0] == "make":  # the environment is the test's own, and up to date
        words[1:1] = ["-o", ".venv/.ready", f"BIN={Path(sys.executable).parent}"]
    environment = ENV | {"PYTHONPATH": str(project)} | variables
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    if UNTIL_INTERRUPTED in words:
        _interrupted(words, project, environment)
        return
    code, out, errors = _done(words, project, environment)
    if code:
        pytest.fail(f"{command}\nas {shlex.join(words)}: {code}\n{out[-1500:]}\n{errors[-2500:]}")


def _done(words: list[str], project: Path, environment: dict[str, str]) -> tuple[int | None, str, str]:
    """(exit code, output, errors) of a command. Programs of this project run in a fork of this process, which has torch
    already: to import it takes longer than they do."""
    if words[0] == "sae-research":
        words = ["python", "-m", "sae_research", *words[1:]]
    if words[:2] != ["python", "-m"]:
        done = subprocess.run(words, cwd=project, env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr
    texts = [project.parent / name for name in ("out.txt", "errors.txt")]
    program = multiprocessing.get_context("fork").Process(target=_as_program, args=(words[2:], project, environment, texts))
    program.start()
    program.join()
    return program.exitcode, *(path.read_text() for path in texts)  # type: ignore[return-value]


def _as_program(words: list[str], project: Path, environment: dict[str, str], texts: list[Path]) -> None:
    """`python -m` in a fork: the project's modules are those of `project`."""
    for number, path in enumerate(texts, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115
    os.chdir(project)
    os.environ.clear()
    os.environ.update(environment)
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("sae_research", "scripts", "benchmarks", "custom_saes", "tests"):
            del sys.modules[name]
    sys.path[:0] = [str(project)]
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def _interrupted(words: list[str], project: Path, environment: dict[str, str]) -> None:
    with subprocess.Popen(
        words, cwd=project, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        shown = process.stdout.readline()
        time.sleep(1)
        assert process.poll() is None, f"{shlex.join(words)} did not go on"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert shown and "Traceback" not in errors, errors


def run_python(page: str, project: Path) -> None:
    """A page's Python blocks without a marker, one after the other in one process, after what they take for granted."""
    code = [block.text for block in python(page) if not block.needs]
    if not code:
        return
    text = smaller(PREPARED.get(page, "") + "\n".join(code), project)
    program = project.parent / "shown" / "page.py"
    program.parent.mkdir(exist_ok=True)
    program.write_text(text)
    code, out, errors = _done([sys.executable, str(program)], project, ENV | {"PYTHONPATH": str(project)})
    assert not code, f"{page}\n{text}\n{out[-1500:]}\n{errors[-2500:]}"
