"""What the ground-truth evaluation left behind: means and intervals over seeds, and `metrics/ground_truth.json`.

Draw `images/ground_truth/*.png`: what was found of known features against L0, and which metric follows it.

The report's section on ground truth: what was found of known features, and which metric follows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sae_research.config.reporting import Visualization
from sae_research.plotting.axes import INK, MUTED, SMALL, TEXT, log_axis, pixels_of, save, say, span
from sae_research.reporting.results import STATUS_KEY, is_figure
from sae_research.reporting.shapes import FIGURE, evaluation_status, shaped
from sae_research.reporting.tables import ABSENT, markdown, number, with_interval
from sae_research.reporting.transfer_figures import legend_below, new_figure, panel
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import read_json, round_significant, slugify, write_json

FOLDER = Path("eval_results/ground_truth")
RESULTS_FILE = "results.json"
METRICS_FILE = Path("metrics/ground_truth.json")
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t by degrees of freedom, from 1."""


@dataclass(frozen=True)
class Line:
    """One method at one sparsity, over seeds."""

    method: str
    dictionary: str
    encoder: str
    sparsity: str
    values: dict[str, list[float]]
    """By metric, one a seed"""
    flags: list[str]

    @property
    def name(self) -> str:
        return f"{self.method}, {self.sparsity}" if self.sparsity else self.method

    def mean(self, key: str) -> float | None:
        found = self.values.get(key)
        return sum(found) / len(found) if found else None

    def interval(self, key: str) -> tuple[float, float] | None:
        """95 % over seeds by Student's t; None for fewer than two."""
        found = self.values.get(key, [])
        if len(found) < 2:
            return None
        mean, n = sum(found) / len(found), len(found)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in found) / (n - 1))
        half = T_975[min(n - 1, len(T_975)) - 1] * deviation / math.sqrt(n)
        return mean - half, mean + half


@dataclass(frozen=True)
class GroundTruthRun:
    """All of one run of the stage."""

    result: dict[str, Any]

    @property
    def lines(self) -> list[Line]:
        return lines(self.result["rows"])

    def follow(self, scope: str) -> dict[str, Any]:
        return self.result["follow"][scope]


def read_ground_truth(root: Path = Path(".")) -> GroundTruthRun | None:
    """The finished run below `root`; None where the evaluation was switched off, failed or never ran."""
    path = root / FOLDER / RESULTS_FILE
    if evaluation_status(root / FOLDER)["status"] != "ok" or not path.is_file():
        return None
    return GroundTruthRun(_results(path))


def _results(path: Path) -> dict[str, Any]:
    """`results.json`. Raises `UserError` for one that is damaged."""
    shape = {
        "setting!": object,
        "generator!": [{str: object}],
        "notes!": [str],
        "rows!": [{"method!": str, "dictionary!": str, "encoder!": str, "metrics!": {str: FIGURE}, "flags!": [str]}],
        "follow!": {str: {"correlations!": object, "methods!": [str], "note": object}},
    }
    return shaped(read_json(path), shape, path, "run `dvc repro ground_truth_eval` again")


def lines(rows: Sequence[Mapping[str, Any]]) -> list[Line]:
    """Rows of all seeds as one line for each method and sparsity, in the order of the first seed."""
    found: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in ("method", "dictionary", "encoder", "sparsity")), []).append(row)
    return [
        Line(
            *key,
            {metric: [row["metrics"][metric] for row in same if metric in row["metrics"]] for metric in same[0]["metrics"]},
            list(dict.fromkeys(flag for row in same for flag in row["flags"])),
        )
        for key, same in found.items()
    ]


