"""Plain generation: the draws of transformers' own filters, and every token of the text read through the SAEs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from sae_research.analysis.context import AnalysisContext
from sae_research.analysis.generate import generate
from sae_research.lm import LanguageModel
from sae_research.lm.generate import choose
from sae_research.runtime.errors import UserError
from sae_research.saes.forms import StandardSAE
from sae_research.saes.pursuit.encoders import IHTPSAE
from tests.helpers.analysis import EARLY, LATE, biased
from tests.helpers.tiny_saes import tiny_sae

PROMPT = "the time that people use water"


class Sums(StandardSAE):
    """Causal, but a token's latents depend on the tokens before it."""

    form = "sums"
    per_token = False

    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().encode(x.cumsum(1), mask)


@pytest.mark.parametrize(("top_k", "top_p", "temperature"), [(5, 1.0, 1.0), (None, 0.8, 0.7), (6, 0.7, 1.3)])
def test_draws_have_the_probabilities_of_transformers(top_k: int | None, top_p: float, temperature: float) -> None:
    logits = 2 * torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    scores = scores if top_k is None else TopKLogitsWarper(top_k)(None, scores)
    expected = (scores if top_p == 1.0 else TopPLogitsWarper(top_p)(None, scores)).softmax(-1)[0]
    n = 4000
    noise = (torch.arange(n) + 0.5) / n
    drawn = choose(logits.expand(n, -1), noise, temperature, top_p, top_k).bincount(minlength=12) / n
    torch.testing.assert_close(drawn, expected, rtol=0, atol=2 / n)


@pytest.mark.parametrize("looks_back", [False, True])
def test_every_token_is_read_through_the_saes(
    two: AnalysisContext, lm: LanguageModel, looks_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The likeliest tokens, one by one from a cache, against whole runs of each prefix with plain products in place."""
    late = two.saes["late"]
    if looks_back:
        two.saes["late"] = late = Sums(late.cfg.replace(form="sums"), **late.tensors())
    tokens = two.tokens(PROMPT)
    kept: dict[str, Tensor] = {}

    def through(hook: str, sae: StandardSAE) -> object:
        def edit(x: Tensor) -> Tensor:
            if hook not in kept:
                kept[hook] = two.mask(tokens, x)
            mask = torch.cat([kept[hook], torch.ones(1, x.shape[1] - tokens.shape[1], dtype=torch.bool)], 1)
            return torch.where(mask[..., None], sae.encode(x, mask) @ sae.W_dec + sae.b_dec, x)

        return edit

    expected = tokens
    for _ in range(6):
        logits = lm.edited_logits(expected, {hook: through(hook, two.one_hook_each()[hook]) for hook in (EARLY, LATE)})
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    (found,) = generate(two, PROMPT, 6, [0], temperature=0)
    assert found.with_saes == lm.tokenizer.decode(expected[0, tokens.shape[1] :])
    plain = lm.model.generate(tokens, max_new_tokens=6, do_sample=False)[0, tokens.shape[1] :]
    assert found.plain == lm.tokenizer.decode(plain)
    same = [int(a) == int(b) for a, b in zip(plain, expected[0, tokens.shape[1] :], strict=False)]
    assert found.agree == (same.index(False) if False in same else len(same))


def test_seeds_repeat_and_differ(analysis: AnalysisContext) -> None:
    first = generate(analysis, PROMPT, 8, [1, 2], 1.5)
    assert generate(analysis, PROMPT, 8, [1, 2], 1.5) == first and generate(analysis, PROMPT, 8, [2], 1.5) == first[1:]
    assert first[0].plain != first[1].plain


def test_without_saes(analysis: AnalysisContext) -> None:
    alone = AnalysisContext(analysis.lm, {}, analysis.params)
    (text,) = generate(alone, PROMPT, 4, [1])
    assert text.with_saes is None and text.agree is None and text.plain == generate(analysis, PROMPT, 4, [1])[0].plain


def test_refusals(lm: LanguageModel, analysis: AnalysisContext) -> None:
    for own, said in (
        ({"temperature": -1}, "temperature -1 is negative"),
        ({"top_k": 0}, "leaves no token"),
        ({"top_p": 0}, "top_p 0 is not above 0"),
        ({"n_tokens": 0}, "length must be"),
        ({"seeds": []}, "one seed"),
    ):
        with pytest.raises(UserError, match=said):
            generate(analysis, PROMPT, **own)
    base = tiny_sae("standard")
    iht = IHTPSAE(base.W_dec, base.b_dec, 3, base.cfg.replace(form="ihtp", base="standard", options={"k": 3}))
    with pytest.raises(UserError, match="cannot generate: its encoder is not causal"):
        generate(AnalysisContext.of({"iht": iht}, lm, analysis.params), PROMPT)
    twice = AnalysisContext.of({"a": biased("standard"), "b": biased("standard", seed=1)}, lm, analysis.params)
    with pytest.raises(UserError, match="both replace"):
        generate(twice, PROMPT)
