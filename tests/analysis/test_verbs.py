"""`analyze` as a user types it."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from ruamel.yaml import YAML

from sae_research.analysis import neuronpedia
from sae_research.cli.analyze_verbs import table
from sae_research.cli.main import main
from sae_research.config.params import Params
from sae_research.runtime.errors import UserError
from sae_research.saes import save_sae
from tests.helpers.analysis import EARLY, SIZE, biased

PROMPT = "the time that people use water"
VERBS = (
    "saes",
    "stats",
    "run",
    "generate",
    "steer",
    "ablate",
    "attribute",
    "subspace",
    "explain",
    "neuronpedia",
    "dashboard",
)


@pytest.fixture
def project(tiny_inputs: Path, in_project: Path) -> Path:
    """A project with two SAEs of the tiny model in downloaded_saes/."""
    for name, sae in (("late", biased("standard", 60.0)), ("early", biased("topk", hook=EARLY))):
        sae.cfg = sae.cfg.replace(model_name="tiny")
        save_sae(sae, in_project / "downloaded_saes" / name)
    with (in_project / "params.yaml").open("w") as stream:
        YAML().dump(
            Params(
                model={"name": str(tiny_inputs / "tiny"), "device": "cpu", "llm_batch_size": 8},
                text={"dataset": str(tiny_inputs / "texts"), "context_size": SIZE},
                analysis={"tokens": 2_000, "split": "sae_train"},
            ).model_dump(mode="json"),
            stream,
        )
    return in_project


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["analyze", *arguments]) == 0
    return capsys.readouterr().out


def test_stats_and_attribute(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "saes", "--local")
    assert "downloaded_saes/late" in out and "blocks.0.hook_resid_post" in out
    assert "causal" in said(capsys, "saes", "--describe", "late")

    out = said(capsys, "stats", "--sae", "late", "--latent", "60")
    assert "dead latents" in out and "[[" in out and "late: 64 latents" in out
    folder = project / "analysis_results/stats/late"
    rows = list(csv.DictReader((folder / "latents.csv").open()))
    assert len(rows) == 64 and {row["kind"] for row in rows} >= {"dead", "between"}
    assert float(rows[60]["max"]) >= float(rows[60]["q99"]) >= float(rows[60]["q50"]) > 0
    assert json.loads((folder / "summary.json").read_text())["dead latents"] == sum(r["kind"] == "dead" for r in rows)
    assert all(Image.open(folder / name).size[0] > 300 for name in ("density.png", "density_cah.png"))

    out = said(capsys, "attribute", "--sae", "late", "early", "--prompt", PROMPT, "--check", "8")
    assert out.count("really ablated: correlation") == 2 and re.search(r"explained +whole +metric", out)
    rows = list(csv.DictReader((project / "analysis_results/attribute/attribution.csv").open()))
    whole = json.loads((project / "analysis_results/attribute/attribution.json").read_text())["saes"]["late"]["whole"]
    assert sum(float(row["share"]) for row in rows if row["sae"] == "late") == pytest.approx(whole, rel=1e-2, abs=1e-3)


def test_generate(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--prompt", PROMPT, "--length", "6", "--texts", "2", "--seed", "5", "--top-k", "20")
    out = said(capsys, "generate", "--sae", "late", "early", *more)
    kept = json.loads((project / "analysis_results/generate/generation.json").read_text())
    assert kept["saes"] == ["late", "early"] and [one["seed"] for one in kept["texts"]] == [5, 6]
    assert all(repr(one[run]) in out for one in kept["texts"] for run in ("plain", "with_saes"))
    assert "equal for" in out and "equal for" not in said(capsys, "generate", *more)
    alone = json.loads((project / "analysis_results/generate/generation.json").read_text())
    assert [one["plain"] for one in alone["texts"]] == [one["plain"] for one in kept["texts"]]


@pytest.mark.slow
def test_the_other_verbs(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, "stats", "--sae", "late")
    out = said(capsys, "run", "--sae", "late", "early", "--prompt", PROMPT)
    assert "reconstruction" in out and "does not count" in out and (project / "analysis_results/run/run.json").is_file()
    assert "%" in out, "the statistics of `late` are at hand: shares of maxima show"
    out = said(capsys, "run", "--sae", "late", "--search-prompt", PROMPT)
    assert re.search(r"latent +score", out)

    out = said(
        capsys,
        "steer",
        "--sae",
        "late",
        "--latent",
        "60",
        "--prompt",
        PROMPT,
        "--length",
        "5",
        "--seeds",
        "2",
        "--strengths",
        "1",
        "--neutral-tokens",
        "64",
    )
    assert "unsteered" in out and "strength 1" in out
    steering = json.loads((project / "analysis_results/steer/steering.json").read_text())
    assert len(steering["strengths"]) == 2 and len(steering["strengths"][1]["samples"]) == 2

    out = said(capsys, "ablate", "--sae", "late", "--prompt", PROMPT, "--latents", "60", "61", "--positions", "-1")
    assert "reconstruction alone - latents 60, 61" in out

    # latents chosen by measured effect
    out = said(capsys, "ablate", "--sae", "late", "--prompt", PROMPT)
    assert "fall of the answer's log-probability" in out and "answer_log_probability" in out
    out = said(capsys, "run", "--sae", "late", "--prompt", PROMPT, "--search-promoted", " the")
    assert re.search(r"latent +estimate +effect", out)
    cheap = ["--length", "3", "--seeds", "1", "--strengths", "1", "--neutral-tokens", "64"]
    out = said(capsys, "steer", "--sae", "late", "--prompt", PROMPT, "--targets", " the", *cheap)
    best = re.search(r"top *\n[- ]*\n? *(\d+)", out)
    assert best and f"latent {best[1]} by add" in out
    with pytest.raises(UserError, match="give --latent, or --targets"):
        main(["analyze", "steer", "--sae", "late", "--prompt", PROMPT])

    out = said(capsys, "subspace", "--sae", "late", "--latents", "58", "60", "61", "62", "--groups", "the", "time")
    assert "component 3" in out and (project / "analysis_results/subspace/subspace.png").is_file()
    out = said(capsys, "explain", "--sae", "late", "--latents", "60", "61")
    assert "mean held-out AUC" in out
    out = said(capsys, "dashboard", "--sae", "late", "early", "--compare", "late", "early", "--neuronpedia")
    assert "index.html in a browser" in out
    assert (project / "analysis_results/dashboard/neuronpedia/late/batch-0.json").is_file()


@pytest.mark.slow
def test_two_equal_runs_write_equal_bytes(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for out in ("a", "b"):
        said(capsys, "stats", "--sae", "late", "--out", out)
        said(capsys, "attribute", "--sae", "late", "--prompt", PROMPT, "--check", "4", "--out", out)
    for path in (project / "a").rglob("*.*"):
        assert path.read_bytes() == (project / "b" / path.relative_to(project / "a")).read_bytes(), path


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["run", "--sae", "late"], "give --prompt, --search-prompt or --search-promoted"),
        (["run", "--sae", "late", "--prompt", ""], "the prompt is empty"),
        (["stats", "--sae", "nothing"], "there: early, late"),
        (["stats", "--sae", "late", "--tokens", "0"], "--tokens must be at least 1"),
        (["ablate", "--sae", "late", "--prompt", PROMPT, "--latents", "64"], "latent 64: the SAE has latents 0 to 63"),
        (["steer", "--latent", "1", "--prompt", PROMPT], "--engine local needs --sae"),
        (["steer", "--latent", "1", "--prompt", PROMPT, "--engine", "neuronpedia"], "needs --source MODEL/SOURCE"),
        (
            [
                "steer",
                "--latent",
                "1",
                "--prompt",
                PROMPT,
                "--engine",
                "neuronpedia",
                "--source",
                "gpt2-small/7-res-jb",
                "--base-url",
                "http://127.0.0.1:9",
            ],
            "cannot be reached",
        ),
        (["attribute", "--sae", "late", "--prompt", PROMPT, "--against", "the"], "--against needs --answer"),
    ],
)
def test_mistakes_are_one_clear_line(project: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as refusal:
        main(["analyze", *arguments])
    assert "\n" not in str(refusal.value)


def test_an_sae_of_another_model_is_refused(project: Path) -> None:
    sae = biased("standard")
    sae.cfg = sae.cfg.replace(model_name="gpt2")
    save_sae(sae, project / "other")
    with pytest.raises(UserError, match="was trained on gpt2"):
        main(["analyze", "stats", "--sae", "other"])


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["analyze", verb, "--help"])
    assert end.value.code == 0
    assert f"Example: python -m sae_research analyze {verb} " in " ".join(capsys.readouterr().out.split())


def test_every_field_of_a_release(monkeypatch: pytest.MonkeyPatch, in_project: Path, capsys: pytest.CaptureFixture) -> None:
    release = {
        "model": "gpt2-small",
        "repo_id": "org/repo",
        "conversion_func": None,
        "config_overrides": {"model_from_pretrained_kwargs": {"center_writing_weights": True}, "note": {}},
        "links": {"publication": "https://example.org/paper"},
        "saes": [
            {"id": "a", "path": 7, "neuronpedia": "gpt2-small/0-x", "l0": 10},
            {"id": "b", "path": "b", "norm_scaling_factor": 1.5, "surplus": [1]},
        ],
    }
    monkeypatch.setattr(neuronpedia, "release_directory", lambda: {"mine": release})
    of_release, of_saes = (
        [re.split(r"\s{2,}", line.strip()) for line in part.splitlines()]
        for part in said(capsys, "saes", "--describe", "mine").split("\n\n")
    )
    assert of_release[1:] == [
        ["release", "mine"],
        ["model", "gpt2-small"],
        ["repo_id", "org/repo"],
        ["conversion_func", "-"],
        ["config_overrides.model_from_pretrained_kwargs.center_writing_weights", "yes"],
        ["config_overrides.note", "{}"],
        ["links.publication", "https://example.org/paper"],
        ["saes", "2"],
        ["saes at Neuronpedia", "1"],
    ]
    assert of_saes == [
        ["sae_id", "path", "neuronpedia", "l0", "variance_explained", "norm_scaling_factor"],
        ["a", "7", "gpt2-small/0-x", "10", "-", "-"],
        ["b", "b", "-", "-", "-", "1.5"],
    ]


@pytest.mark.slow
def test_the_directory_of_releases(in_project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Slow: the list in SAELens' package takes seconds to read."""
    assert "gpt2-small-res-jb" in said(capsys, "saes", "--search", "gpt2-small")
    with pytest.raises(UserError, match="no release of SAELens matches"):
        main(["analyze", "saes", "--search", "no such model"])
    with pytest.raises(UserError, match="did you mean gpt2-small-res-jb"):
        main(["analyze", "saes", "--describe", "gpt2-small-res-j"])
    rows = neuronpedia.list_releases("gpt2-small-res-jb$")
    assert [row["release"] for row in rows] == ["gpt2-small-res-jb"] and rows[0]["model"] == "gpt2-small"
    saes = neuronpedia.list_saes("gpt2-small-res-jb", "blocks.7")
    assert saes[0]["neuronpedia"] == "gpt2-small/7-res-jb"
    assert neuronpedia.neuronpedia_source("gpt2-small-res-jb", "blocks.7.hook_resid_pre") == "gpt2-small/7-res-jb"
    assert neuronpedia.neuronpedia_page("gpt2-small/7-res-jb", 5).endswith("/gpt2-small/7-res-jb/5")
    with pytest.raises(UserError, match="has no SAE 'blocks.99'"):
        neuronpedia.neuronpedia_source("gpt2-small-res-jb", "blocks.99")
    with pytest.raises(UserError, match="not a regular expression"):
        neuronpedia.list_releases("(")


def test_tables() -> None:
    assert table([{"a": 1.23456, "b": None, "c": " x"}, {"a": True, "b": [1, 2.0], "c": ""}]).splitlines() == [
        "a      b    c",
        "1.235  -    ' x'",
        "yes    1 2  ''",
    ]
    assert table([]) == ""


def test_the_script_forwards() -> None:
    root = Path(__file__).parents[2]
    out = subprocess.run(
        [sys.executable, "-m", "scripts.analyze", "steer", "--help"], capture_output=True, text=True, check=True, cwd=root
    )
    assert "Example: python -m sae_research analyze steer" in " ".join(out.stdout.split())
