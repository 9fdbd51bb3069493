"""How often a difference that is not there is called one, on texts with few sources of unequal size.

    python -m benchmarks.noise            # reads eval_results/, writes docs/noise/rates.json
    python -m benchmarks.noise --samples 400000

Under the null hypothesis two SAEs differ by noise alone: one draw for every cluster of text, Gaussian or skewed, of equal
variance in every cluster (sources that differ) or of a variance that falls with its tokens (tokens that differ). The rate
at which the report's test rejects is printed over its nominal level, beside that of an ordinary Student's t over the same
clusters. The second part asks the same of a whole table of paired differences after Holm's correction.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtr

from sae_research.runtime.files import round_significant, write_json, write_text
from sae_research.stats.intervals import FREEDOM_PER_ROOT, holm

RECORD, PAGE = Path("docs/noise/rates.json"), Path("docs/noise.md")
LEVELS = (0.05, 0.005, 0.0005)
NOISES = ("gaussian", "exponential", "lognormal")
"""Of skewness 0, 2 and 2.9."""
SPREADS = ("equal", "by tokens")
_SIGMA = 0.7
CHUNK = 100_000


class Rates(NamedTuple):
    """Rejections over nominal, by level."""

    ours: list[float]
    ordinary: list[float]


def rates(sizes: Sequence[int], noise: str, spread: str, samples: int, seed: int = 0) -> Rates:
    """Rate of false findings over its nominal level at each of `LEVELS`, for clusters with `sizes` tokens."""
    rng, hits = np.random.default_rng(seed), np.zeros((2, len(LEVELS)))
    for start in range(0, samples, CHUNK):
        y_SC = _draws(rng, min(CHUNK, samples - start), sizes, noise, spread)
        for row, p_S in enumerate((p_values(y_SC, sizes), ordinary_p_values(y_SC, sizes))):
            hits[row] += [(p_S < level).sum() for level in LEVELS]
    found = hits / samples / np.array(LEVELS)
    return Rates(found[0].tolist(), found[1].tolist())


def family_rate(sizes: Sequence[int], noise: str, contenders: int, samples: int, seed: int = 0) -> float:
    """How often a table of all paired differences of `contenders` that do not differ holds a finding at 5 % after Holm's
    correction. What they share cancels in pairs, so each has noise of its own alone."""
    rng, found = np.random.default_rng(seed), 0
    pairs = np.array(list(combinations(range(contenders), 2)))
    for _ in range(samples):
        y_KC = _draws(rng, contenders, sizes, noise, "equal")
        found += min(holm(p_values(y_KC[pairs[:, 0]] - y_KC[pairs[:, 1]], sizes))) < LEVELS[0]
    return found / samples


def p_values(y_SC: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Two-sided p of means over tokens against zero, as `intervals.difference` has it [samples]. y_SC: means of clusters."""
    share_C = np.asarray(sizes, float) / np.sum(sizes)
    mean_S = y_SC @ share_C
    error_S = np.sqrt(np.square((y_SC - mean_S[:, None]) * share_C / (1 - share_C)).sum(1))
    return 2 * stdtr(FREEDOM_PER_ROOT / math.sqrt(float(np.square(share_C).sum())), -np.abs(mean_S / error_S))


