"""The leaderboard of a release: one row a dictionary, hook by hook, with intervals, beside published results."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sae_research.config.evaluations import EVALUATIONS
from sae_research.reporting.metrics import LAB, Metric, metric_named, sort_keys
from sae_research.reporting.results import EXTRACTORS, merge
from sae_research.reporting.rows import Row, read_run
from sae_research.reporting.tables import headings
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import find_local, read_json, round_significant, slugify, write_text
from sae_research.runtime.formatting import csv_text, markdown_table, with_interval

BOARD, CSV = "leaderboard.md", "leaderboard.csv"
PUBLISHED = "published"
"""Role of rows that are SAE Bench's results as somebody published them."""


def write_board(
    root: Path,
    release: str,
    folders: Sequence[Path],
    ids: Mapping[str, str],
    refused: Mapping[str, str],
    evaluations: Sequence[str],
    published: Sequence[Row],
) -> str:
    """Write `leaderboard.md` and `leaderboard.csv`; returns the table as text.

    folders: of the batches; ids: of the dictionaries, by name in tables; refused: why others are missing, by id.
    """
    rows = []
    for folder in folders:
        merge(folder)
        rows += [row for row in read_run(folder).rows if row.name in ids]
    rows = sorted(rows, key=_place)
    lines = [f"# {release}", "", _introduction(rows, published), "", board_table([*rows, *published], evaluations, ids)]
    if missing := _not_scored(rows, evaluations, ids, refused):
        lines += ["", "## Not scored", "", *(f"- {line}" for line in missing)]
    text = "\n".join(lines) + "\n"
    write_text(root / BOARD, text)
    write_text(root / CSV, _csv([*rows, *published], evaluations, ids))
    return text


def _place(row: Row) -> tuple[Any, ...]:
    """By model, hook and L0."""
    return str(row.cfg.get("model_name")), row.hooks or "", row.value("l0") or 0.0, row.name


def _introduction(rows: Sequence[Row], published: Sequence[Row]) -> str:
    text = (
        f"{len(rows)} dictionaries. Square brackets hold 95 % intervals over the texts of the evaluation. `*` marks those "
        "that no other of the same hooks beats in loss recovered at as low an L0; at different L0 they do not compare."
    )
    if published:
        text += (
            f" The last {len(published)} rows are SAE Bench's results as published, in its own definitions, on its own "
            "texts: only columns that say SAE Bench compare with them."
        )
    return text


def columns(rows: Sequence[Row], evaluations: Sequence[str]) -> list[Metric]:
    """Of core the report's first table; of every other evaluation the first metrics that an SAE should push. Where published
    rows stand beside, SAE Bench's definitions too."""
    bench = any(row.role == PUBLISHED for row in rows)
    found: list[Metric] = []
    for name in evaluations:
        keys = sort_keys({key for row in rows for key in row.evals.get(name, {}).get("metrics", {})}, name)
        metrics = [metric_named(key, name) for key in keys]
        chosen = [
            metric for metric in metrics if metric.version == LAB and (metric.table or name != "core" and metric.better)
        ]
        found += chosen if name == "core" else chosen[:2]
        found += [metric for metric in metrics if bench and metric.version != LAB and metric.better][:2]
    return found


def board_table(rows: Sequence[Row], evaluations: Sequence[str], ids: Mapping[str, str]) -> str:
    """Markdown, a line a dictionary."""
    metrics, best = columns(rows, evaluations), front(row for row in rows if row.role != PUBLISHED)
    models = len({row.cfg.get("model_name") for row in rows}) > 1
    body = []
    for row in rows:
        values = [
            with_interval(row.value(metric.key, metric.eval), row.interval(metric.key, metric.eval)) for metric in metrics
        ]
        model = [str(row.cfg.get("model_name") or "")] if models else []
        name = f"`{_title(row, ids)}`{' *' if row.name in best else ''}"
        kind = PUBLISHED if row.role == PUBLISHED else row.architecture
        body.append([name, kind, f"{row.cfg.get('d_sae', 0):,}", *model, row.hooks or "", *values])
    named = [
        text if metric.version == LAB else f"SAE Bench: {text}"
        for metric, text in zip(metrics, headings(metrics), strict=True)
    ]
    return markdown_table(["dictionary", "architecture", "latents", *(["model"] if models else []), "hook", *named], body)


def _title(row: Row, ids: Mapping[str, str]) -> str:
    return row.cfg.get("published_as") or ids.get(row.name, row.name)


