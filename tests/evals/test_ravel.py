"""RAVEL: a model whose facts and latents are known, invariances, and what does not qualify."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import tests.helpers.ravel_world as world
from sae_research.config.params import Params
from sae_research.evals import ravel
from sae_research.evals.ravel import evaluation, pairs, patches, prompts
from sae_research.evals.ravel.prompts import right, right_sae_bench
from sae_research.lm import LanguageModel, load_language_model
from sae_research.runtime.errors import NotApplicable, UserError
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SAEConfig, SparseAutoencoder
from sae_research.saes.forms import LinearSAE, StandardSAE
from sae_research.saes.pursuit.encoders import IHTPSAE, MPSAE
from tests.helpers.hub_server import hub_env, serve_hub

D = world.D


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def town_lm(folder: Path) -> LanguageModel:
    return load_language_model(str(folder), "cpu")


@pytest.fixture
def town_params(folder: Path, in_project: Path) -> Any:
    def make(batch: int = 8, **ravel_section: Any) -> Params:
        return Params.model_validate(
            {
                "model": {"name": str(folder), "device": "cpu", "llm_batch_size": batch},
                "text": {"context_size": 32},
                "ravel": {
                    "prompts": str(folder / "prompts"),
                    "min_known_entities": 8,
                    "n_generated_tokens": 3,
                    "entity_attribute_selection": {"town": ["Country", "Language"]},
                    "num_pairs_per_attribute": 12,
                    "train_test_split": 0.5,
                    "batch_size": 4,
                    **ravel_section,
                },
            }
        )

    return make


def config(form: str, d_sae: int, **options: Any) -> SAEConfig:
    return SAEConfig(form=form, d_in=D, d_sae=d_sae, hook_name=world.HOOK, options=options)


def linear(rotation: torch.Tensor) -> LinearSAE:
    """Latents are the rotated dimensions."""
    n = len(rotation)
    return LinearSAE(
        config("linear", n), W_enc=rotation.T.contiguous(), b_enc=torch.zeros(n), W_dec=rotation, b_dec=torch.zeros(D)
    )


def one_latent_each() -> LinearSAE:
    return linear(torch.eye(D))


def entangled() -> LinearSAE:
    """Both attributes in both latents."""
    rotation = torch.eye(D)
    rotation[:2, :2] = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
    return linear(rotation)


def silent() -> StandardSAE:
    """No latent ever fires."""
    return StandardSAE(
        config("standard", 8),
        W_enc=torch.zeros(D, 8),
        b_enc=torch.full((8,), -1.0),
        W_dec=torch.eye(8, D),
        b_dec=torch.zeros(D),
    )


def many() -> dict[str, SparseAutoencoder]:
    atoms = torch.nn.functional.normalize(torch.eye(D) + 0.01, dim=1)
    return {
        "clean": one_latent_each(),
        "entangled": entangled(),
        "silent": silent(),
        "mpsae_s3": MPSAE(atoms, torch.zeros(D), 3, config("matching_pursuit", D, s=3)),
        "mpsae_s5": MPSAE(atoms, torch.zeros(D), 5, config("matching_pursuit", D, s=5)),
        "ihtp_k2": IHTPSAE(atoms, torch.zeros(D), 2, config("ihtp", D, k=2)),
    }


def run(
    saes: dict[str, SparseAutoencoder], lm: LanguageModel, params: Params, folder: Path
) -> tuple[dict[str, Any], StageFolder]:
    stage = StageFolder(folder)
    return dict(ravel.evaluate(saes, lm, params, stage)), stage


def lab(result: dict[str, Any]) -> dict[str, Any]:
    return result["eval_result_unstructured"]["lab_v1"]


# --- known answers ---------------------------------------------------------------------------


def test_a_latent_that_carries_an_attribute_is_found(town_lm: LanguageModel, town_params: Any, tmp_path: Path) -> None:
    results, stage = run(
        {"clean": one_latent_each(), "entangled": entangled(), "silent": silent()}, town_lm, town_params(), tmp_path
    )
    assert not stage.skipped
    assert stage.notes["known"]["town"]["Country"] == {
        "prompts": 32,
        "known_prompts": 32,
        "known_entities": 16,
        "known_values": 2,
    }
    clean = results["clean"]
    assert clean["eval_result_metrics"]["ravel"] == {"disentanglement_score": 1, "cause_score": 1, "isolation_score": 1}
    metrics = lab(clean)["metrics"]
    assert (metrics["disentanglement"], metrics["cause"], metrics["isolation"], metrics["mask_latents"]) == (1, 1, 1, 1)
    assert (metrics["whole_activation_cause"], metrics["whole_activation_isolation"]) == (1, 0)
    assert lab(clean)["intervals"]["disentanglement"] == [1, 1]
    # two latents, each with half of both attributes, cannot move one alone
    assert lab(results["entangled"])["metrics"]["disentanglement"] < 0.9
    assert results["entangled"]["eval_result_metrics"]["ravel"]["disentanglement_score"] < 0.9
    # with the error kept, a mask over latents that never fire changes nothing
    silent_metrics = lab(results["silent"])["metrics"]
    assert (silent_metrics["cause"], silent_metrics["isolation"], silent_metrics["mask_latents"]) == (0, 1, 0)


def test_held_out_entities_are_scored_and_not_learnt_from(town_lm: LanguageModel, town_params: Any, tmp_path: Path) -> None:
    stage = StageFolder(tmp_path)
    facts = prompts.known_prompts(town_lm, town_params(), stage)
    for task in pairs.build_tasks(facts, range(len(facts)), town_params(), stage):
        for part, held_out in ((task.lab.train, False), (task.lab.test, True)):
            assert {facts[row].prompt.held_out for pair in part for row in pair[:2]} == {held_out}
            assert sum(pair.cause for pair in part) == len(part) / 2 == 6
            assert all(facts[p.base].prompt.label != facts[p.source].prompt.label for p in part)
            assert all(facts[p.base].prompt.attribute == facts[p.source].prompt.attribute for p in part)
            assert {facts[p.base].prompt.attribute for p in part if p.cause} == {task.attribute}
            assert task.attribute not in {facts[p.base].prompt.attribute for p in part if not p.cause}
        bases = [(pair.base, pair.cause) for pair in task.lab.test]
        assert len(set(bases)) == len(bases)


# --- invariances -----------------------------------------------------------------------------


def test_one_sae_equals_many_and_results_are_kept(
    town_lm: LanguageModel, town_params: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    together, _ = run(many(), town_lm, town_params(), tmp_path / "a")
    assert list(together) == list(many())
    monkeypatch.setenv("SAE_RESEARCH_NO_CACHE", "1")
    for name in ("clean", "mpsae_s5", "ihtp_k2"):
        assert run({name: many()[name]}, town_lm, town_params(), tmp_path / "b")[0][name] == together[name], name
    monkeypatch.delenv("SAE_RESEARCH_NO_CACHE")
    monkeypatch.setattr(evaluation, "learn", lambda *_: pytest.fail("learnt again although cached"))
    monkeypatch.setattr(town_lm, "generate", lambda *_: pytest.fail("asked again although cached"))
    assert run(many(), town_lm, town_params(), tmp_path / "c")[0] == together
    changed = town_params(learning_rate=0.002)
    with pytest.raises(pytest.fail.Exception):
        run({"clean": one_latent_each()}, town_lm, changed, tmp_path / "d")


@pytest.mark.parametrize("batch", [1, 64])
def test_how_many_rows_run_at_once_changes_nothing(
    batch: int, town_lm: LanguageModel, town_params: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("SAE_RESEARCH_NO_CACHE", "1")
    saes = {"clean": one_latent_each(), "entangled": entangled()}
    want, got = (run(saes, town_lm, town_params(batch=b), tmp_path / str(b))[0] for b in (8, batch))
    for name in saes:
        assert lab(got[name]) == lab(want[name])
        assert got[name]["eval_result_metrics"] == want[name]["eval_result_metrics"]


def test_padding_changes_no_loss(town_lm: LanguageModel, town_params: Any, tmp_path: Path) -> None:
    group, tasks = _group(town_lm, town_params(), tmp_path)
    some = tasks[0].lab.test
    assert len({group.length(pair) for pair in some}) > 1
    patched = group.entity[[pair.source for pair in some]].requires_grad_()
    together = group.loss(some, patched)
    alone = torch.cat([group.loss([pair], patched[i : i + 1]) for i, pair in enumerate(some)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
    gradient = torch.autograd.grad(together.sum(), patched)[0]
    torch.testing.assert_close(gradient, torch.autograd.grad(alone.sum(), patched)[0], atol=1e-5, rtol=1e-4)
    assert gradient.abs().max() > 0


def test_passes_from_the_entity_on_are_those_of_whole_prompts(
    town_lm: LanguageModel, town_params: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    group, tasks = _group(town_lm, town_params(), tmp_path)
    some = [pair for task in tasks for pair in task.lab.test]
    assert group.beginnings.usable and len({group.length(pair) for pair in some}) > 1
    assert len(list(group._parts(some))) > 1
    patched = group.entity[[pair.source for pair in some]].requires_grad_()
    losses, whole = group.loss(some, patched), group._whole_loss(some, patched)
    torch.testing.assert_close(losses, whole, atol=1e-5, rtol=1e-5)
    gradients = [torch.autograd.grad(found.sum(), patched)[0] for found in (losses, whole)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)
    answers = group.answers(some, patched.detach())
    monkeypatch.setitem(group.beginnings.__dict__, "usable", False)
    assert group.answers(some, patched.detach()) == answers
    assert group.loss(some, patched).tolist() == whole.tolist()


def test_an_empty_mask_with_the_error_kept_changes_nothing(town_lm: LanguageModel, town_params: Any, tmp_path: Path) -> None:
    group, tasks = _group(town_lm, town_params(), tmp_path)
    some = tasks[0].lab.test
    for sae in many().values():
        swap = patches.Swap(sae, group.entity_latents({"sae": sae})["sae"], group)
        for share in (0.0, 1.0):
            mask = torch.full((len(some), sae.cfg.d_sae), share)
            rows = [pair.source if share else pair.base for pair in some]
            kept = swap.patched(some, mask, torch.ones(len(some), dtype=torch.bool))
            bare = swap.patched(some, mask, torch.zeros(len(some), dtype=torch.bool))
            torch.testing.assert_close(bare, sae.decode(swap.latents[rows][:, None])[:, 0], atol=1e-6, rtol=1e-5)
            if not share:
                torch.testing.assert_close(kept, group.entity[rows], atol=1e-6, rtol=1e-5)
                answers = group.answers(some, kept)
                assert all(right(group.known[p.base].prompt.label, said) for p, said in zip(some, answers, strict=True))


def test_whole_prompts_are_encoded(town_lm: LanguageModel, town_params: Any, tmp_path: Path) -> None:
    """A sequence-level encoder's latents at the entity are those of the whole prompt, sinks and padding hidden."""
    group, _ = _group(town_lm, town_params(), tmp_path)
    sae = many()["ihtp_k2"]
    latents = group.entity_latents({"sae": sae})["sae"]
    for row in (0, 9, 30):
        batch = group.pool.batch([row])
        z = sae.encode(batch.acts, group.lab_mask(batch))[0, group.known[row].prompt.position]
        torch.testing.assert_close(latents[[row]][0], z)
    assert not torch.equal(sae.encode(batch.acts[:, [group.known[row].prompt.position]])[0, 0], z)


