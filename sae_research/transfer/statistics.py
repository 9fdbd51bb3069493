"""Two models' activations on the same tokens, as sums: similarity by token and position, every latent, and outlier tokens by
the published rules and a robust one."""

from __future__ import annotations

import heapq
import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_research.config.transfer import Outliers
from sae_research.runtime.errors import UserError
from sae_research.runtime.files import read_json
from sae_research.saes.sources import same_model
from sae_research.stats.reconstruction import counted, sums_dtype

COSINE_EDGES = [x / 200 for x in range(-200, 201)]
LOG_EDGES = [x / 20 for x in range(-80, 101)]
"""log10 of a distance, from 1e-4 to 1e5; what lies outside is counted in the outermost bin."""
METRICS = ("cosine", "euclidean", "relative_error", "cosine_shuffled")


class Similarity:
    """Additive sums over pairs of activations x (base) and y (finetuned) of the same token.

    - `cosine` <x, y> / |x| |y|; `euclidean` |x - y|; `relative_error` |x - y| / |x|: means over tokens.
    - `cosine_shuffled`: of x with the y of another token of the batch, the level that no relation gives.
    - `cka`: linear CKA |Y'X|^2 / (|X'X| |Y'Y|), Frobenius norms, columns centred (Kornblith et al. 2019, equation 3),
      from second moments about a fixed shift: equal to the definition over all tokens at once.
    Sums are float64 (float32 on MPS).
    """

    def __init__(self, d_in: int, context_size: int, shift: tuple[Tensor, Tensor]) -> None:
        """shift: a point near either model's mean [d_in] each: takes cancellation out of the moments."""
        self.shift = shift
        device = shift[0].device
        self.dtype = sums_dtype(device)

        def zeros(*size: int) -> Tensor:
            return torch.zeros(*size, dtype=self.dtype, device=device)

        self.n = 0
        self.sums, self.by_position = zeros(len(METRICS)), zeros(len(METRICS), context_size)
        self.at_position = zeros(context_size)
        self.cosine_counts, self.distance_counts = zeros(len(COSINE_EDGES) - 1), zeros(len(LOG_EDGES) - 1)
        self.x_sum, self.y_sum = zeros(d_in), zeros(d_in)
        self.xx, self.yy, self.yx = zeros(d_in, d_in), zeros(d_in, d_in), zeros(d_in, d_in)

    @torch.no_grad()
    def update(self, x: Tensor, y: Tensor, positions: Tensor, shuffle: Tensor) -> Tensor:
        """Add tokens: x, y [n, d_in]; positions [n], those beyond the context size count in the last; shuffle: a
        permutation [n]. Returns the values [len(METRICS), n]."""
        x, y = x.to(self.dtype), y.to(self.dtype)
        values = token_values(x, y, shuffle)
        if len(x) == 0:
            return values
        self.n += len(x)
        self.sums += values.sum(1)
        place = positions.clamp_max(len(self.at_position) - 1)
        self.by_position.index_add_(1, place, values)
        self.at_position += torch.bincount(place, minlength=len(self.at_position)).to(self.dtype)
        self.cosine_counts += counted(values[0], COSINE_EDGES)
        self.distance_counts += counted(values[1].clamp_min(1e-30).log10(), LOG_EDGES)
        x, y = x - self.shift[0], y - self.shift[1]
        self.x_sum += x.sum(0)
        self.y_sum += y.sum(0)
        self.xx.addmm_(x.T, x)
        self.yy.addmm_(y.T, y)
        self.yx.addmm_(y.T, x)
        return values

    @property
    def cka(self) -> float | None:
        """Linear CKA; None where one side does not vary."""
        if self.n < 2:
            return None
        cross = self.yx - torch.outer(self.y_sum, self.x_sum) / self.n
        x = self.xx - torch.outer(self.x_sum, self.x_sum) / self.n
        y = self.yy - torch.outer(self.y_sum, self.y_sum) / self.n
        below = float(x.norm() * y.norm())
        return float(cross.square().sum()) / below if below > 0 else None

    def means(self) -> dict[str, float]:
        """Every metric above; empty when no token was seen."""
        if self.n == 0:
            return {}
        found = dict(zip(METRICS, (self.sums / self.n).tolist(), strict=True))
        return found | ({} if self.cka is None else {"cka": self.cka})

    def profile(self) -> dict[str, Any]:
        """Means by position (None where no token stands) and histograms, for pictures."""
        seen = self.at_position.clamp_min(1)
        positions = {
            name: [value if count else None for value, count in zip(row, self.at_position.tolist(), strict=True)]
            for name, row in zip(METRICS, (self.by_position / seen).tolist(), strict=True)
        }
        return {
            "by_position": positions,
            "cosine_histogram": {"edges": COSINE_EDGES, "counts": [int(c) for c in self.cosine_counts]},
            "euclidean_histogram": {"log10_edges": LOG_EDGES, "counts": [int(c) for c in self.distance_counts]},
        }


