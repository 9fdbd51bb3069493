"""Every verb of `analyze` on CUDA, simulated or real: it ends well, and says what it says on the CPU."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from sae_research.cli.main import main
from sae_research.config.params import Params
from sae_research.saes import save_sae
from tests.helpers.analysis import EARLY, SIZE, biased
from tests.helpers.cuda import DEVICES, covered, cuda

PROMPT = "the time that people use water"
ARGUMENTS: dict[str, list[list[str]]] = {
    "stats": [["--sae", "late", "early", "--latent", "60"]],
    "run": [
        ["--sae", "late", "early", "--prompt", PROMPT, "--answer", " the"],
        ["--sae", "late", "--search-prompt", PROMPT],
        ["--sae", "late", "--search-promoted", " the"],
    ],
    "steer": [
        ["--sae", "late", "--latent", "60", "--prompt", PROMPT, "--length", "3", "--seeds", "1", "--strengths", "1"]
        + ["--neutral-tokens", "64", "--temperature", "0", "--method", method]
        for method in ("add", "clamp", "project")
    ],
    "ablate": [["--sae", "late", "--prompt", PROMPT, "--latents", "60", "61", "--positions", "-1"]],
    "attribute": [["--sae", "late", "early", "--prompt", PROMPT, "--check", "4", "--steps", "2", "--hooks", EARLY]],
    "subspace": [["--sae", "late", "--latents", "58", "60", "61", "62", "--groups", "the", "time"]],
    "explain": [["--sae", "late", "--latents", "60", "61"]],
    "dashboard": [["--sae", "late", "early", "--compare", "late", "early", "--neuronpedia"]],
}


def write_params(tiny_inputs: Path, device: str) -> None:
    with Path("params.yaml").open("w") as stream:
        YAML().dump(
            Params(
                model={"name": str(tiny_inputs / "tiny"), "device": device, "llm_batch_size": 8},
                text={"dataset": str(tiny_inputs / "texts"), "context_size": SIZE},
                analysis={"tokens": 1_000, "split": "sae_train"},
            ).model_dump(mode="json"),
            stream,
        )


def said(verb: str, capsys: pytest.CaptureFixture[str]) -> list[float]:
    """The numbers that a verb prints."""
    for arguments in ARGUMENTS[verb]:
        assert main(["analyze", verb, *arguments]) == 0
    shown = re.sub(r"store: \S+", "", capsys.readouterr().out)
    return [float(number) for number in re.findall(r"(?<![\w.])-?\d+\.\d+(?![\w.])", shown)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("verb", covered("analysis verb", quick=()))
def test_a_verb_says_what_it_says_on_the_cpu(
    verb: str, device: str, tiny_inputs: Path, in_project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, sae in (("late", biased("standard", 60.0)), ("early", biased("topk", hook=EARLY))):
        sae.cfg = sae.cfg.replace(model_name="tiny")
        save_sae(sae, in_project / "downloaded_saes" / name)
    write_params(tiny_inputs, "cpu")
    here = said(verb, capsys)
    write_params(tiny_inputs, "cuda")
    with cuda(device):
        there = said(verb, capsys)
    assert len(here) == len(there) and (here or verb == "dashboard")
    assert there == pytest.approx(here, rel=0.02, abs=0.02)
