"""The report's frame: under which terms the numbers hold, how every evaluation ended, figures, definitions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from sae_research.reporting.ground_truth_data import FOLDER as GROUND_TRUTH
from sae_research.reporting.metrics import EVAL_TITLES, EVALS, METRICS, STOCK_SUFFIX, Metric, headline
from sae_research.reporting.run import Row, Run
from sae_research.reporting.tables import ABSENT, count, markdown, number
from sae_research.reporting.transfer_data import FOLDER as TRANSFER
from sae_research.store_stages import read_status

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
    for title, folder in (("Transfer to a finetuned model", TRANSFER), ("Ground truth", GROUND_TRUTH)):
        state = read_status(root / folder)
        if state["status"] != "missing":
            body.append([title, state["status"], ABSENT, _one_line(state["message"])])
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
        lines += ["", "![Training curves](images/training_curves.png)", "",
                  "Training losses of different recipes are sums of different terms: compare L0 and variance explained."]
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
    body = [
        [f"`{metric.key.replace('{k}', 'k')}`", metric.label + metric.arrow, metric.definition]
        for metric in metrics
    ]
    return markdown(["Key", "Label", "Definition"], body, left=3).replace("{k}", "*k*")
