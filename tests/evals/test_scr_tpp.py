"""SCR and TPP: ablation from means against ablation itself, invariances, shared work, cases without a figure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_research.evals import harness
from sae_research.evals.probing import Draw, ProbeTask, TextActivations, tokenise
from sae_research.evals.scr_tpp import ablation, evaluate_scr, evaluate_tpp, measures
from sae_research.evals.scr_tpp import evaluation as stage
from sae_research.evals.scr_tpp.ablation import NotLinear, View, ablated_logits, decoder_matrix, effects, strongest
from sae_research.evals.scr_tpp.measures import Direction, LabTask, ScrTask
from sae_research.evals.sparse_probing import evaluation
from sae_research.lm import LanguageModel
from sae_research.runtime.errors import UserError
from sae_research.runtime.stages import StageFolder
from sae_research.saes import SparseAutoencoder
from sae_research.saes.forms import LinearSAE, StandardSAE
from sae_research.saes.pursuit.encoders import MPSAE
from sae_research.text.split import split_of
from tests.helpers.damage import DAMAGES
from tests.helpers.evals_saes import HOOK, D, config, dictionary, everything, standard

KINDS = ["animals", "weather", "trades"]
WORDS = {
    "animals": "cat dog horse mouse bird",
    "weather": "rain snow wind storm cloud",
    "trades": "baker miner clerk smith cook",
    "old": "ancient grey worn",
    "new": "fresh bright young",
    "any": "one some many",
}
N = [2, 3, 10, 100]
EVALUATIONS = {"scr": evaluate_scr, "tpp": evaluate_tpp}


def all_saes() -> dict[str, SparseAutoencoder]:
    """Of every kind, and one whose latents fire at zeroed positions."""
    W = dictionary()
    leaky = StandardSAE(
        config("standard"), W_enc=W.T.contiguous(), b_enc=torch.full((64,), 0.3), W_dec=W, b_dec=torch.zeros(D)
    )
    return {**everything(), "leaky": leaky}


def texts_of(kind: str, age: str, wanted: int) -> Iterator[str]:
    """Distinct texts that use words of `kind` and of `age`, equally many in either probing split."""
    left = {"probe_train": wanted, "probe_test": wanted}
    number = 31 * KINDS.index(kind) + 7 * len(age)
    generator = np.random.default_rng(number)
    while any(left.values()):
        words = [*generator.choice(WORDS[age].split(), 2), *generator.choice(WORDS[kind].split(), 1 + number % 4)]
        text = f"{number} the {' '.join(words)}"
        number += 100
        if left.get(split_of(text), 0):
            left[split_of(text)] -= 1
            yield text


@pytest.fixture(scope="session")
def task_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tasks")
    crossed = [
        {"text": text, "label": kind, "second_label": age}
        for kind, age in product(KINDS[:2], ("new", "old"))
        for text in texts_of(kind, age, 16)
    ]
    classes = [{"text": text, "label": kind} for kind in KINDS for text in texts_of(kind, "any", 12)]
    paths = {}
    for name, rows in (("scr", crossed), ("tpp", classes), ("pair", [r for r in classes if r["label"] != "trades"])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        paths[name] = str(folder / f"{name}.jsonl")
    return paths


@pytest.fixture
def params(make_params: Any, task_files: dict[str, str]) -> Any:
    probing = {
        "dataset_names": [task_files["tpp"]],
        "probe_train_set_size": 24,
        "probe_test_set_size": 24,
        "context_length": 40,
        "k_values": [1],
    }
    return make_params(
        scr={
            "dataset_names": [task_files["scr"]],
            "train_set_size": 32,
            "test_set_size": 32,
            "context_length": 40,
            "n_values": N,
            "probe_epochs": 150,
        },
        tpp={"n_values": N, "probe_epochs": 150},
        sparse_probing=probing,
    )


def run(kind: str, saes: Any, lm: LanguageModel, params: Any, folder: Path) -> tuple[dict[str, Any], StageFolder]:
    opened = StageFolder(folder)
    return dict(EVALUATIONS[kind](saes, lm, params, opened)), opened


def lab(result: dict[str, Any]) -> dict[str, Any]:
    return result["eval_result_unstructured"]["lab_v1"]


def close(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Equal accuracies, but for a text or two of the 24 that lie on a probe's boundary."""
    mine, theirs = (dict(leaves(lab(result)["tasks"])) for result in (one, other))
    assert mine.keys() == theirs.keys()
    accuracies = [key for key in mine if "accuracy" in key or "total_metric" in key]
    assert len(accuracies) > len(N)
    for key in accuracies:
        assert mine[key] == pytest.approx(theirs[key], abs=2 / 24 + 1e-9), key


