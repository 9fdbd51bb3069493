"""Prompts run with SAEs in place, latents searched and ablated."""

from __future__ import annotations

import types

import pytest
import torch

from sae_research.analysis.attribute import ablate
from sae_research.analysis.context import AnalysisContext
from sae_research.analysis.prompt import (
    promoted_tokens,
    run_prompt,
    run_with_saes,
    search_by_promoted,
    search_by_prompt,
    top_latents,
    zeroed,
)
from sae_research.lm import LanguageModel
from sae_research.runtime.errors import UserError
from tests.helpers.analysis import EARLY, LATE, biased
from tests.helpers.random_saes import make_sae

PROMPT = "the time that people use water before your long little day"


def test_the_error_term_makes_the_run_exact(two: AnalysisContext) -> None:
    tokens = two.tokens(PROMPT)
    plain = two.lm.logits(tokens)
    exact = run_with_saes(two, tokens)
    torch.testing.assert_close(exact.logits, plain, atol=1e-4, rtol=1e-4)
    alone = run_with_saes(two, tokens, error_term=False)
    assert (alone.logits - plain).abs().max() > 0.1
    for name, hook in (("early", EARLY), ("late", LATE)):
        seen = exact.saes[name]
        torch.testing.assert_close(seen.input, two.lm.activations(tokens, hook), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            seen.reconstruction + seen.error,
            torch.where(seen.mask[..., None], seen.input, seen.reconstruction),
            atol=1e-4,
            rtol=1e-4,
        )
        assert not seen.mask[0, 0] and seen.post[0, 0].abs().sum() == 0, "position 0 does not count"
        torch.testing.assert_close(alone.saes[name].output[0, 0], alone.saes[name].input[0, 0])
        kept = alone.saes[name].mask
        torch.testing.assert_close(alone.saes[name].output[kept], two.saes[name].decode(alone.saes[name].post)[kept])
    relu = torch.where(exact.saes["late"].mask[..., None], exact.saes["late"].pre.relu(), 0)
    torch.testing.assert_close(relu, exact.saes["late"].post)


def test_an_ablated_latent_leaves_with_its_direction_alone(analysis: AnalysisContext) -> None:
    tokens = analysis.tokens(PROMPT)
    x = analysis.lm.activations(tokens, LATE)
    sae, z = analysis.saes["late"], run_with_saes(analysis, tokens).saes["late"].post
    latent = int(z[0].sum(0).argmax())
    by_hand = x - z[..., latent, None] * sae.W_dec[latent]
    run = run_with_saes(analysis, tokens, edits={"late": zeroed([latent])})
    torch.testing.assert_close(run.logits, analysis.lm.resume(LATE, by_hand, tokens), atol=1e-4, rtol=1e-4)
    at_one = x.clone()
    at_one[:, 3] -= z[:, 3, latent, None] * sae.W_dec[latent]
    run = run_with_saes(analysis, tokens, edits={"late": zeroed([latent], [3])})
    torch.testing.assert_close(run.logits, analysis.lm.resume(LATE, at_one, tokens), atol=1e-4, rtol=1e-4)


def test_run_prompt_and_top_latents(two: AnalysisContext) -> None:
    found = run_prompt(two, PROMPT, n_tokens=4)
    assert found.kl["plain"] == 0 and found.kl["error_term"] < 1e-5 < found.kl["reconstruction"]
    plain = two.lm.logits(two.tokens(PROMPT))[0, -1].softmax(-1)
    first = found.next_tokens[0]
    assert first.rank["plain"] == 0 and first.probability["plain"] == pytest.approx(float(plain.max()), rel=1e-5)
    assert {row.rank["reconstruction"] for row in found.next_tokens} >= {0, 1, 2, 3}
    rows = top_latents(two, "late", found.saes["late"], found.tokens, k=3)
    z = found.saes["late"].post[0]
    for row in rows:
        assert row.activation == pytest.approx(float(z[row.position, row.latent]))
        assert row.token == found.tokens[row.position]
        assert row.share_of_max is None, "no statistics were collected"
    assert {row.latent for row in rows if row.position == 4} == set(z[4].topk(3).indices.tolist())
    assert run_prompt(two, PROMPT, first.token).answer.rank["plain"] == 0