def ordinary_p_values(y_SC: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The same by Student's t with one degree of freedom less than clusters, all clusters counted alike [samples]."""
    share_C = np.asarray(sizes, float) / np.sum(sizes)
    mean_S, n = y_SC @ share_C, len(share_C)
    error_S = np.sqrt(np.square((y_SC - mean_S[:, None]) * share_C).sum(1) * n / (n - 1))
    return 2 * stdtr(n - 1, -np.abs(mean_S / error_S))


def _draws(rng: np.random.Generator, samples: int, sizes: Sequence[int], noise: str, spread: str) -> np.ndarray:
    """Means of clusters under the null hypothesis [samples, clusters]."""
    shape, n_C = (samples, len(sizes)), np.asarray(sizes, float)
    if noise == "gaussian":
        y_SC = rng.standard_normal(shape)
    elif noise == "exponential":
        y_SC = rng.exponential(size=shape) - 1
    else:
        s2 = _SIGMA**2
        y_SC = (rng.lognormal(0, _SIGMA, shape) - math.exp(s2 / 2)) / math.sqrt((math.exp(s2) - 1) * math.exp(s2))
    return y_SC if spread == "equal" else y_SC * np.sqrt(n_C.mean() / n_C)


# --- record ------------------------------------------------------------------------------------


def committed_sizes(results: Path = Path("eval_results/core")) -> dict[str, list[int]]:
    """Tokens of every cluster of the core evaluation's two parts, largest first, as the last run had them."""
    record = json.loads(next(iter(sorted(results.glob("*_eval_results.json")))).read_text())
    sums = record["eval_result_unstructured"]["lab_v1"]["cluster_sums"]
    return {
        part: sorted((int(n) for n in sums[metric]["denominator"]), reverse=True)
        for part, metric in (("predictions", "kl"), ("sparsity and variance", "l0"))
    }


def record(samples: int, tables: int, contenders: int = 15) -> dict[str, Any]:
    """All rates on the committed clusters and on equal ones of several numbers."""
    sizes = {**committed_sizes(), "20 equal": [100] * 20, "40 equal": [100] * 40, "80 equal": [100] * 80}
    rows = [
        {
            "clusters": name,
            "number": len(n),
            "effective": sum(n) ** 2 / sum(x * x for x in n),
            "noise": noise,
            "spread": spread,
            **rates(n, noise, spread, samples)._asdict(),
        }
        for name, n in sizes.items()
        for noise in NOISES
        for spread in _spreads(n)
    ]
    families = [
        {"clusters": name, "noise": noise, "contenders": contenders, "rate": family_rate(n, noise, contenders, tables)}
        for name, n in sizes.items()
        for noise in NOISES
    ]
    return round_significant(
        {
            "levels": list(LEVELS),
            "samples": samples,
            "tables": tables,
            "sizes": committed_sizes(),
            "rates": rows,
            "families": families,
        },
        3,
    )


def _spreads(sizes: Sequence[int]) -> Iterator[str]:
    yield from SPREADS if len(set(sizes)) > 1 else SPREADS[:1]


def tables(found: dict[str, Any]) -> dict[str, str]:
    """The page's tables by the name of their marks."""
    at = [f"{which}at {level:g}" for which in ("", "t, ") for level in found["levels"]]
    head = (
        f"| clusters | number | effective | noise | variance | {' | '.join(at)} |\n"
        f"| :-- | --: | --: | :-- | :-- |{' --: |' * len(at)}"
    )
    rows = [
        f"| {row['clusters']} | {row['number']} | {row['effective']:g} | {row['noise']} | {row['spread']} | "
        + " | ".join(f"{value:.2f}" for value in (*row["ours"], *row["ordinary"]))
        + " |"
        for row in found["rates"]
    ]
    families = [
        "| clusters | noise | tables with a finding |",
        "| :-- | :-- | --: |",
        *(f"| {row['clusters']} | {row['noise']} | {100 * row['rate']:.1f} % |" for row in found["families"]),
    ]
    return {"rates": "\n".join([head, *rows]), "families": "\n".join(families)}


def page(text: str, found: dict[str, Any]) -> str:
    """The page with its tables as the record has them."""
    for name, table in tables(found).items():
        before, begin, rest = text.partition(f"<!-- begin {name} -->\n")
        _, end, after = rest.partition(f"<!-- end {name} -->")
        text = f"{before}{begin}{table}\n{end}{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=400_000)
    parser.add_argument("--tables", type=int, default=4_000)
    options = parser.parse_args()
    found = record(options.samples, options.tables)
    write_json(RECORD, found)
    write_text(PAGE, page(PAGE.read_text(), found))
    for row in found["rates"]:
        print(
            f"{row['clusters']:24s} {row['effective']:6.1f} {row['noise']:12s} {row['spread']:10s} "
            f"ours {row['ours']}  ordinary {row['ordinary']}"
        )
    for row in found["families"]:
        print(f"{row['clusters']:24s} {row['noise']:12s} family {row['rate']:.3f}")


if __name__ == "__main__":
    main()
