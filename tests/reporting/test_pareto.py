"""The Pareto picture over named folders."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sae_research.reporting.pareto import Point, draw_pareto, frontier, read_points
from sae_research.runtime.errors import UserError


def write(folder: Path, name: str, **values: Any) -> None:
    place = folder / name
    place.mkdir(parents=True)
    (place / "eval_results.json").write_text(
        json.dumps({"recipe": "top_k", "hook_name": "blocks.1.hook_resid_post", "l0": 20.0, "loss_recovered": 0.9, **values})
    )


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for run, shift in (("one", 0.0), ("two", 0.05)):
        for k, value in ((20, 0.8), (40, 0.85), (80, 0.92)):
            write(tmp_path / run, f"top_k_{k}", l0=float(k), loss_recovered=value - shift)
            write(tmp_path / run, f"standard_{k}", l0=1.5 * k, loss_recovered=value - shift - 0.1, recipe="standard")
    return tmp_path


def point(l0: float, value: float) -> Point:
    return Point("x", "top_k", "", "h", l0, value)


def test_the_frontier_is_what_nothing_beats() -> None:
    a, b, c, d = point(10, 0.5), point(20, 0.4), point(20, 0.7), point(30, 0.7)
    assert frontier([d, c, b, a]) == [a, c]


def test_labels_folders_and_a_picture_without_torch(runs: Path) -> None:
    code = (
        "import sys; from sae_research.cli.main import main; code = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            "pareto",
            f"{runs / 'one'}=now",
            f"{runs / 'two'}=before",
            "--out",
            str(runs / "p.png"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(runs / "p.png")
    with Image.open(runs / "p.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    for color in ((0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)):  # top_k as topk, standard
        assert (np.abs(pixels.astype(int) - color).max(axis=1) < 3).any()
    points = draw_pareto([str(runs / "one"), str(runs / "two")], runs / "q.png")
    assert {(p.recipe, p.label) for p in points} == {(r, label) for r in ("top_k", "standard") for label in ("one", "two")}
    again = (runs / "q.png").read_bytes()
    draw_pareto([str(runs / "one"), str(runs / "two")], runs / "q.png")
    assert (runs / "q.png").read_bytes() == again


def test_what_is_left_out_and_what_is_refused(runs: Path) -> None:
    write(runs / "one", "dead", l0=0.0)
    write(runs / "one", "unmeasured", loss_recovered=None)
    assert len(read_points([str(runs / "one")], "loss_recovered")) == 6
    (runs / "empty").mkdir()
    with pytest.raises(UserError, match="no eval_results.json"):
        read_points([str(runs / "empty")], "loss_recovered")
    with pytest.raises(UserError, match="none of 8 eval_results.json holds"):
        read_points([str(runs / "one")], "fraction_alive")
    with pytest.raises(UserError, match="no such folder"):
        read_points([str(runs / "nowhere")], "loss_recovered")
    with pytest.raises(UserError, match="--metric mse: unknown; known: variance_explained, loss_recovered"):
        draw_pareto([str(runs / "one")], runs / "p.png", "mse")
    with pytest.raises(UserError, match="must end with .png"):
        draw_pareto([str(runs / "one")], runs / "p.jpg")