def leaves(value: dict[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        yield from leaves(item, f"{path}/{key}") if isinstance(item, dict) else [(f"{path}/{key}", item)]


# --- ablation --------------------------------------------------------------------------------


@pytest.mark.parametrize("definition", ["sae_bench", "lab"])
@pytest.mark.parametrize("name", list(all_saes()))
def test_shortcut_is_ablate_and_decode(name: str, definition: Any, lm: LanguageModel, make_params: Any) -> None:
    """The long way: zero the latents of every token, decode, put the error back, take the mean over tokens."""
    context, sae = 30, all_saes()[name]
    texts = [" ".join(WORDS["animals"].split()[:n] * 2) for n in (1, 2, 3, 5, 4)]
    group = TextActivations(lm, HOOK, tokenise(lm, texts, context), make_params(), context)
    means, raw = dict(group.latent_means({name: sae}))[name], getattr(group.raw_means(), definition)
    weight = torch.randn(D, 2, generator=torch.Generator().manual_seed(0))
    removed = means.everywhere if definition == "sae_bench" else means.lab
    view = View(raw @ weight, getattr(means, definition), removed, decoder_matrix(sae) @ weight)
    chosen = [torch.arange(5), torch.arange(0, 30, 3)]
    got = ablated_logits(view, torch.arange(len(texts)), chosen)
    for row, tokens in enumerate(group.pool.sequences):
        batch = group.pool.batch([row])
        keep = group.lab_mask(batch) if definition == "lab" else group.sae_bench_mask(batch)
        x = batch.acts * keep[..., None]
        if definition == "sae_bench":  # zeroed, padded to the context length, and no mask for the encoder
            x = torch.nn.functional.pad(x, (0, 0, 0, context - len(tokens)))
        z = sae.encode(batch.acts if definition == "lab" else x, keep if definition == "lab" else None)
        for latents, want in zip(chosen, got, strict=True):
            without = z.index_fill(-1, latents, 0)
            edited = (sae.decode(without) + (x - sae.decode(z))).sum(dim=1) / keep.sum()
            assert (edited @ weight)[0].tolist() == pytest.approx(want[row].tolist(), abs=2e-4, rel=1e-4)


class Scaled(StandardSAE):
    def decode(self, z: Tensor) -> Tensor:
        return super().decode(2 * z)


class Curved(StandardSAE):
    def decode(self, z: Tensor) -> Tensor:
        return super().decode(z.relu().sqrt())


class Smeared(StandardSAE):
    def decode(self, z: Tensor) -> Tensor:
        return super().decode(z.cumsum(dim=1))


def test_decoders_that_are_not_linear_are_skipped(lm: LanguageModel, params: Any, tmp_path: Path) -> None:
    def of(cls: type) -> SparseAutoencoder:
        sae = standard()
        sae.__class__ = cls
        return sae

    assert torch.allclose(decoder_matrix(of(Scaled)), 2 * standard().W_dec)
    for cls in (Curved, Smeared):
        with pytest.raises(NotLinear):
            decoder_matrix(of(cls))
    results, opened = run("tpp", {"curved": of(Curved), "standard": standard()}, lm, params, tmp_path / "out")
    assert list(results) == ["standard"] and "not linear" in opened.skipped["curved"]


def test_effects_of_signed_latents() -> None:
    """A latent and its negative, with the dictionary row turned: one effect in ours, none for the turned in SAE Bench's."""
    latents = torch.tensor([[2.0, -2.0, 0.1], [2.0, -2.0, 0.1], [0.1, -0.1, 2.0], [0.1, -0.1, 2.0]])
    train = Draw(torch.arange(4), torch.tensor([1.0, 1, 0, 0]))
    view = View(torch.zeros(4, 1), latents, latents, torch.tensor([[0.5], [-0.5], [-0.5]]))
    assert effects(view, train, 0, "tpp", "lab").tolist() == pytest.approx([0.95, 0.95, 0.0])
    assert effects(view, train, 0, "tpp", "sae_bench").tolist() == pytest.approx([0.95, 0.0, 0.0])
    assert effects(view, train, 0, "scr", "lab").tolist() == pytest.approx([0.95, 0.95, 0.95])


def test_latents_without_effect_are_never_ours() -> None:
    effect = torch.tensor([0.0, 3.0, -1.0, 5.0, 0.0])
    assert strongest(effect, 4, "lab").tolist() == [3, 1]
    stock = strongest(effect, 4, "sae_bench").tolist()  # three are not zero, and a zero comes before the negative
    assert stock[:2] == [3, 1] and len(stock) == 3 and stock[2] in (0, 4)


# --- probes ----------------------------------------------------------------------------------


def test_our_probes_never_see_a_test_text() -> None:
    features = np.random.default_rng(0).standard_normal((60, 12)).astype(np.float32)
    labels = torch.tensor(features[:, 2] > 0).float()
    rows = torch.arange(60)
    train = Draw(rows[:40], labels[:40])
    honest, flipped = (ProbeTask(train, Draw(rows[40:], test)) for test in (labels[40:], 1 - labels[40:]))
    starts = [ablation.start(0, 0, 12, 40, 300)]
    ours = [ablation.fit(features, [task], starts, pick_on_test=False) for task in (honest, flipped)]
    stocks = [ablation.fit(features, [task], starts, pick_on_test=True) for task in (honest, flipped)]
    assert np.array_equal(ours[0].weight, ours[1].weight)
    assert not np.array_equal(stocks[0].weight, stocks[1].weight), "SAE Bench's recipe picks its epoch on test texts"
    assert ((ours[0].logits(features)[:, 0] > 0) == (labels.numpy() > 0)).mean() > 0.8


def test_probes_of_different_sizes_train_as_they_would_alone() -> None:
    features = np.random.default_rng(1).standard_normal((80, 9)).astype(np.float32)
    tasks = [
        ProbeTask(Draw(torch.arange(n), torch.arange(n) % 2.0), Draw(torch.arange(n, 80), torch.arange(80 - n) % 2.0))
        for n in (40, 24, 40)
    ]
    starts = [ablation.start(5, i, 9, len(task.train.rows), 3) for i, task in enumerate(tasks)]
    together = ablation.fit(features, tasks, starts, pick_on_test=True)
    for i in range(3):
        alone = ablation.fit(features, [tasks[i]], [starts[i]], pick_on_test=True)
        assert together.weight[i] == pytest.approx(alone.weight[0], abs=1e-6)


# --- invariances -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(EVALUATIONS))
def test_one_equals_many_and_cold_equals_warm(
    kind: str, lm: LanguageModel, params: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    together, _ = run(kind, everything(), lm, params, tmp_path / "a")
    monkeypatch.setenv("SAE_RESEARCH_NO_CACHE", "1")
    for name in ("standard", "mpsae_s6", "ihtp_k4"):
        assert run(kind, {name: everything()[name]}, lm, params, tmp_path / "b")[0][name] == together[name]
    monkeypatch.delenv("SAE_RESEARCH_NO_CACHE")
    monkeypatch.setattr(stage, "TextsByTask", lambda *_: pytest.fail("read texts again although cached"))
    assert run(kind, everything(), lm, params, tmp_path / "c")[0] == together
    assert not any(value != value for value in lab(together["standard"])["metrics"].values())


@pytest.mark.parametrize("kind", list(EVALUATIONS))
def test_sign_and_order_of_latents_change_nothing_of_ours(kind: str, lm: LanguageModel, params: Any, tmp_path: Path) -> None:
    W, b = dictionary(), torch.zeros(D)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(3))

    def of(W: Tensor) -> MPSAE:
        return MPSAE(W.contiguous(), b, 5, config("matching_pursuit", s=5))

    results, _ = run(kind, {"one": of(W), "turned": of(-W), "moved": of(W[order])}, lm, params, tmp_path / "out")
    close(results["one"], results["turned"])
    close(results["one"], results["moved"])


@pytest.mark.parametrize("kind", list(EVALUATIONS))
def test_batch_size_and_padding_change_nothing_of_ours(
    kind: str, lm: LanguageModel, params: Any, make_params: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setenv("SAE_RESEARCH_NO_CACHE", "1")
    want, _ = run(kind, all_saes(), lm, params, tmp_path / "a")
    longer = params.model_copy(
        update={
            "model": params.model.model_copy(update={"llm_batch_size": 50}),
            "scr": params.scr.model_copy(update={"context_length": 90}),
            "sparse_probing": params.sparse_probing.model_copy(update={"context_length": 90}),
        }
    )
    differs = []
    for name, result in run(kind, all_saes(), lm, longer, tmp_path / "b")[0].items():
        close(result, want[name])
        differs += [name] * (result["eval_result_metrics"] != want[name]["eval_result_metrics"])
    assert "leaky" in differs, "SAE Bench's figures do depend on how far texts are padded"


# --- shared work -----------------------------------------------------------------------------


def test_tpp_encodes_nothing_after_sparse_probing(lm: LanguageModel, params: Any, tmp_path: Path, monkeypatch: Any) -> None:
    want, _ = run("tpp", everything(), lm, params, tmp_path / "a")
    for path in harness.ResultCache("tpp").folder.iterdir():
        path.unlink()
    for path in (TextActivations(lm, HOOK, tokenise(lm, ["a"], 9), params, 9)._kept.folder).glob("means_*"):
        shutil.rmtree(path)
    list(evaluation.evaluate(everything(), lm, params, StageFolder(tmp_path / "b")))
    monkeypatch.setattr(TextActivations, "_encoded", lambda *_: pytest.fail("encoded again"))
    assert run("tpp", everything(), lm, params, tmp_path / "c")[0] == want


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_and_large_means_are_made_anew(kind: str, lm: LanguageModel, make_params: Any) -> None:
    def means(params: Any) -> Any:
        group = TextActivations(lm, HOOK, tokenise(lm, ["the cat", "a dog"], 12), params, 12)
        return dict(group.latent_means({"standard": standard()}))["standard"], list(group._kept.folder.glob("means_*"))

    first, files = means(make_params())
    assert len(files) == 1
    DAMAGES[kind](files[0] / "means.safetensors")
    again, files = means(make_params())
    assert len(files) == 1 and all(map(torch.equal, first, again))
    shutil.rmtree(files[0])
    tiny = make_params(activation_caching={"max_gb": 1e-8})
    assert means(tiny)[1] == [] and means(make_params(activation_caching={"enabled": False}))[1] == []


# --- results ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(EVALUATIONS))
def test_sae_bench_types_accept_the_result(kind: str, lm: LanguageModel, params: Any, tmp_path: Path) -> None:
    from pydantic import TypeAdapter
    from sae_bench.evals.scr_and_tpp import eval_output

    results, opened = run(kind, {"standard": standard()}, lm, params, tmp_path / "out")
    result = results["standard"]
    json.dumps(result, allow_nan=False)
    read = TypeAdapter({"scr": eval_output.ScrEvalOutput, "tpp": eval_output.TppEvalOutput}[kind]).validate_python(result)
    metrics, key = lab(result)["metrics"], {"scr": "scr_metric_threshold_{}", "tpp": "tpp_threshold_{}_total_metric"}[kind]
    assert {key.format(n) for n in N} <= set(metrics), "every n stands in ours, fields or not"
    theirs = getattr(read.eval_result_metrics, f"{kind}_metrics")
    assert getattr(theirs, key.format(10)) is not None and not hasattr(theirs, key.format(3))
    assert read.eval_config.n_values == N and len(read.eval_result_details) == 1
    assert lab(result)["thresholds_capped"] == {"100": 64} and opened.notes["thresholds_capped"] == {"standard": 64}
    for name, (low, high) in lab(result)["intervals"].items():
        assert low <= high and low - 1e-9 <= metrics[name] <= high + 1e-9, name
    assert len(lab(result)["intervals"]) >= len(N)


@pytest.mark.parametrize("kind", list(EVALUATIONS))
def test_an_sae_without_activity_changes_nothing(kind: str, lm: LanguageModel, params: Any, tmp_path: Path) -> None:
    dead = LinearSAE(
        config("linear", D), W_enc=torch.zeros(D, D), b_enc=torch.zeros(D), W_dec=torch.eye(D), b_dec=torch.zeros(D)
    )
    result = run(kind, {"dead": dead}, lm, params, tmp_path / "out")[0]["dead"]
    assert set(lab(result)["metrics"].values()) == {0.0}
    counts = [value for key, value in leaves(lab(result)["tasks"]) if "latents_ablated" in key]
    assert len(counts) >= 2 * len(N) and not any(counts)


def direction(clean: float, biased: float, *ablated: float, texts: int = 40) -> Direction:
    """Outcomes with these accuracies."""

    def correct(accuracy: float) -> Tensor:
        return (torch.arange(texts) < round(accuracy * texts)).double()

    return Direction(correct(clean), correct(biased), torch.stack([correct(a) for a in ablated]), [0] * len(ablated))


def lab_task(both: tuple[Direction, Direction], neglected: tuple[int, ...], name: str = "task") -> LabTask:
    empty = Draw(torch.empty(0, dtype=torch.long), torch.empty(0))
    probe = ProbeTask(empty, empty)
    return LabTask(ScrTask(name, (probe, probe, probe), (10, 10, 10, 10), empty), both, neglected)


def test_scr_of_a_tie_and_of_no_gap() -> None:
    tie = direction(0.9, 0.5, 0.7), direction(1.0, 0.5, 0.5)
    assert measures.sae_bench_metrics(tie, [5]) == pytest.approx({"scr_dir1_threshold_5": 0.5, "scr_dir2_threshold_5": 0.0})
    ours, intervals = measures.lab_metrics([lab_task(tie, (0, 1))], [5], 0)
    # the accuracy given back over that lost, of both directions: 0.2 of 0.4 + 0.5
    assert ours["scr_metric_threshold_5"] == pytest.approx(0.2 / 0.9)
    assert ours["scr_dir1_threshold_5"] == pytest.approx(0.5) and "scr_dir1_threshold_5" in intervals

    none = direction(0.8, 0.9, 0.95), direction(0.7, 0.7, 0.2)
    assert measures.sae_bench_metrics(none, [5]) == {
        "scr_dir1_threshold_5": 0.0,
        "scr_dir2_threshold_5": 0.0,
        "scr_metric_threshold_5": 0.0,
    }
    assert measures.lab_metrics([lab_task(none, (0,))], [5], 0) == ({}, {}), "nothing was lost, so there is no figure"
    both, _ = measures.lab_metrics([lab_task(none, (0,), "a"), lab_task(tie, (0,), "b")], [5], 0)
    assert both["scr_metric_threshold_5"] == pytest.approx(0.5), "a task without a loss is left out"


def test_scr_sums_over_tasks_before_dividing() -> None:
    small, large = direction(0.925, 0.9, 0.5), direction(0.9, 0.5, 0.7)
    ours, _ = measures.lab_metrics([lab_task((small, small), (0,), "a"), lab_task((large, large), (0,), "b")], [5], 0)
    assert ours["scr_metric_threshold_5"] == pytest.approx((-0.4 + 0.2) / (0.025 + 0.4))


# --- tasks that do not qualify ---------------------------------------------------------------


def test_tasks_that_do_not_qualify_are_skipped_with_the_reason(
    lm: LanguageModel, params: Any, make_params: Any, task_files: dict[str, str], tmp_path: Path
) -> None:
    def with_tasks(kind: str, names: list[str]) -> Any:
        section = getattr(params, kind).model_dump() | {"dataset_names": names}
        return make_params(**{"sparse_probing": params.sparse_probing.model_dump(), kind: section})

    results, opened = run("tpp", {"s": standard()}, lm, with_tasks("tpp", [task_files["pair"], task_files["tpp"]]), tmp_path)
    assert list(results) == ["s"] and "mirror" in opened.skipped[task_files["pair"]]
    assert list(opened.notes["tasks"]) == [task_files["tpp"]]
    with pytest.raises(UserError, match="no task is usable.*mirror"):
        run("tpp", {"s": standard()}, lm, with_tasks("tpp", [task_files["pair"]]), tmp_path)

    one = tmp_path / "one.csv"
    one.write_text("text,label,second_label\nabc,a,x\ndef,b,x\n")
    results, opened = run("scr", {"s": standard()}, lm, with_tasks("scr", [str(one), task_files["scr"]]), tmp_path)
    assert list(results) == ["s"] and "'second_label' needs two values, found x" in opened.skipped[str(one)]
    with pytest.raises(UserError, match="no task is usable"):
        run("scr", {"s": standard()}, lm, with_tasks("scr", [str(one)]), tmp_path)
    with pytest.raises(UserError, match="unknown two-attribute task 'news_topic'"):
        run("scr", {"s": standard()}, lm, with_tasks("scr", ["news_topic"]), tmp_path)
