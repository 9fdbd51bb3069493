"""The cards of the packaged dictionaries: what they say of the files beside them, the page made of them, and that a fresh
evaluation gives their numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import packaged as benchmark
from benchmarks.packaged_page import NAMED, PAGE, page, wilson
from sae_research.cli.pipeline import read_preset
from sae_research.cli.plan import read_with
from sae_research.evaluate import evaluate
from sae_research.runtime.files import file_sha256, read_json
from sae_research.runtime.formatting import number
from sae_research.runtime.packaged import CARD, FOLDER, packaged_names
from sae_research.saes import load_sae
from sae_research.saes.files import WEIGHTS_FILE

ROOT = Path(__file__).parents[2]
MEGABYTES = 6.0
"""Most that a dictionary may take in the repository."""


def cards() -> list[dict[str, Any]]:
    return [read_json(FOLDER / name / CARD) for name in packaged_names()]


def test_every_dictionary_has_its_card_and_is_what_it_says() -> None:
    assert sorted(benchmark.NAMES) == packaged_names()
    for card in cards():
        sae, weights = load_sae(f"packaged:{card['name']}"), FOLDER / card["name"] / WEIGHTS_FILE
        assert file_sha256(weights) == card["sha256"] and weights.stat().st_size < MEGABYTES * 1e6
        assert (sae.cfg.hook_name, sae.cfg.hook_out) == (card["reads"], card["writes"])
        assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.dtype) == (card["d_in"], card["d_sae"], card["dtype"])
        assert sae.cfg.provenance["recipe_id"] == card["training"]["recipe_id"]


def test_the_page_is_made_of_the_cards() -> None:
    assert (ROOT / PAGE).read_text() == page(cards(), read_json(NAMED))


@pytest.mark.slow
def test_a_fresh_evaluation_gives_the_numbers_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    params, _ = read_with(read_preset("packaged"))
    names = {card["name"].replace("-", "_"): card for card in cards()}
    found = evaluate({name: f"packaged:{card['name']}" for name, card in names.items()}, params=params)
    for name, card in names.items():
        for key, (value, *_) in card["metrics"]["core"].items():
            assert number(found[name]["core"][key]) == number(value), (name, key)


def test_wilsons_interval() -> None:
    low, high = wilson(15, 30)
    assert (round(low, 3), round(high, 3)) == (0.332, 0.668)
    assert wilson(0, 30)[0] == 0 < wilson(0, 30)[1] < 0.12