def front(rows: Iterable[Row]) -> set[str]:
    """Names of those that no other of the same hooks beats in loss recovered at an L0 that is as low."""
    known = [row for row in rows if row.value("l0") is not None and row.value("loss_recovered") is not None]

    def beaten(row: Row) -> bool:
        l0, recovered = row.value("l0"), row.value("loss_recovered")
        assert l0 is not None and recovered is not None
        return any(
            other.hooks == row.hooks
            and other.cfg.get("model_name") == row.cfg.get("model_name")
            and other is not row
            and (other.value("l0") or 0.0) <= l0
            and (other.value("loss_recovered") or 0.0) > recovered
            for other in known
        )

    return {row.name for row in known if not beaten(row)}


def _not_scored(
    rows: Sequence[Row], evaluations: Sequence[str], ids: Mapping[str, str], refused: Mapping[str, str]
) -> list[str]:
    found = [f"`{sae_id}`: {why}" for sae_id, why in refused.items()]
    there = {row.name for row in rows}
    found += [
        f"`{sae_id}`: it was not scored" for name, sae_id in ids.items() if name not in there and sae_id not in refused
    ]
    for row in rows:
        for name in evaluations:
            record = row.evals.get(name, {})
            if record.get("status") != "ok":
                found.append(f"`{ids[row.name]}`, {name}: {record.get('status')}: {record.get('message', '')}".rstrip(": "))
    return found


def _csv(rows: Sequence[Row], evaluations: Sequence[str], ids: Mapping[str, str]) -> str:
    """Every metric in the long form: one line a dictionary and metric."""
    body = []
    for row in rows:
        kind = row.role if row.role == PUBLISHED else row.architecture
        about = [kind, row.cfg.get("d_sae", ""), row.cfg.get("model_name", ""), row.hooks or ""]
        for name in evaluations:
            metrics = row.evals.get(name, {}).get("metrics", {})
            for key in sort_keys(metrics, name):
                low, high = row.interval(key, name) or ("", "")
                body.append([_title(row, ids), *about, name, key, metrics[key], low, high])
    columns_ = ["dictionary", "architecture", "d_sae", "model", "hook", "evaluation", "metric", "value", "low", "high"]
    return csv_text(columns_, body)


# --- published results ---------------------------------------------------------------------------


def published_rows(place: str, evaluations: Sequence[str]) -> list[Row]:
    """SAE Bench's result files (`*_eval_results.json`) below a folder, or in a data set of the hub, as rows. Raises
    `UserError` where there is none."""
    folder = find_local(place)
    if folder is None:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", place):
            raise UserError(f"--published {place}: no such folder, and no data set of the hub (ORGANISATION/NAME)")
        folder = _fetched(place)
    types = {str(record.result_type): name for name, record in EVALUATIONS.items()}
    found: dict[str, Row] = {}
    for path in sorted(folder.rglob("*_eval_results.json")):
        result = read_json(path, "take it out of the folder, or fetch it again")
        if not isinstance(result, dict) or "eval_type_id" not in result:
            raise UserError(f"{path}: not a result of SAE Bench; --published: name a folder of its files")
        name = types.get(str(result["eval_type_id"]))
        if name is None or name not in evaluations:
            continue
        sae = "/".join(str(result.get(key, "")) for key in ("sae_lens_release_id", "sae_lens_id")).strip("/") or path.stem
        metrics = {key: value for key, value in EXTRACTORS[name](result).items() if metric_named(key, name).version != LAB}
        if not metrics:
            raise UserError(f"{path}: holds no metric of SAE Bench's {name}; take it out of the folder, or fetch it again")
        known = {"role": PUBLISHED, "published_as": sae, **_known(result)}
        row = found.setdefault(sae, Row(slugify(f"published {sae}"), known, {}))
        row.evals[name] = {"status": "ok", "metrics": round_significant(metrics)}
    if not found:
        raise UserError(f"--published {place}: no results of {', '.join(evaluations)} below it (*_eval_results.json)")
    return [row for _, row in sorted(found.items())]


def _known(result: Mapping[str, Any]) -> dict[str, Any]:
    cfg = result.get("sae_cfg_dict") or {}
    return {key: cfg[key] for key in ("architecture", "d_sae", "hook_name", "model_name") if key in cfg}


def _fetched(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download

    from sae_research.saes.sources import reach

    return reach(
        lambda: Path(snapshot_download(repo_id, repo_type="dataset", allow_patterns="*_eval_results.json")),
        f"--published {repo_id}",
        repo_id,
    )
