"""What the transfer evaluation left behind, as the report, the metrics and the pictures read it.

From the transfer evaluation's results to `metrics/transfer.json`: one flat set of figures for every pair.

The section of METRICS.md on transfer. Empty where the evaluation was switched off.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sae_research.reporting.results import STATUS_KEY, Figures, is_figure
from sae_research.reporting.shapes import evaluation_status, transfer_results
from sae_research.reporting.tables import ABSENT, markdown, number
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import round_significant, write_json
from sae_research.runtime.stages import read_status

FOLDER = Path("eval_results/transfer")
MAIN = "finetuned"
NAMES = {MAIN: "finetuned", "control_self": "control: itself", "control_perturbed": "control: perturbed"}
MODELS = ("base", "finetuned")


@dataclass(frozen=True)
class TransferRun:
    """All of one run of the stage."""

    status: dict[str, Any]
    results: dict[str, dict[str, Any]]
    """By pair: `finetuned`, then the controls."""
    table: dict[str, list[Any]]
    """The latents of the pair, column by column; None where a figure is not defined."""

    @property
    def main(self) -> dict[str, Any]:
        return self.results[MAIN]

    @property
    def hook(self) -> str:
        return str(self.main["setting"]["hook"])


def read_transfer(root: Path = Path(".")) -> TransferRun | None:
    """The finished run below `root`; None where the evaluation was switched off, failed or never ran."""
    folder = root / FOLDER
    status = evaluation_status(folder)
    found = transfer_results(folder) if folder.is_dir() else {}
    if MAIN not in found:
        return None
    order = [MAIN, *sorted((name for name in found if name != MAIN), reverse=True)]
    return TransferRun(status, {name: found[name] for name in order}, _read_table(folder / "latents.tsv"))


def _read_table(path: Path) -> dict[str, list[Any]]:
    if not path.is_file():
        return {}
    with path.open(newline="") as handle:
        rows = list(csv.DictReader(handle, delimiter="\t"))
    return {name: [_cell(row[name]) for row in rows] for name in (rows[0] if rows else {})}


def _cell(text: str) -> Any:
    if text == "":
        return None
    try:
        return float(text)
    except ValueError:
        return text


def at(values: dict[str, Any] | None, *path: str) -> Any:
    """What stands at a path of keys; None where any part is missing or the figure is not finite."""
    found: Any = values
    for key in path:
        if not isinstance(found, dict) or key not in found:
            return None
        found = found[key]
    return None if isinstance(found, float) and not math.isfinite(found) else found


QUALITY = ("variance_explained", "r2_flattened", "l0", "fraction_dead", "mse")
LOSSES = ("ce_delta", "loss_recovered", "loss_recovered_mean", "kl", "bits_per_byte_patched")
SIMILARITY = ("cosine", "euclidean", "relative_error", "cka", "cosine_shuffled")
FILTERS = {"kept": "", "all": "_with_outliers"}
LATENTS = (
    "pearson",
    "pearson_shuffled",
    "pearson_halves",
    "jaccard",
    "jaccard_shuffled",
    "density_ratio",
    "logit_correlation",
)


def extract_transfer(folder: Path, output: Path) -> None:
    """Write `{pair: {metric: value}}` and the stage's status. Raises `UserError` when the folder is missing."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; run the stage that writes it, `dvc repro transfer_eval`")
    status = evaluation_status(folder)
    if status["status"] == "disabled":
        write_json(output, {STATUS_KEY: {"status": "disabled"}})
        return
    results = transfer_results(folder)
    message = {"message": status["message"]} if status["status"] != "ok" and status.get("message") else {}
    write_json(
        output,
        {
            **{name: pair_figures(result) for name, result in results.items()},
            STATUS_KEY: {"status": status["status"], "pairs": len(results), **message},
        },
    )


