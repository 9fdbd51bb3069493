"""Steering: the edits by hand, verified at every token, matched seeds, and Neuronpedia behind a loopback server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_research.analysis.context import AnalysisContext
from sae_research.analysis.neuronpedia import Neuronpedia, neuronpedia_iframe, quick_list
from sae_research.analysis.steer import Edit, Sample, as_rows, rate_interval, steer
from sae_research.cli.main import main
from sae_research.lm import LanguageModel
from sae_research.lm.generate import choose, sample
from sae_research.runtime.errors import UserError
from sae_research.saes import SparseAutoencoder
from sae_research.saes.forms import StandardSAE
from sae_research.saes.pursuit.encoders import IHTPSAE
from sae_research.stats.predictions import CleanPredictions
from sae_research.text.tokens import token_contexts
from tests.helpers.analysis import LATE, biased
from tests.helpers.tiny_saes import D_SAE, tiny_sae

PROMPT = "the time that people use water"
LATENT = 60


class LooksBack(StandardSAE):
    """Causal, but a token's latents depend on the tokens before it."""

    form = "looks_back"
    per_token = False

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().encode(x.cumsum(1), mask)


def expected(sae: SparseAutoencoder, x: Tensor, method: str, amount: float, mask: Tensor) -> Tensor:
    d, z = sae.W_dec[LATENT], sae.encode(x, mask)[..., LATENT]
    change = {
        "add": amount * d.expand_as(x),
        "clamp": (amount - z)[..., None] * d,
        "project": amount * d - ((x @ d) / (d @ d))[..., None] * d,
    }[method]
    return x + change * mask[..., None]


@pytest.mark.parametrize("method", ["add", "clamp", "project"])
@pytest.mark.parametrize("looks_back", [False, True])
def test_every_generated_token_was_edited(
    lm: LanguageModel, analysis: AnalysisContext, method: str, looks_back: bool
) -> None:
    """Sampling step by step from a cache equals one whole run of the text with the edit at every token."""
    sae = analysis.saes["late"]
    if looks_back:
        sae = LooksBack(sae.cfg.replace(form="looks_back"), **sae.tensors())
    tokens = analysis.tokens(PROMPT)
    mask = analysis.mask(tokens, lm.activations(tokens, LATE))
    edit = Edit(sae, LATENT, method, 30.0, mask)
    ids = sample(lm, tokens, 9, [0, 1], temperature=0, edits={LATE: edit})
    assert edit.edited == 2 * (int(mask.sum()) + 8)
    whole = torch.cat([tokens, ids[:1, :-1]], dim=1)
    long_mask = torch.cat([mask, torch.ones(1, 8, dtype=torch.bool)], 1)
    logits = lm.patched_logits(whole, LATE, lambda x: expected(sae, x, method, 30.0, long_mask))
    assert logits[0, -9:].argmax(-1).tolist() == ids[0].tolist() == ids[1].tolist()
    assert ids[0].tolist() != sample(lm, tokens, 9, [0], temperature=0)[0].tolist(), "the edit changes the text"


def test_a_hook_that_never_fires_is_an_error(lm: LanguageModel, analysis: AnalysisContext) -> None:
    whole = lm.layers
    lm.model.model.layers = torch.nn.ModuleList([whole[0], whole[2]])
    try:
        with pytest.raises(UserError, match="fired 0 times in one pass"):
            sample(lm, analysis.tokens(PROMPT), 2, [0], edits={LATE: lambda x: x})
    finally:
        lm.model.model.layers = whole


def test_steering_report(analysis: AnalysisContext) -> None:
    found = steer(analysis, PROMPT, LATENT, [0.0, 5.0], "add", seeds=[3, 4], n_tokens=12, neutral_tokens=100)
    plain, none, strong = found.strengths
    assert found.maximum == pytest.approx(float(analysis.stats("late").max[LATENT]))
    assert [s.text for s in none.samples] == [s.text for s in plain.samples], "equal seeds meet equal noise"
    assert (none.moved, none.moved_back, plain.moved) == (0, 0, None) and none.kl == pytest.approx(0, abs=1e-6)
    assert strong.kl > 1e-3 and strong.edits == none.edits > 0 == plain.edits
    assert strong.latent_moved == 1 and none.latent_moved == 0, "five times the maximum shows in the texts"
    assert len(found.targets) == 10 and strong.amount == pytest.approx(5 * found.maximum)
    assert strong.target_rate == pytest.approx(
        sum(s.target_tokens for s in strong.samples) / sum(s.tokens for s in strong.samples)
    )
    assert all("samples" not in row for row in as_rows(found))
    assert strong.target_low is None, "two seeds do not say how they vary"
    # the cost by hand
    lm, sae = analysis.lm, analysis.saes["late"]
    tokens = token_contexts(lm.tokenizer, lm.separator_id, analysis.params.text, "core_eval", 100).tokens
    x = lm.activations(tokens, LATE)
    mask = analysis.mask(tokens, x)
    ce, kl = CleanPredictions(lm.logits(tokens), tokens).compare(
        lm.resume(LATE, expected(sae, x, "add", strong.amount, mask), tokens)
    )
    assert strong.kl == pytest.approx(float(kl[mask].mean()), rel=1e-3)
    clean = CleanPredictions(lm.logits(tokens), tokens).ce
    assert strong.ce_change == pytest.approx(float((ce - clean)[mask[:, :-1]].mean()), rel=1e-3)


