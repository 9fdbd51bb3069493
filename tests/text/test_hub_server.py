"""The loopback hub with the real `huggingface_hub` client; `datasets` meets it in test_text_hub.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

from tests.helpers.hub_server import serve_hub


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "layer 4").mkdir(parents=True)
    (folder / "layer 4" / "ae.pt").write_bytes(bytes(range(256)) * 50)
    (folder / "config.json").write_text("{}")
    (folder / "empty.txt").write_text("")
    return folder


def test_files_and_snapshots(model: Path, tmp_path: Path) -> None:
    with serve_hub({"models": {"org/sae": model, "gpt0": model}}) as url:
        for repo in ("org/sae", "gpt0"):
            path = hf_hub_download(repo, "layer 4/ae.pt", endpoint=url, cache_dir=tmp_path / "cache")
            assert Path(path).read_bytes() == (model / "layer 4" / "ae.pt").read_bytes()
            snapshot = Path(snapshot_download(repo, endpoint=url, cache_dir=tmp_path / "cache"))
            assert sorted(file.name for file in snapshot.rglob("*") if file.is_file()) == [
                "ae.pt",
                "config.json",
                "empty.txt",
            ]
        api = HfApi(endpoint=url)
        assert api.list_repo_files("org/sae") == ["config.json", "empty.txt", "layer 4/ae.pt"]
        assert [entry.path for entry in api.list_repo_tree("org/sae")] == ["layer 4", "config.json", "empty.txt"]
        assert [info.path for info in api.get_paths_info("org/sae", ["layer 4", "config.json", "none"])] == [
            "layer 4",
            "config.json",
        ]
        assert api.list_repo_refs("org/sae").branches[0].target_commit == api.model_info("org/sae").sha


def test_what_is_not_there(model: Path, tmp_path: Path) -> None:
    requests: list[str] = []
    with serve_hub({"models": {"org/sae": model}}, requests) as url:
        for error, repo, file, revision in [
            (EntryNotFoundError, "org/sae", "none.bin", "main"),
            (RepositoryNotFoundError, "org/none", "config.json", "main"),
            (RevisionNotFoundError, "org/sae", "config.json", "v2"),
        ]:
            with pytest.raises(error):
                hf_hub_download(repo, file, revision=revision, endpoint=url, cache_dir=tmp_path / "cache")
    assert requests[0] == "HEAD /org/sae/resolve/main/none.bin"


def test_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="spaces"), serve_hub({"spaces": {"org/name": tmp_path}}):
        pass
