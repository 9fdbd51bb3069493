"""The report's section on ground truth: what was found of known features, and which metric follows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_research.reporting.ground_truth_data import GroundTruthRun, Line, lines, read_ground_truth
from sae_research.reporting.tables import ABSENT, markdown, number, with_interval

LABELS = {"l0": "L0", "variance_explained": "Variance explained", "mcc": "MCC", "mcc_activations": "MCC of activations",
          "latent_precision": "Precision", "latent_recall": "Recall", "latent_f1": "F1", "uniqueness": "Uniqueness",
          "fraction_dead": "Dead", "fraction_duplicate": "Duplicate", "absorption": "Absorption",
          "split_latents": "Latents a parent", "top_1_probing": "Top-1 probing", "f1": "F1 of features",
          "cosine_similarity": "Cosine", "fraction_alive": "Fraction alive"}
TRAINED = ("l0", "variance_explained", "top_1_probing", "mcc", "mcc_activations", "latent_f1", "latent_precision",
           "latent_recall", "uniqueness", "fraction_dead", "fraction_duplicate", "absorption", "split_latents")
PURSUIT = ("l0", "variance_explained", "top_1_probing", "latent_f1", "latent_precision", "latent_recall", "mcc_activations")
SCOPES = {"all": "Trained SAEs, and pursuit over trained and untrained dictionaries",
          "trained_dictionaries": "Trained SAEs, and pursuit over a trained dictionary (whose MCC they share)",
          "trained": "Trained SAEs alone"}
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
    head = (f"{setting['num_features']:,} known features in {setting['hidden_dim']} dimensions, on average "
            f"{number(_mean(generator, 'l0'))} active (setting `{setting['name']}` of SAELens' synthetic module, arXiv "
            f"2602.14687), {setting['samples']:,} training and {setting['test_samples']:,} test samples, "
            f"{setting['n_seeds']} seeds. Means over seeds and their 95 % intervals (Student's t)"
            + (": none with one seed." if setting["n_seeds"] < 2 else "."))
    return "\n".join([
        "## Ground truth", "", head, "",
        "*MCC*: mean absolute cosine of true directions and decoder rows, matched one to one. *F1*: of a latent's firing "
        "against that of its nearest true feature, mean over latents. *Absorption*: how much more often a parent's latent "
        "is silent where the latent of a child fires. Definitions: docs/ground_truth.md.", "",
        _table([line for line in found if line.encoder == OWN or line.dictionary not in ("truth", "trained", "untrained")
                or "over" not in line.method], TRAINED), "",
        *_notes(run), "### Which metric follows the truth", "", *follows(run), "",
        "### Pursuit over known dictionaries", "",
        _table([line for line in found if " over " in line.method], PURSUIT), "", *pursuit_findings(found)]).rstrip()


def _notes(run: GroundTruthRun) -> list[str]:
    notes = [f"- {note}." for note in run.result["notes"]]
    flagged = {flag.partition(":")[0]: [line.name for line in run.lines if any(f.startswith(flag.partition(":")[0])
                                                                               for f in line.flags)]
               for line in run.lines for flag in line.flags if not flag.startswith("narrow")}
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
        body = [[LABELS[metric], *(_cell(truths.get(truth, {})) for truth in TRUTHS)]
                for metric, truths in found["correlations"].items()]
        parts += [f"{title}: Spearman's rank correlation over {len(found['methods'])} methods, each read at L0 "
                  f"{number(found['l0'])} (linear in log L0), mean over {found['seeds']} "
                  f"seed{'s' * (found['seeds'] > 1)}; the interval draws methods and seeds anew."
                  + (f" {found['note'].capitalize()}." if found["note"] else ""), "",
                  markdown(["Metric", *TRUTHS.values()], body), ""]
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
    said = [] if run is None else [f"{_followed(run.follow(scope), metric)} {words}" for scope, words in AMONG.items()
                                   if _followed(run.follow(scope), metric)]
    if not said:
        return ""
    return (f"*{LABELS[metric]} and the truth*: on synthetic activations with known features, its rank correlation at equal "
            f"L0 is {'; '.join(said)}. See [ground truth](#ground-truth).")


def _followed(found: Mapping[str, Any], metric: str) -> str:
    """`0.69 [0.14, 0.92] with MCC and 0.44 [-0.19, 0.61] with F1 over 13 methods`; empty where that is not known."""
    truths = found["correlations"].get(metric, {})
    parts = [f"{_cell(truths[truth])} with {label}" for truth, label in TRUTHS.items()
             if "spearman" in truths.get(truth, {})]
    return f"{' and '.join(parts)} over {len(found['methods'])} methods" if parts else ""


def pursuit_findings(found: list[Line]) -> list[str]:
    """What pursuit encoders give over a dictionary, beside that dictionary's own encoder where it has one."""
    own = next((line for line in found if line.encoder == OWN and line.dictionary == "trained"), None)
    text = []
    for dictionary in ("truth", "trained", "untrained"):
        rows = [line for line in found if line.dictionary == dictionary and line.method.endswith(f"over {dictionary}")
                and line.mean("latent_f1") is not None]
        if not rows:
            continue
        best = max(rows, key=lambda line: line.mean("latent_f1") or 0)
        parts = [f"`{line.name}` {number(line.mean('latent_f1'))} at L0 {number(line.mean('l0'))}"
                 for line in rows if line.encoder in ("ihtp", "mpsae")]
        text.append(f"- Over the {WORDS[dictionary]} the best F1 is {number(best.mean('latent_f1'))} (`{best.name}`, L0 "
                    f"{number(best.mean('l0'))})" + (f"; {', '.join(parts)}." if parts else "."))
    if own is not None:
        text.append(f"- The trained dictionary's own encoder (`{own.name}`): F1 {number(own.mean('latent_f1'))} at L0 "
                    f"{number(own.mean('l0'))}.")
    return text


def plain_table(result: dict[str, Any]) -> str:
    """All rows as text, for the command line."""
    keys = ("l0", "variance_explained", "top_1_probing", "mcc", "latent_f1", "uniqueness", "fraction_dead", "absorption")
    found = lines(result["rows"])
    width = max(len(line.name) for line in found)
    head = " " * width + "".join(f"{LABELS[key]:>20s}" for key in keys)
    body = [f"{line.name:{width}s}" + "".join(f"{number(line.mean(key)):>20s}" for key in keys) for line in found]
    return "\n".join([head, *body, *(f"note: {note}" for note in result["notes"])])
