"""The whole DAG through the real `dvc`, in a clone of this repository with a tiny model and tiny texts."""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from sae_research.cli.pipeline import PRESETS, read_preset
from sae_research.config.params import load_params
from sae_research.runtime.errors import run_main
from tests.helpers.dvc_project import ENV, ROOT, SAES, make_project, read, run, set_params


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tiny_inputs: Path) -> Path:
    """A repository with this code, run once."""
    folder = make_project(tmp_path_factory.mktemp("clone") / "repo", tiny_inputs)
    run(folder, sys.executable, "-m", "sae_research", "repro")
    run(folder, "git", "add", "-A")
    run(folder, "git", "commit", "-qm", "results")
    return folder


def test_every_output_is_there(project: Path) -> None:
    manifest = read(project, "downloaded_saes/manifest.json")
    assert manifest["order"][:3] == ["standard", "standard_ihtp_k1", "standard_mpsae_s3"]
    assert sorted(manifest["order"]) == sorted(SAES)
    for evaluation in ("core", "sparse_probing"):
        assert read(project, f"eval_results/{evaluation}/_status.json")["status"] == "ok"
        for sae in SAES:
            assert read(project, f"eval_results/{evaluation}/{sae}_eval_results.json")["eval_type_id"] == evaluation
    assert read(project, "metrics/transfer.json") == {"_status": {"status": "disabled"}}
    for evaluation in ("scr", "tpp", "absorption", "unlearning", "transfer"):
        assert read(project, f"eval_results/{evaluation}/_status.json")["status"] == "disabled"
    metrics = read(project, "metrics/all_metrics.json")
    assert sorted(metrics) == sorted(SAES)
    for sae in SAES:
        assert 0 < metrics[sae]["core"]["l0"] <= 64
        assert (project / f"eval_results/merged/{sae}.json").is_file()
        assert not (project / f"downloaded_saes/{sae}/sae_weights.safetensors").exists() or "_k1" not in sae
        assert sae in (project / "METRICS.md").read_text() and sae in (project / "report/index.html").read_text()
    assert "NaN" not in (project / "metrics/all_metrics.json").read_text()
    assert len(list((project / "images").glob("*.png"))) >= 6
    assert (project / "metrics/results.csv").read_text().count("\n") > 100
    assert not (project / "downloaded_saes/standard_mpsae_s3/sae_weights.safetensors").exists()


def test_nothing_is_left_untracked_or_ignored_wrongly(project: Path) -> None:
    tracked = run(project, "git", "ls-files").stdout.split()
    for name in ("dvc.lock", "METRICS.md", "metrics/core.json", "report/index.html", "images/overview.png"):
        assert name in tracked
    assert not [
        name for name in tracked if name.startswith(("eval_results/", "trained_saes/", "downloaded_saes/", ".cache/"))
    ]


def test_a_second_run_does_nothing(project: Path) -> None:
    out = run(project, "dvc", "repro").stdout
    assert re.findall(r"Running stage '(\w+)'", out) == ["inputs"]
    assert run(project, "git", "status", "--porcelain").stdout == ""


def test_a_local_file_that_changes_is_seen(project: Path, tiny_inputs: Path) -> None:
    text = tiny_inputs / "texts/documents.jsonl"
    state, before = text.stat(), text.read_bytes()
    text.write_bytes(before.replace(b"the", b"eht", 1))
    os.utime(text, ns=(state.st_atime_ns, state.st_mtime_ns))
    try:
        run(project, "dvc", "repro", "-s", "inputs")
        assert "inputs/text.json" in run(project, "git", "status", "--porcelain").stdout
        stale = json.loads(run(project, "dvc", "status", "--json").stdout)
        assert {"train", "setup", "core_eval"} <= set(stale) and "sparse_probing_eval" not in stale
    finally:
        text.write_bytes(before)
        run(project, "dvc", "repro", "-s", "inputs")
    assert run(project, "git", "status", "--porcelain").stdout == ""


