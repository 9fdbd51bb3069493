"""Outlier activations: the published rules, a robust one, and which tokens they hit."""

from __future__ import annotations

import heapq
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_research.errors import UserError
from sae_research.setup.fits import same_model
from sae_research.store import read_json
from sae_research.transfer.sums import counted
from sae_research.transfer_params import Outliers

NORM_EDGES = [x / 20 for x in range(-40, 121)]
"""log10 of the norm, from 0.01 to 1e6."""
CONTEXT = 8
"""Tokens shown on either side of an outlier."""
RULES = ("median", "relative", "absolute")


class Norms(NamedTuple):
    """Norms of the base model's activations at one hook, measured on the first contexts."""

    median: float
    """Over tokens that are neither special nor first."""
    mean: float
    """Over all tokens, as published: the first included."""


def limits(config: Outliers, model_name: str, d_in: int, norms: Norms) -> dict[str, float]:
    """Largest norm that is no outlier, under every rule that has one for this model.

    - `median`: a multiple of the median norm.
    - `relative`: |S x| > multiple * sqrt(d_in) with S = sqrt(d_in) / mean norm, that is a multiple of the mean; S and the
      multiple from `config_file` where it names the model.
    - `absolute`: a norm, given or from `config_file`.
    """
    known = known_values(config, model_name)
    found = {"median": config.median_multiple * norms.median}
    scalar = known.get("norm_scalar", math.sqrt(d_in) / norms.mean if norms.mean else math.inf)
    base = known.get("base_threshhold", math.sqrt(d_in))
    found["relative"] = known.get("threshhold_multiplier", config.relative_multiple) * base / scalar
    absolute = config.absolute_threshold or known.get("absolute_threshold")
    return found | ({} if absolute is None else {"absolute": absolute})


def chosen_limit(config: Outliers, found: dict[str, float], model_name: str) -> float:
    """The limit of `outliers.rule`. Raises `UserError` where there is none."""
    if config.rule == "none":
        return math.inf
    if config.rule not in found:
        raise UserError(f"transfer.outliers.rule: absolute needs absolute_threshold, or {model_name} among the "
                        f"absolute_threshold of {config.config_file}")
    return found[config.rule]


def known_values(config: Outliers, model_name: str) -> dict[str, float]:
    """What the file says of a model, by the file's own keys."""
    path = Path(config.config_file)
    if not path.is_file():
        return {}
    values = read_json(path)
    if not isinstance(values, dict) or not all(isinstance(part, dict) for part in values.values()):
        raise UserError(f"{path}: expected four maps from model names to numbers")
    return {key: float(number) for key, models in values.items() for name, number in models.items()
            if same_model(name, model_name)}


class Listed(NamedTuple):
    """One outlier token in its context."""

    norm: float
    order: int
    """Its place in the text: breaks ties, so that two runs list the same."""
    model: str
    position: int
    before: str
    token: str
    after: str


class OutlierLog:
    """Norms of both models at the SAE's hook, how many each rule would remove, and the largest outliers in context."""

    def __init__(self, found: dict[str, float], limit: float, listed: int, device: torch.device) -> None:
        self.found, self.limit, self.listed = found, limit, listed
        self.removed = {model: dict.fromkeys(found, 0) for model in ("base", "finetuned")}
        self.histogram = {model: torch.zeros(len(NORM_EDGES) - 1, dtype=torch.float64) for model in self.removed}
        self.counted = dict.fromkeys(self.removed, 0)
        self.largest: list[Listed] = []
        self.read = 0

    def update(self, model: str, norms: Tensor, mask: Tensor, tokens: Tensor, tokenizer: Any) -> None:
        """Add a batch. norms, mask, tokens: [batch, seq]; mask: True where a token counts at all."""
        kept = norms[mask].cpu()
        self.counted[model] += len(kept)
        for rule, limit in self.found.items():
            self.removed[model][rule] += int((kept > limit).sum())
        self.histogram[model] += counted(kept.double().clamp_min(1e-9).log10(), NORM_EDGES)
        self._list(model, torch.where(mask, norms, 0.0).cpu(), tokens.cpu(), tokenizer)
        self.read += tokens.numel()

    def _list(self, model: str, norms: Tensor, tokens: Tensor, tokenizer: Any) -> None:
        least = self.largest[0].norm if len(self.largest) == self.listed and self.largest else -math.inf
        candidates = (norms > max(self.limit, least)).nonzero() if self.listed else []
        values = [(float(norms[row, place]), int(row), int(place)) for row, place in candidates]
        for norm, row, place in heapq.nlargest(self.listed, values):
            context = [tokenizer.decode(tokens[row, max(0, place - CONTEXT):place].tolist()),
                      tokenizer.decode([int(tokens[row, place])]),
                      tokenizer.decode(tokens[row, place + 1:place + 1 + CONTEXT].tolist())]
            entry = Listed(norm, -(self.read + row * tokens.shape[1] + place), model, place, *context)
            (heapq.heappush if len(self.largest) < self.listed else heapq.heappushpop)(self.largest, entry)

    def report(self) -> dict[str, Any]:
        """Fractions removed by rule and model, the norm histogram, and the largest outliers."""
        return {
            "limits": self.found,
            "fraction_removed": {model: {rule: count / max(self.counted[model], 1) for rule, count in by_rule.items()}
                                 for model, by_rule in self.removed.items()},
            "norm_histogram": {"log10_edges": NORM_EDGES,
                               **{model: [int(c) for c in counts] for model, counts in self.histogram.items()}},
            "listed": [{key: value for key, value in item._asdict().items() if key != "order"}
                       for item in sorted(self.largest, reverse=True)],
        }