def _group(lm: LanguageModel, params: Params, folder: Path) -> tuple[patches.PromptActivations, list[patches.Task]]:
    stage = StageFolder(folder)
    facts = prompts.known_prompts(lm, params, stage)
    group = patches.PromptActivations(lm, world.HOOK, facts, params)
    return group, pairs.build_tasks(facts, group.usable, params, stage)


# --- prompts ---------------------------------------------------------------------------------


def test_the_entity_ends_at_its_last_token(town_lm: LanguageModel, folder: Path, tmp_path: Path) -> None:
    stage = StageFolder(tmp_path)
    towns = prompts.load_class(str(folder / "prompts"), "town", ["Country", "Language"], stage)
    built = prompts.build_prompts(town_lm, towns)
    assert len(built) == 64
    for prompt in built:
        assert town_lm.tokenizer.decode([prompt.ids[prompt.position]]) == prompt.entity.split()[-1]
        assert prompt.ids[0] == town_lm.separator_id
    assert any(len(prompt.entity.split()) > 1 for prompt in built)


def test_an_entity_of_several_subwords_ends_at_the_last(lm: LanguageModel) -> None:
    towns = prompts.EntityClass(
        "town",
        {"Xyzzyville": {"Country": "A"}, "Of": {"Country": "B"}},
        {"Country": ["%s is in", "the water of %s, they say"]},
        frozenset(),
    )
    for prompt in prompts.build_prompts(lm, towns):
        before = lm.tokenizer.decode(prompt.ids[1 : prompt.position])
        through = lm.tokenizer.decode(prompt.ids[1 : prompt.position + 1])
        assert prompt.entity not in before
        assert through.endswith(prompt.entity)


