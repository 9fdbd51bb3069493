"""Uploads with the real `huggingface_hub` client to the loopback hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sae_research.runtime.endpoints import redacted, secret
from sae_research.runtime.errors import UserError
from sae_research.saes import load_sae, save_sae
from sae_research.saes.exchange import card, upload
from tests.helpers.hub_server import Uploads, hub_env, serve_hub
from tests.helpers.random_saes import make_sae, random_activations

TOKEN = "hf_" + "loopback" * 4
UPLOADS = """
import json, os, sys, time
time.sleep = lambda seconds: None  # the client's patience with a failing hub is not under test
from huggingface_hub import close_session
from sae_research.__main__ import command
for line in sys.stdin:
    close_session()  # no connection may outlive the server
    os.environ["HF_TOKEN"], *sys.argv[1:] = json.loads(line)
    try:
        command()
    except SystemExit as ended:
        print(ended.code, file=sys.__stderr__, flush=True)
        print("ended", flush=True)
"""
"""Uploads one after another in one process, which imports torch once."""


@pytest.fixture
def trained(in_project: Path) -> Path:
    """Two SAEs, one with figures; a hidden file that must stay behind."""
    folder = in_project / "trained_saes"
    for form in ("standard", "topk"):
        save_sae(make_sae(form), folder / form)
    (folder / "topk" / "eval_results.json").write_text(json.dumps({"l0": 5.0, "loss_recovered": 0.9}))
    (folder / ".secret").write_text("not for others")
    return folder


def client_env(url: str, home: Path) -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | hub_env(url, home / "hf")


def run_upload(url: str, home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sae_research", "upload", *arguments],
        env=client_env(url, home) | {"HF_TOKEN": TOKEN},
        capture_output=True,
        text=True,
        check=False,
    )


class Uploader:
    """One process that uploads whenever it is told to."""

    def __init__(self, url: str, home: Path) -> None:
        self.errors = home / "stderr.txt"
        with self.errors.open("w") as stderr:
            self.process = subprocess.Popen(
                [sys.executable, "-c", UPLOADS],
                env=client_env(url, home),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )

    def upload(self, *arguments: str, token: str = TOKEN) -> tuple[int, str]:
        """The exit code, and what was written to stderr."""
        before = self.errors.stat().st_size
        self.process.stdin.write(json.dumps([token, "upload", *arguments]) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "ended\n", self.errors.read_text()
        *lines, code = self.errors.read_text()[before:].splitlines(keepends=True)
        return int(code), "".join(lines)

    def close(self) -> None:
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0


def test_everything_arrives_and_can_be_read_back(trained: Path, tmp_path: Path) -> None:
    requests: list[str] = []
    hub = Uploads(tmp_path / "hub", TOKEN)
    with serve_hub({"models": {}}, requests, hub) as url:
        done = run_upload(url, tmp_path, str(trained), "--hf_repo_id", "org/saes")
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip().endswith("/org/saes/commit/" + done.stdout.strip()[-40:])
        assert TOKEN not in done.stdout + done.stderr
        arrived = tmp_path / "hub" / "org" / "saes"
        names = sorted(path.relative_to(arrived).as_posix() for path in arrived.rglob("*") if path.is_file())
        assert names == [
            "README.md",
            "trained_saes/standard/cfg.json",
            "trained_saes/standard/sae_weights.safetensors",
            "trained_saes/topk/cfg.json",
            "trained_saes/topk/eval_results.json",
            "trained_saes/topk/sae_weights.safetensors",
        ]
        assert (
            load_sae(arrived / "trained_saes" / "topk").encode(random_activations())
            == make_sae("topk").encode(random_activations())
        ).all()
        assert any("/lfs/" in line for line in requests) and sum("/commit/" in line for line in requests) == 1
        (arrived / "README.md").write_text("mine")
        again = run_upload(url, tmp_path, str(trained / "topk"), "--hf_repo_id", "org/saes")
        assert again.returncode == 0 and (arrived / "README.md").read_text() == "mine"
        assert (arrived / "topk" / "cfg.json").is_file()


@pytest.mark.slow
def test_sae_lens_reads_what_was_uploaded(trained: Path, tmp_path: Path) -> None:
    """As the card says. The library takes many seconds to import."""
    code = (
        "from sae_lens import SAE; sae = SAE.from_pretrained('org/saes', 'trained_saes/topk'); "
        "print(sae.cfg.architecture(), sae.cfg.k)"
    )
    with serve_hub({"models": {}}, None, Uploads(tmp_path / "hub", TOKEN)) as url:
        assert run_upload(url, tmp_path, str(trained), "--hf_repo_id", "org/saes").returncode == 0
        read = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env=os.environ | hub_env(url, tmp_path / "hf"),
            capture_output=True,
            text=True,
            check=False,
        )
    assert read.stdout.split() == ["topk", "5"], read.stderr


def test_refusals_are_one_line_and_leave_nothing(trained: Path, tmp_path: Path) -> None:
    hub = Uploads(tmp_path / "hub", TOKEN)
    with serve_hub({"models": {}}, None, hub) as url:
        client = Uploader(url, tmp_path)
        code, line = client.upload(str(trained), "--hf_repo_id", "org/saes", token="hf_wrong")
        assert code == 1 and line.count("\n") == 1 and "does not accept the token" in line
        hub.failing = {"commit"}
        code, line = client.upload(str(trained), "--hf_repo_id", "org/saes")
        assert code == 1 and line.startswith("error: org/saes: ")
        assert TOKEN not in line and "Traceback" not in line
    code, line = client.upload(str(trained), "--hf_repo_id", "org/saes")  # nobody listens there any more
    assert code == 1 and "the upload failed" in line and line.count("\n") == 1
    client.close()
    assert not [path for path in (tmp_path / "hub").rglob("*") if path.is_file()]


def test_what_is_missing_is_said_before_anything_is_sent(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ACCESS_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="set HF_TOKEN in the environment or in .env"):
        upload([trained], "org/saes")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        upload([Path("nowhere")], "org/saes")
    Path("empty").mkdir()
    with pytest.raises(UserError, match="empty: holds no files"):
        upload([Path("empty")], "org/saes")


def test_secrets(in_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SOME_KEY", raising=False)
    assert secret("SOME_KEY") is None
    (in_project / ".env").write_text("# keys\nSOME_KEY='from file'\n")
    assert secret("OTHER_KEY", "SOME_KEY") == "from file"
    monkeypatch.setenv("SOME_KEY", "from environment")
    assert secret("SOME_KEY") == "from environment"
    assert redacted("sent abc to abc", "abc", None) == "sent *** to ***"


def test_the_card_lists_what_is_there(trained: Path) -> None:
    text = card(
        {f"saes/{path.relative_to(trained).as_posix()}": path for path in trained.rglob("*") if path.is_file()}, "org/saes"
    )
    assert "| `saes/topk` | 5.000 | – | 0.900 | – |" in text and 'SAE.from_pretrained("org/saes", "saes/standard")' in text
