"""SAEs are opened when their turn comes and closed after it; what the cached loop scores, keeps and leaves out."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sae_research.config.params import Params
from sae_research.evals import absorption, autointerp, core, harness, meta_sae, sae_probes, scr_tpp, sparse_probing
from sae_research.evals.absorption import evaluation as absorption_module
from sae_research.evals.core.group import core_text
from sae_research.evals.harness import PreparedSAEs, Scores, by_hook
from sae_research.lm import LanguageModel
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import write_json
from sae_research.runtime.stages import StageFolder
from sae_research.saes import save_sae, save_variant
from sae_research.saes.base import Family, Guard
from sae_research.saes.sources import PREPARED
from tests.helpers.evals_saes import config, small_sections, standard

FAMILY = ["ihtp_k1", "ihtp_k4"]
"""Two encoders over one dictionary, which encode together."""
NAMES = ["a", "b", FAMILY[0], "c", FAMILY[1], "d"]


@pytest.fixture
def folder(in_project: Path) -> Path:
    """SAEs as the setup stage leaves them."""
    root = in_project / PREPARED
    for seed, name in enumerate("abcd"):
        save_sae(standard(seed), root / name)
    for name in FAMILY:
        k = int(name[-1])
        save_variant(config("ihtp", k=k), {"k": k}, root / name, root / "a")
    write_json(root / "manifest.json", {"order": NAMES})
    return root


class Counter:
    """How many of the SAEs that were opened are alive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened: list[weakref.ref[Any]] = []
        self.most, real = 0, harness.load_sae

        def load(*given: Any) -> Any:
            sae = real(*given)
            self.opened.append(weakref.ref(sae))
            self.most = max(self.most, self.alive)
            return sae

        monkeypatch.setattr(harness, "load_sae", load)

    @property
    def alive(self) -> int:
        return sum(one() is not None for one in self.opened)


def windows_of(saes: PreparedSAEs, lm: LanguageModel, params: Params, stage: StageFolder) -> Iterator[tuple[str, Any]]:
    tokens = core_text(lm, params, None).tokens
    yield from ((name, found.to_plain()) for name, found in autointerp.find_windows(saes, lm, params, tokens).items())


EVALUATIONS: dict[str, Callable[..., Any]] = {
    "core": core.evaluate,
    "sparse_probing": sparse_probing.evaluate,
    "tpp": scr_tpp.evaluate_tpp,
    "absorption": absorption.evaluate,
    "sparse_probing_sae_probes": sae_probes.evaluate,
    "meta_sae": meta_sae.evaluate,
    "autointerp": windows_of,
}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_memory_does_not_grow_with_the_number_of_saes(
    name: str, folder: Path, lm: LanguageModel, make_params: Any, tasks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(absorption_module, "MIN_TRAIN_WORDS", 4)
    monkeypatch.setattr(absorption_module, "MIN_TEST_WORDS", 1)
    params = make_params(**small_sections(tasks))
    evaluate = EVALUATIONS[name]
    together = dict(evaluate(dict(PreparedSAEs(folder, lm)), lm, params, StageFolder(Path("together"))))
    monkeypatch.setenv("SAE_RESEARCH_NO_CACHE", "1")
    monkeypatch.setattr(harness, "OPEN_BYTES", 0)
    counter = Counter(monkeypatch)
    saes = PreparedSAEs(folder, lm)
    assert counter.most == 1 and counter.alive == 0, "what is to be known of each is read one by one"
    found = dict(evaluate(saes, lm, params, StageFolder(Path("in_turn"))))
    assert counter.most <= len(FAMILY) and counter.alive == 0
    assert list(found) == NAMES and json.dumps(found, sort_keys=True) == json.dumps(together, sort_keys=True)


def test_as_many_are_open_as_their_weights_allow(folder: Path, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    (group,) = by_hook(PreparedSAEs(folder, lm))
    each = group.infos["a"].nbytes
    for limit, expected in (
        (0, [["a"], ["b"], FAMILY, ["c"], ["d"]]),
        (2 * each, [["a", "b"], [*FAMILY, "c"], ["d"]]),  # pursuit has no encoder weights
        (10 * each, [["a", "b", *FAMILY, "c", "d"]]),
    ):
        monkeypatch.setattr(harness, "OPEN_BYTES", limit)
        assert [list(saes) for saes in group.open(NAMES)] == expected


def test_only_what_is_missing_is_scored_and_what_fails_is_left_out(folder: Path, lm: LanguageModel) -> None:
    (group,) = by_hook(PreparedSAEs(folder, lm))
    keys = {name: {part: f"{name}{part}" for part in ("x", "y")} for name in NAMES}
    asked: list[tuple[str, str]] = []
    said: dict[str, str] = {}

    def score(part: str, family: Family) -> Iterator[tuple[str, str]]:
        for name in family:
            asked.append((name, part))
            if name == "c":
                raise UserError("it is broken")
            yield name, name + part

    for _ in range(2):
        scores = Scores("test", group, keys, Guard(said.__setitem__))
        with scores.progress("score") as bar:
            scores.fill(score, bar, ["x", "y"])
        assert scores.left() == {name: {"x": f"{name}x", "y": f"{name}y"} for name in NAMES if name != "c"}
    assert said == {"c": "it is broken"} and asked.count(("c", "x")) == 2
    assert sorted(set(asked)) == sorted(asked[:-1]), "the second time only what had failed"
    first = asked[:11]
    assert [part for _, part in first] == ["x"] * 6 + ["y"] * 5, "part by part: what a part's SAEs share is made once"
    for part in "xy":
        names = [name for name, its in first if its == part]
        assert names[(at := names.index(FAMILY[0])) : at + 2] == FAMILY, "families together"


def test_a_prepared_sae_must_fit_the_model(folder: Path, lm: LanguageModel) -> None:
    (folder / "b" / "sae_weights.safetensors").write_bytes(b"no weights")
    with pytest.raises(UserError, match="damaged weights"):
        PreparedSAEs(folder, lm)
    write_json(folder / "manifest.json", {"order": []})
    with pytest.raises(UserError, match="lists no SAE"):
        PreparedSAEs(folder, lm)
    with pytest.raises(UserError, match="run the setup stage first"):
        PreparedSAEs(folder / "none", lm)