def test_templates_without_an_entity_are_skipped(
    town_lm: LanguageModel, town_params: Any, folder: Path, tmp_path: Path
) -> None:
    spoilt = shutil.copytree(folder / "prompts", tmp_path / "spoilt" / "artifacts" / "ravel" / "base")
    path = spoilt / "ravel_town_attribute_to_prompts.json"
    templates = json.loads(path.read_text())
    templates["Country"] += ["no town lies in", "%s and %s lie in"]
    path.write_text(json.dumps(templates))
    params = town_params(prompts=str(tmp_path / "spoilt"))
    results, stage = run({"clean": one_latent_each()}, town_lm, params, tmp_path / "o")
    assert set(stage.skipped) == {"town: 'no town lies in'", "town: '%s and %s lie in'"}
    assert lab(results["clean"])["metrics"]["disentanglement"] == 1


def test_an_attribute_without_two_values_is_skipped(
    town_lm: LanguageModel, town_params: Any, folder: Path, tmp_path: Path
) -> None:
    poor = shutil.copytree(folder / "prompts", tmp_path / "poor")
    path = poor / "ravel_town_entity_attributes.json"
    facts = {town: {**values, "Continent": "Norland"} for town, values in json.loads(path.read_text()).items()}
    path.write_text(json.dumps(facts))
    templates = poor / "ravel_town_attribute_to_prompts.json"
    templates.write_text(json.dumps({**json.loads(templates.read_text()), "Continent": ["the old people of %s lies in"]}))
    three = town_params(
        prompts=str(poor), min_known_entities=4, entity_attribute_selection={"town": ["Country", "Language", "Continent"]}
    )
    results, stage = run({"clean": one_latent_each()}, town_lm, three, tmp_path / "o")
    assert list(stage.skipped) == ["town/Continent"]
    assert "known train entities differ in 1 values" in stage.skipped["town/Continent"]
    assert set(lab(results["clean"])["attributes"]) == {"town_Country", "town_Language"}
    two = town_params(prompts=str(poor), min_known_entities=4, entity_attribute_selection={"town": ["Country", "Continent"]})
    with pytest.raises(NotApplicable, match="isolation needs two attributes"):
        run({"clean": one_latent_each()}, town_lm, two, tmp_path / "p")


