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
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from tests.helpers.doc_pages import APPLIED, Command, blocks, commands, pages, python
from tests.helpers.dvc_project import ENV, run

FROM_AN_INDEX = "builds an environment from a package index"
TESTS = "runs the tests, of which this is one"
STUDY = "the study of the packaged model at full size, more than an hour"
SPEED = "measures speed, on an idle machine"
PACKAGED = (
    "dictionaries of the packaged model, which the small copy does not use; their cards are held to a fresh evaluation"
)
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
    "make repro PRESET=packaged_training": PACKAGED,
    "make repro PRESET=packaged": PACKAGED,
    "python -m benchmarks.packaged take CLONE": PACKAGED,
    "python -m benchmarks.optional_evaluations CLONE": PACKAGED,
    "python -m benchmarks.packaged card CLONE": PACKAGED,
    "python -m benchmarks.pursuit_study": "a study of the packaged model at full size, some minutes on an idle machine",
    "python -m benchmarks.pursuit --json docs/pursuit/speed.json": SPEED,
    "python -m benchmarks.pursuit": SPEED,
    "make bench": SPEED,
    "python -m benchmarks '<theme>'": SPEED,
    "python -m benchmarks PART --saes 8": SPEED,
    "python -m benchmarks analysis": SPEED,
    "python -m benchmarks training": SPEED,
    "python -m benchmarks.cluster": SPEED,
    "python -m benchmarks.default_run": SPEED,
    "python -m benchmarks.dictionaries": SPEED,
    "python -m benchmarks.growth": SPEED,
    "python -m benchmarks.scale measure": SPEED,
    "python -m benchmarks.coefficients": "SAEs of the packaged model at full size, some minutes",
    "python -m benchmarks.models": "some minutes, model by model; tests/benchmarks/test_models.py makes some of them",
    "python -m benchmarks.gpu --device cpu --small": "tests/benchmarks/test_gpu_benchmark.py runs it",
    "python -m scripts.monitor_experiments --attach NAME": "follows a job at work; tests/experiments does so with real ones",
    "python -m scripts.monitor_experiments --kill NAME": "ends a job at work; tests/experiments does so with real ones",
    "sae-research monitor --attach NAME": "as above, in another spelling",
    "sae-research monitor --kill NAME": "likewise",
    "pip install": "named to say what goes wrong with it",
    "pip install timm": "words of another library's message",
}
"""Commands without a marker that are not run, and why."""
NAMES = (
    "dvc exp",
    "dvc exp run -S",
    "python -m sae_research",
    "python -m scripts.demo",
    "ray start",
    "sae-research analyze stats",
    "sae-research extract",
    "sae-research run",
    "sae-research sweep",
)
"""Beginnings of commands, by which a text calls them; the page or another has them whole."""
SMALLER = (
    ("transfer.separate={}", "transfer.separate={{tokens: 1000, checked: 2, checked_tokens: 240}}"),
    ("--save_dir FOLDER", "--save_dir demo --layers 1 --widths 64 --tokens 2000"),
    ("--layers 3 --architectures top_k", "--layers 2 --architectures top_k"),
    ("--tokens 60000 --widths 2304", "--tokens 2000 --widths 64"),
    ("--tokens 500000000", "--tokens 2000"),
    ("--widths 16384 65536", "--widths 64 96"),
    ("--latents 17 230", "--latents 17 23"),
    ("benchmarks.noise", "benchmarks.noise --samples 2000"),
    ("packaged:smollm2-135m-l8", "trained_saes/standard"),
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
    (
        "export FOLDER OUTPUT --format sae_interpretability",
        "export trained_saes/standard exported_one --format sae_interpretability",
    ),
    ("export FOLDER OUTPUT --format", "export trained_saes exported --format"),
    ("export FOLDER OUT --format FORMAT", "export trained_saes exported --format sae_lens"),
    ("import FOLDER OUTPUT", "import trained_saes imported"),
    ("import FOLDER OUT", "import trained_saes imported"),
    ("extract FOLDER", "extract shards"),
    ("finetune SAE OUTPUT", "finetune trained_saes/standard finetuned --tokens 1000"),
    ("pareto FOLDER", "pareto trained_saes"),
    ("--output_dir FOLDER", "--output_dir written"),
    ("--base_config FILE", "--base_config base.yaml"),
    ("--wandb_sweep FILE", "--wandb_sweep sweep.wandb.yaml"),
    ("--sae NAME", "--sae standard"),
    ("--prompt TEXT", "--prompt 'the of and'"),
    ("--answer TEXT", "--answer ' the'"),
    ("--search TEXT", "--search gpt2"),
    ("--describe RELEASE", "--describe gpt2-small-res-jb"),
    ("--groups Monday Tuesday", "--groups the of"),
    ("analyze VERB", "analyze stats --help"),
    ("-d NAME PLACE", "-d mine ../remote"),
    ("-S '…'", "-S scr.probe_epochs=3"),
    ("section.key=value", "scr.probe_epochs=3"),
    ("git add", "git add base.yaml"),
    ("benchmarks.model_difference", "benchmarks.model_difference eval_results/transfer tiny"),
    ("--config_path FILE", "--config_path one.yaml"),
    ("--sweep_config FILE", "--sweep_config k.yaml"),
    ("--base_config mine.yaml", "--base_config base.yaml"),
    ("apply NAME", "apply {experiment}"),
    ("--wandb_project NAME", "--wandb_project mine"),
    ('evaluations=["core"', 'params=load_params(), evaluations=["core"'),
    ('"smollm2-135m-instruct", device', '"{model}", device'),
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
    "scr": {"train_set_size": 32, "test_set_size": 32, "n_values": [2], "probe_epochs": 2},
    "unlearning": {
        "dataset_size": 16,
        "seq_len": 32,
        "retain_thresholds": [0.01],
        "n_features_list": [2, 4],
        "multipliers": [25],
    },
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
    "one.yaml": "train:\n  saes:\n    topk: {recipe: top_k, d_sae: 64, k: 4}\n",
    "base.yaml": "train:\n  saes:\n    topk: {recipe: top_k, d_sae: 64, k: 4}\n",
    "k.yaml": "train.saes.topk.k: [2, 4]\n",
}
"""Files of the reader's own that a page names without showing them."""
QUEUE_SECONDS = 900
"""Longest that DVC's queue is waited for."""
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
    """Commands of a page that are run: those of its blocks and tables, in its order, without those that need something;
    then those that nothing but running text holds, on the first page that has them."""
    if page in APPLIED:
        return []
    shown = [
        command
        for command in _in_order(page)
        if command.place != "prose" and not command.needs and command.text not in NOT_RUN
    ]
    return [*shown, *(command for command in _in_text() if command.page == page)]


