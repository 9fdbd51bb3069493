"""The transfer evaluation's results, as metrics, report and figures read them: one finished run, `metrics/transfer.json`
with one flat set of values for every pair, and the section of METRICS.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_research.reporting.results import STATUS_KEY, Metrics, is_number
from sae_research.reporting.shapes import evaluation_status, transfer_results
from sae_research.reporting.tables import render
from sae_research.reporting.transfer_crosscoder import (
    MODELS,
    at,
    bounded,
    crosscoder_metrics,
    crosscoder_section,
    numbers,
)
from sae_research.reporting.transfer_separate import OPTIONAL, optional_parts, separate_metrics, separate_section
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import round_significant, write_json
from sae_research.runtime.formatting import ABSENT, markdown_table, number, percent, with_interval
from sae_research.runtime.stages import read_status

if TYPE_CHECKING:
    import pandas as pd

FOLDER = Path("eval_results/transfer")
MAIN = "finetuned"
NAMES = {MAIN: "finetuned", "control_self": "control: itself", "control_perturbed": "control: perturbed"}


@dataclass(frozen=True)
class TransferRun:
    """All of one run of the stage."""

    status: dict[str, Any]
    results: dict[str, dict[str, Any]]
    """By pair: `finetuned`, then the controls."""
    folder: Path

    @property
    def main(self) -> dict[str, Any]:
        return self.results[MAIN]

    @property
    def hook(self) -> str:
        return str(self.main["setting"]["hook"])

    @cached_property
    def latents(self) -> pd.DataFrame:
        """A row a latent of the pair; NaN where a value is not defined."""
        import pandas as pd  # a second to import, for figures alone

        path = self.folder / "latents.tsv"
        return pd.read_csv(path, sep="\t", float_precision="round_trip") if path.is_file() else pd.DataFrame()  # ty: ignore[no-matching-overload]


def read_transfer(root: Path = Path(".")) -> TransferRun | None:
    """The finished run below `root`; None where the evaluation was switched off, failed or never ran."""
    folder = root / FOLDER
    status = evaluation_status(folder)
    found = transfer_results(folder) if folder.is_dir() else {}
    if MAIN not in found:
        return None
    order = [MAIN, *sorted((name for name in found if name != MAIN), reverse=True)]
    return TransferRun(status, {name: found[name] for name in order}, folder)


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
            **{name: pair_metrics(result) for name, result in results.items()},
            STATUS_KEY: {"status": status["status"], "pairs": len(results), **message},
        },
    )


def pair_metrics(result: dict[str, Any]) -> Metrics:
    """All values of a pair, 4 significant digits; what was not measured has no key."""
    return {key: round_significant(float(value)) for key, value in pair_values(result).items() if is_number(value)}


def pair_values(result: dict[str, Any]) -> dict[str, Any]:
    """Every key of `stage_metrics.TRANSFER`, with None for what was not measured."""
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
    return found | crosscoder_metrics(at(result, "crosscoder")) | separate_metrics(at(result, "separate"))


CAPTIONS = {
    "quality": (
        "SAE quality on both models",
        "Outliers left out. Marks: 95 % intervals over stretches of text. Controls read fewer tokens, too few for "
        "intervals: compare each with its own base bar. Loss recovered rests on ablated contexts alone.",
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
        "One point a latent. Tokens of one text are not independent: densities are less certain than the number of tokens "
        "suggests.",
    ),
    "latent_transfer": (
        "Transfer of latents",
        "All latents for which it is defined. Nulls: the base model's activation with the finetuned model's on "
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
OUTPUTS = {"outputs": "this text", "outputs_on_finetuned_text": "held-out text of the kind it was finetuned on"}
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
    """The section of the report, or nothing."""
    run = read_transfer(root)
    if run is None:
        status = read_status(root / FOLDER)
        if status["status"] in ("disabled", "missing"):
            return ""
        return render("transfer", ended=f"{status['status']}: {' '.join(status['message'].split())}")
    main, removed = run.main, [values["fraction_removed"] for pair in run.results.values() for values in _hooks(pair)]
    repair = main.get("repair") or {}
    return render(
        "transfer",
        ended="",
        setting=main["setting"],
        coverage=main["coverage"],
        hook=run.hook,
        weights_moved=at(main, "moved", "weights", "relative_change"),
        outputs=[(where, moved) for key, where in OUTPUTS.items() if at(moved := at(main, "moved", key), "kl") is not None],
        skipped=[(NAMES.get(name, name), " ".join(why.split())) for name, why in run.status["skipped"].items()],
        tokenizers=_tokenizers(main.get("tokenizers")),
        similarity=_similarity_table(run),
        rules=[
            (rule, limit, *(main["outliers"]["fraction_removed"][model][rule] for model in MODELS))
            for rule, limit in main["outliers"]["limits"].items()
        ],
        outliers=_outlier_table(main["outliers"]["listed"][:SHOWN_OUTLIERS]),
        quality=_quality_table(run, "kept"),
        quality_with_outliers=_quality_table(run, "all") if any(removed) else "",
        ablate_every=at(main, "losses", "ablate_every") or 1,
        roles=[
            {
                "table": _latent_table(values["by_interval"], role if len(main["latents"]) > 1 else ""),
                "shift": {"regression": None, **values["density_shift"]},
                "halves": at(values, "density_shift", "halves_regression", "r"),
            }
            for role, values in main["latents"].items()
        ],
        pairs=_pair_table(run),
        samples=_sample_table(at(main, "latents", "base", "by_sample") or {}),
        repair={"gap_closed": None, "tokens_to_half": None, **repair} if repair.get("status") == "ok" else None,
        repair_table=_repair_table(repair["curves"]) if repair.get("status") == "ok" else "",
        repair_message=repair.get("message"),
        crosscoder=crosscoder_section(main.get("crosscoder")),
        separate=separate_section(main.get("separate")),
        captions=[(name, *caption) for name, caption in CAPTIONS.items()]
        + [OPTIONAL[part] for part in optional_parts(main)],
    )


def _hooks(pair: Mapping[str, Any]) -> list[dict[str, Any]]:
    return list(pair["similarity"].values())


def _tokenizers(check: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if not check:
        return None
    said = {None: "not known", True: "same", False: "different"}
    rows = [[key, _whole_or_rounded(check["table"][key])] for key in TOKENIZER_ROWS]
    return {
        "table": markdown_table(["Tokenizers", ""], rows),
        "agrees": [f"{part.replace('_', ' ')} {said[same]}" for part, same in check["agrees"].items()],
        "special": ", ".join(check["special_tokens"]) or "none",
        "rows": check["embedding_rows"],
    }


def _whole_or_rounded(value: float) -> str:
    return f"{value:,.0f}" if value == int(value) else f"{value:.5g}"


def _similarity_table(run: TransferRun) -> str:
    columns = {
        "cosine": "cosine",
        "cosine_shuffled": "cosine, shuffled",
        "euclidean": "euclidean",
        "relative_error": "relative error",
        "cka": "linear CKA",
    }
    body = [
        [
            NAMES.get(name, name),
            f"`{hook}`",
            *numbers(values["kept"], columns),
            percent(values["fraction_removed"]),
            number(at(values, "all", "cosine")),
        ]
        for name, result in run.results.items()
        for hook, values in result["similarity"].items()
    ]
    return markdown_table(["Pair", "Hook", *columns.values(), "outliers", "cosine with outliers"], body, left=2)


def _outlier_table(listed: Sequence[Mapping[str, Any]]) -> str:
    """The listed tokens between their neighbours; empty where none is listed."""
    body = [
        [
            item["model"],
            number(item["norm"]),
            str(item["position"]),
            f"`{'¦'.join(_quoted(item[part]) for part in ('before', 'token', 'after'))}`",
        ]
        for item in listed
    ]
    return markdown_table(["Model", "Norm", "Position", "before ¦token¦ after"], body, left=4) if body else ""


def _quoted(text: str) -> str:
    """One line of a table: no line break, bar or backtick that Markdown would read."""
    return text.replace("\n", "⏎").replace("\t", "⇥").replace("|", "/").replace("`", "'")


def _quality_table(run: TransferRun, kind: str) -> str:
    """kind: `kept`, without outliers, or `all`."""
    rows = [
        {"Pair": NAMES.get(name, name), "Model": model, "SAE of": role, **_quality(result, role, model, kind)}
        for name, result in run.results.items()
        for role in result["quality"]
        # of a control only the model in the finetuned one's place: `control: itself` is the base
        for model in (MODELS if name == MAIN else ("finetuned",))
    ]
    # with one tokenizer for both, nats a token compare
    shown = [key for key in rows[0] if key not in BITS or any(row[key] != ABSENT for row in rows)]
    return markdown_table(shown, [[row[key] for key in shown] for row in rows], left=3)


def _quality(result: dict[str, Any], role: str, model: str, kind: str) -> dict[str, str]:
    quality = at(result, "quality", role, model, kind) or {}
    losses = at(result, "losses", "models", model, kind) or {}
    sae, low = at(losses, "saes", role), at(quality, "fraction_dead_low")
    dead = (low, quality["fraction_dead_high"]) if low is not None else None
    return {
        "variance explained": number(at(quality, "variance_explained")),
        "R² flattened": number(at(quality, "r2_flattened")),
        "L0": number(at(quality, "l0")),
        "dead [95 %]": with_interval(at(quality, "fraction_dead"), dead),
        "CE clean": number(at(losses, "ce_clean", "value")),
        "CE patched": number(at(sae, "ce_patched", "value")),
        "CE zero": number(at(losses, "ce_zero", "value")),
        "CE mean": number(at(losses, "ce_mean", "value")),
        "loss recovered": bounded(at(sae, "loss_recovered")),
        "KL": bounded(at(sae, "kl")),
        BITS[0]: number(at(losses, "bits_per_byte_clean", "value")),
        BITS[1]: number(at(sae, "bits_per_byte_patched", "value")),
    }


def _latent_table(found: dict[str, Any], role: str) -> str:
    columns = {
        "pearson_median": "Pearson",
        "pearson_shuffled_median": "shuffled",
        "pearson_halves_median": "halves",
        "pearson_above_0.5": "above 0.5",
        "jaccard_median": "Jaccard",
        "jaccard_shuffled_median": "shuffled",
        "density_ratio_median": "density ratio",
        "logit_correlation_median": "logit correlation",
    }
    body = [
        [title, f"{found[name]['latents']:,}", *numbers(found[name], columns)]
        for name, title in INTERVALS.items()
        if name in found
    ]
    return markdown_table([f"Latents of the {role} model's SAE" if role else "Latents", "number", *columns.values()], body)


def _pair_table(run: TransferRun) -> str:
    columns = {
        "pearson_median": "Pearson",
        "jaccard_median": "Jaccard",
        "density_ratio_median": "density ratio",
        "logit_correlation_median": "logit correlation",
    }
    body = [
        [NAMES.get(name, name), *numbers(at(result, "latents", "base", "by_interval", "alive"), columns)]
        for name, result in run.results.items()
    ]
    return markdown_table(["Pair, latents that fire in both", *columns.values()], body)


def _sample_table(samples: dict[str, Any]) -> str:
    columns = {
        "pearson_mean": "mean Pearson",
        "log_error_mean": "mean log error",
        "logit_correlation_mean": "mean logit correlation",
    }
    body = [
        [
            name.replace("_", " "),
            *(f"{part[key]:,}" for key in ("drawn_from", "latents", "with_pearson")),
            *numbers(part, columns),
        ]
        for name, part in samples.items()
    ]
    header = ["Sample as published", "drawn from", "latents", "with a correlation", *columns.values()]
    return markdown_table(header, body) if body else ""


def _repair_table(curves: dict[str, Any], rows: int = 8) -> str:
    """At most so many points of the curves; the last one always."""
    header = ["Tokens", "VE on finetuned", "own L0", "VE on base", "own L0", "control: VE on base", "own L0"]
    keys = [f"{key}_on_{model}" for model in ("finetuned", "base") for key in ("variance_explained", "l0")]
    body = [
        [f"{one['tokens']:,}", *numbers(one, keys), *numbers(two, keys[2:])]
        for one, two in zip(curves["finetuned"], curves["base"], strict=True)
    ]
    step = max(1, -(-(len(body) - 1) // rows))
    return markdown_table(header, [*body[:-1:step], body[-1]], left=0)
