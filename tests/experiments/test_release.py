"""A release of six small dictionaries of four kinds on a loopback hub, scored into one leaderboard."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sae_research.experiments.release_board import front, published_rows
from sae_research.reporting.rows import Row
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import read_json, write_json
from sae_research.saes import SparseAutoencoder, save_sae
from sae_research.saes.config import SAEConfig
from sae_research.saes.registry import form_class
from sae_research.saes.releases import saes_of
from tests.helpers.experiments import ROOT
from tests.helpers.hub_server import hub_env, serve_hub

D_IN, D_SAE = 32, 48
HOOKS = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
IDS = ("l0_relu", "l0_topk", "l0_jumprelu", "l0_transcoder", "l1_relu", "l1_topk")
MORE_TEXT = ["-S", "core_eval.n_eval_reconstruction_batches=8", "-S", "core_eval.n_eval_sparsity_variance_batches=8"]
DIRECTORY = """
import json, sys
from sae_research.saes import releases
directory = {"lab/six": {"model": "tiny", "repo_id": "lab/six", "saes": [{"id": name, "path": name} for name in %s]}}
releases.release_directory = lambda: directory
releases.released_saes.cache_clear()
"""
COMMAND = """
from sae_research.__main__ import main
from sae_research.runtime.errors import run_main
sys.argv = ["sae-research", "evaluate-release", "lab/six", *sys.argv[1:]]
run_main(main)
"""


def dictionary(kind: str, hook: str, seed: int, width: int) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(D_SAE, width, generator=generator), dim=1)
    transcoder = kind == "transcoder"
    form = {"relu": "standard", "transcoder": "standard"}.get(kind, kind)
    options = {"k": 8} if kind == "topk" else {}
    cfg = SAEConfig(form, width, D_SAE, "tiny", hook, options=options, apply_b_dec_to_input=not transcoder)
    if transcoder:
        layer = hook.rpartition(".")[0]
        cfg = cfg.replace(hook_name=f"{layer}.mlp.hook_in", hook_out=f"{layer}.hook_mlp_out")
    tensors = {
        "W_enc": rows.T.contiguous(),
        "b_enc": torch.zeros(D_SAE),
        "W_dec": rows,
        "b_dec": torch.zeros(width),
        "threshold": torch.full((D_SAE,), 0.1),
    }
    cls = form_class(form)
    return cls.from_tensors(cfg, {name: tensors[name] for name in cls.tensor_names})


@pytest.fixture
def served(params_only: Path, tiny_inputs: Path, tmp_path: Path) -> Path:
    width = read_json(tiny_inputs / "tiny/config.json")["hidden_size"]
    for seed, name in enumerate(IDS):
        layer, kind = int(name[1]), name.partition("_")[2]
        save_sae(dictionary(kind, HOOKS[layer], seed, width), tmp_path / "six" / name)
    return params_only


def run(project: Path, url: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **hub_env(url, project), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    given = [
        "-S",
        f"model.name={json.loads((project / 'model').read_text())}",
        *MORE_TEXT,
        *arguments,
    ]
    command = [sys.executable, "-c", DIRECTORY % (list(IDS),) + COMMAND, *given]
    return subprocess.run(command, cwd=project, env=env, capture_output=True, text=True, check=False)


def test_a_release_becomes_one_leaderboard(served: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    (served / "model").write_text(json.dumps(str(tiny_inputs / "tiny")))
    (tmp_path / "six/l1_topk/sae_weights.safetensors").write_bytes(b"cut short")
    requests: list[str] = []
    with serve_hub({"models": {"lab/six": tmp_path / "six"}}, requests) as url:
        first = run(served, url)
        assert first.returncode == 1 and "1 of 6 dictionaries could not be opened" in first.stdout, (
            first.stdout + first.stderr
        )
        assert "not opened" in first.stdout and "Traceback" not in first.stderr
        folder = served / "releases/lab_six"
        board = (folder / "leaderboard.md").read_text()
        rows = list(csv.DictReader((folder / "leaderboard.csv").open()))
        figures = {(row["dictionary"], row["metric"]): float(row["value"]) for row in rows}
        assert {name for name, _ in figures} == set(IDS[:5]) and figures["l0_topk", "l0"] == 8
        assert all(f"`{name}`" in board for name in IDS) and "## Not scored" in board
        assert "blocks.0.mlp.hook_in -> blocks.0.hook_mlp_out" in board and "[" in board.partition("| `l0_relu`")[2][:200]
        done = len(requests)
        again = run(served, url, "--match", "l0|relu")
        assert again.returncode == 0 and "not opened" not in again.stdout, again.stdout + again.stderr
        assert len(requests) == done and "core" not in again.stderr, "nothing is fetched or scored again"
        assert (folder / "leaderboard.csv").read_text().count("l0_topk") > 5


PIPELINE = """
from sae_research.config.params import check_params, read_params
from sae_research.evals.run import run_evaluation
from sae_research.experiments.config_files import over, parse_overrides
from sae_research.setup import run_setup
params = check_params(over(read_params("params.yaml"), parse_overrides(sys.argv[1:])), "params.yaml")
run_setup(params)
run_evaluation("core", params)
"""


def test_the_pipeline_takes_a_release(served: Path, tiny_inputs: Path, tmp_path: Path) -> None:
    """As `comparison_saes.release` with one of its dictionaries as the baseline; what cannot be opened is left out."""
    (tmp_path / "six/l1_topk/sae_weights.safetensors").write_bytes(b"cut short")
    chosen = ["baseline_sae.source=sae_lens", "baseline_sae.release=lab/six", "baseline_sae.sae_id=l0_relu"]
    off = [f"sae_variants.{name}.enabled=false" for name in ("ihtp", "mpsae", "omp")]
    chosen += ["baseline_sae.hook_layer=0", "baseline_sae.name=l0_relu", "comparison_saes.trained=[]", "controls.names=[]"]
    overrides = [*chosen, *off, "comparison_saes.release=lab/six", "comparison_saes.match=_relu|topk"]
    with serve_hub({"models": {"lab/six": tmp_path / "six"}}, []) as url:
        env = {**os.environ, **hub_env(url, served), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [
            sys.executable,
            "-c",
            DIRECTORY % (list(IDS),) + PIPELINE,
            *overrides,
            f"model.name={tiny_inputs / 'tiny'}",
        ]
        done = subprocess.run(command, cwd=served, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    names = read_json(served / "downloaded_saes/manifest.json")["order"]
    assert names == ["l0_relu", "lab_six_l0_topk", "lab_six_l1_relu"]
    (warning,) = [line for line in done.stdout.splitlines() if "left out" in line]
    assert "lab_six_l1_topk is left out" in warning and "damaged weights" in warning
    assert sorted(path.name for path in (served / "eval_results/core").glob("*_eval_results.json")) == sorted(
        f"{name}_eval_results.json" for name in names
    )


def test_published_results_stand_beside(tmp_path: Path) -> None:
    result = {
        "eval_type_id": "core",
        "eval_result_metrics": {"sparsity": {"l0": 20.5, "l1": 3.0}, "reconstruction_quality": {"explained_variance": 0.7}},
        "sae_lens_release_id": "release",
        "sae_lens_id": "one",
        "sae_cfg_dict": {"architecture": "topk", "d_sae": 16, "hook_name": "blocks.1.hook_resid_post"},
    }
    write_json(tmp_path / "core/release_one_eval_results.json", result)
    (row,) = published_rows(str(tmp_path), ["core"])
    assert row.role == "published" and row.value("l0_sae_bench") == 20.5 and row.value("variance_explained_sae_bench") == 0.7
    with pytest.raises(UserError, match="no results of absorption"):
        published_rows(str(tmp_path), ["absorption"])


def test_the_front_holds_what_nothing_sparser_beats() -> None:
    def row(name: str, l0: float, recovered: float, hook: str = "a") -> Row:
        return Row(name, {"hook_name": hook}, {"core": {"metrics": {"l0": l0, "loss_recovered": recovered}}})

    rows = [row("sparse", 5, 0.8), row("worse", 6, 0.7), row("dense", 9, 0.9), row("elsewhere", 9, 0.1, "b")]
    assert front(rows) == {"sparse", "dense", "elsewhere"}


@pytest.mark.parametrize(
    "release, match, line",
    [
        ("gpt2-small-res-jbb", None, "no release 'gpt2-small-res-jbb', did you mean"),
        ("gpt2-small-res-jb", "(", "is not a regular expression"),
        ("gpt2-small-res-jb", "nothing", "none of the 13 ids"),
    ],
)
def test_what_is_not_there_is_said_in_a_line(release: str, match: str | None, line: str) -> None:
    with pytest.raises(UserError, match=line):
        saes_of(release, match, "--match")