def test_the_interval_of_a_target_rate_is_over_seeds() -> None:
    samples = [Sample(seed, "", hits, 20, 0.0) for seed, hits in enumerate([4, 2, 5, 3, 4, 2, 6, 3])]
    low, high = rate_interval(samples)
    rates = np.array([s.target_tokens / 20 for s in samples])
    error = rates.std(ddof=1) / np.sqrt(len(rates))
    assert low < rates.mean() - 1.5 * error and high > rates.mean() + 1.5 * error
    assert low > rates.mean() - 5 * error and high < rates.mean() + 5 * error
    assert rate_interval([s._replace(target_tokens=0) for s in samples]) == (0, 0)


def test_nucleus_sampling() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]]))
    drawn = [int(choose(logits, torch.tensor([u]), 1.0, 0.9)) for u in torch.linspace(0.001, 0.999, 950)]
    assert 3 not in drawn and drawn.count(0) / 950 == pytest.approx(0.5 / 0.95, abs=0.01)
    assert int(choose(logits, torch.tensor([0.99]), 0.0, 0.9)) == 0
    assert int(choose(logits, torch.tensor([0.99]), 1.0, 0.01)) == 0


def test_refusals(lm: LanguageModel, analysis: AnalysisContext) -> None:
    base = tiny_sae("standard")
    iht = IHTPSAE(base.W_dec, base.b_dec, 3, base.cfg.replace(form="ihtp", base="standard", options={"k": 3}))
    with pytest.raises(UserError, match="cannot steer: its encoder is not causal.*steer with the dictionary it reads, st"):
        steer(AnalysisContext.of({"standard_ihtp_k3": iht}, lm, analysis.params), PROMPT, 1)
    with pytest.raises(UserError, match="latent 64"):
        steer(analysis, PROMPT, D_SAE)
    dead = AnalysisContext.of({"dead": biased("standard", shift=1e5)}, lm, analysis.params)
    with pytest.raises(UserError, match="fired on none of"):
        steer(dead, PROMPT, 0)
    with pytest.raises(UserError, match="choose one of add, clamp, project"):
        steer(analysis, PROMPT, LATENT, method="shove")
    with pytest.raises(UserError, match="prompt is empty"):
        steer(analysis, "", LATENT)


# --- Neuronpedia -------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict]]]:
    """A loopback server that speaks as much of Neuronpedia's interface as is used here."""
    asked: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.path == "/api/feature/gpt2-small/7-res-jb/5"
            self._answer(
                200,
                {
                    "maxActApprox": 40.0,
                    "frac_nonzero": 0.01,
                    "pos_str": [" Friday"],
                    "explanations": [{"description": "days"}],
                }
                if known
                else None,
            )

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({**body, "key": self.headers.get("x-api-key")})
            if self.path.startswith("/api/explanation/search"):
                layers = ["7-res-jb", "8-res-jb"] if self.path.endswith("-model") else body["layers"]
                known = [
                    {
                        "modelId": body["modelId"],
                        "layer": layers[i % len(layers)],
                        "index": str(i),
                        "description": f"days {i}",
                        "cosine_similarity": 1 - i / 100,
                    }
                    for i in range(45)
                ]
                empty = body["query"] == "nothing"
                return self._answer(200, {"results": [] if empty else known[body["offset"] : body["offset"] + 20]})
            if body["prompt"] == "limit":
                return self._answer(429, {"message": f"slow down {self.headers.get('x-api-key')}"})
            return self._answer(200, {"DEFAULT": body["prompt"] + " a", "STEERED": body["prompt"] + " Friday"})

        def _answer(self, status: int, value: object) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}", asked
    http.shutdown()
    http.server_close()