def extract_ground_truth(folder: Path, output: Path) -> None:
    """Write `{method_sparsity: {metric: mean over seeds}}`, rank correlations and the stage's status."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; run the stage that writes it, `dvc repro ground_truth_eval`")
    status = evaluation_status(folder)
    if status["status"] != "ok":
        message = {"message": status["message"]} if status["status"] != "disabled" and status.get("message") else {}
        write_json(output, {STATUS_KEY: {"status": status["status"], **message}})
        return
    result = _results(folder / RESULTS_FILE)
    figures = {slugify(line.name): {key: line.mean(key) for key in line.values} for line in lines(result["rows"])}
    spearman = {
        scope: {
            f"{metric}_with_{truth}": values["spearman"]
            for metric, truths in found["correlations"].items()
            for truth, values in truths.items()
            if is_figure(values.get("spearman"))
        }
        for scope, found in result["follow"].items()
    }
    write_json(
        output,
        round_significant(
            {
                **figures,
                "rank_correlations": spearman,
                STATUS_KEY: {"status": "ok", "seeds": result["setting"]["n_seeds"], "methods": len(figures)},
            }
        ),
    )


IMAGES = Path("images/ground_truth")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#A6761D", "#7A5195", "#8C8C8C", "#444444")
DICTIONARY_COLORS = {"truth": "#009E73", "trained": "#0072B2", "untrained": "#8C8C8C"}
MARKERS = {"ihtp": "X", "mpsae": "s", "omp": "D", "topk_refit": "v", "nn_mpsae": "P", "nn_omp": "^"}
Picture = Callable[[GroundTruthRun, Visualization], Figure]


def draw_ground_truth(style: Visualization, root: Path = Path(".")) -> list[Path]:
    """Write every picture of a finished run and delete those of an earlier one. Returns what was written."""
    run, folder = read_ground_truth(root), root / IMAGES
    wanted = {} if run is None else {folder / f"{name}.png": draw for name, draw in PICTURES.items()}
    for path in folder.glob("*.png") if folder.is_dir() else ():
        if path not in wanted:
            path.unlink()
    for path, draw in wanted.items():
        save(pixels_of(draw(run, style)), path, style.dpi)
    return sorted(wanted)


def recipes(run: GroundTruthRun, style: Visualization) -> Figure:
    """Trained SAEs: variance explained, MCC and F1 against L0, means and intervals over seeds."""
    found = [line for line in run.lines if line.encoder == OWN]
    figure = new_figure(style, 3, legend=0.4)
    panels = figure.subplots(1, 3)
    for axes, key in zip(panels, ("variance_explained", "mcc", "latent_f1"), strict=True):
        panel(axes, LABELS[key], "L0 (log scale)", LABELS[key])
        for name, color in zip(dict.fromkeys(line.method for line in found), COLORS * len(found), strict=False):
            _curve(axes, [line for line in found if line.method == name], key, name, color, "o")
        _log_l0(axes, found)
    legend_below(figure, panels[0], 4)
    return figure


def pursuit(run: GroundTruthRun, style: Visualization) -> Figure:
    """Pursuit encoders over known dictionaries: variance explained, F1 and top-1 probing against L0."""
    found = [line for line in run.lines if " over " in line.method]
    figure = new_figure(style, 3, legend=1.2)
    panels = figure.subplots(1, 3)
    if not found:
        say(panels[1], "no pursuit encoder was asked for (ground_truth.pursuit)")
        return figure
    for axes, key in zip(panels, ("variance_explained", "latent_f1", "top_1_probing"), strict=True):
        panel(axes, LABELS[key], "L0 (log scale)", LABELS[key])
        for name in dict.fromkeys(line.method for line in found):
            same = [line for line in found if line.method == name]
            encoder, dictionary = same[0].encoder, same[0].dictionary
            _curve(axes, same, key, name.replace("_", " "), DICTIONARY_COLORS[dictionary], MARKERS[encoder])
        _log_l0(axes, found)
    legend_below(figure, panels[0], 4)
    return figure


def _curve(axes: Axes, found: list[Line], key: str, label: str, color: str, marker: str) -> None:
    found = sorted((line for line in found if line.mean(key) is not None), key=lambda line: line.mean("l0") or 0)
    x, y = [line.mean("l0") for line in found], [line.mean(key) for line in found]
    bounds = [line.interval(key) for line in found]
    if all(bounds) and found:
        axes.errorbar(
            x,
            y,
            [
                [value - low for value, (low, _) in zip(y, bounds, strict=True)],
                [high - value for value, (_, high) in zip(y, bounds, strict=True)],
            ],
            color=color,
            fmt="none",
            elinewidth=0.8,
            alpha=0.6,
            capsize=2,
        )
    axes.plot(x, y, color=color, marker=marker, markersize=4.5, linewidth=1.0, label=label)


def _log_l0(axes: Axes, found: list[Line]) -> None:
    l0 = [value for line in found if (value := line.mean("l0"))]
    if l0:
        log_axis(axes.xaxis, *span(l0, log=True))


def follow(run: GroundTruthRun, style: Visualization) -> Figure:
    """Rank correlation of every metric with the truth, and its interval, for each set of methods."""
    scopes = [scope for scope in SCOPES if run.follow(scope)["correlations"]]
    figure = new_figure(style, max(1, len(scopes)), legend=0.3)
    panels = figure.subplots(1, max(1, len(scopes)), squeeze=False)[0]
    if not scopes:
        say(panels[0], run.follow("all")["note"])
        return figure
    for axes, scope in zip(panels, scopes, strict=True):
        found = run.follow(scope)["correlations"]
        panel(
            axes,
            f"{scope.replace('_', ' ')}, {len(run.follow(scope)['methods'])} methods at one L0",
            "Spearman's rank correlation",
            "",
        )
        for place, (truth, label) in enumerate(TRUTHS.items()):
            for row, metric in enumerate(found):
                _whisker(axes, found[metric].get(truth, {}), -row - 0.2 * place, COLORS[place], label if row == 0 else None)
        axes.axvline(0, color=MUTED, linewidth=0.8)
        axes.set_xlim(-1.05, 1.05)
        axes.set_yticks(
            [-row - 0.1 for row in range(len(found))], [LABELS[metric] for metric in found], fontsize=SMALL, color=INK
        )
    legend_below(figure, panels[0], 2)
    return figure


def _whisker(axes: Axes, values: dict[str, object], height: float, color: str, label: str | None) -> None:
    if "spearman" not in values:
        axes.plot([], [], color=color, marker="o", linestyle="none", label=label)
        axes.text(0.03, height, "constant", fontsize=SMALL, color=MUTED, va="center")
        return
    axes.plot([values["spearman"]], [height], color=color, marker="o", markersize=TEXT / 2, linestyle="none", label=label)
    if "interval" in values:
        axes.plot(values["interval"], [height, height], color=color, linewidth=1.4)


PICTURES: dict[str, Picture] = {"recipes": recipes, "pursuit": pursuit, "follow": follow}


LABELS = {
    "l0": "L0",
    "variance_explained": "Variance explained",
    "mcc": "MCC",
    "mcc_activations": "MCC of activations",
    "latent_precision": "Precision",
    "latent_recall": "Recall",
    "latent_f1": "F1",
    "uniqueness": "Uniqueness",
    "fraction_dead": "Dead",
    "fraction_duplicate": "Duplicate",
    "absorption": "Absorption",
    "split_latents": "Latents a parent",
    "top_1_probing": "Top-1 probing",
    "f1": "F1 of features",
    "cosine_similarity": "Cosine",
    "fraction_alive": "Fraction alive",
}
TRAINED = (
    "l0",
    "variance_explained",
    "top_1_probing",
    "mcc",
    "mcc_activations",
    "latent_f1",
    "latent_precision",
    "latent_recall",
    "uniqueness",
    "fraction_dead",
    "fraction_duplicate",
    "absorption",
    "split_latents",
)
PURSUIT = ("l0", "variance_explained", "top_1_probing", "latent_f1", "latent_precision", "latent_recall", "mcc_activations")
SCOPES = {
    "all": "Trained SAEs, and pursuit over trained and untrained dictionaries",
    "trained_dictionaries": "Trained SAEs, and pursuit over a trained dictionary (whose MCC they share)",
    "trained": "Trained SAEs alone",
}
TRUTHS = {"mcc": "MCC", "latent_f1": "F1"}
OWN = "own encoder"
AMONG = {"all": "(untrained dictionaries among them)", "trained_dictionaries": "of trained dictionaries alone"}
WORDS = {"truth": "true features", "trained": "trained dictionary", "untrained": "untrained rows"}


def ground_truth(root: Path = Path(".")) -> str:
    """The whole section; empty where the evaluation left nothing."""
    run = read_ground_truth(root)
    if run is None:
        return ""
    setting, generator = run.result["setting"], run.result["generator"]
    found = run.lines
    head = (
        f"{setting['num_features']:,} known features in {setting['hidden_dim']} dimensions, on average "
        f"{number(_mean(generator, 'l0'))} active (setting `{setting['name']}` of SAELens' synthetic module, arXiv "
        f"2602.14687), {setting['samples']:,} training and {setting['test_samples']:,} test samples, "
        f"{setting['n_seeds']} seeds. Means over seeds and their 95 % intervals (Student's t)"
        + (": none with one seed." if setting["n_seeds"] < 2 else ".")
    )
    return "\n".join(
        [
            "## Ground truth",
            "",
            head,
            "",
            "*MCC*: mean absolute cosine of true directions and decoder rows, matched one to one. *F1*: of a "
            "latent's firing "
            "against that of its nearest true feature, mean over latents. *Absorption*: how much more often a "
            "parent's latent "
            "is silent where the latent of a child fires. Definitions: docs/ground_truth.md.",
            "",
            _table(
                [
                    line
                    for line in found
                    if line.encoder == OWN
                    or line.dictionary not in ("truth", "trained", "untrained")
                    or "over" not in line.method
                ],
                TRAINED,
            ),
            "",
            *_notes(run),
            "### Which metric follows the truth",
            "",
            *follows(run),
            "",
            "### Pursuit over known dictionaries",
            "",
            _table([line for line in found if " over " in line.method], PURSUIT),
            "",
            *pursuit_findings(found),
        ]
    ).rstrip()


def _notes(run: GroundTruthRun) -> list[str]:
    notes = [f"- {note}." for note in run.result["notes"]]
    flagged = {
        flag.partition(":")[0]: [
            line.name for line in run.lines if any(f.startswith(flag.partition(":")[0]) for f in line.flags)
        ]
        for line in run.lines
        for flag in line.flags
        if not flag.startswith("narrow")
    }
    notes += [f"- *{flag}*: {', '.join(f'`{name}`' for name in names)}." for flag, names in flagged.items()]
    return [*notes, ""] if notes else []


def _table(found: list[Line], keys: tuple[str, ...]) -> str:
    shown = [key for key in keys if any(line.mean(key) is not None for line in found)]
    body = [[f"`{line.name}`", *(with_interval(line.mean(key), line.interval(key)) for key in shown)] for line in found]
    return markdown(["SAE", *(LABELS[key] for key in shown)], body)


def _mean(values: list[dict[str, Any]], key: str) -> float:
    return sum(each[key] for each in values) / len(values)


def follows(run: GroundTruthRun) -> list[str]:
    """The table of rank correlations, for each set of methods."""
    parts: list[str] = []
    for scope, title in SCOPES.items():
        found = run.follow(scope)
        if not found["correlations"]:
            parts += [f"{title}: {found['note']}.", ""]
            continue
        body = [
            [LABELS[metric], *(_cell(truths.get(truth, {})) for truth in TRUTHS)]
            for metric, truths in found["correlations"].items()
        ]
        parts += [
            f"{title}: Spearman's rank correlation over {len(found['methods'])} methods, each read at L0 "
            f"{number(found['l0'])} (linear in log L0), mean over {found['seeds']} "
            f"seed{'s' * (found['seeds'] > 1)}; the interval draws methods and seeds anew."
            + (f" {found['note'].capitalize()}." if found["note"] else ""),
            "",
            markdown(["Metric", *TRUTHS.values()], body),
            "",
        ]
        if found["left_out"]:
            parts += [f"No L0 in common, so left out: {', '.join(f'`{name}`' for name in found['left_out'])}.", ""]
    return parts[:-1]


def _cell(values: Mapping[str, Any]) -> str:
    if "spearman" not in values:
        return values.get("note", ABSENT)
    bounds = values.get("interval")
    return with_interval(values["spearman"], tuple(bounds) if bounds else None)


def beside(metric: str, root: Path = Path(".")) -> str:
    """One line on how far a metric followed the truth, for the tables of real models; empty where that is not known.

    metric: `variance_explained` or `top_1_probing`.
    """
    run = read_ground_truth(root)
    said = (
        []
        if run is None
        else [
            f"{_followed(run.follow(scope), metric)} {words}"
            for scope, words in AMONG.items()
            if _followed(run.follow(scope), metric)
        ]
    )
    if not said:
        return ""
    return (
        f"*{LABELS[metric]} and the truth*: on synthetic activations with known features, its rank correlation at equal "
        f"L0 is {'; '.join(said)}. See [ground truth](#ground-truth)."
    )


def _followed(found: Mapping[str, Any], metric: str) -> str:
    """`0.69 [0.14, 0.92] with MCC and 0.44 [-0.19, 0.61] with F1 over 13 methods`; empty where that is not known."""
    truths = found["correlations"].get(metric, {})
    parts = [
        f"{_cell(truths[truth])} with {label}" for truth, label in TRUTHS.items() if "spearman" in truths.get(truth, {})
    ]
    return f"{' and '.join(parts)} over {len(found['methods'])} methods" if parts else ""


def pursuit_findings(found: list[Line]) -> list[str]:
    """What pursuit encoders give over a dictionary, beside that dictionary's own encoder where it has one."""
    own = next((line for line in found if line.encoder == OWN and line.dictionary == "trained"), None)
    text = []
    for dictionary in ("truth", "trained", "untrained"):
        rows = [
            line
            for line in found
            if line.dictionary == dictionary
            and line.method.endswith(f"over {dictionary}")
            and line.mean("latent_f1") is not None
        ]
        if not rows:
            continue
        best = max(rows, key=lambda line: line.mean("latent_f1") or 0)
        parts = [
            f"`{line.name}` {number(line.mean('latent_f1'))} at L0 {number(line.mean('l0'))}"
            for line in rows
            if line.encoder in ("ihtp", "mpsae")
        ]
        text.append(
            f"- Over the {WORDS[dictionary]} the best F1 is {number(best.mean('latent_f1'))} (`{best.name}`, L0 "
            f"{number(best.mean('l0'))})" + (f"; {', '.join(parts)}." if parts else ".")
        )
    if own is not None:
        text.append(
            f"- The trained dictionary's own encoder (`{own.name}`): F1 {number(own.mean('latent_f1'))} at L0 "
            f"{number(own.mean('l0'))}."
        )
    return text


def plain_table(result: dict[str, Any]) -> str:
    """All rows as text, for the command line."""
    keys = ("l0", "variance_explained", "top_1_probing", "mcc", "latent_f1", "uniqueness", "fraction_dead", "absorption")
    found = lines(result["rows"])
    width = max(len(line.name) for line in found)
    head = " " * width + "".join(f"{LABELS[key]:>20s}" for key in keys)
    body = [f"{line.name:{width}s}" + "".join(f"{number(line.mean(key)):>20s}" for key in keys) for line in found]
    return "\n".join([head, *body, *(f"note: {note}" for note in result["notes"])])