def token_values(x: Tensor, y: Tensor, shuffle: Tensor) -> Tensor:
    """Every metric of `METRICS` for each token [len(METRICS), n]. x, y: [n, d_in]; shuffle: a permutation [n]."""
    x_norm, y_norm = x.norm(dim=1), y.norm(dim=1)
    distance = (x - y).norm(dim=1)
    return torch.stack(
        [
            torch.linalg.vecdot(x, y) / (x_norm * y_norm).clamp_min(1e-30),
            distance,
            distance / x_norm.clamp_min(1e-30),
            torch.linalg.vecdot(x, y[shuffle]) / (x_norm * y_norm[shuffle]).clamp_min(1e-30),
        ]
    )


EPSILON = 1e-10
"""Added before a logarithm in the published error of dead latents."""


class Active(NamedTuple):
    """Activations and where they are not zero."""

    dense: Tensor
    """[n, d_sae]"""
    rows: Tensor
    """Token of each non-zero entry [entries]."""
    latents: Tensor
    values: Tensor
    """float64 (float32 on MPS)."""


def active(z: Tensor) -> Active:
    """z: [n, d_sae]."""
    rows, latents = z.nonzero(as_tuple=True)
    return Active(z, rows, latents, z[rows, latents].to(sums_dtype(z.device)))


class PairMoments:
    """Additive sums over pairs (a, b) of activations of each latent, from the non-zero ones alone.

    A latent is zero on most tokens: sums of a, a^2, b, b^2 need the non-zero entries, sums of a*b those of a, and so every
    latent is scored at the cost of the active ones.
    """

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.n = 0
        (self.a, self.b, self.aa, self.bb, self.ab, self.fires_a, self.fires_b, self.fires_both, self.log_error) = (
            torch.zeros(9, d_sae, dtype=sums_dtype(device), device=device)
        )

    @torch.no_grad()
    def update(self, a: Active, b: Active, partner: Tensor | None = None, log_error: bool = False) -> None:
        """Add tokens. partner: the row of b that each row of a goes with [n], a permutation; by default its own.
        log_error: also |log10(a + 1e-10) - log10(b + 1e-10)|, for encoders without a sign."""
        self.n += len(a.dense)
        others = b.dense[a.rows if partner is None else partner[a.rows], a.latents].to(self.a.dtype)
        one = torch.ones((), dtype=self.a.dtype, device=self.a.device)
        self._add(
            a.latents,
            a=a.values,
            aa=a.values.square(),
            ab=a.values * others,
            fires_a=one.expand(len(others)),
            fires_both=(others != 0).to(others.dtype),
        )
        self._add(b.latents, b=b.values, bb=b.values.square(), fires_b=one.expand(len(b.values)))
        if log_error:
            self._add(a.latents, log_error=_log_gap(a.values, others))
            alone = a.dense[b.rows, b.latents] == 0
            self._add(b.latents[alone], log_error=_log_gap(torch.zeros_like(b.values[alone]), b.values[alone]))

    def _add(self, latents: Tensor, **terms: Tensor) -> None:
        for name, values in terms.items():
            getattr(self, name).index_add_(0, latents, values)

    @property
    def pearson(self) -> Tensor:
        """Correlation of a and b over all tokens [d_sae]; NaN where one of them is constant."""
        n = max(self.n, 1)
        var_a, var_b = self.aa - self.a.square() / n, self.bb - self.b.square() / n
        # what is left of a constant by rounding is no variance
        varied = (var_a > 1e-12 * self.aa) & (var_b > 1e-12 * self.bb)
        r = (self.ab - self.a * self.b / n) / (var_a * var_b).clamp_min(0).sqrt()
        return torch.where(varied, r.clamp(-1, 1), torch.nan)

    @property
    def jaccard(self) -> Tensor:
        """Tokens on which both fire over tokens on which either does [d_sae]; NaN where neither ever does."""
        either = self.fires_a + self.fires_b - self.fires_both
        return torch.where(either > 0, self.fires_both / either, torch.nan)

    @property
    def mean_log_error(self) -> Tensor:
        """Mean over tokens of |log10(a + 1e-10) - log10(b + 1e-10)| [d_sae]."""
        return self.log_error / max(self.n, 1)


