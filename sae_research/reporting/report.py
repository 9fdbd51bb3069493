"""The report's frame: under which terms the numbers hold, how every evaluation ended, figures, definitions.

The report's section on training: what curves and held-out figures show to be wrong, and what to change.

What a reader can quote of the run, in a few sentences computed from its tests: they claim no more than was tested.

Write METRICS.md: what ran, the table, how to read it, both definitions, and how every evaluation ended.

Every sentence that compares is computed from the numbers, and none claims more than was tested. The sections stand in
report_setting.py, report_results.py and report_noise.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_research.config.evaluations import EVALUATIONS
from sae_research.reporting.comparisons import SEEDS_FOR_A_CLAIM, contenders
from sae_research.reporting.ground_truth import ground_truth
from sae_research.reporting.metrics import EVAL_TITLES, EVALS, METRICS, STOCK_SUFFIX, Metric, headline
from sae_research.reporting.report_noise import differences, equal_l0, intervals, seeds
from sae_research.reporting.report_results import controls, optional, probing_tasks, results, side_by_side, stricter
from sae_research.reporting.results import RESULTS, Row, Run
from sae_research.reporting.tables import ABSENT, count, markdown, number
from sae_research.reporting.transfer import transfer
from sae_research.runtime.files import write_text
from sae_research.runtime.stages import read_status

if TYPE_CHECKING:
    from sae_research.reporting.comparisons import Comparison


FIELD_TOKENS = 50e6
"""Fewest training tokens in common use; a run below it calls itself a smoke run."""
SAID_ABOVE = {"model", "hooks", "text"}
"""Notes of an evaluation that the first section holds already."""


def what_ran(run: Run) -> str:
    """Model, hook, text, training tokens, contexts: the terms under which the numbers hold."""
    facts = [
        ("Language model", _shared(run.rows, "model_name")),
        ("Hook point", _shared(run.rows, "hook_name")),
        ("SAEs", str(len(run.rows))),
        ("Training", _training(run)),
        ("Core evaluation", _core_setting(run)),
        ("Sparse probing", _probing_setting(run)),
    ]
    lines = [f"- {name}: {text}" for name, text in facts if text]
    return "\n".join(["## What ran", "", *lines, "", *_caution(run)]).rstrip()


def _shared(rows: Iterable[Row], key: str) -> str:
    values = dict.fromkeys(str(row.cfg[key]) for row in rows if row.cfg.get(key) is not None)
    return ", ".join(f"`{value}`" for value in values)


def _training(run: Run) -> str:
    tokens, trained = run.training.get("tokens"), run.training.get("saes", {})
    if not tokens:
        return "no SAE was trained in this run"
    return f"{count(tokens)} tokens per SAE ({', '.join(f'`{name}`' for name in trained)})"


def _core_setting(run: Run) -> str:
    config = run.evals["core"].get("config", {})
    tokens = next((value for row in run.rows if (value := row.value("tokens")) is not None), None)
    return _listed(
        [
            f"text `{config['dataset']}`" if config.get("dataset") else "",
            f"contexts of {config['context_size']} tokens" if config.get("context_size") else "",
            _tokens_counted(run, tokens) if tokens is not None else "",
        ]
    )


def _tokens_counted(run: Run, tokens: float) -> str:
    """How many tokens stand behind the figures: those of predictions are far fewer where evidence says so."""
    sums = next((found for row in run.rows if (found := row.evals.get("core", {}).get("cluster_sums", {}).get("kl"))), None)
    predicted = "" if sums is None else f", {count(round(sum(sums['denominator'])))} for loss and KL"
    return f"{count(tokens)} tokens counted" + (f" for L0 and variance{predicted}" if predicted else "")


def _probing_setting(run: Run) -> str:
    config = run.evals["sparse_probing"].get("config", {})
    names = config.get("dataset_names") or []
    return _listed(
        [
            ", ".join(f"`{name}`" for name in names),
            f"{config['probe_train_set_size']} training and {config['probe_test_set_size']} test texts for each class "
            "against the others"
            if "probe_train_set_size" in config and "probe_test_set_size" in config
            else "",
            f"contexts of {config['context_length']} tokens" if config.get("context_length") else "",
        ]
    )


def _listed(parts: Iterable[str]) -> str:
    return "; ".join(part for part in parts if part)


def _caution(run: Run) -> list[str]:
    tokens = run.training.get("tokens")
    lines = []
    if tokens and tokens < FIELD_TOKENS:
        lines.append(
            f"**This is a smoke run.** Its SAEs saw {count(tokens)} training tokens where the field uses "
            "50M to 500M: it shows that the pipeline works, not which architecture to prefer."
        )
    if any(row.evals.get(name, {}).get("intervals") for row in run.rows for name in EVALS):
        lines.append(
            "[Intervals](#intervals) say how far the figures would move on other text of the same kind, and "
            "[which differences exceed noise](#which-differences-exceed-noise) tests them."
        )
    else:
        lines.append("These results hold no intervals: a difference between two rows is one of two values and no more.")
    return lines


def statuses(run: Run, root: Path = Path(".")) -> str:
    """How each evaluation ended, and what was skipped for which reason. root: the project's folder."""
    body, details = [], []
    for name in EVALS:
        state = run.evals[name]
        n_saes = sum(1 for row in run.rows if row.evals.get(name, {}).get("status") == "ok")
        body.append([EVAL_TITLES[name], state["status"], str(n_saes), _one_line(state.get("message", ""))])
        details += [
            f"- {EVAL_TITLES[name]}, skipped `{what}`: {_one_line(why)}"
            for what, why in sorted(state.get("skipped", {}).items())
        ]
        details += [
            f"- {EVAL_TITLES[name]}, {key.replace('_', ' ')}: {_one_line(value)}"
            for key, value in sorted(state.get("notes", {}).items())
            if isinstance(value, (str, int, float)) and key not in SAID_ABOVE
        ]
    for other in (one for name, one in EVALUATIONS.items() if name not in EVALS):
        state = read_status(root / RESULTS / other.name)
        if state["status"] != "missing":
            body.append([other.title, state["status"], ABSENT, _one_line(state["message"])])
    table = markdown(["Evaluation", "Status", "SAEs", "Message"], body, left=4)
    return "\n".join(["## How each evaluation ended", "", table, "", *details]).rstrip()


