"""The simulation does what its arithmetic says, and the page shows its record."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import scale
from benchmarks.scale_simulation import Faults, SimulatedPhase, Stream, simulate, train
from sae_research.evals.units import plan_units
from sae_research.planning.costs import UnitShares
from sae_research.runtime.files import read_json

ROOT = Path(__file__).parents[2]
EVEN = [SimulatedPhase("a", 1, 2.0, 0.0, 1.0, 0.0, "a")]


def test_one_worker_takes_the_sum() -> None:
    phases = [SimulatedPhase("a", 2, 5.0, 3.0, 1.0, 0.0, "a"), SimulatedPhase("b", 1, 0.0, 0.5, 2.0, 0.0, "b")]
    found = simulate(phases, saes=4, workers=1, start=10.0)
    # two starts, the driver, two parts of four SAEs, one unit of four
    assert found.seconds == pytest.approx(20 + 5 + 2 * (3 + 4) + 0.5 + 8)
    assert found.units == 3 and found.redone == 0 and found.failed == 0


def test_units_are_the_evaluations_own() -> None:
    phases = [SimulatedPhase("a", 3, 0.0, 1.0, 1.0, 0.0, "a")]
    names = [[f"sae_{number}"] for number in range(10)]
    planned = plan_units(names, {name: [0, 1, 2] for (name,) in names}, [0, 1, 2], 4, UnitShares(1.0))
    assert simulate(phases, saes=10, workers=4).units == len(planned)


def test_a_lost_unit_is_done_again_by_another() -> None:
    calm = simulate(EVEN, saes=4, workers=4)
    assert calm.seconds == pytest.approx(3.0)
    lost = simulate(EVEN, saes=4, workers=4, faults=Faults(lost=(0, 2.5)))
    assert lost.seconds == pytest.approx(4.0) and lost.redone == pytest.approx(0.5)
    late = simulate(EVEN, saes=4, workers=4, faults=Faults(lost=(0, 9.0)))
    assert late.seconds == calm.seconds


def test_a_worker_that_fails_comes_back() -> None:
    found = simulate(EVEN, saes=40, workers=1, faults=Faults(mean_seconds=30.0, restart=5.0, max_retries=100))
    assert found.seconds > 42 and found.redone > 0 and found.failed == 0
    given_up = simulate(EVEN, saes=40, workers=1, faults=Faults(mean_seconds=1.0, restart=5.0, max_retries=2))
    assert given_up.failed == 1


def test_a_run_without_workers_left_says_so() -> None:
    with pytest.raises(RuntimeError, match="every worker is gone"):
        simulate(EVEN, saes=4, workers=1, faults=Faults(lost=(0, 3.0)))


def test_training_shares_the_pass_and_owns_saes() -> None:
    one = Stream(tokens=1000, model=4.0, steps=(3.0, 2.0, 1.0), token_bytes=100, checkpoint_seconds=1.0)
    assert train(one, 1, 1e9).seconds == pytest.approx(1000 * 10)
    two = train(one, 2, 100.0)  # half the pass, half a second of gathering, at most three seconds of steps
    assert two.seconds == pytest.approx(1000 * (2 + 0.5 + 3))
    assert two.gather == pytest.approx(0.5 / 5.5) and two.efficiency == pytest.approx(10 / (2 * 5.5))
    assert train(one, 8, 1e12).seconds == pytest.approx(1000 * 3.5, rel=1e-3)  # beyond three ranks only the pass is shared
    stormy = train(one, 2, 100.0, Faults(mean_seconds=1000.0, restart=7.0))
    assert stormy.lost > 0 and stormy.seconds == pytest.approx(two.seconds + stormy.lost)


def test_the_page_shows_its_record() -> None:
    page = (ROOT / "docs/scale.md").read_text()
    assert scale.with_tables(page, scale.tables(read_json(ROOT / "docs/scale.json"))) == page


def test_the_record_is_of_these_unit_costs() -> None:
    """What was simulated is what the code gives now, at the workers that the targets name."""
    values = read_json(ROOT / "docs/scale.json")
    phases = [SimulatedPhase(**one) for one in values["phases"]]
    found = simulate(phases, scale.SAES, scale.NODE, start=values["start_seconds"], room=values["kept_open"])
    row = next(row for row in values["evaluation"] if row["workers"] == scale.NODE)
    assert found.units == row["units"] and found.seconds == pytest.approx(row["seconds"], rel=1e-2)
