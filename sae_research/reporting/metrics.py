"""Looking metrics up: what each is called, means, comes from, and which way it should point.

Extraction, plots, `METRICS.md` and `results.csv` are all driven by `METRICS`. A metric that comes for several
values of k is one record whose key holds `{k}`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from typing import Any

from sae_research.config.evaluations import AT_HOOK, OF_SAES

# The records themselves stand in metric_table.py: add yours there.
from sae_research.reporting.metric_table import LAB, METRICS, SAE_BENCH, SAE_BENCH_SUFFIX, Metric

__all__ = [
    "EVALS",
    "EVAL_NOTES",
    "EVAL_TITLES",
    "LAB",
    "METRICS",
    "OPTIONAL",
    "SAE_BENCH",
    "SAE_BENCH_SUFFIX",
    "WANTED_K",
    "Metric",
    "family_of",
    "headline",
    "home",
    "hook_of",
    "leading_ks",
    "metric_named",
    "residual_key",
    "sort_keys",
    "top_k",
]

EVALS = tuple(OF_SAES)
"""The evaluations, in the order of every table."""
OPTIONAL = tuple(name for name, one in OF_SAES.items() if not one.headline)
"""Those with a section of their own in the report."""
EVAL_TITLES = {name: one.title for name, one in OF_SAES.items()}
EVAL_NOTES = {name: one.caution for name, one in OF_SAES.items() if one.caution is not None}
"""What stands above an evaluation's metrics."""

WANTED_K = (1, 5)
"""The values of k that tables and figures lead with, or the nearest measured ones."""


def leading_ks(measured: Iterable[int]) -> tuple[int, ...]:
    """The measured values of k nearest to `WANTED_K` by ratio, ascending; `WANTED_K` where none was measured.

    >>> leading_ks([1, 2, 5]), leading_ks([1, 2, 10, 100]), leading_ks([20]), leading_ks([])
    ((1, 5), (1, 10), (20,), (1, 5))
    """
    left, chosen = sorted(set(measured)), []
    if not left:
        return WANTED_K
    for wanted in WANTED_K:
        if left:
            chosen.append(min(left, key=lambda k: abs(math.log(k / wanted))))
            left.remove(chosen[-1])
    return tuple(sorted(chosen))


def top_k(key: str) -> int | None:
    """The k of `sae_top_5_accuracy`, of either definition."""
    match = re.fullmatch(r"sae_top_(\d+)_accuracy", key)
    return int(match[1]) if match else None


def residual_key(key: str) -> str | None:
    """The raw residual stream's metric beside a probing metric of an SAE: `sae_top_1_accuracy` -> `llm_top_1_accuracy`."""
    return "llm_" + key.removeprefix("sae_") if key.startswith("sae_") else None


def hook_of(key: str) -> str | None:
    """The hook of a crosscoder's metric at one of its hooks: `kl@blocks.3.hook_resid_post` -> `blocks.3.hook_resid_post`."""
    return key.partition(AT_HOOK)[2] or None


@cache
def _pattern(key: str) -> re.Pattern[str]:
    return re.compile(re.escape(key).replace(r"\{k\}", r"(?P<k>\d+)"))


def metric_named(key: str, eval_name: str) -> Metric:
    """The record of a concrete key, `{k}` filled in: `sae_top_5_accuracy` -> label "Probing top-5".

    A crosscoder's metric at one hook has the metric's record, under the hook's name, and no place in tables and pictures of
    the metric. A metric that an evaluation reports and the table does not know is described by its own name.
    """
    if (hook := hook_of(key)) is not None:
        whole = metric_named(key.partition(AT_HOOK)[0], eval_name)
        says = f"{whole.definition} At {hook}, with that hook of a crosscoder alone replaced."
        nowhere = {"table": False, "plot": 0, "stricter": False, "both": False}
        return replace(whole, key=key, label=f"{whole.label} at {hook}", definition=says, **nowhere)
    for metric in METRICS:
        match = _pattern(metric.key).fullmatch(key) if metric.eval == eval_name else None
        if match:
            k = match.groupdict().get("k")
            return metric if k is None else _with_k(metric, k)
    return Metric(key, key.replace("_", " "), eval_name, None, "Not described in the table of metrics.")


def family_of(key: str, eval_name: str) -> str | None:
    """The `{k}` key that a metric belongs to; None for one that comes once."""
    return next(
        (
            metric.key
            for metric in METRICS
            if metric.eval == eval_name and "{k}" in metric.key and _pattern(metric.key).fullmatch(key)
        ),
        None,
    )


def _with_k(metric: Metric, k: str) -> Metric:
    filled = {field: getattr(metric, field).replace("{k}", k) for field in ("key", "label", "definition")}
    return replace(metric, **filled, source=metric.source and metric.source.replace("{k}", k))


@cache
def home(key: str) -> str:
    """The evaluation that a metric comes from: no two have one of the same key."""
    return next((metric.eval for metric in METRICS if _pattern(metric.key).fullmatch(key)), "core")


def headline(key: str) -> Metric:
    """The record of a metric by its concrete key alone."""
    return metric_named(key, home(key))


def sort_keys(keys: Iterable[str], eval_name: str) -> list[str]:
    """Keys in the table's order, `{k}` by number, unknown ones last: ours first, SAE Bench's after. Those at a
    crosscoder's hooks come after all, hook by hook."""
    order = [metric.key for metric in METRICS if metric.eval == eval_name]

    def rank(key: str) -> tuple[Any, ...]:
        name, _, hook = key.partition(AT_HOOK)
        layers = [int(number) for number in re.findall(r"\d+", hook)]
        for position, pattern in enumerate(order):
            match = _pattern(pattern).fullmatch(name)
            if match:
                return bool(hook), layers, hook, position, int(match.groupdict().get("k") or 0), key
        return bool(hook), layers, hook, len(order), 0, key

    return sorted(keys, key=rank)