def _in_order(page: str) -> list[Command]:
    return sorted(commands(page), key=lambda command: command.line)


@cache
def _in_text() -> tuple[Command, ...]:
    """Commands of running text and of tables of names, each once: those that no block shows and no marker excuses."""
    everywhere = [command for page in pages() if page not in APPLIED for command in _in_order(page)]
    known = {command.text for command in everywhere if command.needs or command.place != "prose"} | {*NOT_RUN, *NAMES}
    found: dict[str, Command] = {}
    for command in everywhere:
        if command.text not in known:
            found.setdefault(command.text, command)
    return tuple(found.values())


def smaller(text: str, project: Path) -> str:
    """A command or a file of a page, for the small copy."""
    for old, new in (*SMALLER, *OWN):
        if old in text:
            text = text.replace(old, new.format_map(_Looked(project)))
    return text


def not_put_in(command: Command) -> list[str]:
    """Words of a command that stand for something of the reader's own and for which `OWN` has nothing."""
    text = command.text
    for old, new in (*SMALLER, *OWN):
        text = text.replace(old, new)
    return re.findall(
        r"(?<![\w~])(?:(?!HEAD)[A-Z]{2,}|…|<\w+>)(?![\w~=])", " ".join(shlex.split(text)[len(command.variables) :])
    )


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
    if words[:3] == ["dvc", "queue", "start"]:
        _queue_done(project)


def _queue_done(project: Path) -> None:
    """Waits for what `dvc queue start` left at work. Fails where an experiment of the queue did not succeed."""
    end = time.monotonic() + QUEUE_SECONDS
    while re.search(r"\b(Queued|Running)\b", status := run(project, "dvc", "queue", "status").stdout):
        assert time.monotonic() < end, status
        time.sleep(2)
    run(project, "dvc", "queue", "stop", "--kill")
    assert "Success" in status and "Failed" not in status, status


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
    out, errors = (path.read_text() for path in texts)
    return program.exitcode, out, errors


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
