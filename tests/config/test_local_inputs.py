"""What parameters point at on this machine is an input of the stages that read them."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from sae_research.config import local_inputs
from sae_research.config.local_inputs import pointers, sections, write_inputs
from sae_research.config.params import Params, check_params
from sae_research.runtime import packaged
from sae_research.runtime.sources import sources


def written(folder: Path) -> dict[str, dict[str, dict[str, object]]]:
    return {path.stem: json.loads(path.read_text()) for path in (folder / "inputs").glob("*.json")}


def test_the_default_points_at_nothing_but_the_outlier_file(in_project: Path) -> None:
    write_inputs(Params())
    found = written(in_project)
    assert (
        set(found)
        == set(sections())
        >= {
            "model",
            "text",
            "baseline_sae",
            "comparison_saes",
            "sparse_probing",
            "scr",
            "tpp",
            "unlearning",
            "ravel",
            "transfer",
            "dashboards",
        }
    )
    assert not any(found.values())


def test_every_kind_of_pointer_is_followed_without_a_path_or_a_time(in_project: Path) -> None:
    outside = in_project / "some where"
    for name in (
        "texts/a.txt",
        "texts/deep/b.txt",
        "texts/.hidden",
        "model/config.json",
        "runs/x/trainer_0/ae.pt",
        "runs/y/trainer_0/ae.pt",
        "task.csv",
        "sae/cfg.json",
        "questions.jsonl",
        "known.json",
    ):
        (outside / name).parent.mkdir(parents=True, exist_ok=True)
        (outside / name).write_text(name)
    (in_project / "own_saes").mkdir()
    (in_project / "own_saes/mine.py").write_text("from own_saes import helper\n")
    (in_project / "own_saes/helper.py").write_text("")
    os.mkfifo(outside / "texts/pipe")
    params = check_params(
        {
            "text": {"dataset": str(outside / "texts")},
            "model": {"name": "some where/model"},
            "comparison_saes": {"folders": [str(outside / "runs/*/trainer_0"), "absent/*"], "python": ["own_saes.mine:A"]},
            "baseline_sae": {"source": "folder", "path": str(outside / "sae")},
            "sparse_probing": {"dataset_names": ["news_topic", str(outside / "task.csv")]},
            "unlearning": {"forget_questions": [str(outside / "questions.jsonl")]},
            "transfer": {
                "finetuned_model": str(outside / "model"),
                "outliers": {"config_file": str(outside / "known.json")},
                "sae": {"source": "folder", "path": str(outside / "sae")},
            },
        },
        "test",
    )
    write_inputs(params)
    found = written(in_project)
    assert {f"{name}.{key}": value["files"] for name, values in found.items() for key, value in values.items()} == {
        "text.dataset": 2,
        "model.name": 1,
        "comparison_saes.folders.0": 2,
        "comparison_saes.python.0": 2,
        "baseline_sae.path": 1,
        "sparse_probing.dataset_names.1": 1,
        "unlearning.forget_questions.0": 1,
        "transfer.finetuned_model": 1,
        "transfer.outliers.config_file": 1,
        "transfer.sae.path": 1,
    }
    assert str(in_project) not in json.dumps(found)

    def changed() -> set[str]:
        nonlocal found
        write_inputs(params)
        before, found = found, written(in_project)
        return {name for name in found if found[name] != before[name]}

    assert changed() == set()
    for name, section in (
        ("texts/deep/b.txt", {"text"}),
        ("runs/y/trainer_0/ae.pt", {"comparison_saes"}),
        ("task.csv", {"sparse_probing"}),
        ("sae/cfg.json", {"baseline_sae", "transfer"}),
        ("model/config.json", {"model", "transfer"}),
    ):
        state, path = (outside / name).stat(), outside / name
        path.write_text(path.read_text()[::-1])  # the same size, and the old time put back
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
        assert changed() == section, name
    (outside / "texts/new.txt").write_text("new")
    assert changed() == {"text"}
    (in_project / "own_saes/helper.py").write_text("1\n")
    local_inputs.sources.__globals__["_read"].cache_clear()
    assert changed() == {"comparison_saes"}


def test_what_is_known_is_not_read_again(in_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = in_project / "texts"
    text.mkdir()
    (text / "a.txt").write_text("a")
    past = time.time() - 100
    monkeypatch.setattr(local_inputs, "_SETTLED_SECONDS", -1.0)
    os.utime(text / "a.txt", (past, past))
    params = check_params({"text": {"dataset": "texts"}}, "test")
    read: list[Path] = []
    real = local_inputs.file_sha256
    monkeypatch.setattr(local_inputs, "file_sha256", lambda path: (read.append(path), real(path))[1])
    write_inputs(params)
    stamp = (in_project / "inputs/text.json").stat().st_mtime_ns
    write_inputs(params)
    assert len(read) == 1 and (in_project / "inputs/text.json").stat().st_mtime_ns == stamp
    (in_project / ".cache/inputs.json").write_text("{ damaged")
    write_inputs(params)
    assert len(read) == 2
    monkeypatch.setenv("SAE_RESEARCH_NO_CACHE", "1")
    write_inputs(params)
    assert len(read) == 3


def test_a_relative_path_is_found_beside_a_queued_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, temporary = tmp_path / "project", tmp_path / "project/.dvc/tmp/exps/x"
    (project / "texts").mkdir(parents=True)
    (project / "texts/a.txt").write_text("a")
    temporary.mkdir(parents=True)
    monkeypatch.chdir(temporary)
    monkeypatch.setenv("DVC_ROOT", str(project))
    write_inputs(check_params({"text": {"dataset": "texts"}}, "test"))
    assert written(temporary)["text"]["dataset"]["files"] == 1


def test_all_of_a_section_is_searched_for_pointers() -> None:
    keys = {pointer.key for pointer in pointers(Params().transfer)}
    assert {"outliers.config_file"} <= keys
    assert not list(pointers(Params().core_eval))
    assert subprocess.run(["git", "check-ignore", "-q", "inputs/text.json"], check=False).returncode != 0


def test_packaged_dictionaries_are_inputs_without_their_cards(in_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = in_project / "kept" / "tiny-l1"
    place.mkdir(parents=True)
    for name in ("cfg.json", "sae_weights.safetensors", "card.json"):
        (place / name).write_text(name)
    monkeypatch.setattr(packaged, "FOLDER", in_project / "kept")
    chosen = {
        "baseline_sae": {"source": "packaged", "name": "tiny_l1"},
        "comparison_saes": {"packaged": ["tiny-l1", "absent"]},
    }
    write_inputs(Params.model_validate(chosen))
    found = written(in_project)
    assert found["baseline_sae"]["name"]["files"] == found["comparison_saes"]["packaged.0"]["files"] == 2
    assert "packaged.1" not in found["comparison_saes"]
    (place / "card.json").write_text("another")
    write_inputs(Params.model_validate(chosen))
    assert written(in_project) == found
    (place / "cfg.json").write_text("another")
    write_inputs(Params.model_validate(chosen))
    assert written(in_project)["baseline_sae"] != found["baseline_sae"]


def test_packaged_dictionaries_are_no_code() -> None:
    reached = sources("scripts.train_saes", "scripts.setup_saes").files
    assert any(path.match("sae_research/runtime/packaged.py") for path in reached)
    assert not any(path.is_relative_to(packaged.FOLDER) for path in reached)