def _log_gap(a: Tensor, b: Tensor) -> Tensor:
    return ((a.clamp_min(0) + EPSILON).log10() - (b.clamp_min(0) + EPSILON).log10()).abs()


class LatentMoments:
    """The pairs a transfer is judged by, on one set of tokens.

    - `models`: base and finetuned model on the same token.
    - `shuffled`: the base model with the finetuned one on another token of the batch, drawn at random.
    - `halves`: the base model with itself, contexts of even number with those of odd number at the same position: what
      latents that only follow the position, or fire nearly always, reach without any relation; its counts are the two
      halves' densities, whose difference is what sampling alone makes.
    """

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.models, self.shuffled, self.halves = (PairMoments(d_sae, device) for _ in range(3))

    def update(self, a: Tensor, b: Tensor, shuffle: Tensor, signed: bool) -> None:
        """a, b: [n, d_sae] on the same tokens; shuffle: a permutation [n]."""
        one, other = active(a), active(b)
        self.models.update(one, other, log_error=not signed)
        self.shuffled.update(one, other, partner=shuffle)

    def update_halves(self, even: Tensor, odd: Tensor) -> None:
        """even, odd: the base model's activations in two contexts at the same positions [n, d_sae]."""
        self.halves.update(active(even), active(odd))


ACTIVATION_EDGES = [x / 10 for x in range(-40, 61)]
"""log10 of |activation|, from 1e-4 to 1e6."""


class ActivationHistogram:
    """Histogram of the non-zero activations' sizes of all latents together."""

    def __init__(self) -> None:
        self.counts = torch.zeros(len(ACTIVATION_EDGES) - 1, dtype=torch.float64)

    @torch.no_grad()
    def update(self, z: Tensor) -> None:
        """z: activations of any shape."""
        self.counts += counted(z[z != 0].abs().log10(), ACTIVATION_EDGES).cpu()


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
        raise UserError(
            f"transfer.outliers.rule: absolute needs absolute_threshold, or {model_name} among the "
            f"absolute_threshold of {config.config_file}"
        )
    return found[config.rule]


def known_values(config: Outliers, model_name: str) -> dict[str, float]:
    """What the file says of a model, by the file's own keys."""
    path = Path(config.config_file)
    if not path.is_file():
        return {}
    values = read_json(path)
    if not isinstance(values, dict) or not all(isinstance(part, dict) for part in values.values()):
        raise UserError(f"{path}: expected four maps from model names to numbers")
    return {
        key: float(number)
        for key, models in values.items()
        for name, number in models.items()
        if same_model(name, model_name)
    }


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
            context = [
                tokenizer.decode(tokens[row, max(0, place - CONTEXT) : place].tolist()),
                tokenizer.decode([int(tokens[row, place])]),
                tokenizer.decode(tokens[row, place + 1 : place + 1 + CONTEXT].tolist()),
            ]
            entry = Listed(norm, -(self.read + row * tokens.shape[1] + place), model, place, *context)
            (heapq.heappush if len(self.largest) < self.listed else heapq.heappushpop)(self.largest, entry)

    def report(self) -> dict[str, Any]:
        """Fractions removed by rule and model, the norm histogram, and the largest outliers."""
        return {
            "limits": self.found,
            "fraction_removed": {
                model: {rule: count / max(self.counted[model], 1) for rule, count in by_rule.items()}
                for model, by_rule in self.removed.items()
            },
            "norm_histogram": {
                "log10_edges": NORM_EDGES,
                **{model: [int(c) for c in counts] for model, counts in self.histogram.items()},
            },
            "listed": [
                {key: value for key, value in item._asdict().items() if key != "order"}
                for item in sorted(self.largest, reverse=True)
            ],
        }