def pair_figures(result: dict[str, Any]) -> Figures:
    """Everything a pair is compared by, 4 significant digits; what was not measured has no key."""
    hook = at(result, "setting", "hook") or ""
    here = at(result, "similarity", hook) or {}
    found: dict[str, Any] = {f"{key}{suffix}": at(here, kind, key) for kind, suffix in FILTERS.items() for key in SIMILARITY}
    found["fraction_outliers"] = at(here, "fraction_removed")
    for model in MODELS:
        for kind, suffix in FILTERS.items():
            quality = at(result, "quality", "base", model, kind)
            losses = at(result, "losses", "models", model, kind)
            found |= {f"{model}_{key}{suffix}": at(quality, key) for key in QUALITY}
            found |= {f"{model}_{key}{suffix}": at(losses, "saes", "base", key, "value") for key in LOSSES}
            found[f"{model}_ce_clean{suffix}"] = at(losses, "ce_clean", "value")
    latents = at(result, "latents", "base")
    alive = [*(f"{key}_median" for key in LATENTS), "pearson_above_0.5", "pearson_above_0.9"]
    found |= {key: at(latents, "by_interval", "alive", key) for key in alive}
    found["density_regression_r"] = at(latents, "density_shift", "regression", "r")
    found["density_fraction_shifted"] = at(latents, "density_shift", "fraction_shifted")
    found["density_fraction_shifted_halves"] = at(latents, "density_shift", "halves_fraction_shifted")
    found["clean_kl"] = at(result, "losses", "clean_kl", "value")
    found["weights_relative_change"] = at(result, "moved", "weights", "relative_change")
    found["matched_fraction"] = at(result, "coverage", "matched_fraction")
    found["usable_token_fraction"] = at(result, "tokenizers", "usable_fraction")
    found |= {
        f"repair_{key}": at(result, "repair", key)
        for key in ("gap", "gap_closed", "tokens_to_half", "gap_after_equal_training")
    }
    return {key: round_significant(float(value)) for key, value in found.items() if is_figure(value)}


CAPTIONS = {
    "quality": (
        "SAE quality on both models",
        "Outliers left out. Marks: 95 % intervals over stretches of text; controls read too few for any, and fewer "
        "tokens altogether: compare each with its own base bar. Loss recovered rests on ablated contexts alone.",
    ),
    "similarity_by_position": (
        "Similarity by position",
        "Means over tokens, outliers left out; the first position never counts.",
    ),
    "similarity_histograms": (
        "Similarity of activations",
        "Single tokens without outliers, and means of whole prompts with them.",
    ),
    "similarity_heat_maps": (
        "Cosine by prompt and position",
        "The first prompts read, outliers included; colours end at the 1st percentile.",
    ),
    "outlier_norms": ("Norms of activations", "Both models at the SAE's hook, with every rule's limit; one was applied."),
    "densities": (
        "Densities of latents",
        "One point a latent. Tokens of one text are not independent: densities are less sure than their number suggests.",
    ),
    "latent_transfer": (
        "Transfer of latents",
        "All latents that have the figure. Nulls: the base model's activation with the finetuned model's on "
        "another token, and with its own in other text. The perturbed control was read on fewer tokens.",
    ),
    "activations": ("Sizes of activations", "Outliers left out."),
    "repair": ("Repair", "Held-out text. Left: with the L0 that the base SAE has on its own model."),
}
"""Title and caption of every picture."""
TOKENIZER_ROWS = (
    "Base Tokenizer Size",
    "Fine-tune Tokenizer Size",
    "Keys only in Base",
    "Keys only in Fine-tune",
    "Keys with Mismatched Token IDs",
    "Good Tokens in Base (%)",
    "Good Tokens in Fine-tune (%)",
)
"""In the order of the published check."""
SHOWN_OUTLIERS = 6
BITS = ("bits per byte, clean", "bits per byte, patched")
INTERVALS = {
    "alive": "fires in both models",
    "both_dead": "silent in both",
    "base_dead": "silent in the base model",
    "finetuned_dead": "silent in the finetuned model",
    "below_1e-4": "density below 1e-4",
    "1e-4_to_1e-3": "1e-4 to 1e-3",
    "1e-3_to_1e-2": "1e-3 to 1e-2",
    "1e-2_to_1e-1": "1e-2 to 1e-1",
    "above_1e-1": "above 1e-1",
}


def transfer(root: Path = Path(".")) -> str:
    """The section, or nothing."""
    run = read_transfer(root)
    if run is None:
        return _ended(read_status(root / FOLDER))
    parts = [_setting(run), _tokenizers(run), _similarity(run), _quality(run), _latents(run), _samples(run), _repair(run)]
    images = [
        f"![{title}](images/transfer/{name}.png)\n\n*{title}.* {caption}" for name, (title, caption) in CAPTIONS.items()
    ]
    return "\n\n".join(["## Transfer to a finetuned model", *(part for part in parts if part), *images])


