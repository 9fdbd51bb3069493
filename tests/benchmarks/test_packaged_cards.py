"""The cards of the packaged dictionaries: what they say of the files beside them, the page made of them, and that a fresh
evaluation gives their numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import packaged as benchmark
from benchmarks.packaged_page import NAMED, PAGE, page
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


of_each = pytest.mark.parametrize("card", cards(), ids=packaged_names())


@of_each
def test_a_dictionary_is_what_its_card_says(card: dict[str, Any]) -> None:
    assert card["name"] in benchmark.NAMES
    sae, weights = load_sae(f"packaged:{card['name']}"), FOLDER / card["name"] / WEIGHTS_FILE
    assert file_sha256(weights) == card["sha256"] and weights.stat().st_size < MEGABYTES * 1e6
    assert (sae.cfg.hook_name, sae.cfg.hook_out) == (card["reads"], card["writes"])
    assert (sae.cfg.d_in, sae.cfg.d_sae, sae.cfg.dtype) == (card["d_in"], card["d_sae"], card["dtype"])
    assert sae.cfg.provenance["recipe_id"] == card["training"]["recipe_id"]


@of_each
def test_the_page_is_made_of_the_cards(card: dict[str, Any]) -> None:
    text = (ROOT / PAGE).read_text()
    assert text == page(cards(), read_json(NAMED)) and f"Latents of `{card['name']}`" in text


@of_each
@pytest.mark.slow
def test_a_fresh_evaluation_gives_the_numbers_of_the_card(card: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    params, _ = read_with(read_preset("packaged"))
    found = evaluate({"packaged": f"packaged:{card['name']}"}, params=params)["packaged"]["core"]
    for key, (value, *_) in card["metrics"]["core"].items():
        assert number(found[key]) == number(value), key