def test_a_model_that_knows_too_little_is_not_scored(lm: LanguageModel, make_params: Any, tmp_path: Path) -> None:
    few = make_params(ravel={"full_dataset_downsample": 60, "n_generated_tokens": 2})
    with pytest.raises(NotApplicable, match="knows too few of the asked facts.*the model answers 0 of"):
        run({"clean": one_latent_each()}, lm, few, tmp_path)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"prompts": "./nowhere"}, "no such folder"),
        ({"entity_attribute_selection": {"hamlet": ["Country", "Language"]}}, "entity classes there: town"),
        (
            {"entity_attribute_selection": {"town": ["Country", "Mayor"]}},
            "no attribute 'Mayor'.*available: Country, Language",
        ),
    ],
)
def test_prompts_that_are_not_there(
    section: dict[str, Any], message: str, town_lm: LanguageModel, town_params: Any, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run({"clean": one_latent_each()}, town_lm, town_params(**section), tmp_path)


def test_masked_entities_are_left_out(town_lm: LanguageModel, town_params: Any, tmp_path: Path) -> None:
    """Entities of outlier norm have no latents: where all are such, nothing can be patched."""
    strict = town_params().model_copy(
        update={"token_mask": Params().token_mask.model_copy(update={"outlier_norm_multiple": 1.01})}
    )
    with pytest.raises(NotApplicable, match="0 of 64 prompts have an entity token that counts"):
        run({"clean": one_latent_each()}, town_lm, strict, tmp_path)


def test_packaged_prompts_are_sound() -> None:
    cities = prompts.load_class("packaged", "city", ["Country", "Continent", "Language"], StageFolder(Path("unused")))
    assert len(cities.values) >= 50
    assert 0.3 < len(cities.held_out) / len(cities.values) < 0.5
    for values in cities.values.values():
        assert set(values) == {"Country", "Continent", "Language"}
    for templates in cities.templates.values():
        assert len(templates) >= 3
        # an entity that a template already answers for would be copied, not known
        assert not any(entity in template for template in templates for entity in cities.values)


HUB = """
import json, sys
from pathlib import Path
from sae_research.runtime.errors import UserError
from sae_research.evals.ravel.prompts import load_class
from sae_research.runtime.stages import StageFolder
for name in sys.argv[1:]:
    try:
        towns = load_class(name, "town", ["Country", "Language"], StageFolder(Path("unused")))
        print(len(towns.values), len(towns.held_out), sorted(towns.templates))
    except UserError as error:
        print(error)
"""


def test_prompts_come_from_a_hub(folder: Path, tmp_path: Path) -> None:
    with serve_hub({"datasets": {"someone/ravel": folder / "prompts"}}) as url:
        done = subprocess.run(
            [sys.executable, "-c", HUB, "someone/ravel", "someone/else"],
            capture_output=True,
            text=True,
            env=os.environ | hub_env(url, tmp_path),
            timeout=120,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    found, missing = done.stdout.strip().splitlines()
    assert found == "16 8 ['Country', 'Language']"
    assert "hub data set 'someone/else'" in missing and "ravel.prompts: packaged" in missing


# --- scoring ---------------------------------------------------------------------------------


def test_answers_are_compared_by_whole_words() -> None:
    assert right("Niger", " Niger. It is") and not right("Niger", " Nigeria")
    assert right_sae_bench("", "Niger", " Nigeria and")
    assert not right("Spain", " S") and right_sae_bench("", "Spain", " S")
    assert right("United States", " the USA.") and right("Hindi,English", " English, but") and right("Chinese", " Mandarin")
    assert right("France", ' "France"}') and not right("France", "")


def test_figures_are_means_of_means_and_intervals_draw_entities(
    town_lm: LanguageModel, town_params: Any, tmp_path: Path
) -> None:
    group, tasks = _group(town_lm, town_params(), tmp_path)
    facts = group.known
    kept = "old Kent", "Nice", "Ohm", "port Pau"

    def said(pair: patches.Pair) -> str:  # right about some entities, wrong about all others
        return facts[pair.target].prompt.label if facts[pair.base].prompt.entity in kept else "nothing"

    found = evaluation.Outcomes(facts, tasks, {task.name: [said(pair) for pair in task.lab.test] for task in tasks})
    mean, figures = evaluation.mean_scores(found.scores(), tasks), found.figures()
    for key in ("cause", "isolation", "disentanglement"):
        assert figures[key].value == pytest.approx(getattr(mean, key))
        for task in tasks:
            assert found.figures(task)[key].value == pytest.approx(getattr(found.scores()[task.name], key))
    assert len(figures["disentanglement"].numerator) == len({facts[p.base].prompt.entity for t in tasks for p in t.lab.test})
    low, high = found.evidence(0)["intervals"]["disentanglement"]
    assert low < mean.disentanglement < high
    # eight entities, each all right or all wrong: the interval is one of eight outcomes, not of some twenty pairs
    assert high - low > 0.5
    everything = evaluation.Outcomes(
        facts, tasks, {t.name: [facts[p.target].prompt.label for p in t.lab.test] for t in tasks}
    )
    assert everything.evidence(0)["intervals"]["cause"] == [1, 1]


def test_pairs_depend_on_the_seed_alone(town_lm: LanguageModel, town_params: Any, tmp_path: Path) -> None:
    facts = prompts.known_prompts(town_lm, town_params(), StageFolder(tmp_path))
    plans = [
        pairs.lab_plan(random.Random(seed), [one.prompt for one in facts], range(64), "Country", ["Language"], 12, 0.5)
        for seed in (1, 1, 2)
    ]
    assert plans[0] == plans[1] != plans[2]


def test_one_bad_sae_is_listed_and_the_others_score(town_lm: LanguageModel, town_params: Any, tmp_path: Path) -> None:
    bad = linear(torch.eye(D))
    bad.b_enc.fill_(torch.nan)
    found, stage = run({"bad": bad, "good": linear(torch.eye(D))}, town_lm, town_params(), tmp_path)
    assert "NaN" in stage.skipped["bad"] and list(found) == ["good"]
