"""Where keys may go: which addresses are this machine, that no request with a key follows a redirect, and what is said."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sae_research.analysis.neuronpedia import Neuronpedia
from sae_research.config.evaluation_params import ChatEndpoint
from sae_research.config.params import check_params
from sae_research.evals.autointerp.client import ChatClient, NoAnswer
from sae_research.runtime.endpoints import checked_url, is_loopback, keeps_secrets, one_line, secret
from sae_research.runtime.errors import UserError
from tests.helpers.hub_server import hub_env

KEY = "sk-very-secret-0123456789"
PROJECT = Path(__file__).parents[2]
HERE = ("http://localhost:8000/v1", "http://LOCALHOST", "http://127.0.0.1:1", "http://127.9.8.7", "http://[::1]:8000/v1")
ELSEWHERE = (
    "http://127.evil.com",
    "http://127.0.0.1.evil.com",
    "http://localhost.evil.com",
    "http://evil.com#@127.0.0.1",
    "http://127.0.0.1@evil.com",
    "http://localhost@evil.com",
    "http://evil.com/?localhost",
    "http://2130706433",
    "http://0x7f000001",
    "http://127.1",
    "http://localhost.",
    "http://127.0.0.1.",
    "http://[::1",
    "http://1270.0.0.1",
    "http://notlocalhost",
    "http://[::2]",
    "http://10.0.0.1",
    "http://",
)


@contextmanager
def serve(answer: tuple[int, dict[str, str], bytes]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server on the loopback that answers all alike; its address and the headers of every request."""
    seen: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            seen.append(dict(self.headers))
            status, headers, body = answer
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", seen
    finally:
        server.shutdown()
        server.server_close()


def chat(url: str) -> ChatClient:
    return ChatClient(ChatEndpoint(base_url=url, model="judge", max_retries=0, timeout_seconds=2), "autointerp")


@pytest.fixture(autouse=True)
def keys(in_project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "NEURONPEDIA_API_KEY"):
        monkeypatch.setenv(name, KEY)


@pytest.mark.parametrize("url", HERE)
def test_this_machine(url: str) -> None:
    assert is_loopback(url) and keeps_secrets(url)
    chat(url)
    Neuronpedia("a/b", url)


@pytest.mark.parametrize("url", ELSEWHERE)
def test_what_only_looks_like_this_machine(url: str) -> None:
    with pytest.raises(UserError, match=r"in the clear|must (look like|hold no)"):
        chat(url)
    with pytest.raises(UserError, match=r"in the clear|must (look like|hold no)"):
        Neuronpedia("a/b", url)
    if url != "http://[::1":
        assert not is_loopback(url) and not keeps_secrets(url)


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{KEY}@host/v1",
        f"https://{KEY}@host",
        f"https://host/v1?key={KEY}",
        f"https://host/#{KEY}",
        f"ftp://{KEY}",
        f"https://{KEY * 20}.org/v1",
        f"https://a..b/{KEY}",
        f"http://host:99999/{KEY}",
        KEY,
        "",
    ],
)
def test_bad_addresses_are_not_repeated(url: str) -> None:
    for make in (lambda: chat(url) if url else checked_url(url, "x", "y"), lambda: Neuronpedia("a/b", url)):
        with pytest.raises(UserError, match="must") as refused:
            make()
        assert KEY not in str(refused.value)


def test_an_address_that_is_no_text_is_not_repeated() -> None:
    with pytest.raises(UserError, match="autointerp.base_url: holds the control character") as refused:
        check_params({"autointerp": {"base_url": f"https://host/\x7f{KEY}"}}, "here")
    assert KEY not in str(refused.value)


@pytest.mark.parametrize("proxy", ["socks5://me:hunter2@host:1", "ftp://me:hunter2@host", "http://me:hunter2@host:x"])
def test_a_proxy_of_no_use_is_one_line(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", proxy)
    with pytest.raises(UserError, match="the proxy that https_proxy") as refused:
        chat("https://host.example/v1")
    assert "hunter2" not in str(refused.value)
    chat(HERE[0])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_key_follows_a_redirect(status: int) -> None:
    with serve((200, {}, b"{}")) as (other, stolen), serve((status, {"Location": f"{other}/x"}, b"")) as (url, seen):
        with pytest.raises(UserError, match=f"HTTP {status} .a redirect"):
            Neuronpedia("gpt2-small/7-res-jb", url).feature(1)
        with pytest.raises(NoAnswer, match="a redirect"):
            chat(url).ask([{"role": "user", "content": "a"}], 5)
        assert [headers.get("x-api-key") or headers.get("X-Api-Key") for headers in seen][0] == KEY and stolen == []


def test_the_hubs_token_follows_no_redirect(in_project: Path) -> None:
    (in_project / "saes").mkdir()
    (in_project / "saes/cfg.json").write_text("{}")
    command = [sys.executable, "-m", "sae_research", "upload", "saes", "--hf_repo_id", "org/saes"]

    def run(url: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, **hub_env(url, in_project / "hf"), "HF_TOKEN": KEY, "PYTHONPATH": str(PROJECT)}
        return subprocess.run(command, env=env, capture_output=True, text=True, check=False)

    with serve((200, {}, b"{}")) as (other, stolen), serve((307, {"Location": f"{other}/x"}, b"")) as (url, seen):
        done = run(url)
        assert done.returncode == 1 and "redirect (307)" in done.stderr and done.stderr.count("\n") == 1
        assert seen and stolen == [] and KEY not in done.stderr
    assert "in the clear" in run("http://127.0.0.1.example.invalid").stderr


def test_half_a_key_is_not_shown() -> None:
    """A message that is cut where the key stands."""
    said = "x" * 190 + KEY
    assert "sk-" not in one_line(said, KEY)
    answer = json.dumps({"error": {"message": said}}).encode()
    with serve((400, {}, answer)) as (url, _):
        with pytest.raises(NoAnswer) as refused:
            chat(url).ask([{"role": "user", "content": "a"}], 5)
        assert "sk-" not in str(refused.value)
        with pytest.raises(UserError) as other:
            Neuronpedia("a/b", url).feature(1)
        assert "sk-" not in str(other.value)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[",
        b"[1]",
        b'"x"',
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"maxActApprox": "7"}',
        b'{"maxActApprox": NaN}',
        b'{"maxActApprox": true}',
    ],
)
def test_a_server_that_answers_anything(body: bytes) -> None:
    with serve((200, {}, body)) as (url, _), pytest.raises(UserError, match="not JSON|has no latent"):
        Neuronpedia("a/b", url).feature(1)


def test_odd_parts_of_an_answer_are_left_out() -> None:
    body = json.dumps({"maxActApprox": 2, "frac_nonzero": "x", "pos_str": 5, "explanations": [3, {"description": KEY}]})
    with serve((200, {}, body.encode())) as (url, _):
        assert Neuronpedia("a/b", url).feature(1) == (2.0, None, [], ["***"])


def test_a_file_of_keys_that_is_none(in_project: Path) -> None:
    (in_project / ".env").write_bytes(b"K\xff=1\n")
    with pytest.raises(UserError, match="not UTF-8"):
        secret("NOT_SET_ANYWHERE")


def test_files_of_keys_are_ignored_by_git_and_dvc(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    shutil.copy(PROJECT / ".gitignore", tmp_path)
    for name in (".env", ".env.local", "custom_saes/.env"):
        assert subprocess.run(["git", "check-ignore", "-q", name], cwd=tmp_path, check=False).returncode == 0, name
    assert {".env", ".env.*"} <= set((PROJECT / ".dvcignore").read_text().split())