def _ended(status: dict[str, Any]) -> str:
    """Why there is nothing to show, where that is not by choice."""
    if status["status"] in ("disabled", "missing"):
        return ""
    return f"## Transfer to a finetuned model\n\n{status['status']}: {' '.join(status['message'].split())}"


def _setting(run: TransferRun) -> str:
    setting, coverage, moved = run.main["setting"], run.main["coverage"], run.main["moved"]
    lines = [
        f"The SAE `{setting['sae']}` of {setting['base_model']} at {setting['hook']} (d_sae {setting['d_sae']:,}), "
        f"read on {setting['finetuned_model']}; text `{setting['dataset']}`, {coverage['tokens_base']:,} tokens "
        f"for statistics. Outlier rule: {setting['outlier_rule']}. `control: itself` compares the base model with "
        "itself, `control: perturbed` with itself after strong noise on its weights."
    ]
    weights = number(at(moved, "weights", "relative_change"))
    lines.append(
        f"How far the finetuned model moved: weights by {weights} of their norm"
        + _outputs(at(moved, "outputs"), "this text")
        + _outputs(at(moved, "outputs_on_finetuned_text"), "held-out text of the kind it was finetuned on")
        + "."
    )
    lines += [
        f"Skipped, {NAMES.get(name, name)}: {' '.join(reason.split())}." for name, reason in run.status["skipped"].items()
    ]
    return "\n\n".join(lines)


def _outputs(found: dict[str, Any] | None, where: str) -> str:
    if not found or at(found, "kl") is None:
        return ""
    return (
        f"; on {where} KL {number(found['kl'])} nats, cross-entropy {number(found['ce_base'])} to "
        f"{number(found['ce_other'])}, the likeliest token the same at {number(found['same_top_token'])} of positions"
    )


def _tokenizers(run: TransferRun) -> str:
    check = run.main.get("tokenizers")
    if not check:
        return ""
    agrees = ", ".join(
        f"{part.replace('_', ' ')} {'not known' if same is None else 'same' if same else 'different'}"
        for part, same in check["agrees"].items()
    )
    special = ", ".join(check["special_tokens"]) or "none"
    table = markdown(["Tokenizers", ""], [[key, _figure(check["table"][key])] for key in TOKENIZER_ROWS])
    rows, coverage = check["embedding_rows"], run.main["coverage"]
    return (
        f"{table}\n\nFurther: {agrees}; special tokens that differ: {special}; embedding rows {rows[0]:,} and "
        f"{rows[1]:,}. Read with {coverage['tokenizers']}; {number(coverage['matched_fraction'])} of the tokens that "
        "count stand in the same place for both."
    )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.5g}"


def _similarity(run: TransferRun) -> str:
    header = [
        "Pair",
        "Hook",
        "cosine",
        "cosine, shuffled",
        "euclidean",
        "relative error",
        "linear CKA",
        "outliers",
        "cosine with outliers",
    ]
    body = []
    for name, result in run.results.items():
        for hook, values in result["similarity"].items():
            kept = values["kept"]
            body.append(
                [
                    NAMES.get(name, name),
                    f"`{hook}`",
                    *(number(at(kept, key)) for key in ("cosine", "cosine_shuffled", "euclidean", "relative_error", "cka")),
                    _percent(values["fraction_removed"]),
                    number(at(values, "all", "cosine")),
                ]
            )
    return "\n\n".join(["### Similarity of activations", markdown(header, body, left=2), _outliers(run)]).rstrip()


def _outliers(run: TransferRun) -> str:
    found = run.main["outliers"]
    shares = "; ".join(
        f"{rule} (above {number(limit)}): "
        + " and ".join(_percent(found["fraction_removed"][model][rule]) for model in MODELS)
        for rule, limit in found["limits"].items()
    )
    text = f"Tokens that each rule calls outliers at `{run.hook}`, in the base and the finetuned model: {shares}."
    if not found["listed"]:
        return text
    listed = [
        [
            item["model"],
            number(item["norm"]),
            str(item["position"]),
            f"`{'¦'.join(_quoted(item[part]) for part in ('before', 'token', 'after'))}`",
        ]
        for item in found["listed"][:SHOWN_OUTLIERS]
    ]
    return f"{text} The largest (all listed ones: `eval_results/transfer/outlier_tokens.tsv`):\n\n" + markdown(
        ["Model", "Norm", "Position", "before ¦token¦ after"], listed, left=4
    )


