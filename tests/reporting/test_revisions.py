"""Results of commits and experiments: read back from Git as they were, compared, and shown within a terminal's width."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sae_research.cli.main import main
from sae_research.cli.results import snapshot
from sae_research.reporting.metrics import headline
from sae_research.reporting.revisions import changed_params, chosen_metrics, fitted, metrics_table, only, read_snapshot
from sae_research.reporting.tables import write_plot_data, write_results_csv
from sae_research.runtime.errors import UserError
from sae_research.runtime.formatting import number
from tests.helpers.results import INTERPOLATING, Lab, build, complete

IDENTITY = ["-c", "user.name=t", "-c", "user.email=t@example.com"]


def git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *IDENTITY, *arguments], cwd=root, check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """A repository whose first commit has a worse `topk` and no `control_pca`; an experiment stands beside."""
    lab = complete(tmp_path_factory.mktemp("revisions"))
    run = build(lab)
    write_results_csv(run, lab.root)
    write_plot_data(run, lab.root)
    path = lab.root / "metrics/results.csv"
    full = path.read_text()
    topk = [line for line in full.splitlines() if line.startswith("topk,topk,comparison,core,kl,") and "lab_v1" in line]
    assert len(topk) == 1
    fewer = [line for line in full.splitlines() if not line.startswith("control_pca")]
    path.write_text("\n".join(fewer).replace(topk[0], topk[0].replace(",0.15,", ",0.3,")) + "\n")
    (lab.root / ".dvc").mkdir()
    git(lab.root, "init", "-q")
    git(lab.root, "add", "params.yaml", "metrics")
    git(lab.root, "commit", "-qm", "one")
    first = git(lab.root, "rev-parse", "HEAD")
    path.write_text(full)
    lab.write("params.yaml", (lab.root / "params.yaml").read_text() + "random_seed: 43\n")
    git(lab.root, "commit", "-qam", "two")
    git(lab.root, "update-ref", f"refs/exps/{first[:2]}/{first[2:]}/sweep-1a", first)
    return lab


@pytest.fixture
def project(repository: Lab, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.chdir(repository.root)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    return repository


def test_results_are_read_back_as_they_were(project: Lab) -> None:
    run = build(project)
    for name in ("workspace", "HEAD"):
        there = snapshot(project.root, name).run
        assert [row.name for row in there.rows] == [row.name for row in run.rows]
        for mine, theirs in zip(run.rows, there.rows, strict=True):
            assert (mine.group, mine.role) == (theirs.group, theirs.role)
            for evaluation, record in mine.evals.items():
                for key, value in record.get("metrics", {}).items():
                    assert theirs.value(key, evaluation) == value
                    assert theirs.interval(key, evaluation) == mine.interval(key, evaluation)
        assert {row.name for row in there.rows if row.interpolating} == INTERPOLATING
        assert there.headline == run.headline


def test_what_differs_between_two(project: Lab) -> None:
    before, after = snapshot(project.root, "sweep-1a"), snapshot(project.root, "HEAD")
    assert only(after, before) == ["control_pca"] and only(before, after) == []
    assert changed_params(before, after) == [("random_seed", "", "43")]


def test_the_terminal_s_tables(project: Lab, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run = build(project)
    for width in (40, 80, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        assert main(["metrics", "--intervals"]) == 0
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= width
        for row in run.rows:
            assert shown.count(number(row.value("kl"))) >= 1
    assert main(["metrics", "sweep-1a", "--metric", "kl"]) == 0
    shown = capsys.readouterr().out
    assert "0.300" in shown and "control_pca" not in shown and "Variance" not in shown
    assert main(["compare", "HEAD~1", "HEAD", "--metric", "kl", "--metric", "l0"]) == 0
    shown = capsys.readouterr().out
    assert "0.300 → 0.150 (−0.150)" in shown and "only in HEAD: control_pca" in shown
    assert [line.split() for line in shown.splitlines()][-1] == ["random_seed", "43"]
    assert shown.count("→") == 1
    assert main(["metrics", "--eval", "sparse_probing"]) == 0
    heading, first = capsys.readouterr().out.split("\nstandard ")
    assert heading.count("Residual") == 8 and heading.count("Bench)") == 8  # ours and SAE Bench's of four probes each
    assert first.split("\n")[0].split()[0] == "0.742"


def test_the_pages(project: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vl_convert", reason="vl-convert-python is not installed: `make setup`")
    assert main(["report", "--compare", "HEAD~1", "workspace"]) == 0
    page = Path(capsys.readouterr().out.strip())
    assert page == project.root / "report_comparisons/head_1_and_workspace/index.html"
    tables = json.loads(page.read_text().split('id="data-tables">')[1].split("</script>")[0])
    (kl,) = [table for table in tables if table["title"] == "KL ↓"]
    (topk,) = [row for row in kl["rows"] if row["name"] == "topk"]
    assert [cell[1] for cell in topk["cells"]] == ["0.300", "0.150", "−0.150", "overlap"]
    assert "<code>43</code>" in page.read_text() and "control_pca" in page.read_text()
    with pytest.raises(UserError, match="report/index.html: not there yet; run `dvc repro generate_report`"):
        main(["report"])
    project.write("report/index.html", "")
    assert main(["report"]) == 0
    assert capsys.readouterr().out.strip() == str(project.root / "report/index.html")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["metrics", "sweep-1b"], "no commit or experiment 'sweep-1b'.*sweep-1a"),
        (["metrics", "--metric", "kll"], "no metric 'kll' in these results; there are l0, "),
        (["metrics", "--eval", "scr"], "no results of 'scr'; there are some of core, sparse_probing"),
        (["report", "--out", "x"], "--out: belongs to --compare"),
    ],
)
def test_mistakes_are_one_line(project: Lab, arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        main(arguments)


def test_damaged_or_missing_results_are_one_line() -> None:
    files = {"metrics/results.csv": "sae,value\na,1\n"}
    with pytest.raises(UserError, match=r"old: metrics/results.csv lacks the column architecture"):
        read_snapshot("old", files.get)
    with pytest.raises(UserError, match=r"old: holds no metrics/results.csv"):
        read_snapshot("old", lambda path: None)
    header = "sae,architecture,role,eval,metric,value,low,high,definition_version,better\n"
    files = {"metrics/results.csv": header + "a,topk,comparison,core,l0,many,,,lab_v1,\n"}
    with pytest.raises(UserError, match=r"old: metrics/results.csv: a, l0: not a number"):
        read_snapshot("old", files.get)


def test_early_commits_without_intervals_are_read() -> None:
    header = "sae,architecture,role,eval,metric,value,definition_version\n"
    run = read_snapshot("old", {"metrics/results.csv": header + "a,topk,comparison,core,kl,0.5,lab_v1\n"}.get).run
    assert run.rows[0].value("kl") == 0.5 and run.rows[0].interval("kl") is None
    assert chosen_metrics(run) == [headline("kl")]
    assert metrics_table(run, chosen_metrics(run), 80).splitlines() == ["SAE   KL ↓", "a    0.500"]


def test_wide_tables_are_cut_into_several() -> None:
    rows = [["SAE", "Variance explained ↑", "L0"], ["a_very_long_name_of_an_sae_seed1", "0.5", "1"]]
    assert fitted(rows, 200).splitlines()[0] == "                                     Variance"
    parts = fitted(rows, 26).split("\n\n")
    assert len(parts) == 2 and all(part.splitlines()[-1].startswith("a_very…seed1") for part in parts)


def test_the_command_runs_without_torch(project: Lab) -> None:
    code = (
        "import sys; from sae_research.cli.main import main; main(['metrics']); assert 'torch' not in sys.modules, 'torch'; "
        "assert 'matplotlib' not in sys.modules, 'matplotlib'"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project.root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