def test_search_reads_page_after_page(server: tuple[str, list[dict]], monkeypatch: pytest.MonkeyPatch) -> None:
    url, asked = server
    monkeypatch.setenv("NEURONPEDIA_API_KEY", "secret-key")
    there = Neuronpedia("gpt2-small/7-res-jb", url)
    found = there.search("days of the week", 50)
    assert [one.latent for one in found] == list(range(45)) and {one.source for one in found} == {"gpt2-small/7-res-jb"}
    assert found[3] == ("gpt2-small/7-res-jb", 3, "days 3", 0.97)
    assert [body["offset"] for body in asked] == [0, 20, 40, 45]
    assert asked[0] == {
        "modelId": "gpt2-small",
        "layers": ["7-res-jb"],
        "query": "days of the week",
        "offset": 0,
        "key": "secret-key",
    }
    everywhere = there.search("days of the week", 3, whole_model=True)
    assert [one.source for one in everywhere] == [f"gpt2-small/{layer}-res-jb" for layer in (7, 8, 7)]
    assert there.search("nothing") == []
    with pytest.raises(UserError, match="at least 3 characters"):
        there.search("ab ")
    with pytest.raises(UserError, match=r"cannot be reached \([^;]*$"):
        Neuronpedia("gpt2-small/7-res-jb", "http://127.0.0.1:9", timeout=2).search("days")


def test_pages_and_lists() -> None:
    address = urlsplit(quick_list("gpt2-small/7-res-jb", [5, 17], "days & weeks"))
    asked = parse_qs(address.query)
    assert (address.netloc, address.path) == ("www.neuronpedia.org", "/quick-list/") and asked["name"] == ["days & weeks"]
    assert json.loads(asked["features"][0]) == [
        {"modelId": "gpt2-small", "layer": "7-res-jb", "index": str(latent)} for latent in (5, 17)
    ]
    frame = neuronpedia_iframe("gpt2-small/7-res-jb", 5, height=300)
    assert 'src="https://www.neuronpedia.org/gpt2-small/7-res-jb/5?embed=true&' in frame._repr_html_()
    assert 'height="300"' in frame._repr_html_()
    with pytest.raises(UserError, match="at least one latent"):
        quick_list("gpt2-small/7-res-jb", [])
    with pytest.raises(UserError, match="MODEL/SOURCE"):
        quick_list("gpt2-small", [1])


def test_the_verb(server: tuple[str, list[dict]], capsys: pytest.CaptureFixture[str]) -> None:
    url, _ = server
    verb = ["analyze", "neuronpedia", "--source", "gpt2-small/7-res-jb"]
    assert main([*verb, "--search", "weekdays", "--limit", "2", "--latents", "4", "--base-url", url]) == 0
    said = capsys.readouterr().out
    assert "days 1" in said and "days 2" not in said and said.count("https://www.neuronpedia.org/gpt2-small/7-res-jb/") == 3
    assert "list: https://www.neuronpedia.org/quick-list/" in said
    with pytest.raises(UserError, match="give --search TEXT or --latents"):
        main(verb)
    with pytest.raises(UserError, match="pages are of releases"):
        main(["analyze", "neuronpedia", "--sae", "standard", "--latents", "1"])


def test_neuronpedia(server: tuple[str, list[dict]], monkeypatch: pytest.MonkeyPatch) -> None:
    url, asked = server
    monkeypatch.setenv("NEURONPEDIA_API_KEY", "secret-key")
    there = Neuronpedia("gpt2-small/7-res-jb", url)
    feature = there.feature(5)
    assert feature == (40.0, 0.01, [" Friday"], ["days"])
    found = there.steer("Today is", 5, 0.5, feature.maximum, seed=7, n_tokens=8)
    assert (found.default, found.steered, found.amount) == ("Today is a", "Today is Friday", 20.0)
    assert asked[0] == {
        "prompt": "Today is",
        "modelId": "gpt2-small",
        "temperature": 0.7,
        "n_tokens": 8,
        "freq_penalty": 0.0,
        "seed": 7,
        "strength_multiplier": 1,
        "key": "secret-key",
        "features": [{"modelId": "gpt2-small", "layer": "7-res-jb", "index": 5, "strength": 20.0}],
    }
    with pytest.raises(UserError, match="no latent 6 of gpt2-small/7-res-jb"):
        there.feature(6)
    with pytest.raises(UserError, match=r"HTTP 429.*slow down \*\*\*.*hourly limit") as refusal:
        there.steer("limit", 5, 0.5, 40.0)
    assert "secret-key" not in str(refusal.value)
    with pytest.raises(UserError, match="allows 300 strength times maximum, asked for 400"):
        there.steer("Today", 5, 10, 40.0)
    with pytest.raises(UserError, match="MODEL/SOURCE"):
        Neuronpedia("gpt2-small", url)
    with pytest.raises(UserError, match="cannot be reached"):
        Neuronpedia("gpt2-small/7-res-jb", "http://127.0.0.1:9", timeout=2).feature(5)
