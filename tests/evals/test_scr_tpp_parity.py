"""SCR and TPP in SAE Bench's definition against SAE Bench 0.6.0 (tests/fixtures/make_scr_tpp.py), on the packaged
model and real text. What stock drew at random comes from the fixture."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from sae_research.evals.probing import Draw, ProbeTask, TextActivations, text_numbers, tokenise
from sae_research.evals.scr_tpp import ablation, measures
from sae_research.evals.scr_tpp.ablation import View, ablated_logits, decoder_matrix, effects, strongest
from sae_research.evals.scr_tpp.evaluation import Settings
from sae_research.lm import LanguageModel, load_language_model
from sae_research.saes import SparseAutoencoder
from tests.fixtures import make_scr_tpp

STOCK = json.loads(make_scr_tpp.FIXTURE.read_text())
FORMS = ("standard", "topk", "mpsae", "ihtp")
# SAE Bench's names of a two-attribute task's data sets, in the order of our probes
CLASSES = ("professor / nurse", "male / female", "male_professor / female_nurse")


class Side(NamedTuple):
    """One evaluation's texts with our probes, trained as SAE Bench's were."""

    task: Any
    group: TextActivations
    probes: ablation.Probes
    logits: torch.Tensor
    draw: Callable[[dict[str, Any], str], Draw]
    """(a recorded draw, its part) -> rows of the pool of texts."""

    def view(self, sae: SparseAutoencoder) -> View:
        means = dict(self.group.latent_means({"sae": sae}))["sae"]
        pull = decoder_matrix(sae) @ torch.from_numpy(self.probes.weight).T
        return View(self.logits, means.sae_bench, means.everywhere, pull)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load_language_model(make_scr_tpp.PARAMS.model.name, "cpu")


@pytest.fixture(scope="module")
def saes(lm: LanguageModel) -> dict[str, SparseAutoencoder]:
    return make_scr_tpp.make_saes(lm)


def side(
    lm: LanguageModel,
    settings: Settings,
    task: Any,
    row_of: dict[str, int],
    parts: dict[str, list[str]],
    stock: dict[str, Any],
    classes: Sequence[str],
) -> Side:
    """task: ours, over the rows of `row_of`; parts: for train and test, the texts in SAE Bench's numbering."""
    numbers = {part: torch.tensor([row_of[text] for text in texts]) for part, texts in parts.items()}

    def draw(recorded: dict[str, Any], part: str) -> Draw:
        rows = torch.tensor([int(row) for row in recorded["rows"].split()])
        return Draw(numbers[part][rows], torch.tensor([float(label) for label in recorded["labels"]]))

    trained = {record["class"]: [] for record in stock["draws"][: 2 * len(stock["trainings"])]}
    for record, part in zip(stock["draws"], ["train", "test"] * len(trained), strict=False):
        trained[record["class"]].append(draw(record, part))
    starts = {
        name: ablation.Start(
            np.array(training["start"].split(), np.float32),
            np.array([order.split() for order in training["orders"]], np.int64),
        )
        for name, training in zip(trained, stock["trainings"], strict=True)
    }
    group = TextActivations(
        lm,
        make_scr_tpp.HOOK,
        tokenise(lm, list(row_of), settings.context_length),
        make_scr_tpp.PARAMS,
        settings.context_length,
    )
    raw = group.raw_means().sae_bench.numpy()
    probes = ablation.fit(
        raw, [ProbeTask(*trained[name]) for name in classes], [starts[name] for name in classes], pick_on_test=True
    )
    return Side(task, group, probes, torch.from_numpy(probes.logits(raw)), draw)


@pytest.fixture(scope="module")
def scr_side(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Side:
    task = make_scr_tpp.scr_tasks()[0]
    parts = {}
    for part, cells in (("train", task.train), ("test", task.test)):
        m = len(cells[0, 1])  # as benchmarks/stock_scr_tpp.py hands them to stock
        parts[part] = [
            *cells[0, 0][:m],
            *cells[1, 0],
            *cells[0, 1],
            *cells[1, 1][:m],
            *cells[0, 0][:m],
            *cells[0, 1],
            *cells[1, 0],
            *cells[1, 1][:m],
            *cells[0, 0],
            *cells[1, 1],
        ]
    row_of = text_numbers(part.values() for part in (task.train, task.test))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(tmp_path_factory.mktemp("project")))
        return side(lm, make_scr_tpp.SCR, measures.scr_task(task, row_of), row_of, parts, STOCK["scr"]["standard"], CLASSES)


