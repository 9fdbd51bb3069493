"""Unlearning: which questions count as known, what is clamped, what it does to answers, and what it must not depend on."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sae_research.config.params import Params
from sae_research.evals import unlearning
from sae_research.evals.unlearning import intervention
from sae_research.evals.unlearning.evaluation import load_material
from sae_research.evals.unlearning.intervention import Configuration, Firing, choose_latents, correct_answers, firing
from sae_research.evals.unlearning.prompts import Prompt, find_known, wordings
from sae_research.lm import LanguageModel, load_language_model
from sae_research.lm.activations import HookActivations
from sae_research.runtime.errors import UserError
from sae_research.runtime.stages import StageFolder, read_status, stage_folder
from sae_research.saes import SparseAutoencoder
from sae_research.saes.forms import StandardSAE
from sae_research.saes.pursuit.encoders import MPSAE
from tests.helpers import knowing_model

SAEs = dict[str, SparseAutoencoder]
FORGET, RETAIN = knowing_model.SUBJECTS
HOOK = knowing_model.HOOK


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load_language_model(str(knowing_model.FOLDER), "cpu")


@pytest.fixture(scope="module")
def saes(lm: LanguageModel) -> SAEs:
    return knowing_model.make_saes(lm)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    knowing_model.write_data(folder)
    return folder


@pytest.fixture
def make_params(data: Path, in_project: Path) -> Any:
    def make(batch_size: int = 32, caching: bool = False, **changes: Any) -> Params:
        section = {
            "forget_corpus": f"{data}/{FORGET}-corpus.jsonl",
            "retain_corpus": f"{data}/{RETAIN}-corpus.jsonl",
            "forget_questions": [f"{data}/{FORGET}.jsonl"],
            "retain_questions": [f"{data}/{RETAIN}.jsonl"],
            "dataset_size": 40,
            "seq_len": 24,
            "min_known_questions": 4,
            "retain_thresholds": [0.005, 0.1],
            "n_features_list": [2, 8],
            "multipliers": [1, 5],
            **changes,
        }
        return Params.model_validate(
            {
                "model": {"name": str(knowing_model.FOLDER), "device": "cpu", "llm_batch_size": batch_size},
                "token_mask": {"outlier_norm_multiple": None},
                "activation_caching": {"enabled": caching},
                "unlearning": section,
            }
        )

    return make


def run(saes: SAEs, lm: LanguageModel, params: Params) -> dict[str, Any]:
    return dict(unlearning.evaluate(saes, lm, params, StageFolder(Path("out"))))


def lab(result: dict[str, Any]) -> dict[str, Any]:
    return result["eval_result_unstructured"]["lab_v1"]


def without_latents(block: dict[str, Any]) -> list[dict[str, Any]]:
    return [{key: value for key, value in entry.items() if key != "latents"} for entry in block["configurations"]]


# --- what is known -----------------------------------------------------------------------------


def test_the_model_knows_its_questions_under_every_order(lm: LanguageModel, data: Path) -> None:
    for name in (FORGET, RETAIN):
        questions = wordings(lm, f"{data}/{name}.jsonl", "auto")
        prompts = list(questions[0]())
        assert len(prompts) == 24 and len({prompt.answer for prompt in prompts}) == 4
        # the chat format, and SAE Bench's opening of an answer
        assert prompts[0].tokens.tolist() == lm.tokenizer(next(iter(knowing_model.prompts(name))))["input_ids"]
        known = find_known(lm, name, questions, None, 16)
        assert (known.asked, known.known) == (8, list(range(8)))


def test_a_wrong_key_is_not_known(lm: LanguageModel, tmp_path: Path) -> None:
    rows = knowing_model.rows(FORGET)
    rows[2]["answer"] = (rows[2]["answer"] + 1) % 4  # type: ignore[operator]
    (tmp_path / "wmdp-bio.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    known = find_known(lm, FORGET, wordings(lm, str(tmp_path / "wmdp-bio.jsonl"), "auto"), None, 16)
    assert known.known == [0, 1, 3, 4, 5, 6, 7]


def test_one_wrong_order_is_enough(lm: LanguageModel) -> None:
    """Right in the first wording, wrong in the second: not known, and the third is never asked."""
    right = next(wordings(lm, _one_question_file(), "auto")[0]())
    seen = []

    def words() -> Any:
        for answer in (right.answer, (right.answer + 1) % 4, right.answer):
            seen.append(answer)
            yield right._replace(answer=answer)

    assert find_known(lm, "some", [words, lambda: iter([right])], None, 4).known == [1]
    assert len(seen) == 2


def _one_question_file() -> str:
    path = Path("one.jsonl")
    path.write_text(json.dumps(knowing_model.rows(FORGET)[0]))
    return str(path)


@pytest.fixture(autouse=True)
def _somewhere(in_project: Path) -> None:
    """Every test runs in a folder of its own."""


def test_asking_stops_when_enough_are_known(lm: LanguageModel, data: Path) -> None:
    questions = wordings(lm, f"{data}/{FORGET}.jsonl", "auto")
    known = find_known(lm, FORGET, [*questions, *questions] * 8, 3, 64)
    assert known.known == [0, 1, 2] and known.asked == 64 and len(known.prompts) == 3


def test_prompt_formats(lm: LanguageModel, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{data}/{RETAIN}.jsonl"
    plain = next(wordings(lm, name, "plain")[0]())
    assert lm.tokenizer.decode(plain.tokens).endswith("Answer :") and plain.tokens[0] == lm.separator_id
    monkeypatch.setattr(lm.tokenizer, "chat_template", None)
    assert torch.equal(next(wordings(lm, name, "auto")[0]()).tokens, plain.tokens)
    with pytest.raises(UserError, match="has no chat template; use auto or plain"):
        wordings(lm, name, "chat")


def test_too_few_known_questions_are_no_score(lm: LanguageModel, saes: SAEs, make_params: Any) -> None:
    params = make_params(min_known_questions=9)
    with stage_folder("eval_results/unlearning") as stage:
        assert stage is not None
        list(unlearning.evaluate(saes, lm, params, stage))
    status = read_status(Path("eval_results/unlearning"))
    assert status["status"] == "not_applicable"
    assert "knows 8 of 8 forget questions" in status["message"]
    assert not list(Path("eval_results/unlearning").glob("*_eval_results.json"))


def test_a_corpus_shorter_than_a_context(lm: LanguageModel, make_params: Any, tmp_path: Path) -> None:
    text = "the blood carries oxygen and the heart pumps the blood around"
    (tmp_path / "short.jsonl").write_text(json.dumps({"text": text}))
    with pytest.raises(UserError, match="shorter than one context of 24 tokens"):
        load_material(lm, make_params(forget_corpus=str(tmp_path / "short.jsonl")), StageFolder(Path("out")))


# --- what is clamped ---------------------------------------------------------------------------


def test_choice_of_latents() -> None:
    density = np.array([0.5, 0.2, 0.2, 0.0, 0.3, 0.9])
    forget = Firing(density, np.array([1.0, 1.0, 2.0, 0.0, 1.0, 1.0]))
    retain = Firing(np.array([0.0, 0.0, 0.0, 0.0, 0.01, 0.5]), np.zeros(6))
    assert choose_latents(forget, retain, 0.01, 10) == [0, 2, 1]  # the silent, the equal and the more frequent stay out
    assert choose_latents(forget, retain, 0.011, 10) == [0, 4, 2, 1]
    assert choose_latents(forget, retain, 1.0, 2) == [5, 0]
    assert choose_latents(forget, retain, 0.0, 2) == []


def test_densities_by_hand(lm: LanguageModel, saes: SAEs, make_params: Any) -> None:
    """Ours counts what is not zero inside the mask, SAE Bench what is positive outside special tokens."""
    tokens = load_material(lm, make_params(), StageFolder(Path("out"))).corpora["forget"][:5]
    corpus = HookActivations(lm, HOOK, tokens, make_params())
    found = firing(corpus, {"mpsae": saes["mpsae"]})["mpsae"]
    acts = lm.activations(tokens, HOOK)
    z = saes["mpsae"].encode(acts)
    bench, own = z[tokens != lm.separator_id], z[~torch.isin(tokens, lm.special_ids)]  # an unknown word is special too
    assert (z < 0).any() and len(own) < len(bench)
    assert found["sae_bench"].density == pytest.approx((bench > 0).double().mean(0).numpy())
    assert found["lab"].density == pytest.approx((own != 0).double().mean(0).numpy())
    assert found["lab"].strength == pytest.approx(own.abs().double().mean(0).numpy(), abs=1e-6)


@pytest.mark.parametrize("name", ["standard", "mpsae", "ihtp"])
@pytest.mark.parametrize("definition", ["sae_bench", "lab"])
def test_answers_are_those_of_a_full_run_with_the_edit(
    name: str, definition: str, lm: LanguageModel, saes: SAEs, make_params: Any
) -> None:
    """Against the definition written out: whole model, every prompt alone, nothing skipped, error term kept."""
    prompts, questions = _asked(lm, make_params(batch_size=3))
    plan = [Configuration(0.0, 8, multiplier, tuple(range(8))) for multiplier in (1, 30)]
    plans = {name: {"sae_bench": plan, "lab": plan}}
    got = correct_answers(questions, prompts, {name: saes[name]}, plans)[name][definition]
    for row, configuration in enumerate(plan):
        want = [_answered_rightly(lm, saes[name], prompt, configuration, definition) for prompt in prompts]
        assert got[row].tolist() == want
    assert not got[1].all(), "the edit changed nothing, so nothing was tested"


def _asked(lm: LanguageModel, params: Params) -> tuple[list[Prompt], HookActivations]:
    material = load_material(lm, params, StageFolder(Path("out")))
    prompts = material.prompts()
    return prompts, HookActivations(lm, HOOK, [prompt.tokens for prompt in prompts], params)


def _answered_rightly(
    lm: LanguageModel, sae: SparseAutoencoder, prompt: Prompt, configuration: Configuration, definition: str
) -> bool:
    def edit(x: torch.Tensor) -> torch.Tensor:
        keep = torch.ones(x.shape[:2], dtype=torch.bool)
        if definition == "lab":
            keep[:, 0] = False  # the only special token here, and no norm stands out
        z = sae.encode(x, keep)
        z[:, 0] = 0
        after = z.clone()
        for latent in configuration.latents:
            column = z[..., latent]
            clamped = torch.where(column > 0, -float(configuration.multiplier), column)
            if definition == "lab":
                clamped = torch.where(column < 0, float(configuration.multiplier), clamped)
            after[..., latent] = clamped
        return (x - sae.decode(z)) + sae.decode(after)

    last = lm.patched_logits(prompt.tokens[None], HOOK, edit)[0, -1]
    return int(torch.stack([last[list(ids)].max() for ids in prompt.options]).argmax()) == prompt.answer


def test_no_prompt_is_run_that_nothing_changes(
    lm: LanguageModel, saes: SAEs, make_params: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, questions = _asked(lm, make_params())
    monkeypatch.setattr(lm, "resume", lambda *_: pytest.fail("a prompt without active latents was run"))
    plan = [Configuration(0.0, 4, 50, ())]
    right = correct_answers(questions, prompts, {"topk": saes["topk"]}, {"topk": {"sae_bench": plan, "lab": plan}})
    assert right["topk"]["lab"].all()


# --- whole evaluations -------------------------------------------------------------------------


def test_knowledge_is_removed_and_the_rest_kept(lm: LanguageModel, saes: SAEs, make_params: Any) -> None:
    from sae_bench.evals.unlearning.eval_output import UnlearningEvalOutput

    result = run({"standard": saes["standard"]}, lm, make_params())["standard"]
    UnlearningEvalOutput(**result)
    block = lab(result)
    best = block["configurations"][block["best_configuration"]]
    assert block["metrics"]["unlearning_score"] >= 0.2
    assert block["metrics"]["unlearning_score"] == pytest.approx(1 - best["forget_accuracy"])
    assert best["retain_accuracy"] >= 0.99
    low, high = block["intervals"]["unlearning_score"]
    assert low <= block["metrics"]["unlearning_score"] <= high and low < high
    assert len(block["configurations"]) == 8
    assert {key: list(value.values()) for key, value in block["questions"].items()} == {
        "forget": [{"asked": 8, "known": 8}],
        "retain": [{"asked": 8, "known": 8}],
    }
    assert "stand_in" not in block
    for entry in block["configurations"]:
        assert entry["forget_accuracy"] == pytest.approx(entry["forget_right"].count("1") / 8)


def test_the_stand_in_says_so(lm: LanguageModel, saes: SAEs, make_params: Any) -> None:
    """One packaged part is enough."""
    stage = StageFolder(Path("out"))
    params = make_params(forget_corpus="packaged_biomedical", dataset_size=2)
    result = dict(unlearning.evaluate({"topk": saes["topk"]}, lm, params, stage))["topk"]
    assert stage.notes["stand_in"].startswith("stand-in")
    assert lab(result)["stand_in"] == result["eval_result_unstructured"]["stand_in"] == stage.notes["stand_in"]


def test_nothing_to_clamp_scores_nothing_and_says_so(lm: LanguageModel, saes: SAEs, make_params: Any) -> None:
    own = saes["standard"]
    silent = StandardSAE(own.cfg, W_enc=own.W_enc, b_enc=own.b_enc - 1000, W_dec=own.W_dec, b_dec=own.b_dec)
    stage = StageFolder(Path("out"))
    result = dict(unlearning.evaluate({"silent": silent}, lm, make_params(), stage))["silent"]
    assert result["eval_result_metrics"]["unlearning"]["unlearning_score"] == 0
    assert lab(result)["metrics"]["unlearning_score"] == 0 and lab(result)["best_configuration"] is None
    assert "scores 0" in stage.notes["nothing_to_clamp"]["silent"]


def test_one_sae_as_among_many_warm_as_cold_and_any_batch_size(
    lm: LanguageModel, saes: SAEs, make_params: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = run(saes, lm, make_params(caching=True))
    monkeypatch.setattr(lm, "resume", lambda *_: pytest.fail("the model ran again"))
    monkeypatch.setattr(lm, "logits", lambda *_: pytest.fail("the model was asked again"))
    assert run(saes, lm, make_params(caching=True)) == together
    monkeypatch.undo()
    monkeypatch.setenv("SAE_RESEARCH_NO_CACHE", "1")
    for name in ("mpsae", "ihtp"):
        alone = run({name: saes[name]}, lm, make_params(batch_size=5))[name]
        assert lab(alone) == lab(together[name])
        assert alone["eval_result_metrics"] == together[name]["eval_result_metrics"]


def test_nothing_depends_on_the_sign_of_a_dictionary(lm: LanguageModel, saes: SAEs, make_params: Any) -> None:
    own = saes["mpsae"]
    found = run({"own": own, "flipped": MPSAE(-own.W_dec, own.b_dec, 4, own.cfg)}, lm, make_params())
    assert lab(found["own"]) == lab(found["flipped"])
    assert any(entry["forget_accuracy"] < 1 for entry in lab(found["own"])["configurations"])


def test_nothing_depends_on_the_order_of_latents(lm: LanguageModel, saes: SAEs, make_params: Any) -> None:
    own = saes["standard"]
    order = torch.randperm(own.cfg.d_sae, generator=torch.Generator().manual_seed(1))
    mixed = StandardSAE(own.cfg, W_enc=own.W_enc[:, order], b_enc=own.b_enc[order], W_dec=own.W_dec[order], b_dec=own.b_dec)
    found = run({"own": own, "mixed": mixed}, lm, make_params())
    assert without_latents(lab(found["own"])) == without_latents(lab(found["mixed"]))
    back = [[int(order[latent]) for latent in entry["latents"]] for entry in lab(found["mixed"])["configurations"]]
    assert back == [entry["latents"] for entry in lab(found["own"])["configurations"]]


# --- scores ------------------------------------------------------------------------------------


def test_score_by_hand() -> None:
    forget = np.array([[1, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]], dtype=bool)
    retain = np.array([[1, 1], [1, 0], [1, 1]], dtype=bool)
    assert intervention.unlearning_score(forget, retain, 0.99) == 0.75  # the second forgets too much else
    assert intervention.best_configuration(forget, retain, 0.99) == 2
    assert intervention.unlearning_score(forget, retain, 0.5) == 0.75
    assert intervention.unlearning_score(forget[1:2], retain[1:2], 0.99) == 0
    assert intervention.best_configuration(forget[1:2], retain[1:2], 0.99) is None


def test_interval_covers_and_held_out_corrects_for_choosing() -> None:
    """Fifty configurations that each forget a tenth at random: the best of them looks better than it is."""
    rng = np.random.default_rng(0)
    forget, retain = rng.random((50, 40)) > 0.1, np.ones((50, 40), dtype=bool)
    score = intervention.unlearning_score(forget, retain, 0.99)
    low, high = intervention.interval(forget, retain, 0.99, seed=1)
    held_out, kept = intervention.held_out(forget, retain, 0.99, seed=1)
    assert score > 0.15 and low <= score <= high
    assert held_out < score and abs(held_out - 0.1) < 0.08 and kept == 1.0
    assert intervention.interval(forget, retain, 0.99, seed=1) == [low, high]
    assert intervention.held_out(forget, np.zeros((50, 40), dtype=bool), 0.99, seed=1) == (0.0, 1.0)


def test_one_bad_sae_is_listed_and_the_others_score(lm: LanguageModel, saes: SAEs, make_params: Any) -> None:
    bad = copy.deepcopy(saes["standard"])
    bad.b_enc.fill_(torch.nan)
    stage = StageFolder(Path("out"))
    found = dict(unlearning.evaluate({"bad": bad, "good": saes["standard"]}, lm, make_params(), stage))
    assert "NaN" in stage.skipped["bad"] and found == run({"good": saes["standard"]}, lm, make_params())