def _one_line(value: object) -> str:
    text = number(value) if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def images(run: Run) -> str:
    """The figures, by relative path."""
    lines = ["## Figures", "", "![Four figures against L0](images/overview.png)", ""]
    lines += [f"![{headline(key).label} against L0](images/l0_vs_{key}.png)" for key in run.plotted]
    lines += ["", "![Density of latents](images/latent_density.png)"]
    if run.curves:
        lines += [
            "",
            "![Training curves](images/training_curves.png)",
            "",
            "Training losses of different recipes are sums of different terms: compare L0 and variance explained.",
        ]
    return "\n".join(lines)


def definitions(run: Run) -> str:
    """Every figure of `metrics/` in one sentence, for the evaluations that ran."""
    ran = [name for name in EVALS if run.unavailable(name) is None]
    mine = [metric for metric in METRICS if metric.eval in ran and not metric.key.endswith(STOCK_SUFFIX)]
    theirs = [metric for metric in METRICS if metric.eval in ran and metric.key.endswith(STOCK_SUFFIX)]
    if not mine:
        return ""
    parts = ["## Definitions", "", _definition_table(mine)]
    if theirs:
        parts += ["", "SAE Bench 0.6.0, where its definition differs:", "", _definition_table(theirs)]
    return "\n".join(parts)


def _definition_table(metrics: Iterable[Metric]) -> str:
    body = [[f"`{metric.key.replace('{k}', 'k')}`", metric.label + metric.arrow, metric.definition] for metric in metrics]
    return markdown(["Key", "Label", "Definition"], body, left=3).replace("{k}", "*k*")


def training(run: Run) -> str:
    """Findings of the train stage as a table; empty where nothing was trained or the stage is older than they."""
    diagnosed = run.training.get("diagnose")
    if not diagnosed:
        return ""
    rows = [_row("text", finding) for finding in diagnosed.get("text", [])]
    rows += [_row(f"`{name}`", finding) for name, findings in diagnosed["saes"].items() for finding in findings]
    healthy = [f"`{name}`" for name, findings in diagnosed["saes"].items() if not findings]
    lines = ["## What the training shows", ""]
    if rows:
        lines += [markdown(["SAE", "Finding", "Figure", "Limit", "Change"], rows, left=2), ""]
    if healthy:
        lines.append(f"Nothing stands out for {', '.join(healthy)}.")
    lines.append("Rules and limits: [docs/training.md](docs/training.md).")
    return "\n".join(lines)