@pytest.mark.slow
def test_an_added_variant_is_evaluated_alone(project: Path) -> None:
    done = run(project, "dvc", "exp", "run", "-n", "more-k", "-S", "sae_variants.ihtp.k_values=[1,3]")
    assert "Running stage 'train'" not in done.stdout
    # the progress bars say how much work there was: one SAE
    assert "1/1" in done.stderr
    shown = run(project, "dvc", "exp", "diff", "HEAD", "more-k").stdout
    assert "standard_ihtp_k3" in shown
    assert "more-k" in run(project, "dvc", "exp", "show", "--csv", "--no-pager").stdout
    assert "standard_ihtp_k3" in read(project, "metrics/all_metrics.json")
    run(project, "git", "checkout", "-q", ".")
    assert "standard_ihtp_k3" not in read(project, "metrics/all_metrics.json")
    run(project, "dvc", "checkout", "-q", "--force")


def test_dvc_reads_metrics_params_and_plots(project: Path) -> None:
    shown = json.loads(run(project, "dvc", "metrics", "show", "--json").stdout)
    assert "metrics/core.json" in shown[""]["data"]
    assert "l0" in run(project, "dvc", "metrics", "diff", "--all").stdout
    assert "sae_variants" in run(project, "dvc", "params", "diff", "--all").stdout
    run(project, "dvc", "plots", "show", "-o", "dvc_plots")
    assert (project / "dvc_plots" / "index.html").is_file()
    assert "core_eval" in run(project, "dvc", "dag").stdout


PRESET_NAMES = sorted(path.stem for path in (ROOT / PRESETS).glob("*.txt"))
QUEUE_EACH = """
import json, subprocess, sys
from dvc.cli import main
queued = {}
for name, overrides in json.load(sys.stdin).items():
    assert main(["exp", "run", "--queue", *(part for override in overrides for part in ("-S", override))]) == 0
    queued[name] = subprocess.check_output(["git", "show", "refs/exps/celery/stash:params.yaml"], text=True)
sys.stdout.write("QUEUED" + json.dumps(queued))
"""