def _quoted(text: str) -> str:
    """One line of a table: no line break, bar or backtick that Markdown would read."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace("|", "/").replace("`", "'")


def _quality(run: TransferRun) -> str:
    parts = ["### The SAE on both models", _quality_table(run, "kept")]
    if any(values["fraction_removed"] for result in run.results.values() for values in result["similarity"].values()):
        parts += ["The same with outliers counted and patched:", _quality_table(run, "all")]
    every = at(run.main, "losses", "ablate_every")
    parts.append(
        "CE zero and mean: with zeros and with the mean activation in place"
        + (f", on one context out of {every}" if every and every > 1 else "")
        + "; loss recovered is scaled by the "
        "former. `R² flattened` is the published comparison's figure, about one mean over tokens and dimensions "
        "together: a constant vector already scores high there. Brackets: 95 % intervals, over stretches of text, "
        "of dead latents by Wilson's formula over latents."
    )
    return "\n\n".join(parts)


def _quality_table(run: TransferRun, kind: str) -> str:
    """kind: `kept`, without outliers, or `all`."""
    header = [
        "Pair",
        "Model",
        "SAE of",
        "variance explained",
        "R² flattened",
        "L0",
        "dead [95 %]",
        "CE clean",
        "CE patched",
        "CE zero",
        "CE mean",
        "loss recovered",
        "KL",
        *BITS,
    ]
    body = [
        [NAMES.get(name, name), model, role, *_quality_cells(result, role, model, kind)]
        for name, result in run.results.items()
        for role in result["quality"]
        for model in _models(name)
    ]
    if all(row[-1] == row[-2] == ABSENT for row in body):  # one tokenizer for both: nats a token compare
        header, body = header[: -len(BITS)], [row[: -len(BITS)] for row in body]
    return markdown(header, body, left=3)


def _models(pair: str) -> tuple[str, ...]:
    """Both for the pair; of a control only the model in the finetuned one's place: `control: itself` is the base."""
    return MODELS if pair == MAIN else ("finetuned",)


def _quality_cells(result: dict[str, Any], role: str, model: str, kind: str) -> list[str]:
    quality = at(result, "quality", role, model, kind) or {}
    losses = at(result, "losses", "models", model, kind) or {}
    dead = number(at(quality, "fraction_dead"))
    if at(quality, "fraction_dead_low") is not None:
        dead += f" [{number(quality['fraction_dead_low'])}, {number(quality['fraction_dead_high'])}]"
    sae = at(losses, "saes", role)
    return [
        number(at(quality, "variance_explained")),
        number(at(quality, "r2_flattened")),
        number(at(quality, "l0")),
        dead,
        number(at(losses, "ce_clean", "value")),
        number(at(sae, "ce_patched", "value")),
        number(at(losses, "ce_zero", "value")),
        number(at(losses, "ce_mean", "value")),
        _bounded(sae, "loss_recovered"),
        _bounded(sae, "kl"),
        number(at(losses, "bits_per_byte_clean", "value")),
        number(at(sae, "bits_per_byte_patched", "value")),
    ]


def _bounded(values: dict[str, Any] | None, key: str) -> str:
    found = at(values, key)
    if not found:
        return ABSENT
    low, high = found.get("low"), found.get("high")
    return number(found["value"]) + ("" if low is None else f" [{number(low)}, {number(high)}]")


