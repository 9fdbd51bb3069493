"""The hub path against a loopback hub, in a process of its own: the client reads its endpoint when
imported."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from sae_research.saes import save_sae
from sae_research.saes.formats.dictionary_learning import export_dictionary_learning
from tests.helpers.hub_server import hub_env, serve_hub
from tests.helpers.tiny_saes import tiny_sae

CLIENT = """
import json, sys, time
time.sleep = lambda seconds: None  # the client's patience with a dead hub is not under test
from huggingface_hub import close_session
from sae_research.runtime.errors import UserError
from sae_research.saes.sources import open_sae
for line in sys.stdin:
    close_session()  # no connection may outlive the server
    repo, file = json.loads(line)
    try:
        sae = open_sae(f"hub:{repo}:{file}")
        answer = [sae.cfg.form, sae.cfg.provenance]
    except UserError as error:
        answer = str(error)
    print(json.dumps(answer), flush=True)
"""


class Client:
    """Asks one process for SAEs, one at a time."""

    def __init__(self, url: str, home: Path) -> None:
        env = os.environ | hub_env(url, home) | {"HF_HUB_ETAG_TIMEOUT": "2"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, repo: str, file: str) -> Any:
        self.process.stdin.write(json.dumps([repo, file]) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        self.process.stdin.close()
        assert self.process.wait(timeout=60) == 0


def test_hub(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    export_dictionary_learning(tiny_sae("topk"), repo / "sweep" / "resid_post_layer_1" / "trainer_8")
    save_sae(tiny_sae(), repo / "ours")
    (repo / "broken").mkdir()
    (repo / "broken" / "ae.pt").write_bytes(b"no weights")
    (repo / "broken" / "config.json").write_text((repo / "sweep/resid_post_layer_1/trainer_8/config.json").read_text())
    (repo / "bad").mkdir()
    (repo / "bad" / "cfg.json").write_text('{"architecture": ')
    (repo / "bad" / "sae_weights.safetensors").write_bytes(b"")
    with serve_hub({"models": {"org/sae": repo}}) as url:
        client = Client(url, tmp_path / "home")
        ours = client.ask("org/sae", "ours/sae_weights.safetensors")
        assert ours[0] == "standard"
        form, provenance = client.ask("org/sae", "sweep/resid_post_layer_1/trainer_8/ae.pt")
        assert (form, provenance["repo_id"], len(provenance["revision"])) == ("topk", "org/sae", 40)
        assert "damaged" in client.ask("org/sae", "broken/ae.pt")
        assert client.ask("org/sae", "gone/ae.pt") == ("org/sae/gone/config.json: no such file in the repository org/sae")
        answer = client.ask("org/none", "a/ae.pt")
        assert "no repository 'org/none'" in answer and "baseline_sae.source: trained" in answer
        assert "not valid JSON" in client.ask("org/sae", "bad/sae_weights.safetensors")
        for name in ("../ae.pt", "/etc/ae.pt", "a/../../ae.pt", "a//ae.pt"):
            assert "baseline_sae.filename: " in client.ask("org/sae", name)
        assert "must end with ae.pt, sae_weights.safetensors" in client.ask("org/sae", "weights.bin")
    # the server is gone: what is cached still works, what is not says how to go on without
    assert client.ask("org/sae", "ours/sae_weights.safetensors") == ours
    assert client.ask("org/sae", "new/ae.pt").endswith(
        "the hub cannot be reached and the file is not in its cache; without a hub, set baseline_sae.source: trained"
    )
    # it accepts connections and says nothing: the same, within the client's own limit instead of six minutes
    with socket.socket() as silent:
        silent.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        silent.bind(("127.0.0.1", int(url.rpartition(":")[2])))
        silent.listen(50)
        started = time.monotonic()
        assert client.ask("org/sae", "ours/sae_weights.safetensors") == ours
        assert "the hub cannot be reached" in client.ask("org/sae", "new/ae.pt")
        assert time.monotonic() - started < 30
    client.close()


def test_fits_names() -> None:
    from sae_research.saes.sources import same_model

    assert same_model("pythia-70m-deduped", "EleutherAI/pythia-70m-deduped")
    assert same_model("HuggingFaceTB/SmolLM2-135M-Instruct", "smollm2-135m-instruct")
    assert same_model("gpt2-small", "openai-community/gpt2")
    assert not same_model("pythia-70m", "pythia-70m-deduped")
