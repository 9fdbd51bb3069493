"""Atomic files, fingerprints, stage folders and caches."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sae_research.runtime import files, stages
from sae_research.runtime.cache import ResultCache, prune
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import fingerprint, read_json, write_json
from sae_research.runtime.stages import StageFolder, stage_folder


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"x": 1})

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        write_json(path, {"x": 2})
    assert read_json(path) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nan"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_fingerprint_ignores_order_and_sees_values() -> None:
    assert fingerprint({"a": 1, "b": [1, 2]}) == fingerprint({"b": [1, 2], "a": 1}) != fingerprint({"a": 1, "b": [2, 1]})


def test_rounding() -> None:
    assert files.round_significant({"a": 123456.0, "b": [0.00012346], "c": "x", "d": 7}) == {
        "a": 123500.0,
        "b": [0.0001235],
        "c": "x",
        "d": 7,
    }
    assert files.round_significant(0.123456) == 0.1235
    assert files.round_significant(-98765.4) == -98770.0


def test_stage_status_tells_how_it_ended(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with stage_folder(folder, enabled=False) as stage:
        assert stage is None
    assert stages.read_status(folder)["status"] == "disabled"
    with stage_folder(folder) as stage:
        assert isinstance(stage, StageFolder)
        assert stages.read_status(folder)["status"] == "incomplete"
        stage.skip("task", "too few texts")
        stage.write_result("sae", {"x": 1})
    assert stages.read_status(folder) == {"status": "ok", "message": "", "skipped": {"task": "too few texts"}, "notes": {}}
    assert stages.read_results(folder) == {"sae": {"x": 1}}
    with pytest.raises(UserError), stage_folder(folder):
        raise UserError("the disk is a teapot")
    assert stages.read_status(folder)["status"] == "failed"
    assert "teapot" in stages.read_status(folder)["message"]
    assert stages.read_results(folder) == {}, "nothing stale survives"
    assert stages.read_status(tmp_path / "nowhere")["status"] == "missing"


def test_result_cache_survives_damage(in_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = ResultCache("kind")
    assert cache.get("key") is None
    cache.put("key", {"x": 1})
    assert ResultCache("kind").get("key") == {"x": 1}
    (in_project / ".cache/results/kind/key.json").write_text("{broken")
    assert cache.get("key") is None
    cache.put("key", {"x": 2})
    monkeypatch.setenv("SAE_RESEARCH_NO_CACHE", "1")
    assert ResultCache("kind").get("key") is None


def test_prune_drops_the_least_recently_used(tmp_path: Path) -> None:
    for age, name in ((3, "old"), (2, "kept"), (1, "new")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data").write_bytes(b"x" * 1000)
        os.utime(tmp_path / name / "data", (1_000_000 - age, 1_000_000 - age))
    assert [p.name for p in prune(tmp_path, 1.5e-6, keep=[tmp_path / "kept"])] == ["old", "new"]
    assert [p.name for p in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize(
    ("body", "code", "line"),
    [
        ("raise UserError('mend this')", 1, "error: mend this"),
        ("raise OSError(28, 'No space left on device')", 1, "error: no space left"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("return 3", 3, ""),
    ],
)
def test_exit_codes_and_one_line(body: str, code: int, line: str) -> None:
    program = f"from sae_research.runtime.errors import UserError, run_main\ndef main():\n    {body}\nrun_main(main)\n"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert done.stderr.startswith(line)
    assert done.stderr.count("\n") <= 1


def test_damaged_json_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"a": 1})[:-2])
    with pytest.raises(UserError, match=r"a\.json: not valid JSON"):
        read_json(path)


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b", "a\nb", ".hidden", "x" * 300, 3, None]
)
def test_names_that_lead_elsewhere_are_refused(name: object, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="^there: .* is no name that a file could be called after"):
        files.checked_name(name, "there")
    (tmp_path / "manifest.json").write_text(json.dumps({"order": [name], "saes": {str(name): {}}}))
    with pytest.raises(UserError, match=r"manifest\.json"):
        stages.read_manifest(tmp_path / "manifest.json")


def test_long_names_are_cut_alike_and_stay_apart() -> None:
    one, other = files.slugify("a" * 300), files.slugify("a" * 299 + "b")
    assert one == files.slugify("A" * 300) and one != other
    assert len(one) == files.NAME_LIMIT and files.SLUG.fullmatch(one) and files.slugify("a" * 150) == "a" * 150


@pytest.mark.parametrize(
    "value",
    [
        [],
        {},
        {"order": 3},
        {"order": ["a"], "saes": {}},
        {"order": ["a"], "saes": {"a": 1}},
        {"order": ["a", "a"], "saes": {"a": {}}},
    ],
)
def test_a_manifest_of_another_shape(value: object, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"manifest\.json: "):
        stages.read_manifest(tmp_path / "manifest.json")


def test_home_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.user_path("~/saes") == tmp_path / "saes"
    with pytest.raises(UserError, match="no such home folder"):
        files.user_path("~nobody_of_that_name/x")