@pytest.fixture(scope="module")
def tpp_side(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> Side:
    task = make_scr_tpp.tpp_tasks()[0]
    parts = {
        part: [text for texts in own.values() for text in texts]
        for part, own in (("train", task.train), ("test", task.test))
    }
    row_of = text_numbers(part.values() for part in (task.train, task.test))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_ROOT", str(tmp_path_factory.mktemp("project")))
        return side(
            lm,
            make_scr_tpp.TPP,
            measures.tpp_task(task, row_of, 0),
            row_of,
            parts,
            STOCK["tpp"]["standard"],
            list(task.train),
        )


def test_probes_become_what_stocks_become(scr_side: Side, tpp_side: Side) -> None:
    for kind, found in (("scr", scr_side), ("tpp", tpp_side)):
        stock = STOCK[kind]["standard"]
        names = list(dict.fromkeys(record["class"] for record in stock["draws"][: 2 * len(stock["trainings"])]))
        order = [names.index(name) for name in CLASSES] if kind == "scr" else range(len(names))
        for probe, index in enumerate(order):
            want = np.array(stock["trainings"][index]["end"].split(), np.float64)
            theta = np.append(found.probes.weight[probe], found.probes.bias[probe])
            assert theta[::8] == pytest.approx(want, abs=2e-5), f"{kind} {names[index]}"
            assert np.abs(want - np.array(stock["trainings"][index]["start"].split(), np.float64)[::8]).max() > 0.005


@pytest.mark.parametrize("form", FORMS)
def test_scr_equals_stock(form: str, scr_side: Side, saes: dict[str, SparseAutoencoder]) -> None:
    thresholds = list(make_scr_tpp.SCR.n_values)
    both = measures.directions(scr_side.task, scr_side.view(saes[form]), thresholds, "sae_bench")
    got = measures.sae_bench_metrics(both, thresholds)
    want = {key: value for key, value in STOCK["scr"][form]["metrics"].items() if not isinstance(value, dict)}
    assert got == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_tpp_equals_stock_given_its_draws(form: str, tpp_side: Side, saes: dict[str, SparseAutoencoder]) -> None:
    """Stock draws the negatives anew for every accuracy, so every accuracy is compared on its own draw."""
    view, thresholds = tpp_side.view(saes[form]), make_scr_tpp.TPP.n_values
    labels, classes = list(tpp_side.task.probes), range(len(tpp_side.task.probes))
    after_training = 2 * len(labels)
    first = STOCK["tpp"][FORMS[0]]["draws"][after_training:]
    draws = iter(first[: len(labels)])  # of the clean accuracies, which stock keeps with the probes

    def accuracy(logits: torch.Tensor, probe: int) -> float:
        record = next(draws)
        assert record["class"] == labels[probe]
        drawn = tpp_side.draw(record, "test")
        return float(((logits[drawn.rows, probe] > 0) == (drawn.labels > 0)).double().mean())

    clean = [accuracy(view.logits, probe) for probe in classes]
    draws = iter(first[len(labels) :] if form == FORMS[0] else STOCK["tpp"][form]["draws"])
    effect = [effects(view, tpp_side.draw(next(draws), "train"), probe, "tpp", "sae_bench") for probe in classes]
    every = torch.arange(len(view.logits))
    drops = np.zeros((len(labels), len(thresholds), len(labels)))
    for target in classes:
        chosen = [strongest(effect[target], n, "sae_bench") for n in thresholds]
        for i, logits in enumerate(ablated_logits(view, every, chosen)):
            drops[target, i] = [clean[probe] - accuracy(logits, probe) for probe in classes]
    assert next(draws, None) is None
    for target, label in enumerate(labels):
        others = [probe for probe in classes if probe != target]
        for i, n in enumerate(thresholds):
            want = STOCK["tpp"][form]["classes"][tpp_side.task.name][label]
            intended, unintended = drops[target, i, target], drops[target, i, others].mean()
            assert intended == pytest.approx(want[f"tpp_threshold_{n}_intended_diff_only"], abs=1e-5)
            assert unintended == pytest.approx(want[f"tpp_threshold_{n}_unintended_diff_only"], abs=1e-5)
            assert intended - unintended == pytest.approx(want[f"tpp_threshold_{n}_total_metric"], abs=1e-5)


def test_the_leak_of_masked_positions_is_there(scr_side: Side, saes: dict[str, SparseAutoencoder]) -> None:
    """Without latents of zeroed positions the figures would not be SAE Bench's."""
    thresholds = list(make_scr_tpp.SCR.n_values)
    view = scr_side.view(saes["standard"])
    tight = view._replace(removed=view.latents)
    assert (view.removed - view.latents).abs().max() > 1
    got, without = (
        torch.cat([d.ablated for d in measures.directions(scr_side.task, v, thresholds, "sae_bench")]) for v in (view, tight)
    )
    assert not torch.equal(got, without)


@pytest.mark.slow
def test_fixture_is_what_stock_says_today(tmp_path: Path) -> None:
    path = tmp_path / "fresh.json"
    subprocess.run(
        [sys.executable, "-m", "tests.fixtures.make_scr_tpp", str(path)], check=True, cwd=Path(__file__).parents[2]
    )
    fresh = json.loads(path.read_text())
    for kind in ("scr", "tpp"):
        for form in FORMS:
            assert fresh[kind][form]["draws"] == STOCK[kind][form]["draws"]
            assert fresh[kind][form]["metrics"] == STOCK[kind][form]["metrics"]