@pytest.fixture(scope="module")
def queued_presets(project: Path) -> dict[str, tuple[list[str], str]]:
    """Overrides of every preset, and params.yaml as DVC makes it of them, in queued experiments that are then dropped. All
    in one process: DVC takes longer to start than to queue."""
    present = load_params(project / "params.yaml").train.saes  # this project has one SAE only to take out
    overrides = {
        preset: [
            override
            for override in read_preset(preset)
            if not override.startswith("~train.saes.") or override.rpartition(".")[2] in present
        ]
        for preset in PRESET_NAMES
    }
    done = subprocess.run(
        [sys.executable, "-c", QUEUE_EACH],
        input=json.dumps(overrides),
        cwd=project,
        env=ENV,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    run(project, "dvc", "queue", "remove", "--queued")
    queued = json.loads(done.stdout.rpartition("QUEUED")[2])
    return {preset: (overrides[preset], queued[preset]) for preset in PRESET_NAMES}


@pytest.mark.parametrize("preset", PRESET_NAMES)
def test_presets_mean_to_dvc_what_they_say(
    queued_presets: dict[str, tuple[list[str], str]], preset: str, tmp_path: Path
) -> None:
    overrides, text = queued_presets[preset]
    queued = tmp_path / "queued.yaml"
    queued.write_text(text)
    params = load_params(queued)
    trains = "train.enabled=false" not in overrides
    assert params.train.enabled == trains
    if (
        not trains and preset != "packaged" and not preset.startswith("transfer-")
    ):  # called after a model, or a release of one
        model = params.model.name
        assert (model.startswith(preset) or preset.startswith(model)) and params.comparison_saes.trained == []
    for override in overrides:
        where, _, want = override.partition("=")
        value: Any = params.model_dump()
        *parents, last = where.lstrip("+~").split(".")
        for key in parents:
            value = value[key]
        if override.startswith("~"):
            assert last not in value
        elif override.startswith("+"):
            added = OverridesParser.create().parse_override(override).value()
            assert {key: value[last][key] for key in added} == added
        else:
            shown = "null" if value[last] in (None, []) else str(value[last])  # null stands for an empty list too
            assert shown.lower().replace("'", "").replace(" ", "") == want.lower()


@pytest.mark.slow
def test_switching_evaluations_off_leaves_nothing_stale(project: Path) -> None:
    set_params(project, {"eval_types": {"core": False}})
    try:
        run(project, sys.executable, "-m", "sae_research", "repro")
        metrics = read(project, "metrics/all_metrics.json")
        assert all("core" not in values and "sparse_probing" in values for values in metrics.values())
        assert "disabled" in (project / "METRICS.md").read_text()
        set_params(project, {"eval_types": {"core": False, "sparse_probing": False}})
        run(project, sys.executable, "-m", "sae_research", "repro")
        assert read(project, "metrics/all_metrics.json") == {}, "no SAE keeps a figure of an evaluation that is off"
    finally:
        run(project, "git", "checkout", "-q", "params.yaml")
        run(project, "dvc", "repro")
    assert run(project, "git", "status", "--porcelain").stdout == "", "back to the same bytes"


@pytest.mark.slow
def test_optional_evaluations_reach_the_report_and_one_that_fails_stops_none(project: Path) -> None:
    small = {"dataset_names": ["news_section"], "train_set_size": 24, "test_set_size": 16, "n_values": [2, 5]}
    set_params(
        project,
        {
            "eval_types": {"tpp": True, "meta_sae": True, "autointerp": True},
            "tpp": small,
            "meta_sae": {"train_steps": 5, "train_batch_size": 32},
        },
    )  # autointerp without an endpoint
    try:
        done = run(project, sys.executable, "-m", "sae_research", "repro", check=False)
        assert done.returncode == 1
        assert "failed: autointerp: failed: autointerp.base_url" in done.stdout
        assert "error: autointerp.base_url" in done.stderr and "Traceback" not in done.stderr
        metrics = read(project, "metrics/all_metrics.json")
        for evaluation in ("core", "tpp", "meta_sae"):
            assert read(project, f"eval_results/{evaluation}/_status.json")["status"] == "ok"
            assert metrics["topk"][evaluation]
        assert "2605.18229" in (project / "METRICS.md").read_text()
    finally:
        run(project, "git", "checkout", "-q", ".")
        run(project, "dvc", "checkout", "-q", "--force")


@pytest.mark.parametrize(
    ("values", "stage", "line"),
    [
        ({"model": {"nmae": "x"}}, "train", "error: params.yaml: unknown key model.nmae, did you mean name?"),
        ({"train": {"hook_name": "blocks.77.hook_resid_post"}}, "train", "the model has layers 0 to 2"),
        ({"baseline_sae": {"name": "absent"}}, "setup", "run the train stage"),
        ({"text": {"dataset": "./empty_folder"}}, "train", "empty_folder"),
        ({"sparse_probing": {"dataset_names": ["nonsense"]}}, "sparse_probing", "unknown task 'nonsense'"),
        ({"core_eval": {"n_eval_sparsity_variance_batches": 100_000}}, "core", "ends after"),
    ],
)
def test_mistakes_are_one_line_and_lose_nothing(
    project: Path,
    values: dict[str, Any],
    stage: str,
    line: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """In this process, as the next test starts a script of its own: importing torch takes longer than to fail."""
    scripts = {"train": "train_saes", "setup": "setup_saes", "core": "run_core_eval", "sparse_probing": "run_sparse_probing"}
    before = (project / "downloaded_saes/manifest.json").read_bytes()
    monkeypatch.chdir(project)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    set_params(project, values)
    try:
        with pytest.raises(SystemExit) as ended:
            run_main(importlib.import_module(f"scripts.{scripts[stage]}").main)
        assert ended.value.code == 1
        errors = [text for text in capfd.readouterr().err.splitlines() if text.startswith("error:")]
        assert len(errors) == 1 and line in errors[0]
        assert (project / "downloaded_saes/manifest.json").read_bytes() == before
        assert (project / "trained_saes/standard/cfg.json").is_file()
    finally:
        run(project, "git", "checkout", "-q", "params.yaml")
        if stage in ("core", "sparse_probing"):  # they empty their folder first
            run(project, "dvc", "checkout", "-q", "--force", f"eval_results/{stage}")


def test_damaged_weights_are_one_line(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """In this process too."""
    monkeypatch.chdir(project)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    weights = project / "downloaded_saes/topk/sae_weights.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:100])
    try:
        with pytest.raises(SystemExit) as ended:
            run_main(importlib.import_module("scripts.run_core_eval").main)
        assert ended.value.code == 1
        errors = capfd.readouterr().err.splitlines()
        assert "damaged weights" in errors[-1] and errors[-1].startswith("error:")
        assert read(project, "eval_results/core/_status.json")["status"] == "failed"
    finally:
        weights.write_bytes(whole)
        run(project, "dvc", "checkout", "-q", "--force")


@pytest.mark.slow
def test_a_killed_stage_resumes(project: Path) -> None:
    """The status says incomplete, and the next run ends with the same bytes."""
    want = (project / "eval_results/core/standard_eval_results.json").read_bytes()
    shutil.rmtree(project / ".cache/results", ignore_errors=True)
    process = subprocess.Popen(
        [sys.executable, "-m", "scripts.run_core_eval"],
        cwd=project,
        env=ENV,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    status = project / "eval_results/core/_status.json"

    def begun() -> bool:
        try:
            return "incomplete" in status.read_text()
        except FileNotFoundError:  # the stage empties its folder first
            return False

    while process.poll() is None and not begun():
        pass
    process.kill()
    process.wait()
    assert read(project, "eval_results/core/_status.json")["status"] in ("incomplete", "ok")
    run(project, sys.executable, "-m", "scripts.run_core_eval")
    assert (project / "eval_results/core/standard_eval_results.json").read_bytes() == want


@pytest.mark.slow
def test_transfer_through_dvc(project: Path) -> None:
    """The offline pair: the tiny model and a finetune of it that the stage makes."""
    set_params(
        project,
        {
            "eval_types": {"transfer": True},
            "transfer": {
                "hooks": ["blocks.0.hook_resid_post"],
                "tokens": 1000,
                "patched_tokens": 240,
                "own_finetune": {"source": None, "steps": 3},
                "controls": {"tokens": 480, "patched_tokens": 96},
                "repair": {"tokens": 480, "held_out_tokens": 240},
            },
        },
    )
    try:
        run(project, sys.executable, "-m", "sae_research", "repro")
        metrics = read(project, "metrics/transfer.json")
        assert metrics["_status"] == {"status": "ok", "pairs": 3} and metrics["control_self"]["cosine"] == 1
        assert "## Transfer to a finetuned model" in (project / "METRICS.md").read_text()
        assert (project / "images/transfer/quality.png").is_file() and (project / "images/overview.png").is_file()
    finally:
        run(project, "git", "checkout", "-q", ".")


@pytest.mark.slow
def test_dashboards_through_dvc(project: Path) -> None:
    assert read(project, "dashboards/_status.json")["status"] == "disabled"
    set_params(
        project,
        {
            "eval_types": {"dashboards": True},
            "analysis": {"tokens": 1000},
            "dashboards": {"saes": ["standard", "topk"], "compare": [["standard", "topk"]]},
        },
    )
    try:
        run(project, sys.executable, "-m", "sae_research", "repro")
        assert read(project, "dashboards/_status.json")["notes"]["saes"] == ["standard", "topk"]
        assert "Variance explained" in (project / "dashboards/topk/index.html").read_text()
        assert (project / "dashboards/compare/standard_and_topk/data.js").is_file()
        assert run(project, "git", "status", "--porcelain", "dashboards").stdout == "", "DVC keeps it, Git does not"
        assert "up to date" in run(project, "dvc", "status", "dashboards").stdout
    finally:
        run(project, "git", "checkout", "-q", ".")
        run(project, "dvc", "repro")