def _latents(run: TransferRun) -> str:
    parts = [
        "### Transfer of latents",
        "Every latent is a row of `eval_results/transfer/latents.tsv`. Medians over "
        "latents; *shuffled* pairs a token with another one, *halves* the base model with itself on other text.",
    ]
    for role, values in run.main["latents"].items():
        header = [
            "Latents" if len(run.main["latents"]) == 1 else f"Latents of the {role} model's SAE",
            "number",
            "Pearson",
            "shuffled",
            "halves",
            "above 0.5",
            "Jaccard",
            "shuffled",
            "density ratio",
            "logit correlation",
        ]
        found = values["by_interval"]
        body = [
            [
                title,
                f"{found[name]['latents']:,}",
                *(
                    number(at(found[name], key))
                    for key in (
                        "pearson_median",
                        "pearson_shuffled_median",
                        "pearson_halves_median",
                        "pearson_above_0.5",
                        "jaccard_median",
                        "jaccard_shuffled_median",
                        "density_ratio_median",
                        "logit_correlation_median",
                    )
                ),
            ]
            for name, title in INTERVALS.items()
            if name in found
        ]
        parts += [markdown(header, body), _shift(values["density_shift"])]
    controls = [
        [
            NAMES.get(name, name),
            *(
                number(at(result, "latents", "base", "by_interval", "alive", key))
                for key in ("pearson_median", "jaccard_median", "density_ratio_median", "logit_correlation_median")
            ),
        ]
        for name, result in run.results.items()
    ]
    parts.append(
        markdown(["Pair, latents that fire in both", "Pearson", "Jaccard", "density ratio", "logit correlation"], controls)
    )
    return "\n\n".join(parts)


def _shift(shift: dict[str, Any]) -> str:
    line = at(shift, "regression")
    words = (
        f"log10 densities: r = {number(line['r'])}, slope {number(line['slope'])} over {line['latents']:,} latents "
        "that fire in both"
        if line
        else "Too few latents fire in both models for a regression of densities"
    )
    halves = at(shift, "halves_regression", "r")
    return (
        f"{words} (two halves of the base model's own text: r = {number(halves)}). Densities whose intervals do not "
        f"overlap: {_percent(shift['fraction_shifted'])} of latents, between the halves "
        f"{_percent(shift['halves_fraction_shifted'])}. A latent that never fired on {shift['base']['tokens']:,} tokens "
        f"has a density below {shift['base']['silent_density_below']:.2g} (Wilson, 95 %)."
    )


def _samples(run: TransferRun) -> str:
    samples = at(run.main, "latents", "base", "by_sample") or {}
    body = [
        [
            name.replace("_", " "),
            f"{part['drawn_from']:,}",
            f"{part['latents']:,}",
            f"{part['with_pearson']:,}",
            *(number(at(part, key)) for key in ("pearson_mean", "log_error_mean", "logit_correlation_mean")),
        ]
        for name, part in samples.items()
    ]
    header = [
        "Sample as published",
        "drawn from",
        "latents",
        "with a correlation",
        "mean Pearson",
        "mean log error",
        "mean logit correlation",
    ]
    return markdown(header, body) if body else ""


def _repair(run: TransferRun) -> str:
    found = run.main.get("repair") or {}
    if found.get("status") != "ok":
        return f"### Repair\n\nNot run: {found['message']}." if found.get("message") else ""
    header = ["Tokens", "VE on finetuned", "own L0", "VE on base", "own L0", "control: VE on base", "own L0"]
    rows = zip(found["curves"]["finetuned"], found["curves"]["base"], strict=True)
    body = [
        [
            f"{one['tokens']:,}",
            *(number(one[f"{key}_on_{model}"]) for model in ("finetuned", "base") for key in ("variance_explained", "l0")),
            number(two["variance_explained_on_base"]),
            number(two["l0_on_base"]),
        ]
        for one, two in rows
    ]
    half, gap = found.get("tokens_to_half"), found["gap"]
    if found.get("gap_closed") is None:
        words = (
            f"There is no gap to close: at equal L0 the base SAE explains {number(gap)} less of the finetuned model's "
            "variance."
        )
    else:
        words = (
            f"At equal L0 the base SAE explains {number(gap)} less of the finetuned model's variance than of its own "
            "model's. "
            + (
                f"Half of that was closed after {half:,.0f} tokens"
                if half is not None
                else f"Half of that was not closed within {found['tokens']:,} tokens"
            )
            + f"; {_percent(found['gap_closed'])} at the end."
        )
    words += (
        " VE (variance explained) is at the L0 of the base SAE on its own model. The control is trained as long on "
        f"the base model's activations: against it a gap of {number(found['gap_after_equal_training'])} remains."
    )
    title = "### Repair: the base SAE finetuned on the finetuned model's activations"
    return "\n\n".join([title, _thinned(header, body), words])


def _thinned(header: Sequence[str], body: list[list[str]], rows: int = 8) -> str:
    step = max(1, -(-(len(body) - 1) // rows))
    shown = [row for index, row in enumerate(body) if index % step == 0 or index == len(body) - 1]
    return markdown(header, shown, left=0)


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"
