"""What a reader can quote of the run, in a few sentences computed from its tests: they claim no more than was tested."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sae_research.reporting.metrics import Metric
from sae_research.reporting.run import Run
from sae_research.reporting.seeds import SEEDS_FOR_A_CLAIM, contenders
from sae_research.reporting.tables import number

if TYPE_CHECKING:
    from sae_research.reporting.differences import Comparison

UNTRAINED = "control_data_rows"
"""The control that a reader asks for first: the same encoder over rows that nobody trained."""
MAIN = "variance_explained"


def summary(run: Run, found: Sequence[Comparison]) -> str:
    """Three to five sentences; empty where nothing was compared."""
    if not found:
        return ""
    lines = [_compared(run, found), *_untrained(found), *_largest(found), *_alike(found), _not_varied(run)]
    return "## In short\n\n" + "\n".join(f"- {line}" for line in lines)


def _compared(run: Run, found: Sequence[Comparison]) -> str:
    roles = {role: [f"`{row.name}`" for row in run.rows if row.role == role] for role in ("baseline", "comparison")}
    trained = ", ".join([*roles["baseline"], *roles["comparison"]])
    variants = sum(row.role == "variant" for row in run.rows)
    controls = sum(row.is_control for row in run.rows)
    exceeding = sum(item.exceeds_noise for item in found)
    return (f"Compared at equal L0: {trained}" + (f", {variants} pursuit encoders over the baseline's dictionary" if variants
                                                  else "") + (f" and {controls} controls" if controls else "")
            + f"; {exceeding} of {len(found)} differences exceed noise after Holm's correction.")


def _untrained(found: Sequence[Comparison]) -> list[str]:
    """Every trained SAE against untrained rows, in the headline metric and in probing."""
    lines = []
    for item in found:
        if item.other is None or item.other.grid.label != UNTRAINED or item.one.lower.rows[0].role == "variant":
            continue
        if item.metric.key != MAIN:
            continue
        beside = [other for other in found if (other.pair, other.l0) == (item.pair, item.l0)
                  and other.metric.key.startswith("sae_top_")]
        probing = "; ".join(f"{other.metric.label.lower()} {_difference(other)}" for other in beside)
        lines.append(f"{item.one.title} against untrained data rows under matching pursuit, at L0 {number(item.l0)}: "
                     f"variance explained {_difference(item)}" + (f"; {probing}." if probing else "."))
    return lines[:2]


def _largest(found: Sequence[Comparison]) -> list[str]:
    """The largest difference between two trained or pursuit rows that exceeds noise, in the headline metric."""
    rivals = [item for item in found if item.other is not None and not item.other.is_control and not item.one.is_control
              and item.metric.key == MAIN and item.exceeds_noise]
    if not rivals:
        return []
    item = max(rivals, key=lambda item: abs(item.found.value))
    return [f"The largest difference between two encoders, at L0 {number(item.l0)}: {item.pair[0]} less {item.pair[1]}, "
            f"variance explained {_difference(item)}."]


def _alike(found: Sequence[Comparison]) -> list[str]:
    """Metrics in which no two SAEs differ by more than noise."""
    metrics: dict[Metric, bool] = {}
    for item in found:
        if item.other is not None and not item.other.is_control and not item.one.is_control:
            metrics[item.metric] = metrics.get(item.metric, False) or item.exceeds_noise
    quiet = [metric.label for metric, exceeds in metrics.items() if not exceeds]
    return [f"In {', '.join(quiet)} no two of the trained SAEs and pursuit encoders are separated."] if quiet else []


def _difference(item: Comparison) -> str:
    def signed(value: float) -> str:
        return ("+" if value > 0 else "") + number(value).replace("-", "−")

    return (f"{signed(item.found.value)} [{signed(item.found.low)}, {signed(item.found.high)}]"
            + ("" if item.exceeds_noise else ", within noise"))


def _not_varied(run: Run) -> str:
    seeds = [contender.seeds for contender in contenders(run.rows) if contender.rows[0].recipe]
    fixed = ["the language model", "the layer", "the length of training"]
    if not seeds or min(seeds) < SEEDS_FOR_A_CLAIM:
        fixed.insert(0, "the training seed")
    probing = next((found for row in run.rows if (found := row.evals.get("sparse_probing", {}).get("outcomes"))), {})
    if probing and probing.get("train_draws", 1) < 2:
        fixed.append("the probes' training texts")
    return f"Not varied: {', '.join(fixed)}. What differs here differs on these texts."
