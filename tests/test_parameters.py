"""params.yaml's comments come from the configuration's classes, in the form that DVC keeps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.hydra import apply_overrides

from sae_research.cli.parameters import described, written
from sae_research.config.inputs import NonNegativeMPSAE
from sae_research.config.params import Params
from sae_research.config.section import Section
from sae_research.config.yaml_files import parse
from sae_research.runtime.errors import UserError

FILE = Path(__file__).parents[1] / "params.yaml"
TEXT = FILE.read_text()


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        elif not isinstance(value, dict):
            yield prefix + key, value


def other(value: Any) -> str:
    if isinstance(value, bool):
        return str(not value).lower()
    return "[a,b]" if isinstance(value, list) else "77" if isinstance(value, (int, float)) else "other"


def test_comments_are_those_of_the_classes() -> None:
    assert written(TEXT) == TEXT, "run python -m sae_research.cli.parameters"
    assert "  llm_batch_size: 16            # Sequences per forward pass" in TEXT
    assert written(TEXT.replace("llm_batch_size: 16 ", "llm_batch_size: 8 # mine")).count("mine") == 0
    assert described(NonNegativeMPSAE, "tolerance").startswith("A token stops")


def changed(path: Path, overrides: list[str]) -> list[tuple[str, str]]:
    """(before, after) of the lines that `dvc exp run -S` changes; items of lists aside."""
    path.write_text(TEXT)
    apply_overrides(path, overrides)
    before, after = ([line for line in text.splitlines() if line.lstrip()[:2] != "- "] for text in (TEXT, path.read_text()))
    return [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]


def test_dvc_changes_the_lines_of_values_and_no_others(tmp_path: Path) -> None:
    path, values = tmp_path / "params.yaml", dict(leaves(parse(TEXT, "params.yaml")))
    assert changed(path, ["random_seed=42"]) == [] and path.read_text() == TEXT
    lists = [key for key, value in values.items() if isinstance(value, list) and value]
    assert changed(path, [f"{key}=[a,b]" for key in lists]) == []
    single = [key for key in values if key not in lists]
    pairs = changed(path, [f"{key}={other(values[key])}" for key in single])
    assert len(pairs) == len(single) > 200
    for key, (before, after) in zip(single, pairs, strict=True):
        assert before.split()[0] == after.split()[0] == f"{key.rpartition('.')[2]}:"
        assert before.partition(" # ")[2] == after.partition(" # ")[2]


def test_a_sentence_that_fits_no_line_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Model(Section):
        name: str = "x"
        """A sentence of far more words than a line of the file has room for, which would have to be broken somewhere."""

    monkeypatch.setitem(Params.model_fields, "model", type(Params.model_fields["model"])(annotation=Model))
    with pytest.raises(UserError, match="model.name: its first sentence is .. characters"):
        written("model:\n  name: x\n")