def test_search(analysis: AnalysisContext) -> None:
    found = search_by_prompt(analysis, PROMPT, 5)
    assert [round(row.score, 6) for row in found] == sorted((round(row.score, 6) for row in found), reverse=True)
    stats, z = analysis.stats("late"), run_with_saes(analysis, analysis.tokens(PROMPT)).saes["late"].post[0]
    best = found[0]
    assert best.score == pytest.approx(float(z[:, best.latent].max()) / stats.max[best.latent], rel=1e-4)
    sae = analysis.saes["late"]
    row = promoted_tokens(analysis, sae, [7], 3)[0]
    norm = analysis.lm.model.model.norm.weight
    logits = (sae.W_dec[7] * norm) @ analysis.lm.model.get_output_embeddings().weight.T
    assert [t for t, _ in row.raised] == [analysis.lm.tokenizer.decode([i]) for i in logits.topk(3).indices.tolist()]
    assert [t for t, _ in row.lowered] == [analysis.lm.tokenizer.decode([i]) for i in (-logits).topk(3).indices.tolist()]
    token = analysis.lm.tokenizer.decode([70])
    all_logits = (sae.W_dec * norm) @ analysis.lm.model.get_output_embeddings().weight.T
    scores = ((all_logits - all_logits.mean(1, keepdim=True)) / all_logits.std(1, keepdim=True))[:, 70]
    assert [row.latent for row in search_by_promoted(analysis, [token], 4)] == scores.topk(4).indices.tolist()


def test_statistics_of_several_hooks(two: AnalysisContext) -> None:
    """One pass of the model serves one hook; an analysis asks for each hook's in turn."""
    for name, hook in (("early", EARLY), ("late", LATE)):
        assert two.stats(name).about["hook"] == hook and two.stats(name).count.sum() > 0
    rows = top_latents(two, "late", run_prompt(two, PROMPT).saes["late"], ["x"] * len(two.tokens(PROMPT)[0]), 1)
    assert all(0 < row.share_of_max for row in rows)


def test_ablation_rows(analysis: AnalysisContext) -> None:
    z = run_with_saes(analysis, analysis.tokens(PROMPT)).saes["late"].post[0]
    strong = z.sum(0).topk(2).indices.tolist()
    rows = {row.run: row for row in ablate(analysis, PROMPT, strong)}
    plain, whole = rows["plain"], rows["with error term"]
    assert plain.answer_rank == 0 and whole.kl < 1e-5 and abs(whole.answer_logit_change) < 1e-3
    one = rows[f"with error term - latent {strong[0]}"]
    assert one.kl > 1e-4 and one.answer_logit - whole.answer_logit == pytest.approx(one.answer_logit_change, abs=1e-3)
    assert f"reconstruction alone - latents {strong[0]}, {strong[1]}" in rows
    silent = int((z.abs().sum(0) == 0).nonzero()[0])
    assert ablate(analysis, PROMPT, [silent])[2].kl < 1e-6, "a silent latent's absence changes nothing"


def test_foreign_objects(lm: LanguageModel, analysis: AnalysisContext) -> None:
    ours = biased("standard")
    theirs = types.SimpleNamespace(encode=lambda x: ours.encode(x), decode=lambda z: ours.decode(z))
    other = AnalysisContext.of({"theirs": theirs}, lm, analysis.params, LATE)
    tokens = analysis.tokens(PROMPT)
    torch.testing.assert_close(run_with_saes(other, tokens, False).logits, run_with_saes(analysis, tokens, False).logits)
    assert other.saes["theirs"].causal and other.saes["theirs"].per_token and not other.saes["theirs"].signed
    backwards = types.SimpleNamespace(encode=lambda x: ours.encode(x) + x.mean((1, 2), keepdim=True), decode=ours.decode)
    assert not AnalysisContext.of({"it": backwards}, lm, analysis.params, LATE).saes["it"].causal
    assert other.stats("theirs").count.tolist() == analysis.stats("late").count.tolist()


def test_bad_input_is_one_clear_line(lm: LanguageModel, analysis: AnalysisContext, two: AnalysisContext) -> None:
    cases = [
        (lambda: analysis.tokens(""), "the prompt is empty"),
        (lambda: analysis.token("time water"), "is not one token of"),
        (lambda: ablate(analysis, PROMPT, [64]), "latent 64: the SAE has latents 0 to 63"),
        (lambda: ablate(analysis, PROMPT, [1], positions=[99]), "position 99: the prompt has positions 0"),
        (lambda: ablate(two, PROMPT, [1]), "one SAE at a time"),
        (
            lambda: AnalysisContext.of({"a": biased("standard"), "b": biased("topk")}, lm).one_hook_each(),
            "a and b both replace",
        ),
        (lambda: AnalysisContext.of({"gpt": make_sae("standard", model_name="gpt2")}, lm), "was trained on gpt2"),
        (lambda: AnalysisContext.of({"wide": make_sae("standard", model_name="tiny")}, lm), "reads 12 dimensions"),
        (lambda: AnalysisContext.of({"no": object()}, lm), "has no encode and decode"),
        (lambda: AnalysisContext.open(["nowhere"]), "no such folder, nor a name in downloaded_saes/"),
        (lambda: AnalysisContext.open(["sae_lens:gpt2"]), "sae_lens:RELEASE:ID"),
        (lambda: search_by_promoted(analysis, []), "name at least one token"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message) as refusal:
            call()
        assert "\n" not in str(refusal.value)