def _row(name: str, finding: dict[str, Any]) -> list[str]:
    text = finding["says"].replace("|", "\\|")
    return [
        name,
        text,
        f"{finding['figure']} {number(finding['value'])}",
        number(finding["limit"]),
        f"`{finding['change'].partition(':')[0]}`:{finding['change'].partition(':')[2]}",
    ]


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
    return (
        f"Compared at equal L0: {trained}"
        + (f", {variants} pursuit encoders over the baseline's dictionary" if variants else "")
        + (f" and {controls} controls" if controls else "")
        + f"; {exceeding} of {len(found)} differences exceed noise after Holm's correction."
    )


def _untrained(found: Sequence[Comparison]) -> list[str]:
    """Every trained SAE against untrained rows, in the headline metric and in probing."""
    lines = []
    for item in found:
        if item.other is None or item.other.grid.label != UNTRAINED or item.one.lower.rows[0].role == "variant":
            continue
        if item.metric.key != MAIN:
            continue
        beside = [
            other
            for other in found
            if (other.pair, other.l0) == (item.pair, item.l0) and other.metric.key.startswith("sae_top_")
        ]
        probing = "; ".join(f"{other.metric.label.lower()} {_difference(other)}" for other in beside)
        lines.append(
            f"{item.one.title} against untrained data rows under matching pursuit, at L0 {number(item.l0)}: "
            f"variance explained {_difference(item)}" + (f"; {probing}." if probing else ".")
        )
    return lines[:2]


def _largest(found: Sequence[Comparison]) -> list[str]:
    """The largest difference between two trained or pursuit rows that exceeds noise, in the headline metric."""
    rivals = [
        item
        for item in found
        if item.other is not None
        and not item.other.is_control
        and not item.one.is_control
        and item.metric.key == MAIN
        and item.exceeds_noise
    ]
    if not rivals:
        return []
    item = max(rivals, key=lambda item: abs(item.found.value))
    return [
        f"The largest difference between two encoders, at L0 {number(item.l0)}: {item.pair[0]} less {item.pair[1]}, "
        f"variance explained {_difference(item)}."
    ]


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

    return f"{signed(item.found.value)} [{signed(item.found.low)}, {signed(item.found.high)}]" + (
        "" if item.exceeds_noise else ", within noise"
    )


def _not_varied(run: Run) -> str:
    seeds = [contender.seeds for contender in contenders(run.rows) if contender.rows[0].recipe]
    fixed = ["the language model", "the layer", "the length of training"]
    if not seeds or min(seeds) < SEEDS_FOR_A_CLAIM:
        fixed.insert(0, "the training seed")
    probing = next((found for row in run.rows if (found := row.evals.get("sparse_probing", {}).get("outcomes"))), {})
    if probing and probing.get("train_draws", 1) < 2:
        fixed.append("the probes' training texts")
    return f"Not varied: {', '.join(fixed)}. What differs here differs on these texts."


REPORT = Path("METRICS.md")


def write_report(run: Run, root: Path = Path(".")) -> None:
    """Write METRICS.md and metrics/differences.csv. The same results give the same bytes."""
    from sae_research.reporting.comparisons import comparisons, write_differences_csv  # numpy, which no other part needs

    found = comparisons(run)
    write_text(root / REPORT, report(run, found, root))
    write_differences_csv(found, root)


def report(run: Run, found: list[Comparison] | None = None, root: Path = Path(".")) -> str:
    """The whole text. found: all comparisons of the run, made here unless given. root: the project's folder."""
    if found is None:
        from sae_research.reporting.comparisons import comparisons

        found = comparisons(run)
    sections = (
        summary(run, found),
        what_ran(run),
        results(run, root),
        stricter(run),
        intervals(run),
        seeds(run),
        differences(run, found),
        equal_l0(run),
        controls(run),
        side_by_side(run),
        probing_tasks(run),
        optional(run),
        training(run),
        transfer(root),
        ground_truth(root),
        statuses(run, root),
        images(run),
        definitions(run),
    )
    head = (
        "# Metrics\n\nGenerated by `python -m scripts.generate_report`; edits are lost. "
        "Every figure, tidy: [metrics/results.csv](metrics/results.csv)."
    )
    return "\n\n".join([head, *(section for section in sections if section)]) + "\n"
